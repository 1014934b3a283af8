"""The layout that gives most tokens under limits on latency, or the best for each latency.

Exhaustive, but for what cannot win: tokens/s grow with the batch, and so does the time of a step. So one evaluation,
of the batch with which a layout would equal the best one so far, tells whether it is better at all; only then its
batch is sought. What decodes and what prefills is searched apart, each for one instance, and then put together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, log
from typing import TypeAlias

from expertmesh.mesh.topology import Topology
from expertmesh.planner.costs import accepted_tokens, decode_step
from expertmesh.planner.deployment import Decode, Deployment
from expertmesh.planner.memory import cache_bytes, room
from expertmesh.planner.parameters import Parameters
from expertmesh.planner.plans import (
    MOST_USE,
    NEAR,
    Limits,
    Plan,
    answer,
    fitted,
    fullest,
    held,
    prompts_of_a_step,
)
from expertmesh.planner.serving import ADMISSION, Service, Workload, chunk, prefill_rate, prefill_time, steady
from expertmesh.planner.space import Mode, Space

COARSE = 0.02  # gain for which a layout takes another's place, where there are many limits
KEPT = 0.6  # of the tokens of the best plan: those that give less are not compared with it


@dataclass(frozen=True)
class Point:
    """Of one instance with a batch. tpot, ttft: seconds; tokens: output tokens/s."""

    tpot: float
    ttft: float
    tokens: float

    def over(self, limits: Limits) -> float:
        """By how much of a limit it is over; below 0 where it is under all."""
        return max(self.tpot / limits.tpot, self.ttft / limits.ttft) - 1


Curve: TypeAlias = Callable[[float], Point]


@dataclass(frozen=True)
class Best:
    deployment: Deployment
    batch: float
    tokens: float


@dataclass(frozen=True)
class Prefiller:
    """rate: prompts/s of one instance at most, so that TTFT holds."""

    deployment: Deployment
    rate: float


Table = list[Best | None]  # for each limit on TPOT


def improve(
    table: Table, tpots: Sequence[float], ttft: float, floors: Sequence[float], d: Deployment, curve: Curve, most: float
) -> None:  # fmt: skip
    """Enter a deployment where it is the best so far. tpots: limits, rising; floors: tokens/s that are not worth
    entering; most: batch that its memory holds."""
    gain = 1 + (NEAR if len(tpots) == 1 else COARSE)
    known = [max(best.tokens if best else 0.0, floor) for best, floor in zip(table, floors, strict=True)]
    left = [j for j, tokens in enumerate(known) if tokens < inf]
    while left:
        j = left.pop()
        limits = Limits(tpots[j], ttft)
        # The batch that would give a little more than what is known in the time that there is.
        enough = known[j] * gain
        batch = max(1.0, min(most, enough * tpots[j] / d.topology.groups)) if enough else most
        point = curve(batch)
        if point.tokens > enough:
            low = batch if point.over(limits) < 0 else 1.0
            found = fullest(curve, partial(Point.over, limits=limits), low, most)
            if found is None:  # nor with less time
                return
            if found[1].tokens > known[j]:
                known[j] = found[1].tokens
                table[j] = Best(d, found[0], found[1].tokens)
        # Where this took longer than a limit, that limit's batch is smaller, and gives less.
        left = [i for i in left if point.tpot < tpots[i] or point.tokens > known[i] * gain]


class Search:
    """tpots: limits on TPOT in seconds, rising; the last may be infinite."""

    def __init__(
        self, space: Space, work: Workload, tpots: Sequence[float], ttft: float = inf, p: Parameters | None = None
    ) -> None:  # fmt: skip
        self.space, self.work, self.tpots, self.ttft, self.p = space, work, tpots, ttft, p
        self.cluster = space.cluster
        # Tokens/s of all cards that a plan has to give to be of interest, for each limit.
        self.floors = [0.0] * len(tpots)

    def plans(self) -> list[Plan]:
        """For one limit: the best of each size and attention TP, but those far from the best of all; for several: what
        is best for each. Most tokens first; of equals the one of least latency."""
        found: list[Plan] = []
        for plan in self._all():
            found.append(plan)
            worth = plan.outcome.tokens * (KEPT if len(self.tpots) == 1 else 1.0)
            self.floors = [
                max(floor, worth) if plan.outcome.tpot <= tpot else floor
                for floor, tpot in zip(self.floors, self.tpots, strict=True)
            ]
        return sorted(
            found, key=lambda plan: (-round(log(plan.outcome.tokens) / NEAR / 2), plan.outcome.tpot)
        )

    def _all(self) -> Iterator[Plan]:
        if self.space.mode in (None, "together"):
            yield from self._whole("together", self.ttft)
        if self.space.mode in (None, "apart"):
            yield from self._apart()
        if self.space.mode == "elsewhere":
            yield from self._whole("elsewhere", inf)

    def decoding(self, d: Deployment) -> Curve:
        """Of an instance that decodes only."""
        accepted = accepted_tokens(d)

        def at(batch: float) -> Point:
            tpot = decode_step(d, Decode(batch, self.work.context), self.p).seconds / accepted
            return Point(tpot, 0.0, batch * d.topology.groups / tpot)

        return at

    def serving(self, d: Deployment) -> Curve:
        """Of an instance that prefills too."""
        service = steady(Service(d), self.work, self.p)

        def at(batch: float) -> Point:
            found = service.at(batch)
            return Point(found.tpot, found.ttft, found.tokens)

        return at

    def _bests(self, size: Topology, mode: Mode, ttft: float, floors: Sequence[float]) -> Iterator[Best]:
        """Of instances of this size, the best for each limit, and for each attention TP if there is one limit only."""
        table: Table = [None] * len(self.tpots)
        curve_of = self.serving if mode == "together" else self.decoding
        for tp in self.space.tps(size):
            for d in self.space.layouts(size, tp):
                most = held(d, mode, self.work)
                if most >= 1:
                    improve(table, self.tpots, ttft, floors, d, curve_of(d), most)
            if len(table) == 1:
                yield from filter(None, table)
                table = [None]
        yield from filter(None, table)

    def _whole(self, mode: Mode, ttft: float) -> Iterator[Plan]:
        """Instances on all nodes alike."""
        for size in reversed(self.cluster.sizes()):
            n = self.cluster.instances(size, self.cluster.nodes)
            if not n:
                continue
            for best in self._bests(size, mode, ttft, [floor / n for floor in self.floors]):
                service = Service(best.deployment, n)
                yield Plan(service, mode, self.work, answer(service, mode, self.work, self.p).at(best.batch))

    def _apart(self) -> Iterator[Plan]:
        """Each size with the number of nodes for prefill that gives most."""
        nodes = self.cluster.nodes
        prefill = self._prefillers()
        sizes = [size for size in self.cluster.sizes() if size.nodes < nodes]
        for size in sorted(sizes, key=lambda size: abs(size.nodes - nodes / 2)):
            splits = {k: n for k in prefill if (n := self.cluster.instances(size, nodes - k))}
            for best in self._bests(size, "apart", inf, self._floors(splits, prefill)):
                k = max(splits, key=lambda k: (min(splits[k] * best.tokens, prefill[k][0]), k))
                service = Service(best.deployment, splits[k], prefill[k][1].deployment, prefill[k][2])
                # As much as the best of this size gives, if prefill keeps up.
                plan = fitted(service, "apart", self.work, Limits(ttft=self.ttft), self.p, best.batch)
                if plan is not None:
                    yield plan

    def _floors(
        self, splits: Mapping[int, int], prefill: Mapping[int, tuple[float, Prefiller, int]]
    ) -> list[float]:
        """Tokens/s of one instance, with as many of them as prefill that gives enough leaves."""
        most = [
            max((n for k, n in splits.items() if prefill[k][0] > floor), default=0) for floor in self.floors
        ]
        return [floor / n if n else inf for floor, n in zip(self.floors, most, strict=True)]

    def _prefillers(self) -> dict[int, tuple[float, Prefiller, int]]:
        """For each number of nodes, the instances that prefill most: tokens/s of output that they sustain."""
        of_size = {size: found for size in self.cluster.sizes() if (found := self._prefiller(size))}
        out: dict[int, tuple[float, Prefiller, int]] = {}
        for k in range(1, self.cluster.nodes):
            for size, one in of_size.items():
                n = self.cluster.instances(size, k)
                tokens = n * one.rate * self.work.output
                if n and (k not in out or tokens > out[k][0]):
                    out[k] = (tokens, one, n)
        return out

    def _prefiller(self, size: Topology) -> Prefiller | None:
        best: Prefiller | None = None
        for tp in self.space.tps(size):
            for d in self.space.layouts(size, tp, prefill=True):
                if not self.prefills(d):
                    continue
                rate = prefill_rate(d, self.work, self.p)
                if best and rate * MOST_USE <= best.rate:
                    continue
                rate *= self.most_use(d)
                if rate > 0 and (best is None or rate > best.rate):
                    best = Prefiller(d, rate)
        return best

    def prefills(self, d: Deployment) -> bool:
        """Whether memory holds the rows of a full step, and the cache of its prompts."""
        return room(d, chunk(d) / d.topology.tp) >= prompts_of_a_step(d, self.work.input) * cache_bytes(d)

    def most_use(self, d: Deployment) -> float:
        """Share of the time that prefill may be busy: requests wait for it as for one server (M/D/1)."""
        if self.ttft == inf:
            return MOST_USE
        alone = prefill_time(d, self.work, self.p, 1 / d.topology.groups)
        slack = (self.ttft - ADMISSION) / alone - 1
        return 0.0 if slack <= 0 else min(MOST_USE, 2 * slack / (1 + 2 * slack))


def search(space: Space, work: Workload, limits: Limits, p: Parameters | None = None) -> list[Plan]:
    """Plans within the limits, the best of each kind, most tokens first; none where there are none."""
    plans = Search(space, work, [limits.tpot], limits.ttft, p).plans()
    return list({plan.key: plan for plan in reversed(plans)}.values())[::-1]
