"""The engine's side of a server: steps, and what comes and goes between them."""

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from expertmesh.engine.engine import Engine
from expertmesh.engine.telemetry import Telemetry
from expertmesh.errors import InputError, RankFailure
from expertmesh.request import Request, SamplingParams
from expertmesh.server.frames import Frame, TokenWriter

FAILED = "the engine failed and the server must be restarted; its log says why"
PULSE = 0.5  # seconds between two words on how the engine is
BEAT = 3.0  # seconds without requests after which the ranks show with a step without rows that they are there
PATIENCE = 10.0  # seconds after which a step is late,
OF_LONGEST = 3.0  # or so many times the longest one before
# Seconds between two frames with the tokens of requests that go on. Steps may be faster than that; eyes are not, and a
# frame wakes threads on cores that compute.
PACE = 0.02
LINGER = 10.0  # seconds beyond the grace after which the other process hangs


class Pump:
    """Steps an engine for as long as the process that speaks HTTP is there.

    run is for the thread that the engine belongs to. `put` is for any: frames, and {"do": "drain"} where the server is
    to stop. telemetry: what is told of the engine beside its health.
    """

    def __init__(
        self,
        engine: Engine,
        send: Callable[[Frame], None],
        grace: float = 30.0,
        linger: float = 60.0,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._engine, self._send, self._telemetry = engine, send, telemetry
        self._grace, self._linger = grace, linger
        self._inbox: SimpleQueue[Frame] = SimpleQueue()
        self.put = self._inbox.put
        self._writer = TokenWriter()
        self._untold: dict[
            str, Request
        ] = {}  # requests that have tokens of which the other process does not know
        self._told = 0.0  # when all were told
        self._steps, self._longest = 0, 0.0
        self._finished = time.monotonic()  # when the last step did
        self._asking = False  # the ranks, for whose answers it waits
        self._draining = self.failed = False
        self._gone = False
        self._deadline: float | None = None  # when this ends, whatever the other process does

    def run(self, about: dict[str, Any], opened: Callable[[], None] = lambda: None) -> bool:
        """Until the other process has ended. Returns whether everything went well: it was told to stop, and the engine
        did not fail. about: what was worked out for this engine, for who asks the server. opened: is called when
        requests are taken."""
        self._opened = opened
        engine = self._engine
        capacity = engine.config.max_batch_requests * engine.layout.topology.groups
        head = {"capacity": capacity, "max_context": engine.config.max_context, "about": about}
        self._finished = time.monotonic()
        self._send({"do": "ready", "status": self.status()} | head)
        engine.ranks.on_failure(lambda message: self.put({"do": "failed", "message": message}))
        ended = threading.Event()
        pulse = threading.Thread(target=self._beat, args=(ended,), name="pulse", daemon=True)
        pulse.start()
        try:
            while self._obey():
                self._work()
        finally:
            ended.set()
            pulse.join()
        if not self.failed:
            engine.abort_all()  # nobody waits for what still runs
        return self._draining and not self.failed

    def status(self) -> dict[str, Any]:
        """How the engine is. Any thread may ask. since: seconds since the last step has finished; patience: after how
        many of them it is late; awaited: ranks that have not answered what they were asked."""
        engine = self._engine
        balancer = engine.balancer
        return {
            "steps": self._steps,
            "since": time.monotonic() - self._finished,
            "patience": max(PATIENCE, OF_LONGEST * self._longest) + BEAT,
            "awaited": [engine.ranks.place(rank) for rank in engine.ranks.awaited()] if self._asking else [],
            "balance": None if balancer is None else balancer.report(),
        }

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(PULSE):
            try:
                self._send({"do": "state", "status": self.status()})
            except RuntimeError:  # something changed while it was looked at
                continue

    def _obey(self) -> bool:
        """Do what has come, and sleep while there is nothing to do. False: it is time to end."""
        while True:
            try:
                frame = self._inbox.get(timeout=self._wait())
            except Empty:
                return self._deadline is None or time.monotonic() < self._deadline
            self._do(frame)
            if self._gone:
                return False

    def _wait(self) -> float:
        """Seconds to sleep at most."""
        if self._engine.busy and not self.failed:
            return 0.0
        return max(0.0, min(PULSE, (self._deadline or math.inf) - time.monotonic()))

    def _do(self, frame: Frame) -> None:
        match frame["do"]:
            case "submit" if not self.failed:
                self._submit(frame)
            case "finish" if not self.failed:
                self._engine.finish(frame["key"], frame["reason"])
                self._writer.forget(frame["key"])
                self._untold.pop(frame["key"], None)
            case "drain":
                if not self._draining:
                    self._draining = True
                    self._send({"do": "drain", "grace": self._grace})
                    self._end_by(self._grace + LINGER)
            case "failed":
                self._fail(frame["message"])
            case "open":
                self._opened()
            case "refused":
                raise InputError(frame["message"])
            case "gone":
                self._gone = True

    def _submit(self, frame: Frame) -> None:
        """What cannot be queued is an error of this request alone, whatever is wrong with it."""
        key = frame["key"]
        try:
            self._engine.submit_tokens(frame["tokens"], SamplingParams(**frame["params"]), key)
        except InputError as error:
            self._send({"do": "refuse", "key": key, "message": str(error)})
        except Exception:
            logging.getLogger(__name__).exception("request %s could not be queued", key)
            self._send({"do": "refuse", "key": key, "message": None})

    def _work(self) -> None:
        """A step, and what is to be told. What fails is told, and nothing is computed after it."""
        if self.failed:
            return
        self._asking = True
        try:
            if self._engine.busy or time.monotonic() >= self._finished + BEAT:
                self._step()
            if self._telemetry is not None and self._telemetry.due:
                self._send({"do": "telemetry", "state": self._telemetry.snapshot()})
        except RankFailure as error:  # its message names the cause
            self._fail(str(error))
        except Exception:
            logging.getLogger(__name__).exception("the engine failed")
            self._fail(None)
        finally:
            self._asking = False

    def _step(self) -> None:
        """With rows where there are any."""
        start = time.monotonic()
        if self._engine.busy:
            self._tell(self._engine.advance())
        else:
            self._engine.heartbeat()
        self._finished = time.monotonic()
        self._steps += 1
        self._longest = max(self._longest, self._finished - start)

    def _tell(self, advanced: Sequence[Request]) -> None:
        """What a step has brought: first tokens and ends at once, others in frames that have a pace."""
        for request in advanced:
            if request.problem is not None:
                self._send({"do": "refuse", "key": request.id, "message": request.problem})
            else:
                self._untold[request.id] = request
        now = time.monotonic()
        due = now >= self._told + PACE
        if due:
            self._told = now
        telling = [r for r in self._untold.values() if due or r.finish_reason or self._writer.new(r)]
        if telling:
            self._send(self._writer.write(telling))
            for request in telling:
                del self._untold[request.id]

    def _end_by(self, seconds: float) -> None:
        self._deadline = min(self._deadline or math.inf, time.monotonic() + seconds)

    def _fail(self, message: str | None) -> None:
        """The first time: tell it, and stay for a while to be asked. message: for the log and for clients; None: it is
        in the log already, and nothing for strangers."""
        if self.failed:
            return
        self.failed = True
        self._end_by(self._linger)
        if message is not None:
            logging.getLogger(__name__).error(message)
        told = FAILED if message is None else f"the engine failed and the server must be restarted: {message}"
        self._send({"do": "failed", "message": told, "place": place_in(message or "")})


def place_in(message: str) -> dict[str, Any]:
    """Rank, node, card and host, where a message of a rank's failure begins with them (`launch.crew.name_of`)."""
    found = re.match(r"rank (\d+) \(node (\d+), card (\d+)\) on (\S+)", message)
    return dict(zip(("rank", "node", "card"), map(int, found.groups()[:3]), strict=True)) | {
        "host": found[4]
    } if found else {}  # fmt: skip
