"""Loads to placements: legal ones always, near the best possible ones where the loads are known, and such that the
split of every step can level where they are not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expertmesh import InputError, Topology
from expertmesh.balancer.eplb import eplb
from expertmesh.mesh.balance import OBJECTIVES, balance, even_cards, moves, rooms, split_cards
from expertmesh.mesh.loads import Floats, Loads
from expertmesh.mesh.locality import cross_node_copies
from expertmesh.mesh.placement import EMPTY, Placement, default_placement
from expertmesh.mesh.search import held
from tests.support.cluster import placements, topologies

objectives = st.sampled_from(sorted(OBJECTIVES))


@pytest.fixture(autouse=True, scope="module")
def _short_searches() -> Iterator[None]:
    """What is promised does not depend on how long is searched, but for what the tests with `long` look at."""
    with pytest.MonkeyPatch.context() as patch:
        for name, objective in OBJECTIVES.items():
            patch.setitem(
                OBJECTIVES, name, replace(objective, tries=1500, scenarios=min(objective.scenarios, 4))
            )
        yield


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, objective in OBJECTIVES.items():
        tries, scenarios = (20_000, 16) if objective.scenarios else (100_000, 0)
        monkeypatch.setitem(OBJECTIVES, name, replace(objective, tries=tries, scenarios=scenarios))


@dataclass(frozen=True)
class Case:
    loads: Loads
    topology: Topology
    redundant: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Skewed loads in several windows; experts, and layers in some windows, without any."""
    topology = draw(
        st.one_of(topologies(), st.sampled_from([Topology(3, 5), Topology(2, 8), Topology(1, 1)]))
    )
    experts = draw(st.sampled_from([1, 2, 5, 16, 30]))
    redundant = draw(st.integers(0, min(experts, experts * (topology.ranks - 1))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    counts_WLE = rng.zipf(1.4, (draw(st.integers(1, 3)), 2, experts)).clip(0, 2000)
    counts_WLE *= rng.random(counts_WLE.shape) < draw(st.sampled_from([1.0, 0.6]))
    counts_WLE[0, 0, 0] = 1
    if len(counts_WLE) > 1:
        counts_WLE[1, 0] = 0
    return Case(Loads.of(counts_WLE, rng.uniform(0.5, 2, len(counts_WLE))), topology, redundant)


def zipf(seed: int, layers: int = 2, experts: int = 64, exponent: float = 0.8) -> Floats:
    rng = np.random.default_rng(seed)
    ranks = np.arange(1, experts + 1) ** -exponent
    return np.stack([rng.permutation(ranks) for _ in range(layers)]) * 1e5


def fullest(loads_LR: Floats) -> float:
    """Over the mean card, mean over the layers."""
    return float((loads_LR.max(1) / loads_LR.mean(1)).mean())


def check(placement: Placement, case: Case) -> None:
    """`Placement` refuses missing experts and two of one on a card itself."""
    assert placement.layers == case.loads.layers and placement.experts == case.loads.experts
    used = (placement.slots_LRS != EMPTY).sum(2)
    assert (used == rooms(case.loads.experts, case.topology, case.redundant)).all()


@given(topologies(), st.integers(1, 40), st.integers(0, 40))
def test_rooms_are_even_over_cards_and_nodes(topology: Topology, experts: int, redundant: int) -> None:
    room_R = rooms(experts, topology, redundant)
    assert room_R.sum() == experts + redundant and np.ptp(room_R) <= 1
    assert np.ptp(room_R.reshape(topology.nodes, -1).sum(1)) <= 1


@settings(max_examples=40)
@given(cases(), objectives)
def test_every_expert_is_placed_and_no_card_holds_more_than_its_room(case: Case, objective: str) -> None:
    made = balance(case.loads, case.topology, case.redundant, objective=objective)
    check(made, case)
    again = balance(case.loads, case.topology, case.redundant, objective=objective)
    np.testing.assert_array_equal(made.slots_LRS, again.slots_LRS)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_the_replicas_that_there_can_be(objective: str) -> None:
    loads = Loads.of(zipf(0, experts=6))
    made = balance(loads, Topology(2, 2), 18, objective=objective)
    assert (np.sort(made.slots_LRS, axis=2) == np.arange(6)).all()
    np.testing.assert_allclose(split_cards(made, loads.total_LE), even_cards(made, loads.total_LE), rtol=1e-4)


@settings(max_examples=50)
@given(cases(), objectives, st.data())
def test_an_old_placement_is_fitted_within_the_budget(
    case: Case, objective: str, data: st.DataObject
) -> None:
    """Any old one: other numbers of slots and empty ones. What does not fit has to move, whatever the budget is."""
    layers = [
        data.draw(placements(case.topology, case.loads.experts)).slots_LRS[0] for _ in case.loads.layers
    ]
    size = max(slots.shape[1] for slots in layers)
    padded = [np.pad(s, ((0, 0), (0, size - s.shape[1])), constant_values=EMPTY) for s in layers]
    old = Placement(np.stack(padded), case.loads.experts, case.loads.layers)

    def again(budget: int | None) -> Placement:
        return balance(case.loads, case.topology, case.redundant, old=old, budget=budget, objective=objective)

    fitted = again(0)
    check(fitted, case)
    parts = len(case.loads.layers)
    for more in (0, 1, 7):
        budget = parts * (max(_moves_by_layer(old, fitted)) + more)
        made = again(budget)
        check(made, case)
        assert moves(old, made) <= budget
    free = again(None)
    check(free, case)
    np.testing.assert_array_equal(free.slots_LRS, again(None).slots_LRS)


def _moves_by_layer(old: Placement, new: Placement) -> list[int]:
    one = [Placement(new.slots_LRS[i : i + 1], new.experts, (layer,)) for i, layer in enumerate(new.layers)]
    return [moves(old, part) for part in one]


@example(6, 5, 0)
@given(st.integers(2, 6), st.integers(1, 10), st.integers(0, 5))
def test_replicas_give_way_where_there_is_less_room(ranks: int, experts: int, redundant: int) -> None:
    """From every expert on every card, but for the first on the last: several replicas of one expert have to go."""
    everywhere = np.tile(np.arange(experts), (ranks, 1))
    everywhere[-1, 0] = EMPTY
    case = Case(Loads.of(zipf(1, 1, experts)), Topology(1, ranks), min(redundant, experts * (ranks - 1)))
    old = Placement(everywhere[None], experts, (0,))
    check(balance(case.loads, case.topology, case.redundant, old=old, budget=0), case)


@settings(max_examples=40)
@given(cases(), objectives)
def test_a_budget_of_nothing_leaves_all_where_it_is(case: Case, objective: str) -> None:
    old = balance(case.loads, case.topology, case.redundant, objective=objective, seed=1)
    shifted = replace(case.loads, counts_WLE=np.flip(case.loads.counts_WLE, axis=2))
    made = balance(shifted, case.topology, case.redundant, old=old, budget=0, objective=objective)
    assert moves(old, made) == 0
    assert (np.sort(made.slots_LRS) == np.sort(old.slots_LRS)).all()


def test_moves_are_experts_that_a_card_did_not_have() -> None:
    old = Placement(np.array([[[0, 1], [2, 3]], [[0, 1], [2, 3]]]), 4, (3, 5))
    new = Placement(np.array([[[1, 0], [2, 3]], [[0, 2], [1, 3]], [[2, 3], [0, 1]]]), 4, (3, 5, 9))
    assert moves(old, new) == 2 and moves(old, old) == 0


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_good_placement_is_left_alone(objective: str) -> None:
    loads = Loads.of(zipf(5))
    old = balance(loads, Topology(2, 4), 16, objective="known")
    assert fullest(even_cards(old, loads.total_LE)) < 1.04
    assert moves(old, balance(loads, Topology(2, 4), 16, old=old, objective=objective)) == 0


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_few_moves_bring_a_placement_back(objective: str) -> None:
    topology, counts_LE = Topology(2, 4), zipf(6, layers=3)
    old = balance(Loads.of(counts_LE), topology, 16, objective="known")
    shifted = counts_LE * np.random.default_rng(7).lognormal(0, 0.3, counts_LE.shape)
    made = balance(Loads.of(shifted), topology, 16, old=old, objective=objective)
    assert fullest(even_cards(made, shifted)) < 1.06 < fullest(even_cards(old, shifted))
    anew = balance(Loads.of(shifted), topology, 16, objective=objective)
    assert moves(old, made) < moves(old, anew) / 3


@pytest.mark.usefixtures("long")
def test_known_loads_are_level() -> None:
    """No card could have less than the mean; and where one expert alone has more, not less than that."""
    for seed, topology in enumerate([Topology(2, 4), Topology(3, 5), Topology(1, 7)]):
        counts_LE = zipf(seed, exponent=0.9)
        made = balance(Loads.of(counts_LE), topology, 2 * topology.ranks, objective="known")
        assert fullest(even_cards(made, counts_LE)) < 1.01
    steep = zipf(
        0, layers=1, experts=256, exponent=1.2
    )  # far more replicas of few experts than greedy rules find
    made = balance(Loads.of(steep), Topology(8, 8), 64, objective="known")
    assert fullest(even_cards(made, steep)) < 1.03
    hot = np.full((1, 16), 1.0)
    hot[0, 3] = 100
    made = balance(Loads.of(hot), Topology(1, 4), 0, objective="known")
    assert even_cards(made, hot).max() == 103  # all cards hold four


@pytest.mark.usefixtures("long")
def test_robust_is_ahead_of_eplb_when_loads_change() -> None:
    """Both with the split of every step; the mean over loads that differ from those that were planned for."""
    topology, ours, theirs = Topology(2, 8), [], []
    for seed in range(3):
        counts_LE = zipf(seed)
        loads, rng = Loads.of(counts_LE), np.random.default_rng(seed)
        plans = balance(loads, topology, 16), eplb(loads, topology, 16)
        for _ in range(6):
            changed = counts_LE * rng.lognormal(0, 0.45, counts_LE.shape)
            for found, plan in zip((ours, theirs), plans, strict=True):
                found.append(fullest(split_cards(plan, changed)) - 1)
    assert np.mean(ours) < 0.85 * np.mean(theirs)


@pytest.mark.usefixtures("long")
def test_local_sends_to_fewer_nodes() -> None:
    loads, topology = Loads.of(zipf(2), groups=8), Topology(4, 2)
    copies = {
        name: cross_node_copies(balance(loads, topology, 8, objective=name), loads, topology)
        for name in OBJECTIVES
    }
    assert copies["local"] < 0.97 * min(copies["known"], copies["robust"])


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_windows_count_by_their_rows(objective: str) -> None:
    """As the figures do: a window of few rows is worth little for even shares, however different it is."""
    large, small = 1e3 * zipf(3), zipf(4)
    loads = Loads.of(np.stack([large, small]))
    made = balance(loads, Topology(2, 4), 16, objective=objective)
    assert fullest(even_cards(made, loads.total_LE)) < 1.05


def test_cards_by_hand() -> None:
    placement = Placement(np.array([[[0, 1], [0, 2], [3, EMPTY]]]), 4, (0,))
    counts_LE = np.array([[6.0, 4, 1, 2]])
    np.testing.assert_allclose(even_cards(placement, counts_LE), [[7, 4, 2]])
    np.testing.assert_allclose(split_cards(placement, counts_LE), [[5.5, 5.5, 2]], atol=1e-4)


@settings(max_examples=40)
@given(cases())
def test_a_split_is_never_worse_than_even_shares(case: Case) -> None:
    placement = balance(case.loads, case.topology, case.redundant)
    total_LE = case.loads.total_LE
    even, split = even_cards(placement, total_LE), split_cards(placement, total_LE)
    np.testing.assert_allclose(even.sum(1), total_LE.sum(1))
    np.testing.assert_allclose(split.sum(1), total_LE.sum(1), rtol=1e-4)
    assert (split.max(1) <= even.max(1) + 1e-4 * total_LE.sum(1)).all()


def test_what_is_refused() -> None:
    loads, topology = Loads.of(zipf(0, experts=8)), Topology(2, 2)
    old = default_placement(8, loads.layers, topology)
    with pytest.raises(InputError, match="objective 'best' is not one of robust, known, local"):
        balance(loads, topology, objective="best")
    with pytest.raises(InputError, match="budget of -1 moves; must be at least 0"):
        balance(loads, topology, old=old, budget=-1)
    with pytest.raises(InputError, match="can use 24 at most"):
        balance(loads, topology, 25)
    with pytest.raises(InputError, match="at least 0"):
        balance(loads, topology, -1)
    for wrong in (
        default_placement(9, loads.layers, topology),
        default_placement(8, loads.layers, Topology(1, 3)),
    ):
        with pytest.raises(
            InputError, match=r"the old placement has . experts on . cards, but the loads are of 8"
        ):
            balance(loads, topology, old=wrong)
    with pytest.raises(InputError, match="the old placement has no layer 1"):
        balance(loads, topology, old=default_placement(8, [0, 7], topology))


def test_only_the_layers_of_the_loads_are_placed() -> None:
    counts_LE = np.concatenate([np.zeros((2, 16)), zipf(3, experts=16)])
    loads, topology = Loads.of(counts_LE), Topology(1, 4)
    old = default_placement(16, range(6), topology, 4)
    made = balance(loads, topology, 4, old=old)
    assert made.layers == (2, 3) and held(made.slots_LRS[0], 16).any(0).all()
