"""The engine's side with an engine that only counts: what it is asked for, in which thread, and how it ends."""

import itertools
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from expertmesh import InputError, SamplingParams
from expertmesh.engine.engine import Engine
from expertmesh.errors import RankFailure
from expertmesh.request import Request
from expertmesh.server import pump as module
from expertmesh.server.frames import Frame
from expertmesh.server.pump import FAILED, Pump, place_in

DIED = "rank 1 (node 0, card 1) on here died in step 3: killed by signal 9 (SIGKILL), process 77; all have been stopped"
BOUND = 60.0


class Counting:
    """An engine whose requests get the tokens 0, 1, 2, ... Each step waits for `gate`; number `fails_at` fails."""

    def __init__(self, fails_at: int = -1, failure: BaseException | None = None) -> None:
        self.requests: dict[str, Request] = {}
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.steps, self.fails_at, self.failure = 0, fails_at, failure or RuntimeError("broken on purpose")
        self.gate = threading.Event()
        self.gate.set()
        self.callbacks: list[Callable[[str], None]] = []
        self.config = SimpleNamespace(max_batch_requests=3, max_context=50)
        self.layout = SimpleNamespace(topology=SimpleNamespace(groups=2))
        self.ranks = SimpleNamespace(
            on_failure=self.callbacks.append, awaited=lambda: [1], place=lambda rank: {"rank": rank}
        )
        self.scheduler, self.balancer = SimpleNamespace(schedulers=[], preemptions=0), None

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    def submit_tokens(self, tokens: list[int], params: SamplingParams, key: str) -> None:
        self.threads.add(threading.get_ident())
        if not tokens:
            raise InputError("an empty prompt")
        if tokens == [13]:
            raise RecursionError("nobody has thought of this")
        self.requests[key] = Request(key, tokens, len(tokens), params, 0)

    def finish(self, key: str, reason: str) -> None:
        self.calls.append(f"{reason} {key}")
        self.requests.pop(key, None)

    def abort_all(self) -> None:
        self.requests.clear()

    def heartbeat(self) -> None:
        self.calls.append("beat")
        self._step()

    def advance(self) -> list[Request]:
        self._step()
        advanced = list(self.requests.values())
        for request in advanced:
            request.tokens.append(request.output_length)
            if request.output_length == request.params.max_tokens:
                request.finish_reason = "length"
                del self.requests[request.id]
        return advanced

    def _step(self) -> None:
        self.threads.add(threading.get_ident())
        self.gate.wait()
        self.steps += 1
        if self.steps == self.fails_at:
            raise self.failure


class Running:
    """A pump in a thread, and what it says."""

    def __init__(self, engine: Counting, **options: Any) -> None:
        self.said: list[Frame] = []
        self.pump = Pump(cast(Engine, engine), self.said.append, **options)
        self.result: Any = None
        self.opened = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self.pump.run({"model": "m"}, self.opened.set)
        except InputError as error:
            self.result = error

    def of(self, what: str) -> list[Frame]:
        return [frame for frame in list(self.said) if frame["do"] == what]

    def tokens(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for frame in self.of("tokens"):
            for key, news in frame["new"].items():
                found.setdefault(key, []).extend(news[0])
        return found

    def wait(self, what: Callable[[], object]) -> None:
        end = time.monotonic() + BOUND
        while not what():
            assert time.monotonic() < end
            time.sleep(0.002)

    def end(self) -> Any:
        """Once the other process has gone."""
        self.pump.put({"do": "gone"})
        self.thread.join(BOUND)
        assert not self.thread.is_alive()
        return self.result


def submit(key: str, length: int, tokens: tuple[int, ...] = (1,)) -> Frame:
    return {"do": "submit", "key": key, "tokens": list(tokens), "params": {"max_tokens": length}}


@pytest.mark.parametrize("pace", [0.0, 1e9])
def test_frames_between_first_and_last_tokens_have_a_pace(
    pace: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First tokens and ends are told at once, whatever the pace; nothing is told twice, or lost."""
    monkeypatch.setattr(module, "PACE", pace)
    engine = Counting()
    engine.gate.clear()
    running = Running(engine)
    lengths = {"a": 1, "b": 4, "c": 9}
    for key, length in lengths.items():
        running.pump.put(submit(key, length))
    engine.gate.set()
    running.wait(lambda: running.tokens() == {key: list(range(n)) for key, n in lengths.items()})
    running.end()
    of_c = [len(frame["new"]["c"][0]) for frame in running.of("tokens") if "c" in frame["new"]]
    assert of_c == ([1] * 9 if pace == 0 else [1, 8])


def test_what_was_not_told_of_a_request_that_is_given_up_is_never_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PACE", 1e9)
    engine = Counting()
    running = Running(engine)
    running.pump.put(submit("a", 1 << 30))
    running.wait(lambda: engine.steps > 5)
    running.pump.put({"do": "finish", "key": "a", "reason": "abort"})
    running.wait(lambda: not engine.busy)
    running.pump.put(submit("b", 2))
    running.wait(lambda: running.tokens().get("b") == [0, 1])
    running.end()
    assert running.tokens()["a"] == [0]


def test_requests_run_to_their_ends_in_one_thread() -> None:
    engine = Counting()
    running = Running(engine)
    for key, length in zip("abc", (1, 5, 2), strict=True):
        running.pump.put(submit(key, length))
    running.wait(lambda: running.tokens() == {"a": [0], "b": [0, 1, 2, 3, 4], "c": [0, 1]})
    running.pump.put({"do": "open"})
    assert running.opened.wait(BOUND)
    assert running.end() is False, "nobody has told it to end"
    assert engine.threads == {running.thread.ident}
    ready, *_ = running.said
    assert (ready["do"], ready["capacity"], ready["max_context"]) == ("ready", 6, 50)
    assert ready["about"] == {"model": "m"}


def test_one_frame_for_all_requests_of_a_step_and_nothing_for_who_has_gone() -> None:
    engine = Counting()
    engine.gate.clear()
    running = Running(engine)
    running.pump.put(submit("x", 1))  # its step waits, and what comes meanwhile is there before the next one
    for key in "abc":
        running.pump.put(submit(key, 2))
    running.pump.put({"do": "finish", "key": "b", "reason": "abort"})
    running.pump.put(submit("e", 1, ()))
    engine.gate.set()
    running.wait(lambda: running.tokens() == {"x": [0], "a": [0, 1], "c": [0, 1]})
    assert all({"a", "c"} <= set(frame["new"]) for frame in running.of("tokens")[1:])
    assert running.of("refuse") == [{"do": "refuse", "key": "e", "message": "an empty prompt"}]
    assert "abort b" in engine.calls
    running.end()


def test_a_request_that_nobody_has_thought_of_ends_alone(caplog: pytest.LogCaptureFixture) -> None:
    running = Running(Counting())
    running.pump.put(submit("odd", 1, (13,)))
    running.pump.put(submit("next", 1))
    running.wait(lambda: running.tokens() == {"next": [0]})
    assert running.of("refuse") == [{"do": "refuse", "key": "odd", "message": None}]
    assert "odd could not be queued" in caplog.text and "nobody has thought" in caplog.text
    assert not running.of("failed")
    running.end()


def test_an_idle_engine_shows_now_and_then_that_its_ranks_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.01)
    monkeypatch.setattr(module, "PULSE", 0.01)
    engine = Counting()
    telemetry = SimpleNamespace(due=True, snapshot=lambda: {"rows": 5})
    running = Running(engine, telemetry=telemetry)
    running.wait(lambda: engine.calls.count("beat") > 2 and len(running.of("state")) > 2)
    engine.gate.clear()
    running.wait(lambda: running.of("state")[-1]["status"]["awaited"] == [{"rank": 1}])
    before = running.of("state")[-1]["status"]
    running.wait(lambda: running.of("state")[-1]["status"]["since"] > before["since"] + 0.05)
    assert running.of("telemetry")[0]["state"] == {"rows": 5} and before["steps"] >= 2
    assert before["patience"] > module.PATIENCE
    engine.gate.set()
    running.end()


@pytest.mark.parametrize("when", ["idle", "in a step"])
def test_a_rank_that_fails_is_told_once_and_asked_about_for_a_while(
    when: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Counting(fails_at=3, failure=RankFailure(DIED))
    running = Running(engine)
    if when == "in a step":
        running.pump.put(submit("a", 9))
    running.wait(lambda: engine.callbacks)
    running.wait(lambda: when == "idle" or running.of("failed"))
    engine.callbacks[0](DIED)
    running.wait(lambda: running.of("failed"))
    running.pump.put(submit("b", 9))  # of somebody who has not heard it yet
    running.pump.put({"do": "finish", "key": "a", "reason": "abort"})
    running.pump.put({"do": "drain"})
    running.wait(lambda: running.of("drain"))
    assert running.end() is False and running.pump.failed
    (failed,) = running.of("failed")
    assert failed["message"] == f"the engine failed and the server must be restarted: {DIED}"
    assert failed["place"] == {"rank": 1, "node": 0, "card": 1, "host": "here"}
    assert [record.getMessage() for record in caplog.records] == [DIED]
    assert "b" not in engine.requests


def test_what_nobody_expected_is_in_the_log_and_not_told_to_strangers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    running = Running(Counting(fails_at=1), linger=0.05)
    running.pump.put(submit("a", 9))
    running.thread.join(BOUND)  # by itself, when it has been there for so long
    assert running.result is False and not running.thread.is_alive()
    (failed,) = running.of("failed")
    assert (failed["message"], failed["place"]) == (FAILED, {})
    assert "broken on purpose" in caplog.text


def test_told_to_end_it_goes_on_until_the_other_process_has_gone() -> None:
    engine = Counting()
    running = Running(engine, grace=7.0)
    running.pump.put(submit("a", 1 << 30))
    for _ in range(2):
        running.pump.put({"do": "drain"})
    running.wait(lambda: running.of("drain"))
    steps = engine.steps
    running.wait(lambda: engine.steps > steps + 3)
    assert running.of("drain") == [{"do": "drain", "grace": 7.0}]
    assert running.end() is True
    assert not engine.requests, "nothing is left in the engine"


def test_the_other_process_may_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER", 0.05)
    running = Running(Counting(), grace=0.01)
    running.pump.put({"do": "drain"})
    running.thread.join(BOUND)
    assert running.result is True and not running.thread.is_alive()


def test_a_model_that_cannot_be_served_after_all() -> None:
    running = Running(Counting())
    running.pump.put({"do": "refused", "message": "it has no tokenizer"})
    running.thread.join(BOUND)
    assert isinstance(running.result, InputError) and "no tokenizer" in str(running.result)


@pytest.mark.parametrize("message", ["", "the driver cannot go on", "rank 1 failed"])
def test_a_failure_without_a_place(message: str) -> None:
    assert place_in(message) == {}


def test_a_place_in_words_of_the_crew() -> None:
    from expertmesh.launch.crew import name_of, place_of
    from expertmesh.mesh.topology import Topology

    topology = Topology(3, 2)
    for rank, host in itertools.product(range(6), ("a", "node1.of.b")):
        said = f"{name_of(rank, topology)} on {host} has been computing"
        assert place_in(said) == place_of(rank, topology, host)
