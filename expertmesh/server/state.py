"""How the engine is, as far as the process knows that speaks HTTP: by what it has heard, and when."""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from expertmesh.server.frames import Frame

SILENT = 10.0  # seconds after which something is wrong with a process that says how it is twice a second


@dataclass
class EngineState:
    """failure: message and time, and rank, node, card and host where one has failed. about: what was worked out for
    this engine, by name. status: see `pump.Pump.status`."""

    done: int = 0
    total: int = 0
    ready: bool = False
    draining: bool = False
    capacity: int = 0
    max_context: int = 0
    about: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    failure: dict[str, Any] | None = None
    heard: float = field(default_factory=time.monotonic)

    def hear(self, frame: Frame) -> None:
        self.heard = time.monotonic()
        match frame["do"]:
            case "loading":
                self.done, self.total = frame["done"], frame["total"]
            case "ready":
                self.capacity, self.max_context, self.about = (
                    frame[name] for name in ("capacity", "max_context", "about")
                )
                self.status, self.ready = frame["status"], True
            case "state":
                self.status = frame["status"]

    def fail(self, message: str, **place: Any) -> None:
        """Nothing can be computed any more; the first cause counts."""
        self.failure = self.failure or {"message": message, "since": _ago(0)} | place

    @property
    def loading(self) -> str:
        """How far loading is, in words."""
        return f"loading: {self.fraction:.0%} of {self.total / 1e6:,.0f} MB" if self.total else "loading"

    @property
    def fraction(self) -> float:
        return self.done / self.total if self.total else 0.0

    def health(self) -> tuple[int, dict[str, Any]]:
        """The answer's status and what it says: 200 where every rank has finished a step lately."""
        if self.failure is not None:
            return _problem("failed", "engine_stopped", **self.failure)
        if not self.ready:
            return self.readiness()
        age = time.monotonic() - self.heard
        if age > SILENT:
            message = f"the process of the engine has not been heard of for {age:.0f} s"
            return _problem("silent", "engine_silent", message, since=_ago(age))
        late = self.status["since"] + age
        if late > self.status["patience"]:
            return self._late(late)
        return 200, {"status": "draining" if self.draining else "ok"}

    def _late(self, seconds: float) -> tuple[int, dict[str, Any]]:
        ranks = self.status["awaited"]
        names = [f"rank {r['rank']} (node {r['node']}, card {r['card']}) on {r['host']}" for r in ranks]
        who = f"{', '.join(names)} {'has' if len(ranks) == 1 else 'have'} not answered"
        message = (
            f"no step has finished for {seconds:.0f} s: {who if ranks else 'the engine does not begin one'}"
        )
        first = ranks[0] if ranks else {}
        return _problem("late", "step_late", message, since=_ago(seconds), ranks=ranks, **first)

    def readiness(self) -> tuple[int, dict[str, Any]]:
        """200 where requests are taken."""
        if self.failure is not None:
            return _problem("failed", "engine_stopped", **self.failure)
        if self.draining:
            return _problem("draining", "shutting_down", "the server is stopping")
        if self.ready:
            return 200, {"status": "ok"}
        phase = "starting" if not self.total else "weights" if self.done < self.total else "ranks"
        progress = {"phase": phase, "bytes": self.done, "total_bytes": self.total}
        return _problem(
            "loading", "loading", f"the model is {self.loading}", **progress, fraction=self.fraction
        )


def _problem(status: str, code: str, message: str, **more: Any) -> tuple[int, dict[str, Any]]:
    """The API's form of an error, and beside it what a program reads."""
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    return 503, {"status": status, "error": error} | more


def _ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")
