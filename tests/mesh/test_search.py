"""The start by greedy rules, and the search that makes it better and never worse."""

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.mesh.locality import Gate
from expertmesh.mesh.placement import EMPTY, Ints, Placement
from expertmesh.mesh.search import Goal, arrange, held, improve, pack, replicate
from tests.support.cluster import placements, topologies

seeds = st.integers(0, 2**32)


def start(experts: int, ranks: int, slots: int, seed: int) -> tuple[np.ndarray, Ints, Ints]:
    """Shares, rooms and a greedy placement."""
    shares_E = np.random.default_rng(seed).lognormal(0, 1, experts)
    room_R = np.full(ranks, slots // ranks)
    room_R[: slots % ranks] += 1
    return shares_E, room_R, pack(shares_E, replicate(shares_E, slots, ranks), room_R)


def cards(slots_RS: Ints, shares_E: np.ndarray) -> np.ndarray:
    has_RE = held(slots_RS, len(shares_E))
    return has_RE @ (shares_E / has_RE.sum(0)) / shares_E.sum() * len(slots_RS)


@given(st.integers(1, 12), st.integers(1, 6), seeds, st.data())
def test_replicas_go_where_a_slot_has_most(experts: int, ranks: int, seed: int, data: st.DataObject) -> None:
    slots = data.draw(st.integers(experts, experts * ranks))
    shares_E = np.random.default_rng(seed).lognormal(0, 1, experts)
    counts_E = replicate(shares_E, slots, ranks)
    assert counts_E.sum() == slots and counts_E.min() >= 1 and counts_E.max() <= ranks
    some = counts_E > 1  # taking one away leaves more than any slot has that could have got it
    open_ = counts_E < ranks
    if some.any() and open_.any():
        assert (shares_E / np.maximum(counts_E - 1, 1))[some].min() >= (shares_E / counts_E)[
            open_
        ].max() - 1e-12


@given(st.integers(1, 12), st.integers(1, 6), seeds, st.data())
def test_packs_are_full_and_legal(experts: int, ranks: int, seed: int, data: st.DataObject) -> None:
    slots = data.draw(st.integers(experts, experts * ranks))
    _, room_R, slots_RS = start(experts, ranks, slots, seed)
    Placement(slots_RS[None], experts, (0,))
    assert ((slots_RS != EMPTY) == (np.arange(slots_RS.shape[1]) < room_R[:, None])).all()


@given(topologies(), st.integers(1, 20), st.data())
def test_what_a_rank_holds(topology: object, experts: int, data: st.DataObject) -> None:
    slots_RS = data.draw(placements(topology, experts)).slots_LRS[0]  # type: ignore[arg-type]
    assert held(slots_RS, experts).tolist() == [
        [e in own for e in range(experts)] for own in slots_RS.tolist()
    ]


@settings(max_examples=40)
@given(st.integers(2, 20), st.integers(1, 7), seeds, st.booleans(), st.data())
def test_the_search_keeps_placements_legal_and_costs_down(
    experts: int, ranks: int, seed: int, scenarios: bool, data: st.DataObject
) -> None:
    slots = data.draw(st.integers(experts, experts * ranks))
    shares_E, room_R, slots_RS = start(experts, ranks, slots, seed)
    varied = shares_E * np.random.default_rng(seed).lognormal(0, 0.5, (3 * scenarios, experts))
    goal = Goal(shares_E, varied, np.full(len(varied), 1 / 3), even=1.0, risk=0.1, doubt=0.5)
    found = improve(slots_RS, room_R, goal, 2000, 0.0, seed)
    Placement(found[None], experts, (0,))
    assert ((found != EMPTY) == (slots_RS != EMPTY)).all()
    np.testing.assert_array_equal(found, improve(slots_RS, room_R, goal, 2000, 0.0, seed))
    if not scenarios:
        plain = Goal(shares_E, varied, np.empty(0), even=1.0)
        before, after = (
            ((cards(s, shares_E) - 1) ** 2).sum()
            for s in (slots_RS, improve(slots_RS, room_R, plain, 2000, 0.0, seed))
        )
        assert after <= before + 1e-9


def test_the_search_finds_the_best_of_a_small_cluster() -> None:
    """Against all ways to put 6 experts on 2 cards of 3 slots."""
    for seed in range(10):
        shares_E, room_R, slots_RS = start(6, 2, 6, seed)
        ways = [np.array(way) for way in product((0, 1), repeat=6) if sum(way) == 3]
        best = min(abs(shares_E[way == 0].sum() / shares_E.sum() * 2 - 1) for way in ways)
        goal = Goal(shares_E, np.empty((0, 6)), np.empty(0), even=1.0)
        found = cards(improve(slots_RS, room_R, goal, 20_000, 0.05, seed), shares_E)
        assert found.max() - 1 <= best + 1e-9


@settings(max_examples=30)
@given(st.integers(4, 16), st.integers(0, 12), seeds)
def test_no_more_slots_change_than_the_budget_allows(experts: int, budget: int, seed: int) -> None:
    _, room_R, slots_RS = start(experts, 4, experts + 4, seed)
    shares_E = np.random.default_rng(seed + 1).lognormal(0, 1, experts)
    goal = Goal(shares_E, np.empty((0, experts)), np.empty(0), even=1.0, old_RS=slots_RS, budget=budget)
    found = improve(slots_RS, room_R, goal, 5000, 0.0, seed)
    moved = int((held(found, experts) & ~held(slots_RS, experts)).sum())
    assert moved <= budget


def test_cards_that_are_level_enough_stay() -> None:
    shares_E, room_R, slots_RS = start(16, 4, 20, 0)
    most = float(cards(slots_RS, shares_E).max()) - 1
    goal = Goal(shares_E, np.empty((0, 16)), np.empty(0), even=1.0, old_RS=slots_RS)
    for enough, same in ((most + 1e-6, True), (most - 1e-6, False)):
        stopping = Goal(**(vars(goal) | {"enough": enough}))
        found = improve(slots_RS, room_R, stopping, 5000, 0.0, 0)
        assert (found == slots_RS).all() == same


@settings(max_examples=40)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(4, 20), st.integers(0, 9), seeds)
def test_exchanged_cards_keep_their_experts(
    nodes: int, per_node: int, experts: int, more: int, seed: int
) -> None:
    """And tokens are sent to no more nodes."""
    ranks = nodes * per_node
    slots = min(experts + more, experts * ranks)
    shares_E, room_R, slots_RS = start(experts, ranks, slots, seed)
    tokens_TK = Gate(chosen=min(4, experts)).sample(shares_E, 200, seed)
    found = arrange(slots_RS, room_R, nodes, tokens_TK, seed)
    as_sets = [sorted(tuple(sorted(card)) for card in s.tolist()) for s in (slots_RS, found)]
    assert as_sets[0] == as_sets[1]
    assert ((found != EMPTY).sum(1) == room_R).all()
    np.testing.assert_allclose(np.sort(cards(found, shares_E)), np.sort(cards(slots_RS, shares_E)))
    np.testing.assert_array_equal(found, arrange(slots_RS, room_R, nodes, tokens_TK, seed))
