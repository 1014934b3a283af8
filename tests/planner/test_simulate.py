"""Simulated services: nothing is lost, queues are those of theory, limits are those of the cost model."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import InputError
from expertmesh.mesh.topology import Topology
from expertmesh.planner.arrivals import Arrival, poisson
from expertmesh.planner.cards import card
from expertmesh.planner.costs import accepted_tokens, decode_step
from expertmesh.planner.deployment import Decode, Deployment
from expertmesh.planner.memory import DECODING_ROWS, RESERVED, cache_bytes, room
from expertmesh.planner.models import model
from expertmesh.planner.serving import ADMISSION, Service, Workload, prefill_time, serve
from expertmesh.planner.serving import chunk as full_chunk
from expertmesh.planner.simulate import Percentiles, Report, pages_of, simulate

SMALL = Deployment(model("deepseek-v2-lite"), card("h200"), Topology(1, 1, 1))
GROUPS = Deployment(model("deepseek-v3"), card("ascend-910b"), Topology(4, 8, 4), weight_precision="int8")
SERVICES = {
    "one": Service(SMALL),
    "groups": Service(GROUPS),
    "instances": Service(GROUPS, 2),
    "drafts": Service(replace(GROUPS, drafts=2)),
    "apart": Service(GROUPS, 2, GROUPS, 1),
}  # fmt: skip
REQUESTS = st.lists(
    st.builds(Arrival, st.floats(0, 20), st.integers(1, 20_000), st.integers(1, 3000)), min_size=1, max_size=40
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(SERVICES)), REQUESTS, st.sampled_from([None, 1, 5]), st.sampled_from([None, 64, 1000]),
    st.sampled_from([0.0, 2.0]),
)  # fmt: skip
def test_nothing_is_lost(
    name: str, arrivals: list[Arrival], concurrency: int | None, chunk: float | None, gather: float
) -> None:
    service = SERVICES[name]
    found = simulate(service, arrivals, concurrency=concurrency, chunk=chunk, gather=gather, seed=1)
    assert found.finished == len(arrivals) and not found.rejected
    assert found.output == sum(a.output for a in arrivals)
    assert found.output == pytest.approx(found.tokens * found.seconds)
    assert 0 < found.pages <= 1
    for times in (found.ttft, found.tpot, found.total):
        assert times is None or 0 < times.p50 <= times.p90 <= times.p99
    assert (found.tpot is None) == all(a.output == 1 for a in arrivals)
    assert found.total and found.present == pytest.approx(found.finished / found.seconds * found.total.mean)
    if concurrency is not None:
        assert found.present <= concurrency * (1 + 1e-9)
    again = simulate(service, arrivals, concurrency=concurrency, chunk=chunk, gather=gather, seed=1)
    assert again == found


@settings(max_examples=25, deadline=None)
@given(st.integers(300, 4000), st.integers(2, 2000), st.integers(10, 60), st.integers(1, 128))
def test_no_pages_beyond_those_there_are(length: int, output: int, requests: int, page: int) -> None:
    """A cache of a few requests: the youngest gives way and is computed again, and all are done in the end."""
    tight = with_room(3 * (length + output) + 2 * page)
    found = simulate(Service(tight), [Arrival(0.0, length, output)] * requests, page=page)
    assert found.finished == requests and found.output == requests * output
    assert found.pages <= 1
    assert found.batch <= pages_of(tight, page) * page / length


def with_room(tokens: int) -> Deployment:
    """On a card that has room for so many tokens beside the weights and the largest step of prefill."""
    rows = full_chunk(SMALL) / SMALL.topology.tp
    wanted = tokens * cache_bytes(SMALL) - room(SMALL, max(rows, DECODING_ROWS))
    memory = SMALL.card.memory_gb + wanted / 1e9 / (1 - RESERVED)
    return replace(SMALL, card=replace(SMALL.card, memory_gb=memory + 1e-9))


def test_what_never_fits_is_rejected() -> None:
    tokens = pages_of(SMALL) * 128
    fits, never = Arrival(0.0, 1000, 10), Arrival(0.0, tokens, 10)
    found = simulate(SERVICES["one"], [fits, never, fits])
    assert (found.finished, found.rejected) == (2, 1)
    assert simulate(SERVICES["one"], [never, fits], concurrency=1).finished == 1
    with pytest.raises(InputError, match="none of 1 requests fits"):
        simulate(SERVICES["one"], [never])


@pytest.mark.parametrize("use", [0.3, 0.6, 0.8])
def test_prompts_wait_as_in_an_m_d_1_queue(use: float) -> None:
    """One token of output, a prompt in each step: Poisson arrivals at one server that takes as long for each (Pollaczek
    and Khinchine)."""
    work = Workload(4000, 1)
    alone = prefill_time(SMALL, work, prompts=1)
    found = simulate(SERVICES["one"], poisson(use / alone, 40_000, work), chunk=4000)
    assert found.ttft and found.total and found.ttft == found.total and found.tpot is None
    waited = found.ttft.mean - ADMISSION
    assert waited == pytest.approx(alone * (1 + use / (2 * (1 - use))), rel=0.06)
    assert found.ttft.p50 >= ADMISSION + alone * 0.999


@pytest.mark.parametrize("name", ["one", "groups", "apart"])
def test_a_request_that_is_alone_waits_for_nothing(name: str) -> None:
    """TTFT is the time of its prompt, TPOT that of a step with one request in one of the groups."""
    service, work = SERVICES[name], Workload(4000, 400)
    found = simulate(service, [Arrival(i * 1e3, 4000, 400) for i in range(5)])
    assert found.ttft and found.tpot and found.ttft.p50 == pytest.approx(found.ttft.p99)
    groups = service.decode.topology.groups
    level, full = (prefill_time(service.decode, work, prompts=n) for n in (1 / groups, 1))
    assert level * 0.999 <= found.ttft.mean - ADMISSION <= full * 1.001
    low, high = (decode_step(service.decode, Decode(n, 4200.0)).seconds for n in (1 / groups, 1))
    transfer = 4000 * 70_272 / (service.decode.card.across_gbs * 1e9) * 1.2 / 400 if service.prefill else 0.0
    assert low * 0.99 <= found.tpot.mean <= high * 1.01 + transfer
    assert found.queue == pytest.approx(0.0, abs=1e-9) and found.preemptions == 0


@pytest.mark.parametrize("requests", [4, 32])
@pytest.mark.parametrize("apart", [False, True])
def test_a_closed_loop_is_what_serving_says(apart: bool, requests: int) -> None:
    """Where each step of prefill has one prompt, and there is one group, nothing is averaged away."""
    service = Service(SMALL, 1, SMALL, 2) if apart else SERVICES["one"]
    work = Workload(16_384, 500)
    lengths = [Arrival(0.0, 16_384, 1 + (i * 617) % 1000) for i in range(2000)]
    found, said = simulate(service, lengths, concurrency=requests), serve(service, work, requests)
    assert found.tokens == pytest.approx(said.tokens, rel=0.15)
    assert found.batch == pytest.approx(said.batch, rel=0.2)


@pytest.mark.parametrize(("requests", "gather"), [(16, 0.0), (200, 1.0), (400, 1.0)])
def test_a_closed_loop_of_many_groups_is_nearly_what_serving_says(requests: int, gather: float) -> None:
    """Which takes steps of prefill to be filled to some share; here prompts gather for a second."""
    work = Workload(3500, 1500)
    lengths = [Arrival(0.0, 3500, 1 + (i * 617) % 2999) for i in range(20 * requests)]
    found = simulate(SERVICES["groups"], lengths, concurrency=requests, gather=gather)
    said = serve(SERVICES["groups"], work, requests)
    assert found.tokens == pytest.approx(said.tokens, rel=0.2)
    assert found.tpot and found.tpot.p50 == pytest.approx(said.tpot, rel=0.25)


def test_drafts_are_accepted_as_often_as_is_said() -> None:
    plain, drafts = SERVICES["groups"], SERVICES["drafts"]
    one = [Arrival(0.0, 100, 20_001)]
    slow, fast = simulate(plain, one), simulate(drafts, one)
    assert slow.tpot and fast.tpot
    steps = [decode_step(s.decode, Decode(1 / 8, 10_100.0)).seconds for s in (plain, drafts)]
    expected = steps[1] / steps[0] / accepted_tokens(drafts.decode)
    assert fast.tpot.mean / slow.tpot.mean == pytest.approx(expected, rel=0.05)
    assert simulate(drafts, one, seed=1) != fast == simulate(drafts, one)


def test_prompts_that_gather_disturb_less() -> None:
    """Of several groups, a step for one takes nearly as long as a step for all."""
    arrivals = [Arrival(0.0, 3500, 1 + (i * 617) % 1000) for i in range(800)]
    at_once, gathered = (
        simulate(SERVICES["groups"], arrivals, concurrency=200, gather=g) for g in (0.0, 1.0)
    )
    assert gathered.tpot and at_once.tpot and gathered.tpot.p50 < 0.9 * at_once.tpot.p50
    assert gathered.tokens > at_once.tokens


def test_more_arrivals_wait_longer() -> None:
    work = Workload(3500, 300)
    found = [simulate(SERVICES["groups"], poisson(rate, 500, work)) for rate in (0.1, 1.0, 5.0)]
    for name in ("ttft", "tpot", "total"):
        means = [percentiles(report, name).mean for report in found]
        assert means == sorted(means)


def percentiles(report: Report, name: str) -> Percentiles:
    value = getattr(report, name)
    assert isinstance(value, Percentiles)
    return value


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ({"concurrency": 0}, "at any time"), ({"chunk": 0.5}, "chunks"), ({"chunk": float("nan")}, "chunks"),
        ({"page": 0}, "pages"), ({"gather": -1.0}, "gather"), ({"gather": float("nan")}, "gather"),
    ],
)  # fmt: skip
def test_what_cannot_be(more: dict[str, float], wrong: str) -> None:
    with pytest.raises(InputError, match=wrong):
        simulate(SERVICES["one"], [Arrival(0.0, 10, 10)], **more)  # type: ignore[arg-type]


def test_a_service_must_have_room_and_requests() -> None:
    with pytest.raises(InputError, match="no requests"):
        simulate(SERVICES["one"], [])
    large = Deployment(GROUPS.model, GROUPS.card, Topology(1, 8, 8), weight_precision="int8")
    with pytest.raises(InputError, match="the weights and the rows of a step leave"):
        simulate(Service(large), [Arrival(0.0, 10, 10)])
