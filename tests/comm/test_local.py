"""Threads that exchange: order, failures, bounds."""

import pytest
import torch

from expertmesh import Topology
from expertmesh.comm.base import Comm, CommError
from expertmesh.comm.local import LocalWorld


def words(*values: int) -> list[torch.Tensor]:
    return [torch.tensor([v], dtype=torch.uint8) for v in values]


def test_many_rounds_never_mix() -> None:
    """Ranks run ahead of each other; rounds of several groups overlap."""
    topology = Topology(2, 3, 1)

    def program(comm: Comm) -> None:
        for turn in range(200):
            for ranks in (
                topology.all_ranks(),
                topology.node_ranks(comm.rank),
                topology.rail_ranks(comm.rank),
            ):
                code = (turn * 7 + comm.rank) % 256
                came = comm.exchange("dispatch", ranks, words(*[(code + r) % 256 for r in ranks]))
                assert [int(c) for c in came] == [(turn * 7 + r + comm.rank) % 256 for r in ranks]

    LocalWorld(topology, 60).run(program)


def test_bytes_to_oneself_are_not_counted() -> None:
    def program(comm: Comm) -> tuple[list[int], list[int]]:
        comm.exchange("dispatch", (0, 1, 2), [torch.zeros(n, dtype=torch.uint8) for n in (5, 0, 7)])
        comm.exchange("dispatch", (0, 1, 2), words(1, 1, 1), [1, 1, 1])
        return comm.sent.bytes["dispatch"].tolist(), comm.sent.messages["dispatch"].tolist()

    found = LocalWorld(Topology(1, 3, 1), 60).run(program)
    # 8 bytes announce a message, also an empty one, where its length is not known.
    assert found[0] == ([0, 8 + 0 + 1, 8 + 7 + 1], [0, 2, 3])
    assert found[1] == ([8 + 5 + 1, 0, 8 + 7 + 1], [3, 0, 3])


def test_a_rank_that_fails_ends_all_and_is_the_one_named() -> None:
    def program(comm: Comm) -> None:
        for turn in range(10):
            if comm.rank == 2 and turn == 4:
                raise ValueError("broken")
            comm.exchange("combine", (0, 1, 2, 3), words(0, 0, 0, 0))

    with pytest.raises(ValueError, match="broken"):
        LocalWorld(Topology(1, 4, 1), 60).run(program)


def test_a_rank_that_does_not_come_is_named() -> None:
    def program(comm: Comm) -> None:
        if comm.rank != 1:
            comm.exchange("combine", (0, 1, 2), words(0, 0, 0))

    with pytest.raises(CommError, match=r"rank 1 did not come to an exchange within 0.2 s"):
        LocalWorld(Topology(1, 3, 1), 0.2).run(program)
