"""Experts in slots, and who sends to which replica."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh import InputError, Topology
from expertmesh.mesh.placement import EMPTY, Placement, default_placement
from tests.support.cluster import placements, topologies

V3 = Topology(8, 8, 8)


@given(topologies(), st.integers(1, 40), st.data())
def test_default_is_legal_even_and_has_the_replicas_asked_for(
    topology: Topology, experts: int, data: st.DataObject
) -> None:
    inside = experts * (topology.cards_per_node - 1)
    redundant = data.draw(st.integers(0, inside) | st.integers(0, experts * (topology.ranks - 1)))
    placement = default_placement(experts, [3, 4], topology, redundant)
    filled = (placement.slots_LRS[0] != EMPTY).sum(1)
    assert filled.sum() == experts + redundant
    assert (placement.slots_LRS[0] == placement.slots_LRS[1]).all()
    if not redundant:
        assert filled.max() - filled.min() <= 1
    if redundant > inside:
        return
    # While they can, replicas stay in their node, which holds the experts that it held without.
    plain = default_placement(experts, [3], topology)
    for node in range(topology.nodes):
        ranks = slice(node * topology.cards_per_node, (node + 1) * topology.cards_per_node)
        assert set(placement.slots_LRS[0, ranks].flat) - {EMPTY} == set(plain.slots_LRS[0, ranks].flat) - {
            EMPTY
        }


def test_nodes_of_one_card_have_replicas_of_each_other() -> None:
    placement = default_placement(8, [0], Topology(4, 1), 6)
    slots = placement.slots_LRS[0]
    filled = (slots != EMPTY).sum(1)
    assert filled.sum() == 14 and filled.max() == placement.slots_per_rank == 4
    assert max(Counter(slots[slots != EMPTY].tolist()).values()) == 2


def test_routing_groups_of_v3_stay_on_their_node() -> None:
    placement = default_placement(256, range(3, 61), V3, 64)
    assert placement.slots_per_rank == 5
    for rank in range(64):
        held = placement.of_rank(rank)[3]
        assert {expert // 32 for expert in held} == {rank // 8} and EMPTY not in held


@pytest.mark.parametrize("nodes", [2, 4, 16])
def test_groups_stay_together_where_nodes_divide_them(nodes: int) -> None:
    placement = default_placement(256, [0], Topology(nodes, 8, 1))
    for node in range(nodes):
        held = set(placement.slots_LRS[0, node * 8 : node * 8 + 8].flat)
        assert len({expert // 32 for expert in held}) == max(1, 8 // nodes)


@given(topologies(), st.integers(1, 12), st.data())
def test_choices_are_replicas_and_equal_ranks_load_them_equally(
    topology: Topology, experts: int, data: st.DataObject
) -> None:
    placement = data.draw(placements(topology, experts))
    choices, size = placement.choices(0, topology), placement.slots_per_rank
    flat = placement.slots_LRS[0].ravel()
    for expert in range(experts):
        assert (flat[choices[:, expert]] == expert).all()
        replicas = np.flatnonzero(flat == expert)
        served = Counter(choices[:, expert].tolist())
        counts = [served[slot] for slot in replicas.tolist()]
        assert max(counts) - min(counts) <= 1
        for slot in replicas.tolist():
            host = slot // size
            # Who has a replica sends to itself.
            assert choices[host, expert] == slot


def test_replicas_of_a_node_serve_it_first() -> None:
    topology = Topology(2, 2, 1)
    placement = Placement(np.array([[[0, 1], [0, 2], [0, 3], [1, 2]]]), 4, (0,))
    choices = placement.choices(0, topology)
    # Expert 1 is on ranks 0 and 3: each serves its node. Expert 0 has three replicas for four ranks.
    assert choices[:, 1].tolist() == [1, 1, 6, 6]
    assert choices[:3, 0].tolist() == [0, 2, 4]


def test_choices_are_the_same_on_every_rank_and_in_every_process() -> None:
    first, second = (default_placement(64, [0], V3, 32) for _ in range(2))
    assert (first.choices(0, V3) == second.choices(0, V3)).all()


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([[[0], [1]]], "no slot for expert 2"),
        ([[[0, 1], [2, 2]]], "expert 2 twice on rank 1"),
        ([[[0, 1], [2, 3]]], "not from 0 to 2"),
        ([[[0, 1], [2, -2]]], "not from 0 to 2"),
        ([[0, 1, 2]], "not \\[layers, ranks, slots\\]"),
        ([[[0, 1, 2]], [[0, 1, 2]]], "of 1 layers"),
    ],
)
def test_an_illegal_placement_is_refused(slots: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Placement(np.array(slots), 3, (0,))


@pytest.mark.parametrize("redundant", [-1, 8 * 7 + 1])
def test_redundancy_that_cannot_be_is_refused(redundant: int) -> None:
    with pytest.raises(InputError, match="redundant slots"):
        default_placement(8, [0], Topology(2, 4, 1), redundant)
