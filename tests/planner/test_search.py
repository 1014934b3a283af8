"""The search: it loses nothing of what an exhaustive one finds, and finds what is known of clusters."""

from dataclasses import replace
from itertools import product
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import InputError
from expertmesh.mesh.loads import Loads
from expertmesh.mesh.topology import Topology
from expertmesh.planner.advice import advise
from expertmesh.planner.cards import card
from expertmesh.planner.deployment import COLLECTIVE
from expertmesh.planner.loaded import judged
from expertmesh.planner.memory import most_requests
from expertmesh.planner.models import model
from expertmesh.planner.nearest import refusal
from expertmesh.planner.plans import Limits, Plan, fitted, front, knee
from expertmesh.planner.search import Search, search
from expertmesh.planner.serving import Service, Workload
from expertmesh.planner.space import Cluster, Space, best_weights

V3, LITE, ASCEND = model("deepseek-v3"), model("deepseek-v2-lite"), card("ascend-910b")
WORK = Workload(3500, 1500)
EVERY_WAY = [(COLLECTIVE, None, None)] + [
    (name, there, back)
    for name in ("flat", "two_tier")
    for there in (None, "int8")
    for back in (None, "int8")
]


def exhaustive(space: Space, work: Workload, limits: Limits) -> float:
    """Most tokens/s: each layout, with every exchange, fitted by itself, and each pair that decodes and prefills."""
    best, cluster = 0.0, space.cluster
    spaces = [space]
    if space.exchange is None:
        spaces = [replace(space, exchange=e, dispatch=t, combine=b) for e, t, b in EVERY_WAY]
    for one in spaces:
        for size in cluster.sizes():
            n = cluster.instances(size, cluster.nodes)
            for tp, _ in product(one.tps(size), range(n > 0)):
                for d in one.layouts(size, tp):
                    plan = fitted(Service(d, n), "together", work, limits)
                    best = max(best, plan.outcome.tokens if plan and space.mode != "apart" else 0.0)
    return max(best, _pairs(space, work, limits) if space.mode != "together" else 0.0)


def _pairs(space: Space, work: Workload, limits: Limits) -> float:
    best, cluster, search_ = 0.0, space.cluster, Search(space, work, [limits.tpot])
    for k in range(1, cluster.nodes):
        for size, other in product(cluster.sizes(), cluster.sizes()):
            n, m = cluster.instances(size, cluster.nodes - k), cluster.instances(other, k)
            for tp, tp2 in product(space.tps(size) if n else (), space.tps(other) if m else ()):
                for d, p in product(space.layouts(size, tp), space.layouts(other, tp2, prefill=True)):
                    if search_.prefills(p):
                        plan = fitted(Service(d, n, p, m), "apart", work, limits)
                        best = max(best, plan.outcome.tokens if plan else 0.0)
    return best


def best_of(space: Space, work: Workload, limits: Limits) -> float:
    return max((plan.outcome.tokens for plan in search(space, work, limits)), default=0.0)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([(1, 2), (2, 2), (1, 4), (3, 1)]),
    st.floats(100, 8000),
    st.floats(20, 4000),
    st.sampled_from([0.005, 0.01, 0.02, 0.05, inf]),
    st.sampled_from([0.3, 0.6, 2.0, inf]),
    st.sampled_from(["ascend-910b", "h20", "h100"]),
)
def test_pruning_loses_nothing_together(
    size: tuple[int, int], tokens: float, output: float, tpot: float, ttft: float, name: str
) -> None:
    space = Space(Cluster(card(name), *size), LITE, mode="together")
    work, limits = Workload(tokens, output), Limits(tpot, ttft)
    assert best_of(space, work, limits) == pytest.approx(exhaustive(space, work, limits), rel=0.01)


@settings(max_examples=8, deadline=None)
@given(
    st.floats(100, 8000),
    st.floats(20, 4000),
    st.sampled_from([0.005, 0.01, 0.03, inf]),
    st.sampled_from([0.3, 1.0, inf]),
)
def test_pruning_loses_nothing_apart(tokens: float, output: float, tpot: float, ttft: float) -> None:
    space = Space(Cluster(ASCEND, 3, 2), LITE, mode="apart", redundant=0, exchange="two_tier_int8")
    work, limits = Workload(tokens, output), Limits(tpot, ttft)
    assert best_of(space, work, limits) == pytest.approx(exhaustive(space, work, limits), rel=0.01)


def test_the_front_has_the_best_of_each_limit() -> None:
    space = Space(Cluster(ASCEND, 2, 4), LITE)
    tpots = [0.005, 0.01, 0.02, 0.05, inf]
    points = front(Search(space, WORK, tpots).plans())
    for tpot in tpots:
        best = max((p.outcome.tokens for p in points if p.outcome.tpot <= tpot), default=0.0)
        assert best == pytest.approx(best_of(space, WORK, Limits(tpot)), rel=0.03)
    assert knee(points) in points
    assert [p.outcome.tpot for p in points] == sorted(p.outcome.tpot for p in points)
    assert [p.outcome.tokens for p in points] == sorted(p.outcome.tokens for p in points)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([0.02, 0.05, 0.1]),
    st.sampled_from([1.0, 3.0, inf]),
    st.sampled_from(["h20", "ascend-910b"]),
)
def test_more_is_never_worse(tpot: float, ttft: float, name: str) -> None:
    """More time, and more nodes."""
    space, limits = Space(Cluster(card(name), 2, 4), LITE), Limits(tpot, ttft)
    now = best_of(space, WORK, limits)
    assert now <= best_of(space, WORK, Limits(tpot * 1.5, ttft)) * 1.005
    assert now <= best_of(space, WORK, Limits(tpot, ttft * 1.5)) * 1.005
    larger = replace(space, cluster=Cluster(card(name), 4, 4))
    assert now <= best_of(larger, WORK, limits) * 1.005


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return search(Space(Cluster(ASCEND, 8, 8), V3), WORK, Limits(0.05, 2.0))


def test_plans_keep_limits_and_memory(plans: list[Plan]) -> None:
    assert len(plans) > 5 and {plan.mode for plan in plans} == {"apart", "together"}
    for plan in plans:
        assert plan.cards == 64
        assert plan.outcome.tpot <= 0.05 and plan.outcome.ttft <= 2.0
        assert plan.outcome.batch <= plan.most_batch <= most_requests(plan.service.decode, WORK.context)
        assert plan.outcome.tokens <= plans[0].outcome.tokens * 1.005
    assert len({plan.key for plan in plans}) == len(plans)


def decoded(tp: int, tpot: float) -> float:
    """Decode alone on 64 cards with EP64, without drafts, as the arithmetic of the announced result has it."""
    space = Space(
        Cluster(ASCEND, 8, 8),
        V3,
        mode="elsewhere",
        attention_tp=tp,
        drafts=0,
        cache="bf16",
        exchange="two_tier_int8",
    )
    found = [p for p in search(space, WORK, Limits(tpot)) if p.service.decode.topology.nodes == 8]
    return max((p.outcome.tokens for p in found), default=0.0)


@pytest.mark.parametrize(("tpot", "least"), [(0.05, 1.2), (0.075, 1.5), (0.1, 2.0)])
def test_whole_attention_beats_split_attention_on_64_cards(tpot: float, least: float) -> None:
    """Where attention is split over 8 cards the latent cache is stored 8 times."""
    assert max(decoded(tp, tpot) for tp in (1, 2)) > least * decoded(8, tpot)


def test_advice_is_ranked_and_helps(plans: list[Plan]) -> None:
    advice = advise(plans, Limits(0.05, 2.0))
    assert [a.gain for a in advice] == sorted((a.gain for a in advice), reverse=True)
    assert all(a.gain > 0 and a.tpot_ms <= 60 for a in advice)
    changes = {a.change: a for a in advice}
    assert changes["one more node"].cards == 72 and changes["one more node"].per_card < 0.2
    assert any("compute" in change for change in changes)


def test_recorded_loads_decide_over_the_usual_skew() -> None:
    """Replicas level loads of which one expert has far more than a rank's share; the same for all need none."""
    space = Space(Cluster(card("h20"), 2, 2), LITE, mode="together")
    limits = Limits(0.05)
    plans = [plan for plan in search(space, WORK, limits) if plan.service.decode.ranks == 4]
    counts = np.ones((2, 64)) + 400 * (np.arange(64) == 5)
    uneven, even = (judged(plans, Loads.of(c), limits) for c in (counts, np.ones((2, 64))))
    assert uneven[0].service.decode.redundant > 0
    assert even[0].service.decode.imbalance == pytest.approx(1.0)
    assert even[0].outcome.tokens >= uneven[0].outcome.tokens


def test_choices_that_are_pinned_are_kept() -> None:
    space = Space(
        Cluster(card("h800"), 4, 8), V3, attention_tp=2, redundant=32, weights="fp8", cache="bf16", exchange="flat",
        dispatch="fp8", drafts=1, overlap=True, mode="together", balance="perfect",
    )  # fmt: skip
    for plan in search(space, WORK, Limits(0.1)):
        d = plan.service.decode
        assert (d.topology.tp, d.redundant, d.weight_precision, d.cache_precision) == (2, 32, "fp8", "bf16")
        assert (d.exchange, d.dispatch, d.drafts, d.overlap, d.balance) == ("flat", "fp8", 1, True, "perfect")
        assert plan.service.prefill is None


def test_sizes() -> None:
    cluster = Cluster(card("gb200"), 18, 4)
    sizes = cluster.sizes()
    assert sizes[:3] == [Topology(1, 1), Topology(1, 2), Topology(1, 4)] and sizes[-1] == Topology(18, 4)
    assert cluster.instances(Topology(6, 4), 18) == 3 and cluster.instances(Topology(5, 4), 18) == 0
    assert cluster.instances(Topology(1, 2), 18) == 36
    assert Cluster(card("ascend-910c"), 4, 8).ranks_per_node == 16
    assert len(Cluster(card("h800"), 2048, 8).sizes()) < 64


def test_weights_that_a_card_multiplies() -> None:
    assert best_weights(card("h800"), V3) == "fp8"
    assert best_weights(ASCEND, V3) == "int8"
    assert best_weights(card("h800"), LITE) == "int8"  # whose checkpoint is in bfloat16


@pytest.mark.parametrize(
    ("size", "limits", "message"),
    [
        ((8, 8), Limits(0.002), "no layout has a TPOT of 2 ms; the lowest is"),
        (
            (8, 8),
            Limits(0.1, 0.21),
            "no layout has a TTFT of 210 ms with a TPOT of at most 100 ms; the lowest is",
        ),
        ((1, 8), Limits(0.1), r"need 8\d\.\d GB a rank, .* it takes 2 nodes of 8, or fewer bits"),
    ],
)
def test_what_is_nearest(size: tuple[int, int], limits: Limits, message: str) -> None:
    space = Space(Cluster(ASCEND, *size), V3, drafts=0, redundant=0)
    assert not search(space, WORK, limits)
    error = refusal(space, WORK, limits)
    with pytest.raises(InputError, match=message):
        raise error
    if limits.tpot == 0.002:  # and that is within reach
        lowest = float(str(error).split("lowest is ")[1].split(" ms")[0]) / 1e3
        assert search(space, WORK, Limits(lowest * 1.01))
        assert not search(space, WORK, Limits(lowest * 0.98))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_tp": 3}, "attention_tp 3 does not divide the 8 cards"),
        ({"weights": "fp7"}, "weight precision 'fp7' is not one of"),
        ({"cache": "fp4"}, "cache precision 'fp4' is not one of"),
        ({"exchange": "three_tier"}, "exchange 'three_tier' is not one of"),
        ({"dispatch": "fp4"}, "dispatch 'fp4' is not one of"),
        ({"drafts": 4}, "plan for 0 to 3"),
        ({"redundant": -1}, "-1 redundant slots"),
        ({"accepted": 1.5}, "say with how many drafts"),
        ({"model": LITE, "drafts": 1}, "no layer for them; plan for 0"),
        ({"cluster": (0, 8)}, "at least 1 of each"),
    ],
)
def test_choices_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        if "cluster" in change:
            Cluster(ASCEND, *change["cluster"])  # type: ignore[misc]
        replace(Space(Cluster(ASCEND, 8, 8), V3), **change)  # type: ignore[arg-type]
