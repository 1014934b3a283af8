"""A service with the batch that limits and memory allow, and what it gives so."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import TypeVar

from expertmesh.errors import InputError
from expertmesh.planner.costs import accepted_tokens, decode_step
from expertmesh.planner.deployment import Decode, Deployment
from expertmesh.planner.memory import most_requests
from expertmesh.planner.parameters import Parameters
from expertmesh.planner.serving import Apart, Outcome, Service, Together, Workload, chunk, steady
from expertmesh.planner.space import Mode

MOST_USE = 0.9  # of prefill that has ranks of its own: fuller, requests would wait for long
NEAR = 2e-3  # of a limit, as which a batch is found
SAME = 0.01  # of two points of a front, as which only the one with more tokens stays
P = TypeVar("P")


@dataclass(frozen=True)
class Limits:
    """Seconds, means; infinite where there is none."""

    tpot: float = inf
    ttft: float = inf

    def __post_init__(self) -> None:
        if not (self.tpot > 0 and self.ttft > 0):
            raise InputError(
                f"a limit of {min(self.tpot, self.ttft) * 1e3:g} ms; give a larger limit, which must be above 0"
            )


@dataclass(frozen=True)
class Plan:
    """A service, what is asked of it, and what it gives with the batch that the limits allow."""

    service: Service
    mode: Mode
    work: Workload
    outcome: Outcome

    @property
    def cards(self) -> float:
        return self.service.ranks / self.service.decode.card.dies_per_card

    @property
    def tokens_per_card(self) -> float:
        return self.outcome.tokens / self.cards

    @property
    def most_batch(self) -> float:
        """Requests of a TP group that memory holds."""
        return held(self.service.decode, self.mode, self.work)

    @property
    def in_flight(self) -> float:
        """Requests in the service, those in prefill among them (Little's law)."""
        waiting = self.outcome.tokens / self.work.output * self.outcome.ttft
        return self.outcome.batch * self.service.groups + waiting

    @property
    def key(self) -> tuple[object, ...]:
        """Plans of one key differ in little."""
        return (self.mode, self.service.decode.topology, self.service.instances)


class Elsewhere:
    """Decoding only: prompts come with their cache."""

    def __init__(self, service: Service, work: Workload, p: Parameters | None) -> None:
        self.service, self.work, self.p = service, work, p

    def at(self, batch: float) -> Outcome:
        step = decode_step(self.service.decode, Decode(batch, self.work.context), self.p)
        tpot = step.seconds / accepted_tokens(self.service.decode)
        return Outcome(0.0, tpot, batch * self.service.groups / tpot, batch, 0.0, step)


def fullest(
    curve: Callable[[float], P], over: Callable[[P], float], low: float, high: float
) -> tuple[float, P] | None:
    """The largest batch whose point is not over the limits (above 0), and that point; None where even `low` is. By
    false position."""
    best = curve(high)
    above = over(best)
    if above <= 0:
        return high, best
    best = curve(low)
    below = over(best)
    if below > 0:
        return None
    while high - low > NEAR / 4 * high and below < -NEAR:
        middle = low + (high - low) * min(0.95, max(0.05, below / (below - above)))
        point = curve(middle)
        value = over(point)
        if value <= 0:
            low, below, best = middle, value, point
            above /= 2  # Illinois: no end stays for ever
        else:
            high, above = middle, value
            below = max(below / 2, -1.0) if below < -2 * NEAR else below
    return low, best


def answer(
    service: Service, mode: Mode, work: Workload, p: Parameters | None
) -> Apart | Together | Elsewhere:
    return Elsewhere(service, work, p) if mode == "elsewhere" else steady(service, work, p)


def prefill_rows(d: Deployment, mode: Mode) -> float:
    """Of a rank in a full step of prefill, where that is between those of decoding."""
    return chunk(d) / d.topology.tp if mode == "together" else 0.0


def held(d: Deployment, mode: Mode, work: Workload) -> float:
    """Requests of a TP group that memory holds."""
    return most_requests(d, work.context, prefill_rows(d, mode))


def fitted(
    service: Service,
    mode: Mode,
    work: Workload,
    limits: Limits,
    p: Parameters | None = None,
    most: float = inf,
) -> Plan | None:
    """The service with the largest batch within limits, memory and `most`; None where it cannot keep the limits."""
    most = min(most, held(service.decode, mode, work))
    if most < 1:
        return None
    curve = answer(service, mode, work, p).at

    def over(found: Outcome) -> float:
        busy = found.prefill_use / MOST_USE if mode == "apart" else 0.0
        return max(found.tpot / limits.tpot, min(found.ttft / limits.ttft, 1e3), busy) - 1

    # Where prefill does not even keep up with one request of each group, groups are idle for some of the time.
    found = fullest(curve, over, 1.0, most) or fullest(curve, over, 1 / 64, 1.0)
    return found and Plan(service, mode, work, found[1])


def prompts_of_a_step(d: Deployment, length: float) -> float:
    """Tokens in the cache for the prompts of a full step of a TP group."""
    return max(length, chunk(d) // length * length)


def front(plans: Sequence[Plan]) -> list[Plan]:
    """Those of which none other gives as much in nearly the same time, quickest first."""
    out: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.outcome.tpot, -plan.outcome.tokens)):
        if out and plan.outcome.tokens <= out[-1].outcome.tokens * (1 + NEAR):
            continue
        if out and plan.outcome.tpot < out[-1].outcome.tpot * (1 + SAME):
            out.pop()
        out.append(plan)
    return out


def knee(plans: Sequence[Plan]) -> Plan:
    """The point of a front with the greatest product of tokens/s per card and tokens/s for a user."""
    return max(plans, key=lambda plan: plan.tokens_per_card / plan.outcome.tpot)
