"""Layouts of the same cards that give more than one that is there, under the same limit on latency."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from expertmesh.errors import InputError
from expertmesh.mesh.topology import Topology
from expertmesh.planner.deployment import Deployment
from expertmesh.planner.formats import WEIGHTS
from expertmesh.planner.parameters import Parameters
from expertmesh.planner.plans import Limits, fitted
from expertmesh.planner.serving import Outcome, Service, Workload
from expertmesh.planner.space import divisors

EXCHANGES = ("flat", "two_tier", "two_tier_int8", "two_tier_int8_both")


@dataclass(frozen=True)
class Better:
    """changes: to the layout before, in words; gain: all tokens/s over those before."""

    changes: tuple[str, ...]
    deployment: Deployment
    outcome: Outcome
    gain: float


def best_load(d: Deployment, work: Workload, tpot: float, p: Parameters | None = None) -> Outcome | None:
    """With as many requests as fit and keep TPOT (seconds), prefill on the same ranks; None where not one does."""
    plan = fitted(Service(d), "together", work, Limits(tpot), p)
    return None if plan is None else plan.outcome


def better(start: Deployment, work: Workload, tpot: float, p: Parameters | None = None) -> list[Better]:
    """Layouts of the same cards and the same precision of weights with more tokens/s than `start`, the best one first;
    `start` itself comes last. InputError where it does not keep the limit."""
    now = best_load(start, work, tpot, p)
    if now is None:
        raise InputError(
            f"the layout to start from does not reach {tpot * 1e3:.3g} ms a token with any load; give a larger limit"
        )
    found = [Better((), start, now, 1.0)]
    for d in layouts(start):
        outcome = best_load(d, work, tpot, p)
        if outcome is not None and outcome.tokens > now.tokens:
            found.append(Better(changes(start, d), d, outcome, outcome.tokens / now.tokens))
    return sorted(found, key=lambda b: -b.gain)


def layouts(start: Deployment) -> Iterator[Deployment]:
    """All with another attention TP, exchange, overlap, or number of redundant slots: the last only where imbalance is
    modelled, for where it is given they only take memory."""
    t = start.topology
    redundant = {start.redundant, 0, start.ranks} if start.imbalance is None else {start.redundant}
    for tp, exchange, overlap, slots in product(
        divisors(t.cards_per_node), EXCHANGES, (False, True), sorted(redundant)
    ):
        topology = Topology(t.nodes, t.cards_per_node, tp)
        try:
            d = replace(start, topology=topology, exchange=exchange, overlap=overlap, redundant=slots)
        except InputError:  # the model does not split so
            continue
        if d != start:
            yield d


def precisions(best: Better, work: Workload, tpot: float, p: Parameters | None = None) -> list[Better]:
    """The same layout with weights in other precisions that the engine has kernels for, if they give more."""
    found = []
    for kept in WEIGHTS.values():
        d = replace(best.deployment, weight_precision=kept.name)
        outcome = best_load(d, work, tpot, p) if kept.engine else None
        if outcome is not None and outcome.tokens > best.outcome.tokens:
            gain = outcome.tokens / best.outcome.tokens
            found.append(Better(changes(best.deployment, d), d, outcome, gain))
    return sorted(found, key=lambda b: -b.gain)


def changes(old: Deployment, new: Deployment) -> tuple[str, ...]:
    """What differs, in words."""
    values = {
        "attention TP": (old.topology.tp, new.topology.tp),
        "exchange": (old.exchange, new.exchange),
        "overlap": tuple("on" if d.overlap else "off" for d in (old, new)),
        "redundant slots": (old.redundant, new.redundant),
        "weights": (old.weight_precision, new.weight_precision),
    }
    return tuple(f"{name} {a} -> {b}" for name, (a, b) in values.items() if a != b)
