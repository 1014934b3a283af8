"""Every row reaches exactly its slots and comes back summed once, and what was sent is what was predicted."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertmesh import Topology
from expertmesh.comm.base import Comm, Received
from expertmesh.comm.exchange import TieredExchange
from expertmesh.mesh.placement import default_placement
from expertmesh.mesh.traffic import ALGORITHMS, algorithm, traffic
from tests.support.cluster import Case, cases
from tests.support.worlds import EVERY_WORLD, WORLDS, Worlds

EXACT = ["flat", "two_tier"]
PIECES = st.sampled_from([1, 1, 2, 3, 9])


def answer(x: Tensor, slot: int, rank: int, size: int) -> Tensor:
    """A stand-in for an expert that no other slot of the cluster shares."""
    return x * (1 + (rank * size + slot) / 7) + slot


def run(
    case: Case, name: str, world: Worlds, log: list[list[Any]] | None = None, pieces: int = 1
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What every rank gets back, and the bytes that each sent."""
    size = case.placement.slots_per_rank

    def program(comm: Comm) -> tuple[Tensor, dict[str, Any]]:
        rank = comm.rank
        exchange = TieredExchange(comm, case.placement, algorithm(name), pieces)
        received = exchange.dispatch(0, case.x[rank], case.experts[rank], case.weights[rank])
        if log is not None:
            log[rank] = _arrivals(received)
        y = torch.zeros_like(received.x_RD)
        for row, (slots, weights) in enumerate(zip(received.slots_RK, received.weights_RK, strict=True)):
            for slot, weight in zip(slots.tolist(), weights.tolist(), strict=True):
                if slot >= 0:
                    y[row] += weight * answer(received.x_RD[row], slot, rank, size)
        return exchange.combine(y, received), comm.sent.bytes

    results = world(case.topology).run(program)
    return [r for r, _ in results], [b for _, b in results]


def _arrivals(received: Received) -> list[tuple[tuple[float, ...], int, float]]:
    """(row, slot, weight) of all that came, in any order."""
    return sorted(
        (tuple(x.tolist()), int(slot), float(weight))
        for x, slots, weights in zip(received.x_RD, received.slots_RK, received.weights_RK, strict=True)
        for slot, weight in zip(slots, weights, strict=True)
        if slot >= 0
    )


@given(cases(), st.sampled_from(EXACT), PIECES, WORLDS)
def test_rows_reach_their_slots_and_come_back_summed(
    case: Case, name: str, pieces: int, world: Worlds
) -> None:
    size = case.placement.slots_per_rank
    log: list[list[Any]] = [[] for _ in case.ranks]
    back, _ = run(case, name, world, log, pieces)
    expected_log: list[list[Any]] = [[] for _ in case.ranks]
    for rank in case.ranks:
        expected = torch.zeros_like(case.x[rank])
        for row, x in enumerate(case.x[rank]):
            for slot, weight in zip(
                case.slots[rank][row].tolist(), case.weights[rank][row].tolist(), strict=True
            ):
                host, local = divmod(slot, size)
                expected[row] += weight * answer(x, local, host, size)
                expected_log[host].append((tuple(x.tolist()), local, weight))
        torch.testing.assert_close(back[rank], expected, atol=1e-5, rtol=1e-5)
    assert log == [sorted(entries) for entries in expected_log]


@given(cases(), st.sampled_from(sorted(ALGORITHMS)), PIECES, WORLDS)
def test_bytes_sent_are_the_bytes_predicted(case: Case, name: str, pieces: int, world: Worlds) -> None:
    _, sent = run(case, name, world, pieces=pieces)
    size, width = case.placement.slots_per_rank, case.x[0].shape[1]
    law = traffic(case.slots, case.topology, size, width, "float32", algorithm(name), pieces)
    assert (np.array([s["dispatch"] for s in sent]) == law.dispatch_RR).all()
    assert (np.array([s["combine"] for s in sent]) == law.combine_RR).all()


@pytest.mark.parametrize(
    ("name", "bound"), [("int8", 0.02), ("int8_both", 0.02), ("fp8", 0.06), ("fp8_both", 0.06)]
)
def test_quantised_rows_are_close(name: str, bound: float) -> None:
    case = _wide_case()
    exact, _ = run(case, "two_tier", EVERY_WORLD[0])
    back, _ = run(case, f"two_tier_{name}", EVERY_WORLD[0])
    for a, b in zip(exact, back, strict=True):
        error = float((a - b).norm() / a.norm())
        assert 0 < error < bound


def _wide_case() -> Case:
    topology = Topology(2, 2, 1)
    generator = torch.Generator().manual_seed(0)
    return Case(
        topology,
        default_placement(8, [0], topology, 4),
        [torch.randn(5, 300, generator=generator) for _ in range(4)],
        [torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(5)]) for _ in range(4)],
        [torch.rand(5, 3, generator=generator) for _ in range(4)],
    )


@given(cases(), st.sampled_from(sorted(ALGORITHMS)), PIECES, WORLDS)
def test_the_same_exchange_gives_the_same_bits(case: Case, name: str, pieces: int, world: Worlds) -> None:
    first, second = run(case, name, EVERY_WORLD[0])[0], run(case, name, world, pieces=pieces)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
