"""Snapshots against the engine that they are of."""

from dataclasses import replace

import msgpack
import numpy as np
import pytest

from expertmesh import LLM, SamplingParams, Topology
from expertmesh.engine import telemetry
from expertmesh.engine.arrays import from_plain
from expertmesh.engine.balancer import BalanceState
from expertmesh.engine.telemetry import News, Telemetry
from tests.support.states import state_of

PARAMS = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every snapshot reads the ranks' counters."""
    monkeypatch.setattr(telemetry, "READING", 0.0)
    monkeypatch.setattr(telemetry, "SHARE", 1e9)


def keys(value: object) -> object:
    """The shape of plain data: names, and kinds of values."""
    if isinstance(value, dict):
        return {key: keys(each) for key, each in value.items()}
    return type(value).__name__


@pytest.mark.parametrize("ranks", ["threads", "processes"])
def test_it_tells_what_the_engine_knows(at_once: None, ranks: str) -> None:
    options = {"ranks": ranks, "redundant": 16, "rebalance": "every=4", "cache_tokens": 512, "overlap": "off"}
    with LLM(topology=Topology(2, 2), **options) as llm:  # type: ignore[arg-type]
        told = Telemetry(llm.engine)
        told.snapshot()
        llm.generate(["Once upon a time", "def main("], PARAMS)
        found = msgpack.unpackb(msgpack.packb(told.snapshot()))
        counts = llm.engine.ranks.loads()
        total_LE = from_plain(found["experts"]["total"])
        assert np.array_equal(total_LE, np.stack([rows.numpy() for rows in counts.values()]))
        assert (from_plain(found["experts"]["recent"]) <= total_LE).all()
        assert found["experts"]["layers"] == list(counts)
        cards_LR = from_plain(found["experts"]["cards"])
        assert cards_LR.sum(1) == pytest.approx(from_plain(found["experts"]["recent"]).sum(1))
        assert found["experts"]["imbalance"] == pytest.approx(cards_LR.max(1) / cards_LR.mean(1))
        assert llm.engine.balancer is not None
        slots = llm.engine.balancer.placement.slots_LRS
        assert np.array_equal(from_plain(found["placement"]["slots"]), slots)
        sent = llm.engine.ranks.sent()
        purposes = {purpose for each in sent for purpose in each.bytes}
        for purpose in purposes:
            sizes = [sum(s.in_node(purpose) for s in sent), sum(s.across(purpose) for s in sent)]
            assert found["links"]["bytes"][purpose] == sizes
        nodes = np.array(found["links"]["nodes"])
        assert np.trace(nodes) == sum(inside for inside, _ in found["links"]["bytes"].values())
        assert nodes.sum() - np.trace(nodes) == sum(far for _, far in found["links"]["bytes"].values())
        assert len(found["ranks"]) == 4
        assert [one["pid"] for one in found["ranks"]] == (llm.engine.ranks.pids or [None] * 4)
        assert found["tokens"]["generated"] == 24 and found["requests"]["finished"] == {"length": 2}
        assert found["parts"]["steps"] >= 1 and len(found["parts"]["seconds"]) == 4
        llm.engine.ranks.reset()
        assert [steps for steps, _ in llm.engine.ranks.parts()] == [0] * 4


def test_what_is_made_up_for_other_tests_has_its_shape(at_once: None) -> None:
    with LLM(topology=Topology(1, 2), rebalance="auto", cache_tokens=256) as llm:
        llm.generate(["Once"], PARAMS)
        found = Telemetry(llm.engine).snapshot()
    made = state_of()
    for name in (
        "experts",
        "placement",
        "cache",
        "steps",
        "recent",
        "balance",
        "parts",
        "queue",
        "tokens",
        "model",
    ):
        assert set(found[name]) == set(made[name]), name
    assert set(made) - {"problem"} == set(found)
    assert set(found["links"]) == set(made["links"])
    assert set(found["cluster"]) == set(made["cluster"])
    assert set(found["ranks"][0]) == set(made["ranks"][0])


def test_requests_that_run_and_wait(tiny_folder: str) -> None:
    llm = LLM(tiny_folder, page_size=4, max_batch_requests=1)
    told = Telemetry(llm.engine)
    llm.engine.submit([3, 4, 5], PARAMS, "first")
    llm.engine.submit([6, 7], PARAMS, "second")
    llm.engine.step()
    found = told.snapshot()["requests"]
    assert (found["running"], found["waiting"], found["submitted"]) == ([1], [1], 2)
    first, second = found["list"]
    assert (first["id"], first["state"], first["prompt"], first["output"]) == ("first", "running", 3, 1)
    assert (second["id"], second["state"], second["computed"]) == ("second", "waiting", 0)
    assert first["age"] >= second["age"] >= 0
    llm.engine.abort_all()


def test_nobody_is_asked_while_nothing_is_computed(
    at_once: None, tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(tiny_folder, page_size=4)
    told = Telemetry(llm.engine)
    llm.generate([[3, 4, 5]], PARAMS)
    asked: list[int] = []
    loads = llm.engine.ranks.loads
    monkeypatch.setattr(llm.engine.ranks, "loads", lambda: asked.append(1) or loads())
    told.snapshot()
    found = told.snapshot()
    assert len(asked) == 1
    assert found["recent"]["steps"] == 0 and not from_plain(found["experts"]["recent"]).any()
    assert from_plain(found["experts"]["total"]).sum() > 0


def test_a_costly_reading_is_seldom(tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that each look at the ranks moves by a second: the next look is 200 s away."""
    llm = LLM(tiny_folder, page_size=4)
    now = [100.0]
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now[0])
    told, asked = Telemetry(llm.engine), []
    loads = llm.engine.ranks.loads

    def slow() -> object:
        asked.append(now[0])
        now[0] += 1.0
        return loads()

    monkeypatch.setattr(llm.engine.ranks, "loads", slow)
    for _ in range(500):
        llm.engine.tally.steps += 1
        now[0] += 1.0
        assert told.due
        told.snapshot()
    assert np.diff(asked) == pytest.approx(200.0, abs=2.0)


def test_counters_that_begin_anew_are_no_fault(at_once: None, tiny_folder: str) -> None:
    llm = LLM(tiny_folder, page_size=4)
    told = Telemetry(llm.engine)
    llm.generate([[3, 4, 5]], PARAMS)
    told.snapshot()
    llm.engine.ranks.reset()
    llm.generate([[3]], PARAMS)
    found = told.snapshot()
    assert from_plain(found["experts"]["recent"]).min() >= 0


def test_a_move_is_told_when_it_begins_and_when_it_ends() -> None:
    news, state = News(), BalanceState("auto")
    assert news.of(state) == []
    moving = replace(state, doing="moving", imbalance=1.5)
    assert news.of(moving) == ["A plan pays: experts begin to move; the fullest card has 1.50 times the mean"]
    assert news.of(replace(moving, moved=3, moved_bytes=3_000_000)) == []
    done = replace(moving, doing="watching", moved=5, moved_bytes=5_000_000, imbalance=1.1)
    assert news.of(done) == ["Experts moved: 5, 5.0 MB; the fullest card has 1.10 times the mean"]
    between = replace(done, moved=7, moved_bytes=6_000_000)  # begun and ended between two looks
    assert news.of(between) == ["Experts moved: 2, 1.0 MB; the fullest card has 1.10 times the mean"]
    assert news.of(replace(between, refused=1)) == [
        "A plan was refused: moving would cost more time than it gains; the fullest card has 1.10 times the mean"
    ]
    assert news.of(replace(between, refused=1, failures=1, error="it broke")) == ["Failed: it broke"]
