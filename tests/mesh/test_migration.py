"""From one placement to another in rounds, each of which leaves a placement that serves."""

from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh import Topology
from expertmesh.mesh.balance import moves
from expertmesh.mesh.migration import Move, rounds
from expertmesh.mesh.placement import EMPTY, Ints, Placement, default_placement
from tests.support.cluster import placements, topologies

Pair: TypeAlias = tuple[Topology, Placement, Placement]


def several(layers: list[Placement], numbers: tuple[int, ...], size: int) -> Placement:
    """Layers in one placement, filled up with empty slots."""
    widths = [((0, 0), (0, size - layer.slots_per_rank)) for layer in layers]
    slots = [
        np.pad(p.slots_LRS[0], width, constant_values=EMPTY) for p, width in zip(layers, widths, strict=True)
    ]
    return Placement(np.stack(slots), layers[0].experts, numbers)


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """Two placements of the same layers. With no slot to spare more often than not: chains and rings."""
    topology, experts = draw(topologies(8)), draw(st.integers(1, 12))
    numbers = tuple(draw(st.lists(st.integers(0, 60), min_size=1, max_size=3, unique=True)))
    found = [[draw(placements(topology, experts)) for _ in numbers] for _ in range(2)]
    size = max(p.slots_per_rank for layers in found for p in layers)
    old, new = (several(layers, numbers, size) for layers in found)
    if draw(st.booleans()):
        return topology, old, new
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    tight = [np.stack([_dense(generator, topology.ranks, experts) for _ in numbers]) for _ in range(2)]
    old, new = (Placement(slots, experts, numbers) for slots in tight)
    return topology, old, new


def _dense(generator: np.random.Generator, ranks: int, experts: int) -> Ints:
    """One slot for each expert, and no more of them than have to be."""
    slots = np.full(ranks * -(-experts // ranks), EMPTY, dtype=np.int64)
    slots[:experts] = generator.permutation(experts)
    return slots.reshape(-1, ranks).T.copy()


def experts_of(placement: Placement, layer: int, rank: int) -> set[int]:
    return set(placement.slots_LRS[placement.row_of(layer), rank].tolist()) - {EMPTY}


@given(pairs())
def test_every_round_leaves_a_placement_that_serves(pair: Pair) -> None:
    topology, placement, new = pair
    every = rounds(placement, new, topology)
    changed = {layer for one in every for layer in one.slots}
    for one in every:
        ranks = [move.rank for move in one.moves]
        assert ranks and len(set(ranks)) == len(ranks)  # a rank has spare memory for one
        slots = placement.slots_LRS.copy()
        for m in one.moves:
            row = placement.row_of(m.layer)
            assert placement.slots_LRS[row, m.source, m.source_slot] == m.expert and m.source != m.rank
            assert m.expert in experts_of(new, m.layer, m.rank) - experts_of(placement, m.layer, m.rank)
            slots[row, m.rank, m.slot] = m.expert
        placement = placement.replaced(one.slots)  # raises where an expert has no slot, or two on a rank
        gone = placement.slots_LRS != slots
        assert (placement.slots_LRS[gone] == EMPTY).all()
        assert set(one.slots) == {m.layer for m in one.moves}
    for layer in new.layers:
        moved = layer in changed
        for rank in range(topology.ranks):
            have, want = experts_of(placement, layer, rank), experts_of(new, layer, rank)
            assert have == want if moved else have >= want


@given(pairs())
def test_only_what_a_rank_lacks_is_moved(pair: Pair) -> None:
    topology, old, new = pair
    every = rounds(old, new, topology)
    assert sum(len(one.moves) for one in every) == moves(old, new)
    end = old
    for one in every:
        end = end.replaced(one.slots)
    for row, layer in enumerate(old.layers):
        for rank in range(topology.ranks):
            stays = np.isin(old.slots_LRS[row, rank], sorted(experts_of(new, layer, rank)))
            np.testing.assert_array_equal(end.slots_LRS[row, rank][stays], old.slots_LRS[row, rank][stays])
    assert rounds(end, new, topology) == [] and rounds(new, new, topology) == []


@given(pairs())
def test_experts_come_from_the_nearest(pair: Pair) -> None:
    """In the node, on the rail, anywhere."""
    topology, placement, new = pair

    def distance(source: int, rank: int) -> tuple[bool, bool]:
        return topology.node_of(source) != topology.node_of(rank), topology.card_of(
            source
        ) != topology.card_of(rank)

    for one in rounds(placement, new, topology):
        for m in one.moves:
            holders = np.argwhere(placement.slots_LRS[placement.row_of(m.layer)] == m.expert)[:, 0].tolist()
            assert distance(m.source, m.rank) == min(distance(holder, m.rank) for holder in holders)
        placement = placement.replaced(one.slots)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_a_ring_turns_in_one_round(ranks: int) -> None:
    topology = Topology(1, ranks)
    old = default_placement(ranks, [4], topology)
    new = Placement(np.roll(old.slots_LRS, 1, axis=1), ranks, (4,))
    (one,) = rounds(old, new, topology)
    expected = {Move(4, (r - 1) % ranks, (r - 1) % ranks, 0, r, 0) for r in range(ranks)}
    assert set(one.moves) == expected
    np.testing.assert_array_equal(old.replaced(one.slots).slots_LRS, new.slots_LRS)


def test_layers_share_a_round_where_their_ranks_differ() -> None:
    """Ranks 0 and 1 swap in one layer, 2 and 3 in the other one."""
    topology = Topology(2, 2)
    old = default_placement(4, [1, 2], topology)
    new = old.replaced({1: np.array([[1], [0], [2], [3]]), 2: np.array([[0], [1], [3], [2]])})
    (one,) = rounds(old, new, topology)
    assert {(m.layer, m.rank) for m in one.moves} == {(1, 0), (1, 1), (2, 2), (2, 3)}
