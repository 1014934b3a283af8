"""Rows shared out to replicas, step by step: the same sums whichever is taken, and level cards where all know."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh import Topology
from expertmesh.comm.base import Comm
from expertmesh.comm.exchange import TieredExchange
from expertmesh.comm.local import LocalWorld
from expertmesh.comm.replicas import Counts, Gathering, Replicas
from expertmesh.mesh.placement import Ints, Placement, default_placement
from expertmesh.mesh.split import Split, level
from expertmesh.mesh.traffic import algorithm
from tests.support.cluster import Case, cases, topologies
from tests.support.worlds import WORLDS, Worlds

SPLITS = ("even", "now", "last")
Arrivals: TypeAlias = Counter[tuple[tuple[float, ...], float]]


def counts_of(rank: int, shape: tuple[int, ...]) -> Counts:
    return np.random.default_rng(rank).integers(0, 1 << 16, shape).astype(np.uint16)


@given(topologies(), st.lists(st.integers(0, 4), min_size=1, max_size=3), WORLDS)
def test_gathering_brings_all_counts_to_all_in_their_order(
    topology: Topology, sizes: list[int], world: Worlds
) -> None:
    shape = tuple(sizes)

    def program(comm: Comm) -> Counts:
        gathering = Gathering(comm, counts_of(comm.rank, shape))
        gathering.forward()
        return gathering.result()

    expected = np.stack([counts_of(rank, shape) for rank in range(topology.ranks)])
    for found in world(topology).run(program):
        np.testing.assert_array_equal(found, expected)


def run(
    case: Case, split: str, steps: int = 1, pieces: int = 1
) -> tuple[list[list[Tensor]], list[Arrivals], list[int]]:
    """What the ranks get back in each step; (row, weight) of all that came to each expert; rows of each rank for its
    slots in the last step."""
    size = case.placement.slots_per_rank
    slots_RS = case.placement.slots_LRS[0]

    def program(comm: Comm) -> tuple[list[Tensor], list[Arrivals], int]:
        rank = comm.rank
        exchange = TieredExchange(comm, case.placement, algorithm("two_tier"))
        exchange.prepare(pieces, split, max(map(len, case.x)) * case.experts[0].shape[1])
        back, came, rows = [], [Counter[Any]() for _ in range(case.placement.experts)], 0
        for step in range(steps):
            x = case.x[rank] + step
            received = exchange.dispatch(0, x, case.experts[rank], case.weights[rank])
            y, rows = torch.zeros_like(received.x_RD), 0
            for row, slots, weights in zip(
                range(len(y)), received.slots_RK.tolist(), received.weights_RK.tolist(), strict=True
            ):
                for slot, weight in zip(slots, weights, strict=True):
                    if slot < 0:
                        continue
                    assert slot < size
                    expert = int(slots_RS[rank, slot])
                    assert expert >= 0
                    y[row] += weight * (received.x_RD[row] * (1 + expert / 7) + expert)
                    came[expert][tuple(received.x_RD[row].tolist()), weight] += 1
                    rows += 1
            back.append(exchange.combine(y, received))
        return back, came, rows

    found = LocalWorld(case.topology, 60).run(program)
    backs = [[back[step] for back, _, _ in found] for step in range(steps)]
    experts = range(case.placement.experts)
    return backs, [sum((came[e] for _, came, _ in found), Counter()) for e in experts], [n for *_, n in found]


@settings(max_examples=60)
@given(cases(), st.sampled_from([1, 1, 3]))
def test_whichever_replica_is_taken_the_sums_are_the_same(case: Case, pieces: int) -> None:
    steps = 3
    expected = [
        [
            sum(
                (
                    weights[:, k, None] * (x + step) * (1 + experts[:, k, None] / 7)
                    + weights[:, k, None] * experts[:, k, None]
                    for k in range(experts.shape[1])
                ),
                torch.zeros_like(x),
            )
            for x, experts, weights in zip(case.x, case.experts, case.weights, strict=True)
        ]
        for step in range(steps)
    ]
    arrivals = []
    for split in SPLITS:
        backs, came, _ = run(case, split, steps, pieces)
        arrivals.append(came)
        for back, wanted in zip(backs, expected, strict=True):
            torch.testing.assert_close(back, wanted, atol=1e-4, rtol=1e-5)
    assert arrivals[0] == arrivals[1] == arrivals[2]


def totals(case: Case) -> Ints:
    every = torch.cat([experts.flatten() for experts in case.experts]).numpy()
    return np.bincount(every, minlength=case.placement.experts)


@given(cases())
def test_counts_of_the_same_step_level_the_ranks(case: Case) -> None:
    _, _, rows = run(case, "now")
    counts_E = totals(case)
    assert sum(rows) == counts_E.sum()
    if counts_E.any():
        best = level(case.placement.slots_LRS[0], counts_E[None].astype(np.float64))[0].max()
        assert max(rows) == np.ceil(best - 1e-3)


@given(cases())
def test_counts_of_the_last_step_level_the_same_step_when_it_comes_again(case: Case) -> None:
    """The first step goes by wishes alone."""
    first, second, now = run(case, "last")[2], run(case, "last", 2)[2], run(case, "now")[2]
    split = Split(case.placement.slots_LRS[0], case.placement.experts, case.topology)
    if not split.replicated:
        return
    wished = sum(split.wish(case.experts[rank].numpy(), rank).counts_2P.sum(0) for rank in case.ranks)
    assert first == np.reshape(wished, (case.topology.ranks, -1)).sum(1).tolist()
    assert second == now


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("redundant", "rows", "size"), [(0, 3, 1), (4, 255, 1), (4, 256, 2), (4, 1 << 16, 4)]
)
def test_counts_travel_only_where_there_is_a_choice(split: str, redundant: int, rows: int, size: int) -> None:
    """In as few bytes as hold the rows that a rank may have."""
    topology = Topology(2, 2, 1)
    placement = default_placement(8, [0], topology, redundant)

    def program(comm: Comm) -> int:
        exchange = TieredExchange(comm, placement, algorithm("two_tier"))
        exchange.prepare(1, split, rows)
        received = exchange.dispatch(0, torch.ones(3, 4), torch.arange(3)[:, None], torch.ones(3, 1))
        exchange.combine(torch.zeros_like(received.x_RD), received)
        return comm.sent.across("counts") + comm.sent.in_node("counts")

    told = LocalWorld(topology, 60).run(program)
    asked = redundant and split != "even"
    # Of 12 slots two counts: one rank's to the rail's peer, two ranks' to the other card.
    assert told == [2 * 12 * size * 3 if asked else 0] * 4


@pytest.mark.parametrize("rows", [255, 256])
def test_counts_are_exact_at_the_ends_of_their_type(rows: int) -> None:
    """All rows of one rank for an expert that all four have."""
    topology = Topology(2, 2, 1)
    placement = Placement(np.tile(np.arange(2), (1, 4, 1)), 2, (0,))
    experts = [torch.zeros(rows if rank == 3 else 0, 1, dtype=torch.int64) for rank in range(4)]

    def program(comm: Comm) -> Ints:
        replicas = Replicas(comm, placement)
        replicas.how, replicas.rows = "now", rows
        return replicas.choose(0, experts[comm.rank].numpy())[0]

    slots = LocalWorld(topology, 60).run(program)[3]
    by_rank = np.bincount(slots.ravel() // 2)
    assert by_rank.sum() == rows and by_rank.max() == -(-rows // 4)


def chosen_after(
    topology: Topology, puts: Sequence[Placement], experts: Sequence[Tensor]
) -> list[tuple[Ints, Ints]]:
    """Slots that every rank chooses by the last step of the first placement, then after the others have been put."""

    def program(comm: Comm) -> tuple[Ints, Ints]:
        replicas, mine = Replicas(comm, puts[0]), experts[comm.rank].numpy()
        replicas.how, replicas.rows = "now", max(map(len, experts))
        replicas.choose(0, mine)
        replicas.how = "last"
        before, _ = _finish(replicas, mine)
        for placement in puts[1:]:
            replicas.put(placement)
        return before, _finish(replicas, mine)[0]

    return LocalWorld(topology, 60).run(program)


def _finish(replicas: Replicas, mine: Ints) -> tuple[Ints, Gathering | None]:
    slots, gathering = replicas.choose(0, mine)
    if gathering is not None:
        gathering.forward()
        gathering.result()
    return slots, gathering


def test_another_placement_makes_what_was_known_void() -> None:
    """What every rank does next is what it does first: its wishes. The same placement again changes nothing."""
    topology = Topology(2, 2, 1)
    a = default_placement(8, [0], topology, 8)
    b = replace(a, slots_LRS=a.slots_LRS[:, :, ::-1].copy())
    experts = [torch.zeros(rows, 1, dtype=torch.int64) for rows in (8, 0, 0, 0)]

    def wishes(placement: Placement) -> list[list[int]]:
        split = Split(placement.slots_LRS[0], 8, topology)
        return [split.wish(experts[rank].numpy(), rank).slots_TK.ravel().tolist() for rank in range(4)]

    levelled = [slots.ravel().tolist() for slots, _ in chosen_after(topology, [a], experts)]
    assert levelled != wishes(a)
    same = chosen_after(topology, [a, replace(a)], experts)
    assert all(np.array_equal(before, after) for before, after in same)
    for puts, last in (([a, b], b), ([a, b, a], a)):
        found = chosen_after(topology, puts, experts)
        assert [before.ravel().tolist() for before, _ in found] == levelled
        assert [after.ravel().tolist() for _, after in found] == wishes(last)
