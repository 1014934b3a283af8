"""A service as its requests come, event by event: what they wait for, and how long each takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from math import isnan
from typing import Any

import numpy as np

from expertmesh.errors import InputError
from expertmesh.planner.arrivals import Arrival
from expertmesh.planner.clock import Clock
from expertmesh.planner.costs import accepted_tokens
from expertmesh.planner.deployment import Deployment
from expertmesh.planner.instance import Instance, Request
from expertmesh.planner.memory import DECODING_ROWS, cache_bytes, room
from expertmesh.planner.parameters import Parameters
from expertmesh.planner.serving import ADMISSION, Service
from expertmesh.planner.serving import chunk as full_chunk

PAGE = 128  # tokens


@dataclass(frozen=True)
class Percentiles:
    """Of a time, seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @staticmethod
    def of(values: Sequence[float]) -> "Percentiles | None":
        """None where there are no values."""
        if not values:
            return None
        return Percentiles(float(np.mean(values)), *(float(x) for x in np.percentile(values, (50, 90, 99))))


@dataclass(frozen=True)
class Report:
    """finished, rejected: requests, those that no TP group has room for being rejected; preemptions: how often one
    gave way to others and was computed again. seconds: from the first arrival to the last token; ttft, tpot (where
    there are two tokens or more), total: of requests; output: tokens; tokens: of output a second, of the whole service.
    Means over time: batch, requests that a TP group decodes; queue, those that wait to be taken; present, all that are
    in the service. pages: most of a TP group's that were in use, as a share."""

    finished: int
    rejected: int
    preemptions: int
    seconds: float
    output: int
    tokens: float
    ttft: Percentiles | None
    tpot: Percentiles | None
    total: Percentiles | None
    batch: float
    queue: float
    present: float
    pages: float


def simulate(
    service: Service, arrivals: Sequence[Arrival], *, concurrency: int | None = None, chunk: float | None = None,
    gather: float = 0.0, page: int = PAGE, seed: int = 0, p: Parameters | None = None,
) -> Report:  # fmt: skip
    """Replay arrivals against a service. The same arguments give the same report.

    A request joins a TP group `ADMISSION` seconds after it has arrived; its first token comes at the end of the step
    that completes its prompt. concurrency: so many requests at any time, whatever the times of arrivals: one comes as
    another leaves; chunk: most tokens of prompts that a TP group computes in a step (None: as many as `serving` does);
    gather: seconds that prompts wait for further ones, while others are decoded; seed: of which drafts are accepted.
    InputError where there are no arrivals or none fits.
    """
    if not arrivals:
        raise InputError("there are no requests to simulate; give some")
    if concurrency is not None and concurrency < 1:
        raise InputError(f"{concurrency} requests at any time; it must be at least 1")
    if (chunk is not None and not chunk >= 1) or page < 1:
        raise InputError(f"chunks of {chunk} tokens and pages of {page}; both must be at least 1")
    if not gather >= 0:
        raise InputError(f"prompts gather for {gather} seconds; it must be at least 0")

    def instances(d: Deployment, number: int) -> list[Instance]:
        budget = full_chunk(d) if chunk is None else chunk
        pages = pages_of(d, page, 0.0 if d is service.decode and service.prefill else budget / d.topology.tp)
        clock = Clock(d, p)
        return [Instance(d.topology.groups, pages, page, budget, gather, clock) for _ in range(number)]

    decoding = instances(service.decode, service.instances)
    entry = instances(service.prefill, service.prefill_instances) if service.prefill else decoding
    return _Simulation(service.decode, entry, decoding, seed, p).run(sorted(arrivals), concurrency)


def pages_of(d: Deployment, page: int = PAGE, rows: float = 0.0) -> int:
    """Of a TP group's cache, each of so many tokens, beside so many rows of a rank's step. InputError where the weights
    leave no room for one."""
    left = room(d, max(rows, DECODING_ROWS))
    pages = int(left // (page * cache_bytes(d)))
    if pages < 1:
        raise InputError(
            f"the weights and the rows of a step leave {left / 1e9:.1f} GB of a card for the cache, less than a page; "
            "give more cards"
        )
    return pages


class _Simulation:
    """Events are functions of the time, in a heap."""

    def __init__(
        self, decode: Deployment, entry: list[Instance], decoding: list[Instance], seed: int, p: Parameters | None
    ) -> None:  # fmt: skip
        self._decode, self._entry, self._decoding = decode, entry, decoding
        self._link = decode.card.across_gbs * 1e9 * (p or decode.card.reached).link_efficiency
        self._rng, self._accepted = np.random.default_rng(seed), _acceptance(decode)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order, self._numbers = count(), count()
        self._present, self._area, self._last = 0, 0.0, 0.0
        self._requests: list[Request] = []
        self._rejected = 0
        self._waiting: list[Arrival] = []  # of a closed loop, the next one last

    def run(self, arrivals: list[Arrival], concurrency: int | None) -> Report:
        if concurrency is None:
            for arrival in arrivals:
                self._at(arrival.time, self._arrives, arrival)
        else:
            self._waiting = arrivals[::-1]
            for _ in range(min(concurrency, len(arrivals))):
                self._at(0.0, self._arrives, self._waiting.pop())
        start = self._last = self._events[0][0]
        while self._events:
            now, _, event = heappop(self._events)
            self._area += self._present * (now - self._last)
            self._last = now
            event(now)
        return self._report(self._last - start)

    def _at(self, time: float, event: Callable[..., None], *args: Any) -> None:
        heappush(self._events, (time, next(self._order), lambda now: event(now, *args)))

    def _arrives(self, now: float, arrival: Arrival) -> None:
        most = arrival.input + arrival.output
        if not all(instances[0].groups[0].fits(most) for instances in (self._entry, self._decoding)):
            self._rejected += 1
            self._next(now)
            return
        steps, number = self._steps(arrival.output), next(self._numbers)
        per_step = (arrival.output - 1) / max(steps, 1)
        request = Request(number, now, arrival.input, arrival.output, steps, arrival.input, per_step=per_step)
        self._present += 1
        self._requests.append(request)
        self._at(now + ADMISSION, self._join, request, self._entry)

    def _join(self, now: float, request: Request, instances: list[Instance]) -> None:
        """The TP group with the fewest requests takes it, after the step that its instance is in."""
        instance, group = min(
            ((i, g) for i in instances for g in i.groups), key=lambda pair: pair[1].requests
        )
        request.queued = now
        group.queue.append(request)
        end = instance.begin(now) if instance.idle else instance.cut(now)
        if end is not None:
            self._at(end, self._ends, instance, instance.turn)

    def _ends(self, now: float, instance: Instance, turn: int) -> None:
        """A turn ends, unless it was cut meanwhile."""
        if turn != instance.turn:
            return
        computed, done = instance.end()
        for group, request in computed:
            request.first = now if isnan(request.first) else request.first
            if not request.steps:
                done.append(request)
            elif instance in self._decoding:
                instance.start(group, request)
            else:
                self._at(now + self._transfer(request), self._join, request, self._decoding)
        for request in done:
            request.end = now
            self._present -= 1
            self._next(now)
        end = instance.begin(now) if instance.idle else None
        if end is not None:
            self._at(end, self._ends, instance, instance.turn)

    def _next(self, now: float) -> None:
        """Of a closed loop."""
        if self._waiting:
            self._at(now, self._arrives, self._waiting.pop())

    def _transfer(self, request: Request) -> float:
        """Seconds in which each rank of a TP group gets the cache of a prompt over its link to other nodes."""
        return self._decode.card.across_us * 1e-6 + request.known * cache_bytes(self._decode) / self._link

    def _steps(self, output: int) -> int:
        """Of decoding, after the first token: each gives one and the drafts up to the first that is not accepted."""
        drafts, need = self._decode.drafts, output - 1
        if not drafts or not need:
            return need
        given = 1 + (self._rng.random((need, drafts)) < self._accepted).cumprod(axis=1).sum(axis=1)
        return int(np.searchsorted(np.cumsum(given), need)) + 1

    def _report(self, seconds: float) -> Report:
        found = self._requests
        if not found:
            most = self._decoding[0].groups[0]
            raise InputError(
                f"none of {self._rejected} requests fits into the cache of a TP group, which has room for "
                f"{most.pages * most.page:,} tokens; give shorter ones, or more cards"
            )
        output, groups = sum(r.output for r in found), sum(len(i.groups) for i in self._decoding)
        seconds = max(seconds, 1e-12)
        every = self._decoding if self._entry is self._decoding else [*self._decoding, *self._entry]
        return Report(
            len(found), self._rejected, sum(i.preemptions for i in every), seconds, output, output / seconds,
            Percentiles.of([r.first - r.time for r in found]),
            Percentiles.of([(r.end - r.first) / (r.output - 1) for r in found if r.output > 1]),
            Percentiles.of([r.end - r.time for r in found]),
            sum(i.decoded for i in self._decoding) / seconds / groups,
            sum(r.waited for r in found) / seconds, self._area / seconds, max(i.peak for i in every),
        )  # fmt: skip


def _acceptance(d: Deployment) -> float:
    """Probability that a draft is accepted where those before it are, such that a step gives `accepted_tokens`."""
    low, high, wanted = 0.0, 1.0, accepted_tokens(d)
    for _ in range(50):
        middle = (low + high) / 2
        given = sum(middle**i for i in range(d.drafts + 1))
        low, high = (middle, high) if given < wanted else (low, middle)
    return high
