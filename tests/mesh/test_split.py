"""A step's rows over replicas: compiled and plain alike, and as level as any split can be."""

from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh import Topology
from expertmesh.mesh.placement import EMPTY, Ints, default_placement
from expertmesh.mesh.split import SCALE, Small, Split, Wish, level
from tests.support.cluster import placements, topologies

SHAPES = [Topology(1, 1), Topology(1, 4), Topology(3, 1), Topology(2, 3), Topology(4, 2), Topology(3, 5)]


@dataclass(frozen=True)
class Step:
    """One layer's step: the experts of every rank's rows."""

    split: Split
    experts_RTK: list[Ints]

    @property
    def plain(self) -> "Step":
        old = self.split
        return Step(Split(old.slots_RS, old.experts, old.topology, plain=True), self.experts_RTK)

    def wishes(self) -> list[Wish]:
        return [self.split.wish(experts_TK, rank) for rank, experts_TK in enumerate(self.experts_RTK)]

    def plans(self, counts_R2P: Small, tolerance: float = 0.0) -> list[tuple[Small, Small]]:
        ranks = range(self.split.topology.ranks)
        return [self.split.settle(counts_R2P, rank, tolerance) for rank in ranks]

    def slots(self, tolerance: float = 0.0) -> list[Ints]:
        wishes = self.wishes()
        plans = self.plans(counted(wishes), tolerance)
        return [self.split.assign(w, r, *plan) for r, (w, plan) in enumerate(zip(wishes, plans, strict=True))]

    def cards(self, slots_RTK: list[Ints]) -> Ints:
        """Rows of each rank."""
        ranks, size = self.split.slots_RS.shape
        return sum(np.bincount(s.ravel() // size, minlength=ranks) for s in slots_RTK)

    def asked(self) -> Ints:
        """Rows of each expert."""
        return sum(np.bincount(e.ravel(), minlength=self.split.experts) for e in self.experts_RTK)


def counted(wishes: list[Wish]) -> Small:
    return np.stack([wish.counts_2P for wish in wishes])


@st.composite
def steps(draw: st.DrawFn, most: int = 12) -> Step:
    """Replicas anywhere or none, empty slots, skewed experts, ranks without rows."""
    topology = draw(st.one_of(topologies(most), st.sampled_from([t for t in SHAPES if t.ranks <= most])))
    experts = draw(st.integers(1, 16))
    made = st.just(default_placement(experts, [0], topology)) | placements(topology, experts)
    slots_RS = draw(made).slots_LRS[0]
    chosen = draw(st.integers(1, min(experts, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    bias_E = draw(st.sampled_from([0.0, 1.0, 3.0])) * rng.standard_normal(experts)
    rows = draw(st.lists(st.sampled_from([0, 1, 3, 9]), min_size=topology.ranks, max_size=topology.ranks))
    scores = [bias_E + rng.gumbel(size=(n, experts)) for n in rows]
    return Step(Split(slots_RS, experts, topology), [np.argsort(-s, axis=1)[:, :chosen] for s in scores])


def captured(slots_RS: Ints, load_E: Ints) -> dict[tuple[int, ...], int]:
    """Of every set of ranks: what experts that are nowhere else bring."""
    ranks = range(len(slots_RS))
    hosts = [{int(r) for r in np.argwhere(slots_RS == e)[:, 0]} for e in range(len(load_E))]
    sets = [s for n in range(1, len(slots_RS) + 1) for s in combinations(ranks, n)]
    return {s: sum(int(load) for h, load in zip(hosts, load_E, strict=True) if h <= set(s)) for s in sets}


def optimum(slots_RS: Ints, load_E: Ints) -> int:
    """The least that the fullest rank can have: the flow is as large as the smallest cut (Ford and Fulkerson)."""
    return max(ceil(Fraction(load, len(s))) for s, load in captured(slots_RS, load_E).items())


def fair(slots_RS: Ints, load_E: Ints) -> list[Fraction]:
    """Loads of the ranks, the largest as small as can be, then the next: again and again the largest set of ranks whose
    mean cannot be less."""
    inside = captured(slots_RS, load_E)
    out, done = [Fraction(0)] * len(slots_RS), frozenset[int]()
    while len(done) < len(out):
        best: tuple[Fraction, int, tuple[int, ...]] = (Fraction(-1), 0, ())
        for some in combinations_of(frozenset(range(len(out))) - done):
            more = inside[tuple(sorted(done | set(some)))] - (inside[tuple(sorted(done))] if done else 0)
            best = max(best, (Fraction(more, len(some)), len(some), some))
        for rank in best[2]:
            out[rank] = best[0]
        done |= set(best[2])
    return out


def combinations_of(ranks: frozenset[int]) -> list[tuple[int, ...]]:
    return [s for n in range(1, len(ranks) + 1) for s in combinations(sorted(ranks), n)]


@given(steps(15), st.sampled_from([0.0, 0.05, 0.5]))
def test_compiled_and_plain_are_alike(step: Step, tolerance: float) -> None:
    wishes, plain = step.wishes(), step.plain.wishes()
    for one, other in zip(wishes, plain, strict=True):
        np.testing.assert_array_equal(one.slots_TK, other.slots_TK)
        np.testing.assert_array_equal(one.open_TK, other.open_TK)
        np.testing.assert_array_equal(one.counts_2P, other.counts_2P)
    counts = counted(wishes)
    for one, other in zip(step.plans(counts, tolerance), step.plain.plans(counts, tolerance), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    for mine, theirs in zip(step.slots(tolerance), step.plain.slots(tolerance), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@given(steps(15), st.sampled_from([0.0, 0.1]))
def test_every_row_goes_to_its_expert_once(step: Step, tolerance: float) -> None:
    flat = step.split.slots_RS.ravel()
    for found in (step.slots(tolerance), [wish.slots_TK for wish in step.wishes()]):
        for slots_TK, experts_TK in zip(found, step.experts_RTK, strict=True):
            np.testing.assert_array_equal(flat[slots_TK], experts_TK)


@given(steps())
def test_wishes_are_counted(step: Step) -> None:
    for wish in step.wishes():
        size = step.split.slots_RS.size
        for kind in (0, 1):
            expected = np.bincount(wish.slots_TK[wish.open_TK == kind], minlength=size)
            np.testing.assert_array_equal(wish.counts_2P[kind], expected)


@given(steps())
def test_a_wish_is_bound_where_its_node_is_visited_anyway(step: Step) -> None:
    """Open ones are those that alone bring their row to a node, and whose expert has replicas."""
    per_node = step.split.slots_RS.shape[1] * step.split.topology.cards_per_node
    replicas = np.bincount(step.split.slots_RS[step.split.slots_RS != EMPTY], minlength=step.split.experts)
    for rank, wish in enumerate(step.wishes()):
        home = step.split.topology.node_of(rank)
        for slots, opens, experts in zip(wish.slots_TK, wish.open_TK, wish.experts_TK, strict=True):
            for slot, is_open, expert in zip(slots // per_node, opens, experts, strict=True):
                if replicas[expert] == 1 or slot == home:
                    assert not is_open
                elif not is_open:
                    assert (slots // per_node == slot).sum() > 1


@given(steps(7))
def test_the_fullest_rank_has_as_little_as_any_split_could_give_it(step: Step) -> None:
    assert step.cards(step.slots()).max() == optimum(step.split.slots_RS, step.asked())


@given(steps(7), st.sampled_from([0.01, 0.1, 1.0]))
def test_a_tolerance_is_kept(step: Step, tolerance: float) -> None:
    cards, asked = step.cards(step.slots(tolerance)), step.asked()
    allowed = ceil(float(asked.sum()) / len(cards) * (1 + tolerance))
    assert cards.max() <= max(optimum(step.split.slots_RS, asked), allowed)


@given(steps())
def test_nothing_moves_that_need_not(step: Step) -> None:
    """With room enough for the wishes they are the plan."""
    wishes = step.wishes()
    for wish, slots_TK in zip(wishes, step.slots(float(len(wishes))), strict=True):
        np.testing.assert_array_equal(wish.slots_TK, slots_TK)


@given(steps(15), st.sampled_from([0.0, 0.1]))
def test_plans_of_all_ranks_fit_together(step: Step, tolerance: float) -> None:
    wishes = step.wishes()
    counts, flat = counted(wishes), step.split.slots_RS.ravel()
    plans = step.plans(counts, tolerance)
    for wish, (shed, take) in zip(wishes, plans, strict=True):
        assert (shed >= 0).all() and (take >= 0).all() and (shed <= wish.counts_2P).all()
        assert not (shed.sum(0) * take).any()
        for expert in range(step.split.experts):
            assert shed[:, flat == expert].sum() == take[flat == expert].sum()
    after = counts.sum((0, 1)) - sum(s.sum(0) for s, _ in plans) + sum(t for _, t in plans)
    size = step.split.slots_RS.size
    found = sum(np.bincount(s.ravel(), minlength=size) for s in step.slots(tolerance))
    np.testing.assert_array_equal(after, found)


@given(steps(), st.integers(0, 2**32))
def test_stale_counts_give_slots_of_the_right_experts(step: Step, seed: int) -> None:
    """The step before this one had other rows."""
    rng = np.random.default_rng(seed)
    counts = counted(step.wishes())
    counts = np.where(step.split.slots_RS.ravel() == EMPTY, 0, rng.permutation(counts)).astype(np.int32)
    plans, flat = step.plans(counts), step.split.slots_RS.ravel()
    plain = step.plain
    for rank, (wish, (shed, take)) in enumerate(zip(step.wishes(), plans, strict=True)):
        given_ = shed.copy(), take.copy()
        slots_TK = step.split.assign(wish, rank, shed, take)
        np.testing.assert_array_equal(flat[slots_TK], wish.experts_TK)
        np.testing.assert_array_equal(slots_TK, plain.split.assign(wish, rank, shed, take))
        np.testing.assert_array_equal(given_[0], shed)
        np.testing.assert_array_equal(given_[1], take)


@given(steps())
def test_the_same_rows_go_the_same_way(step: Step) -> None:
    for first, second in zip(step.slots(), step.slots(), strict=True):
        np.testing.assert_array_equal(first, second)


@st.composite
def loads(draw: st.DrawFn, most: int) -> tuple[Ints, Ints]:
    """Slots and loads of experts; some have none."""
    topology, experts = Topology(1, draw(st.integers(1, most))), draw(st.integers(1, 14))
    slots_RS = draw(placements(topology, experts)).slots_LRS[0]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return slots_RS, rng.integers(0, 40, (draw(st.integers(1, 3)), experts)) ** 2


@given(loads(15))
def test_levels_are_alike(case: tuple[Ints, Ints]) -> None:
    slots_RS, loads_NE = case
    found = level(slots_RS, loads_NE.astype(float))
    np.testing.assert_array_equal(found, level(slots_RS, loads_NE.astype(float), plain=True))
    np.testing.assert_allclose(found.sum(1), loads_NE.sum(1), rtol=1e-4)


@settings(max_examples=300)
@given(loads(6))
def test_levels_are_fair(case: tuple[Ints, Ints]) -> None:
    slots_RS, loads_NE = case
    for load_E, found in zip(loads_NE, level(slots_RS, loads_NE.astype(float)), strict=True):
        expected = [float(x) for x in fair(slots_RS, load_E)]
        within = len(load_E) * len(expected) / SCALE * load_E.sum()
        np.testing.assert_allclose(found, expected, atol=max(within, 1e-9))


@pytest.mark.parametrize("plain", [False, True])
def test_levels_of_nothing_are_zero(plain: bool) -> None:
    assert level(np.array([[0, 1], [1, EMPTY]]), np.zeros((1, 2)), plain).tolist() == [[0, 0]]


@pytest.mark.parametrize("plain", [False, True])
def test_a_full_rank_takes_nothing_from_those_that_are_less_full(plain: bool) -> None:
    """Expert 1 could go to rank 0 too, which expert 0 alone makes fuller than the others."""
    slots_RS = np.array([[0, 1], [1, 2], [2, EMPTY], [3, EMPTY]])
    found = level(slots_RS, np.array([[20.0, 6, 8, 0]]), plain)
    np.testing.assert_allclose(found, [[20, 7, 7, 0]], atol=1e-3)
