"""What the engine counts of its own work, step by step: requests, tokens, and where the time of a step goes. No torch.

Counters only ever grow; who wants a rate takes two readings and their difference.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from expertmesh.request import Batch, Request

# What the engine does in a step, in order: it chooses rows, the ranks compute, experts may move, outputs become text.
STEP_PARTS = ("schedule", "ranks", "balance", "update")
# Bounds of the buckets of waiting times, in seconds.
QUEUE_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Stopwatch:
    """Seconds of the parts of one step."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> float:
        """Seconds since the last lap, which went into this part."""
        now = time.perf_counter()
        taken, self._last = now - self._last, now
        self.parts[part] = taken
        return taken


@dataclass
class Histogram:
    """How many values were at most each bound; the last count is of those above all."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def cumulative(self) -> list[int]:
        return list(accumulate(self.counts))


@dataclass
class Tally:
    """Of one engine, since it was made. The engine's thread calls, in the order of a request's life.

    rows: token rows computed, those computed again after a preemption too; prompt_tokens: of requests that have begun,
    of which cached_tokens were found in the cache; split: seconds of steps whose rows were shared out to replicas by
    counts, not evenly.
    """

    submitted: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    rows: int = 0
    steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEP_PARTS, 0.0))
    split: float = 0.0
    queued: Histogram = field(default_factory=lambda: Histogram(QUEUE_BOUNDS))
    since: dict[str, float] = field(default_factory=dict)  # when each request came, `time.monotonic`
    _queue: set[str] = field(default_factory=set)  # requests that have not begun

    def submit(self, request: Request) -> None:
        self.submitted += 1
        self.since[request.id] = time.monotonic()
        self._queue.add(request.id)

    def begin(self, batches: Sequence[Batch]) -> None:
        """These rows are computed next: what has waited for its first one waits no longer."""
        if not self._queue:
            return
        now = time.monotonic()
        for request in (part.request for batch in batches for part in batch.slices):
            if request.id in self._queue:
                self._queue.remove(request.id)
                request.queued = now - self.since[request.id]
                self.queued.observe(request.queued)
                self.prompt_tokens += request.prompt_length
                self.cached_tokens += request.cached_tokens

    def end(self, request: Request) -> None:
        """It has its reason."""
        self.finished[request.finish_reason or "abort"] += 1
        self.since.pop(request.id, None)
        self._queue.discard(request.id)

    def step(self, batches: Sequence[Batch], generated: int, watch: Stopwatch, split: bool) -> None:
        """A step is done, and brought so many tokens."""
        self.steps += 1
        self.rows += sum(batch.rows for batch in batches)
        self.generated_tokens += generated
        for part, seconds in watch.parts.items():
            self.seconds[part] += seconds
        self.split += watch.parts["ranks"] * split
