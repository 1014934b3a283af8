"""The newest of what the engine tells of itself (`engine.telemetry`), for all who look at it, and the last minutes
of it in a few numbers."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, TypeAlias

State: TypeAlias = dict[str, Any]

EVERY = 1.0  # seconds between two points of the history
POINTS = 600  # that are kept


class States:
    """Where states are published and followed, on one event loop. A slow follower misses states, never the newest."""

    def __init__(self, latency: Callable[[], Mapping[str, float | None]]) -> None:
        """latency: what requests have met lately, which is known here and not in the engine."""
        self.latest: State | None = None
        self.history: deque[dict[str, float | None]] = deque(maxlen=POINTS)
        self._latency = latency
        self._closed = False
        self._next = asyncio.Event()

    def publish(self, state: State) -> None:
        """What the engine told; `problem` is in it where it computes no more."""
        self.latest = {"problem": None} | state | {"latency": dict(self._latency())}
        if not self.history or state["time"] - (self.history[-1]["time"] or 0.0) >= EVERY:
            self.history.append(point(self.latest))
        self._wake()

    def fail(self, problem: str) -> None:
        """The engine computes no more: the last state stays, with the reason."""
        if self.latest is not None:
            self.latest = self.latest | {"problem": problem}
        self._wake()

    def close(self) -> None:
        """End all followers, and every later one at once."""
        self._closed = True
        self._wake()

    async def follow(self) -> AsyncGenerator[State]:
        """The newest state now, and each newer one."""
        while not self._closed:
            news = self._next
            if self.latest is not None:
                yield self.latest
            await news.wait()

    def _wake(self) -> None:
        news, self._next = self._next, asyncio.Event()
        news.set()


def point(state: State) -> dict[str, float | None]:
    """The numbers whose course is shown."""
    recent, cache, requests = state["recent"], state["cache"], state["requests"]
    seconds, steps = recent["seconds"], recent["steps"]
    imbalance = state["experts"]["imbalance"] if steps else []

    def rate(name: str) -> float:
        return float(recent[name] / seconds) if seconds else 0.0

    lately: dict[str, float | None] = state["latency"]
    return {
        "time": state["time"],
        "generated": rate("generated_tokens"),
        "prompt": rate("prompt_tokens"),
        "running": sum(requests["running"]),
        "waiting": sum(requests["waiting"]),
        "step": sum(recent["step_seconds"].values()) / steps if steps else None,
        "imbalance": sum(imbalance) / len(imbalance) if imbalance else None,
        "cache": sum(cache["used"]) / max(1, sum(cache["pages"])),
    } | lately
