"""The engine in a thread of its own, and its outputs on an event loop."""

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from expertmesh.engine.engine import Engine
from expertmesh.errors import RankFailure
from expertmesh.request import Output, SamplingParams

NOT_RUNNING = "the engine is not running: the server is starting or stopping"
FAILED = "the engine failed and the server must be restarted; its log says why"


class EngineStopped(RuntimeError):
    """The engine computes nothing any more; the message says why."""


@dataclass(frozen=True)
class Job:
    """One sequence to generate: its prompt's token ids and how to go on."""

    tokens: list[int]
    params: SamplingParams


@dataclass(eq=False)
class _Call:
    """Jobs that somebody waits for together. Of each request only the newest output is kept, which holds all of
    it: a slow reader gets larger pieces instead of a growing queue."""

    fresh: dict[str, Output] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    problem: str | None = None

    async def take(self) -> dict[str, Output]:
        await self.wake.wait()
        self.wake.clear()
        fresh, self.fresh = self.fresh, {}
        return fresh


class Worker:
    """Runs an engine for an event loop.

    Two sides share two things only: the inbox, from the loop to the thread, and the loop's own queue, back. The
    engine is touched by its thread alone, everything else here by the loop alone, so there are no locks.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._calls: dict[str, _Call] = {}
        self._ids = itertools.count()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.problem: str | None = NOT_RUNNING

    def start(self) -> None:
        """Begin to compute; called on the event loop that the outputs go to."""
        self._inbox, self.problem = SimpleQueue(), None
        first, self._loop = self._loop is None, asyncio.get_running_loop()
        if first:
            self._engine.ranks.on_failure(self._rank_failed)
        self._thread = threading.Thread(target=self._run, args=(self._loop,), name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End all calls with EngineStopped, and the thread after its step. Nothing is left in the engine."""
        if self._thread is None:
            return
        self._end(self.problem or NOT_RUNNING)
        for key in self._calls:
            self._inbox.put(partial(self._engine.abort, key))
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def check(self) -> None:
        """EngineStopped where a request could not run now."""
        if self.problem is not None:
            raise EngineStopped(self.problem)

    def report(self) -> dict[str, Any]:
        """What is told of the engine beside its health: where experts may move, what the balancer does."""
        balancer = self._engine.balancer
        return {} if balancer is None else {"balance": balancer.report()}

    async def generate(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Output]]:
        """Outputs of the jobs as they grow, each with its job's number. Closing it, or cancelling whoever waits in
        it, aborts what still runs. EngineStopped where the engine does not live until the end."""
        self.check()
        call = _Call()
        running: dict[str, int] = {}
        try:
            for number, job in enumerate(jobs):
                key = f"{next(self._ids)}"
                running[key], self._calls[key] = number, call
                self._inbox.put(partial(self._engine.submit, job.tokens, job.params, key))
            while running:
                for key, output in (await call.take()).items():
                    number = running[key]
                    if output.finished:
                        del running[key], self._calls[key]
                    yield number, output
                if running and call.problem is not None:
                    raise EngineStopped(call.problem)
        finally:
            for key in running:
                del self._calls[key]
                self._inbox.put(partial(self._engine.abort, key))

    # The engine's thread

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while self._obey():
                outputs = self._engine.step()
                if outputs:
                    _post(loop, self._deliver, outputs)
        except RankFailure as error:  # its message names the cause
            _post(loop, self._fail, str(error))
        except BaseException:
            logging.getLogger(__name__).exception("the engine failed")
            _post(loop, self._end, FAILED)

    def _obey(self) -> bool:
        """Do what the inbox says, and sleep in it while the engine has nothing to do. False: stop."""
        while True:
            try:
                command = self._inbox.get(block=not self._engine.busy)
            except Empty:
                return True
            if command is None:
                return False
            command()

    # A thread of the ranks

    def _rank_failed(self, message: str) -> None:
        """A rank has failed, perhaps while nothing was asked of it."""
        assert self._loop is not None
        _post(self._loop, self._fail, message)

    # On the loop, called by the threads

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            call = self._calls.get(output.request_id)
            if call is not None:  # else nobody waits any more, and its abort is in the inbox
                call.fresh[output.request_id] = output
                call.wake.set()

    def _fail(self, message: str) -> None:
        if self.problem is None:  # heard for the first time
            logging.getLogger(__name__).error(message)
            self._end(FAILED)

    def _end(self, problem: str) -> None:
        self.problem = problem
        for call in self._calls.values():
            call.problem = problem
            call.wake.set()


def _post(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends and nobody waits
        loop.call_soon_threadsafe(call, *args)
