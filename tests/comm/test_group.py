"""Collectives of a TP group over ragged shares."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmesh import Topology
from expertmesh.comm.base import Comm
from expertmesh.comm.group import Clustered, shares
from tests.support.worlds import WORLDS, Worlds


@given(st.integers(0, 1000), st.integers(1, 70))
def test_shares_are_all_rows_and_equal_but_for_one(rows: int, ranks: int) -> None:
    found = shares(rows, ranks)
    assert sum(found) == rows and max(found) - min(found) <= 1 and found == sorted(found, reverse=True)


@given(
    st.integers(0, 9), st.sampled_from([2, 3, 4]), st.sampled_from([torch.float32, torch.bfloat16]), WORLDS
)
def test_collectives_of_a_group(rows: int, size: int, dtype: torch.dtype, world: Worlds) -> None:
    """Two groups side by side: none hears the other."""
    generator = torch.Generator().manual_seed(rows)
    every = torch.randn(2, rows, 8, generator=generator).to(dtype)
    other = torch.randn(2, rows, 3, generator=generator).to(dtype)
    partial = torch.randn(2, size, rows, 4, generator=generator).to(dtype)
    counts = shares(rows, size)
    wanted = torch.randint(max(rows, 1), (2 * rows,), generator=generator).tolist()

    def program(comm: Comm) -> tuple[torch.Tensor, ...]:
        node, me = divmod(comm.rank, size)
        group = Clustered(comm, exchange=None).group(rows)  # type: ignore[arg-type]
        assert group.leads == (me == 0)
        first = sum(counts[:me])
        mine = slice(first, first + counts[me])
        gathered = group.all_gather(every[node][mine], other[node][mine])
        summed = group.reduce_scatter(partial[node, me])
        columns = group.gather_columns(every[node][:, 2 * me : 2 * me + 2])
        assert (columns is None) == (me > 0)
        some = group.gather_rows(every[node][mine], wanted)
        return (*gathered, summed, some, columns if columns is not None else gathered[0])

    for rank, (a, b, summed, some, columns) in enumerate(world(Topology(2, size, size)).run(program)):
        node, me = divmod(rank, size)
        assert torch.equal(a, every[node]) and torch.equal(b, other[node])
        mine = slice(sum(counts[:me]), sum(counts[: me + 1]))
        torch.testing.assert_close(summed, partial[node].float().sum(0)[mine].to(dtype))
        wide = torch.cat([every[node][:, 2 * i : 2 * i + 2] for i in range(size)], dim=1)
        assert torch.equal(columns, wide if me == 0 else every[node])
        assert torch.equal(some, every[node][wanted])
