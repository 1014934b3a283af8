"""The published balancer: its published example, and what its description promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh import InputError, Topology
from expertmesh.balancer.eplb import eplb, eplb_slots, slot_loads, without_twins
from expertmesh.mesh.loads import Loads
from expertmesh.mesh.placement import EMPTY

# The example of https://github.com/deepseek-ai/EPLB: two layers, 4 groups, 16 slots on 2 nodes of 4 cards.
EXAMPLE = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    dtype=float,
)
PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_example() -> None:
    slots_LRS = eplb_slots(EXAMPLE, Topology(2, 4), 4, groups=4)
    assert slots_LRS.shape == (2, 8, 2) and slots_LRS.reshape(2, -1).tolist() == PUBLISHED


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 2**32))
def test_every_expert_has_a_slot_and_every_card_as_many(
    nodes: int, cards: int, per_card: int, extra: int, seed: int
) -> None:
    topology = Topology(nodes, cards)
    experts, redundant = topology.ranks * per_card, topology.ranks * extra
    counts_LE = np.random.default_rng(seed).integers(1, 1000, (3, experts)).astype(float)
    for groups in (None, nodes):
        slots_LRS = eplb_slots(counts_LE, topology, redundant, groups)
        assert slots_LRS.shape == (3, topology.ranks, per_card + extra)
        assert all(set(layer.flat) == set(range(experts)) for layer in slots_LRS)
        np.testing.assert_allclose(slot_loads(slots_LRS, counts_LE).sum(1), counts_LE.sum(1))


@given(st.integers(0, 2**32))
def test_replicas_go_to_the_expert_with_most_rows_a_slot(seed: int) -> None:
    counts_LE = np.random.default_rng(seed).permutation(np.arange(1, 17) ** 2)[None].astype(float)
    slots = eplb_slots(counts_LE, Topology(1, 4), 8)[0]
    replicas = np.bincount(slots.ravel(), minlength=16)
    # Taking a replica away from anybody would leave more than the fullest slot now has.
    fewer = counts_LE[0][replicas > 1] / (replicas[replicas > 1] - 1)
    assert fewer.min() >= (counts_LE[0] / replicas).max()


@given(st.integers(0, 2**32))
def test_hierarchical_keeps_groups_on_their_node(seed: int) -> None:
    counts_LE = np.random.default_rng(seed).integers(1, 100, (2, 24)).astype(float)
    slots_LRS = eplb_slots(counts_LE, Topology(2, 2), 8, groups=4)
    for layer in slots_LRS.reshape(2, 2, -1):
        first, second = ({int(e) // 6 for e in node} for node in layer)
        assert len(first) == len(second) == 2 and not first & second


def test_equal_loads_are_balanced() -> None:
    slots_LRS = eplb_slots(np.ones((1, 32)), Topology(2, 4), 0)
    assert slot_loads(slots_LRS, np.ones((1, 32))).tolist() == [[4.0] * 8]


def test_twins_on_a_card_count_twice_and_are_stored_once() -> None:
    slots_LRS = np.array([[[0, 0], [1, 0]]])
    counts_LE = np.array([[30.0, 5.0]])
    assert slot_loads(slots_LRS, counts_LE).tolist() == [[20.0, 15.0]]
    assert without_twins(slots_LRS).tolist() == [[[0, EMPTY], [1, 0]]]
    loads = Loads.of(np.array([[1000, 1, 1, 1]]))
    placement = eplb(loads, Topology(1, 2), 4)  # four more slots for expert 0: five on two cards
    assert (placement.slots_LRS == 0).sum() == 2 and (placement.slots_LRS == EMPTY).sum() == 3


@pytest.mark.parametrize(
    ("topology", "redundant", "groups", "message"),
    [
        (Topology(2, 4), 3, None, "12 experts and 3 replicas do not divide by 8 cards"),
        (Topology(2, 4), 4, 3, "3 groups do not divide by 2 nodes"),
        (Topology(2, 4), 4, 8, "12 experts in 8 groups"),
        (Topology(2, 3), -6, None, "-6 replicas"),
    ],
)
def test_what_it_has_no_plan_for(
    topology: Topology, redundant: int, groups: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        eplb_slots(EXAMPLE, topology, redundant, groups)
