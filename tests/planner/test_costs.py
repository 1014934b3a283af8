"""Steps: what must hold of any deployment; the published steps that they stand for are judged by the benchmark."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from expertmesh.errors import InputError
from expertmesh.mesh.loads import Loads
from expertmesh.mesh.topology import Topology
from expertmesh.planner.cards import card, known_cards
from expertmesh.planner.costs import Step, accepted_tokens, decode_step, prefill_step
from expertmesh.planner.deployment import BALANCES, COLLECTIVE, Decode, Deployment, Load, Prefill
from expertmesh.planner.formats import CACHES, WEIGHTS
from expertmesh.planner.imbalance import busiest, highest, imbalance, measured, used
from expertmesh.planner.models import model
from expertmesh.planner.parameters import bounds, parameters
from expertmesh.planner.schedule import two_batches

V3 = model("deepseek-v3")
# What a card has more of only helps.
GAINS = ("memory_gbs", "bf16_tflops", "node_gbs", "across_gbs", "bulk_gbs")


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    topology = Topology(draw(st.sampled_from([1, 2, 8, 16])), 8, draw(st.sampled_from([1, 2, 8])))
    drafts = draw(st.integers(0, 3))
    return Deployment(
        model(draw(st.sampled_from(["deepseek-v3", "deepseek-v2-lite", "kimi-k2"]))),
        card(draw(st.sampled_from(known_cards()))),
        topology,
        expert_split=draw(st.sampled_from(["expert", "expert", "tensor"])),
        redundant=draw(st.sampled_from([0, 32])),
        weight_precision=draw(st.sampled_from(sorted(WEIGHTS))),
        cache_precision=draw(st.sampled_from(sorted(CACHES))),
        exchange=draw(st.sampled_from(["flat", "two_tier_int8", "two_tier_fp8_both", COLLECTIVE])),
        drafts=drafts,
        overlap=draw(st.booleans()),
        balance=draw(st.sampled_from(BALANCES)),
    )


loads = st.one_of(
    st.builds(Decode, st.floats(1, 500), st.floats(0, 1e5)),
    st.builds(lambda n, t: Prefill(t, n), st.floats(1, 1e5), st.floats(1, 32_768)),
)


def step(d: Deployment, load: Load) -> Step:
    return decode_step(d, load) if isinstance(load, Decode) else prefill_step(d, load)


@settings(max_examples=200, deadline=None)
@given(deployments(), loads)
def test_no_part_is_faster_than_its_resources(d: Deployment, load: Load) -> None:
    found = step(d, load)
    assert all(0 <= part.floor <= part.seconds * (1 + 1e-9) for part in found.parts)
    assert 0 < found.floor <= found.seconds
    assert found.seconds <= sum(part.seconds for part in found.parts) * (1 + 1e-9)
    assert len({part.name for part in found.parts}) == len(found.parts)
    if not d.overlap:
        assert found.seconds == pytest.approx(sum(found.by_part.values()))


@settings(max_examples=200, deadline=None)
@given(deployments(), loads, st.floats(1, 4))
def test_more_work_takes_longer(d: Deployment, load: Load, more: float) -> None:
    """But not in proportion. Noise of a step's loads may hide a little of it: fuller steps are more even."""
    grown = (
        replace(load, batch=load.batch * more)
        if isinstance(load, Decode)
        else replace(load, tokens=load.tokens * more)
    )
    less, much = step(d, load), step(d, grown)
    assert less.seconds <= much.seconds * 1.001 <= less.seconds * more * 1.01


@settings(max_examples=200, deadline=None)
@given(deployments(), loads, st.sampled_from(GAINS), st.floats(1, 4))
def test_a_better_card_is_no_slower(d: Deployment, load: Load, name: str, more: float) -> None:
    better = replace(d.card, **{name: getattr(d.card, name) * more})
    assert step(replace(d, card=better), load).seconds <= step(d, load).seconds * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(deployments(), st.floats(1, 200), st.floats(1, 1e4))
def test_longer_contexts_take_longer(d: Deployment, batch: float, context: float) -> None:
    assert (
        decode_step(d, Decode(batch, context)).seconds <= decode_step(d, Decode(batch, 2 * context)).seconds
    )


@settings(max_examples=100, deadline=None)
@given(deployments(), loads)
def test_balance_only_helps(d: Deployment, load: Load) -> None:
    assume(d.expert_split == "expert")
    uneven, even = (replace(d, imbalance=value) for value in (2.0, 1.0))
    assert step(even, load).seconds <= step(uneven, load).seconds


def test_drafts_pay_while_memory_decides() -> None:
    one = Deployment(V3, card("h800"), Topology(4, 8, 1))
    plain, drafted = (decode_step(replace(one, drafts=n), Decode(8, 4096)) for n in (0, 1))
    assert accepted_tokens(replace(one, drafts=1)) == pytest.approx(1.78)
    assert plain.seconds < drafted.seconds < 1.5 * plain.seconds
    assert drafted.tokens / drafted.seconds > 1.2 * plain.tokens / plain.seconds


def test_what_decoding_is_bound_by() -> None:
    """Attention over latents is bound by arithmetic where a card has little of it (H20), by memory where much; slow
    links bind the exchange of wide expert parallelism."""
    slow, fast = (
        decode_step(Deployment(V3, card(name), Topology(2, 8, 1)), Decode(64, 8192))
        for name in ("h20", "gb200")
    )
    bounds_of = [{part.name: part.bound for part in found.parts} for found in (slow, fast)]
    assert bounds_of[0]["attention"] == "compute" and slow.bound == "compute"
    wide = decode_step(Deployment(V3, card("h800"), Topology(16, 8, 1), exchange="flat"), Decode(256, 2048))
    assert wide.bound == "link across"
    assert decode_step(Deployment(V3, card("h200"), Topology(1, 8, 8)), Decode(1, 100)).bound == "latency"


def test_two_batches() -> None:
    """Travel hides behind computing, and the longer of the two decides; nothing is hidden of what is alone."""
    assert two_batches([(2.0, False), (1.0, True)]) == pytest.approx(4.0, rel=0.01)
    assert two_batches([(1.0, False), (3.0, True)]) == pytest.approx(6.0, rel=0.01)
    assert two_batches([(2.0, False)]) == pytest.approx(4.0, rel=0.01)
    assert two_batches([(1.0, False), (1.0, True), (1.0, False), (1.0, True)]) == pytest.approx(4.0, rel=0.01)


def test_imbalance() -> None:
    """The noise of a step as it was measured on 64 cards at 8, 32 and 128 tokens of a card."""
    d = Deployment(V3, card("h800"), Topology(8, 8, 1), imbalance=1.0)
    found = [imbalance(d, 8.0 * tokens, parameters()) for tokens in (8, 32, 128)]
    assert found == pytest.approx([1.31, 1.15, 1.07], abs=0.02)
    assert [highest(n) for n in (1, 2, 64)] == pytest.approx([0, 0.56, 2.39], abs=0.06)
    assert 0 < used(d, 1.0, parameters()) < used(replace(d, balance="perfect"), 1.0, parameters()) < 1


@given(st.integers(1, 64), st.integers(1, 320), st.floats(0, 1), st.floats(0, 1))
def test_the_busiest_rank_uses_more_slots_the_more_are_used(
    slots: int, ranks: int, one: float, other: float
) -> None:
    less, more = (busiest(slots, share, ranks) for share in sorted((one, other)))
    assert less <= more * (1 + 1e-9) and slots * max(one, other) <= more * (1 + 1e-9) and more <= slots


def test_imbalance_of_recorded_loads() -> None:
    """By the project's own balancer: replicas level loads that are known, others less so."""
    rng = np.random.default_rng(0)
    before = Loads.of(rng.lognormal(sigma=1.0, size=(1, 64)))
    after = Loads.of(before.total_LE * rng.lognormal(sigma=0.5, size=(1, 64)))
    topology = Topology(2, 4, 1)
    placed = measured(before, topology, 8, objective="known")
    assert 1.0 <= placed < measured(before, topology, 8, after, "known") < 2.0
    assert measured(before, topology) > placed


def test_parameters_are_plausible() -> None:
    for name, limit in bounds().items():
        assert (
            limit.low <= getattr(parameters(), name) <= limit.high and limit.low <= limit.prior <= limit.high
        )
        assert limit.unit and limit.meaning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exchange": "three_tier"}, "exchange 'three_tier' is not one of flat"),
        ({"weight_precision": "fp7"}, "weight precision 'fp7' is not one of bf16"),
        ({"cache_precision": "fp4"}, "cache precision 'fp4' is not one of"),
        ({"balance": "good"}, "balance 'good' is not one of"),
        ({"expert_split": "half"}, "expert split 'half' is not one of"),
        ({"dispatch": "fp4"}, "dispatch 'fp4' is not one of"),
        ({"drafts": -1}, "must be at least 0"),
        ({"drafts": 1, "accepted": 3.0}, "it must be from 1 to 2"),
        ({"imbalance": 0.5}, "must be at least 1"),
    ],
)
def test_deployments_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(Deployment(V3, card("h800"), Topology(1, 8, 1)), **change)  # type: ignore[arg-type]


def test_loads_that_cannot_be() -> None:
    with pytest.raises(InputError, match="a step of 0 requests"):
        Decode(0, 100)
    with pytest.raises(InputError, match="some"):
        Prefill(100, 50, 50)


@pytest.mark.parametrize("load", [Decode(16, 4096), Prefill(16384, 4096)], ids=["decode", "prefill"])
def test_a_cache_is_of_account_as_far_as_it_holds_the_weights(load: Load) -> None:
    plain = Deployment(model("deepseek-v2-lite"), card("h100"), Topology(1, 1, 1), weight_precision="bf16")
    cached = [
        step(replace(plain, card=replace(plain.card, cache_mb=mb, cache_gbs=20_000)), load).seconds
        for mb in (1e-6, 50, 1e5)
    ]
    assert cached == sorted(cached, reverse=True)
    assert step(plain, load).seconds == pytest.approx(cached[0])
    assert cached[1] > 0.98 * cached[0]


def test_starts_of_kernels_take_longer_where_no_graph_is_run_again() -> None:
    d = Deployment(V3, card("h100"), Topology(1, 8, 1))
    slow = replace(parameters(), eager_us=1000.0)
    assert decode_step(d, Decode(8, 1024), slow).seconds == decode_step(d, Decode(8, 1024)).seconds
    more = prefill_step(d, Prefill(128, 128), slow).seconds - prefill_step(d, Prefill(128, 128)).seconds
    kernels = V3.num_hidden_layers * slow.layer_kernels + 4  # of the head
    assert more == pytest.approx((slow.eager_us - parameters().eager_us) * 1e-6 * kernels)


def test_several_ranks_have_to_be_told_of_a_step() -> None:
    slow = replace(parameters(), ranks_us=5000.0)
    for ranks, more in ((1, 0.0), (8, 5e-3 - parameters().ranks_us * 1e-6)):
        d = Deployment(V3, card("h100"), Topology(1, ranks, 1))
        gained = decode_step(d, Decode(8, 1024), slow).seconds - decode_step(d, Decode(8, 1024)).seconds
        assert gained == pytest.approx(more)
