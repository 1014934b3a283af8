"""Collectives of torch.distributed as a transport: what others have to be, and what is said when ranks are missing."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist

from expertmesh import Topology
from expertmesh.comm.base import Comm, CommError
from expertmesh.comm.cards.distributed import DistributedComm
from expertmesh.comm.group import Clustered, shares
from expertmesh.comm.local import LocalWorld
from expertmesh.errors import InputError
from tests.comm.cards import process
from tests.comm.cards.world import CPU, CardWorld


def test_bytes_of_unknown_and_of_known_length_arrive_and_are_counted_alike() -> None:
    topology = Topology(2, 2, 2)

    def program(comm: Comm) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
        came: list[Any] = []
        for ranks in (topology.all_ranks(), topology.node_ranks(comm.rank), topology.rail_ranks(comm.rank)):
            for known in (True, False):
                parts = [
                    torch.full((comm.rank + 2 * r,), 16 * comm.rank + r, dtype=torch.uint8) for r in ranks
                ]
                sizes = [r + 2 * comm.rank for r in ranks] if known else None
                came.append([part.tolist() for part in comm.exchange("weights", ranks, parts, sizes)])
        return came, comm.sent.bytes, comm.sent.messages

    for found, wanted in zip(
        CardWorld(topology).run(program), LocalWorld(topology, 60).run(program), strict=True
    ):
        assert found[0] == wanted[0]
        np.testing.assert_equal(found[1:], wanted[1:])


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tp_group_has_the_bits_of_other_transports(rows: int, dtype: torch.dtype) -> None:
    topology = Topology(2, 3, 3)
    counts = shares(rows, 3)
    generator = torch.Generator().manual_seed(rows)
    every = torch.randn(6, rows, 8, generator=generator).to(dtype)
    wanted = torch.randint(max(rows, 1), (2 * rows,), generator=generator).tolist()

    def program(comm: Comm) -> tuple[Any, ...]:
        me = topology.tp_rank(comm.rank)
        group = Clustered(comm, exchange=None).group(rows)  # type: ignore[arg-type]
        mine = every[comm.rank].split(counts)[me]
        gathered = group.all_gather(mine, mine[:, :3])
        summed = group.reduce_scatter(every[comm.rank])
        return *gathered, summed, group.gather_rows(mine, wanted), group.gather_columns(mine[:0])

    for found, expected in zip(
        CardWorld(topology).run(program), LocalWorld(topology, 60).run(program), strict=True
    ):
        for a, b in zip(found, expected, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_a_backend_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"torch\.distributed has no nccl here"):
        DistributedComm(Topology(1, 2), 0, CPU, "nccl", dist.HashStore(), 1.0)


def test_processes_over_gloo_have_the_bits_of_threads(tmp_path: Path) -> None:
    ranks = range(process.TOPOLOGY.ranks)
    running = [
        subprocess.Popen([sys.executable, "-W", "error", "-m", process.__name__, str(rank), str(tmp_path)])
        for rank in ranks
    ]
    assert [each.wait() for each in running] == [0] * len(ranks)
    wanted = CardWorld(process.TOPOLOGY).run(process.program)
    for rank, expected in zip(ranks, wanted, strict=True):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # The last one ended, and the others said who was missing.
    said = [(tmp_path / f"{rank}.txt").read_text(encoding="utf-8") for rank in ranks[:-1]]
    for rank, words in zip(ranks, said, strict=False):
        assert words.startswith(f"({ranks[-1]},) combine of ranks 0, 1, 2, 3 failed"), (rank, words)
        assert f"rank {ranks[-1]} did not come to it" in words


def test_a_rank_that_does_not_join_is_told(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 2)
    store.set_timeout(timedelta(seconds=1))
    with pytest.raises(CommError, match="rank 0 could not join the others over gloo"):
        DistributedComm(Topology(1, 2), 0, CPU, "gloo", store, 1.0)
