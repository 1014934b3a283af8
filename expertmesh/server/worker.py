"""The engine of another process, for an event loop: who sends it requests, and whose tokens become outputs."""

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from expertmesh.engine.text import OutputText
from expertmesh.engine.tokenizer import Tokenizer
from expertmesh.errors import InputError
from expertmesh.request import Output
from expertmesh.server.frames import Frame, plain_params
from expertmesh.server.growing import Growing, Job
from expertmesh.server.state import EngineState

__all__ = ["EngineStopped", "Job", "Worker"]

QUEUE, PER_SLOT = 1024, 16  # choices that may wait: at least, and for each that can run
REMEMBERED = 256  # choices that ended last, by which the throughput is told
LONGEST_WAIT = 120  # seconds that a client is told to wait at most


class EngineStopped(RuntimeError):
    """A request cannot run, or not to its end; the message says why. status, code, headers: of the answer."""

    def __init__(
        self,
        message: str,
        status: int = 500,
        code: str = "engine_stopped",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


@dataclass(eq=False)
class _Call:
    """Jobs that somebody waits for together. Of each only that it has changed is kept: a slow reader gets larger
    pieces instead of a growing queue."""

    waiting: set[Growing] = field(default_factory=set)  # not all of them has been told
    fresh: dict[Growing, None] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    problem: Exception | None = None

    def end(self, problem: Exception) -> None:
        self.problem = self.problem or problem
        self.wake.set()


class Watcher(Protocol):
    """Who looks at what the engine tells of itself (`engine.telemetry`)."""

    def publish(self, state: Frame) -> None: ...

    def fail(self, problem: str) -> None:
        """The engine computes nothing any more."""
        ...

    def close(self) -> None:
        """The server is stopping."""
        ...


class Worker:
    """Runs jobs in the engine at the other end of a line. Everything here happens on one event loop.

    send: gives a frame to the other end. `hear` is to be called with each that comes from there. tokenizer: makes the
    texts; stop texts are found here, and the engine is told. request_timeout: seconds that a call may take. max_queue:
    choices that may wait; None: worked out when the engine says how many can run.
    """

    def __init__(
        self,
        send: Callable[[Frame], None],
        tokenizer: Tokenizer | None = None,
        request_timeout: float | None = None,
        max_queue: int | None = None,
    ) -> None:
        self._send, self.tokenizer = send, tokenizer
        self._timeout, self._max_queue = request_timeout, max_queue
        self._running: dict[str, tuple[Growing, _Call]] = {}
        self._calls: set[_Call] = set()
        self._ids = itertools.count()
        self._ended: deque[float] = deque(maxlen=REMEMBERED)
        self.idle = asyncio.Event()
        self.idle.set()
        self.state = EngineState()
        self.watcher: Watcher | None = None

    @property
    def problem(self) -> str | None:
        """Why nothing can run, if nothing can."""
        try:
            self._check_state()
        except EngineStopped as error:
            return str(error)
        return None

    @property
    def open(self) -> int:
        """Choices that run or wait."""
        return len(self._running)

    @property
    def room(self) -> int:
        """Choices that may be there at the same time."""
        capacity = self.state.capacity
        queue = max(QUEUE, PER_SLOT * capacity) if self._max_queue is None else self._max_queue
        return capacity + queue

    def check(self, choices: int = 1) -> None:
        """EngineStopped where a request of so many choices could not run now."""
        self._check_state()
        if choices > self.room:
            raise EngineStopped(
                f"{choices} choices are more than this server takes at a time: at most {self.room}",
                400,
                "too_many_choices",
            )
        if self.open + choices > self.room:
            raise EngineStopped(
                f"{self.open} choices run or wait, and {choices} more are too many: at most {self.room}; try again",
                429,
                "queue_full",
                {"Retry-After": str(self._retry_after(self.open + choices - self.room))},
            )

    def report(self) -> dict[str, Any]:
        """What is told of the engine beside its health: where experts may move, what the balancer does."""
        balance = self.state.status.get("balance")
        return {} if balance is None else {"balance": balance}

    async def generate(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Output]]:
        """Outputs of the jobs as they grow, each with its job's number. Closing it, or cancelling whoever waits in
        it, aborts what still runs. EngineStopped where the engine does not live until the end."""
        self.check(len(jobs))
        call = _Call()
        self._calls.add(call)
        timer = None
        if self._timeout is not None:
            late = EngineStopped(
                f"the request took longer than the {self._timeout:g} s that one may take here", 504, "timeout"
            )
            timer = asyncio.get_running_loop().call_later(self._timeout, call.end, late)
        try:
            for number, job in enumerate(jobs):
                self._submit(number, job, call)
            while call.waiting:
                await call.wake.wait()
                call.wake.clear()
                fresh, call.fresh = call.fresh, {}
                for growing in fresh:
                    if growing.changed:  # else it was told with what came while others were
                        output = growing.output()
                        if output.finished:
                            call.waiting.discard(growing)
                        yield growing.number, output
                if call.waiting and call.problem is not None:
                    raise call.problem
        finally:
            if timer is not None:
                timer.cancel()
            self._calls.discard(call)
            for growing in call.waiting:
                self._leave(growing.key, "abort")

    def hear(self, frame: Frame) -> None:
        """What the engine says."""
        match frame["do"]:
            case "tokens":
                waited = frame.get("waited", {})
                for key, news in frame["new"].items():
                    if key in self._running:  # else nobody waits any more, and the engine has been told
                        growing, call = self._running[key]
                        growing.queued = waited.get(key, growing.queued)
                        self._grow(growing, call, news)
            case "refuse":
                if frame["key"] in self._running:
                    self._running[frame["key"]][1].end(_refusal(frame["message"]))
            case "telemetry":
                if self.watcher is not None and self.state.failure is None:
                    self.watcher.publish(frame["state"])
            case "failed":
                self.fail(frame["message"], **frame["place"])
            case "drain":
                self.state.draining = True
                if self.watcher is not None:
                    self.watcher.close()  # pages that look on would not go by themselves
            case _:
                self.state.hear(frame)

    def fail(self, message: str, **place: Any) -> None:
        """The engine computes nothing any more; place: rank, node, card and host where one has failed."""
        self.state.fail(message, **place)
        self.end_all(EngineStopped(message))
        if self.watcher is not None:
            self.watcher.fail(message)

    def end_all(self, problem: Exception) -> None:
        """End all calls with this."""
        for call in self._calls:
            call.end(problem)

    def _check_state(self) -> None:
        state = self.state
        if state.failure is not None:
            raise EngineStopped(state.failure["message"])
        if state.draining:
            headers = {"Connection": "close", "Retry-After": "5"}
            raise EngineStopped(
                "the server is stopping and takes no new requests", 503, "shutting_down", headers
            )
        if not state.ready:
            raise EngineStopped(f"the model is {state.loading}", 503, "loading", {"Retry-After": "5"})

    def _submit(self, number: int, job: Job, call: _Call) -> None:
        key = f"{next(self._ids)}"
        frame = {"do": "submit", "key": key, "tokens": job.tokens, "params": plain_params(job.params)}
        try:
            self._send(frame)
        except OverflowError:
            raise InputError("a number of the sampling parameters has more than 64 bits") from None
        stream = self.tokenizer.stream() if self.tokenizer else None
        growing = Growing(key, number, job, OutputText(stream, job.params.stop))
        self._running[key] = growing, call
        call.waiting.add(growing)
        self.idle.clear()

    def _grow(self, growing: Growing, call: _Call, news: Sequence[Any]) -> None:
        stopped = growing.take(news)
        if stopped:
            self._leave(growing.key, "stop")
        elif growing.reason is not None:
            self._leave(growing.key)
        if growing.reason is not None:
            self._ended.append(time.monotonic())
        call.fresh[growing] = None
        call.wake.set()

    def _leave(self, key: str, reason: str | None = None) -> None:
        """It runs no more; reason: what the engine is told, where it does not know. Again: nothing."""
        if self._running.pop(key, None) is not None and reason is not None:
            self._send({"do": "finish", "key": key, "reason": reason})
        if not self._running:
            self.idle.set()

    def _retry_after(self, over: int) -> int:
        """Seconds until so many choices will have ended, going by the last ones."""
        if len(self._ended) < 2:
            return 5
        rate = len(self._ended) / max(1e-3, time.monotonic() - self._ended[0])
        return max(1, min(LONGEST_WAIT, math.ceil(over / rate)))


def _refusal(message: str | None) -> Exception:
    """Why the engine has not taken a request; None where that is not the request's fault."""
    if message is not None:
        return InputError(message)
    return EngineStopped("internal error; the server's log says more", 500, "internal_error")
