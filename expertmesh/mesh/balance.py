"""Experts to cards by their loads: placements that stay level when the loads change (library and command `balance`).

Two things are known of a load: it was recorded, and the next one will differ. A placement that is optimal for the
record alone is bad for what comes next; what helps then is the split of every step's rows over replicas
(`mesh/split.py`), as far as replicas tie the cards together. So the placement is searched for that is best, after that
split, over loads that may come: the recorded windows and log-normal variations of them.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from expertmesh import native
from expertmesh.errors import InputError
from expertmesh.mesh.loads import Floats, Loads, check_fit
from expertmesh.mesh.locality import sample
from expertmesh.mesh.placement import EMPTY, Ints, Placement
from expertmesh.mesh.search import Goal, arrange, even, held, improve, pack, replicate, taken
from expertmesh.mesh.split import level
from expertmesh.mesh.topology import Topology


@dataclass(frozen=True)
class Objective:
    """What a placement is to be good at. scenarios: how many variations of the loads it is judged by; deviation: of
    their logarithm; reversion: how far they go back to the mean (large loads tend to fall, small ones to rise); the
    rest as in `search.Goal`. greed: exponent of the loads for the first number of replicas; tries, heat, cold:
    of the search, see `improve`, heat at most; tokens: that locality is judged by."""

    scenarios: int = 0
    deviation: float = 0.0
    reversion: float = 0.0
    even: float = 1.0
    slack: float = 0.0
    risk: float = 0.0
    copies: float = 0.0
    greed: float = 1.0
    tries: int = 150_000
    heat: float = 2e-2
    cold: float = 1e-4
    tokens: int = 1024


OBJECTIVES = {
    "robust": Objective(
        32, 0.45, 0.1, even=3.0, slack=0.035, risk=0.1, greed=0.85, tries=60_000, heat=1e-3, cold=1e-3
    ),
    "known": Objective(),
    "local": Objective(even=3.0, slack=0.035, copies=0.3, tries=100_000, heat=1e-3, cold=1e-3, tokens=4096),
}
ENOUGH = 0.045  # an old placement is left alone once no card is further above the mean
# What a moved slot has to be worth, in turn, see `search.Goal`; and the moves that are tried for each.
MOVES, TRIES = tuple(0.128 * 0.6**i for i in range(10)), 100_000
WORTH = 0.1  # of the mean: what the fullest card has to gain for moving all slots
HEAT = 0.1  # most of a search by even shares, in the squares of what cards are off the mean at its start
MOST_NODES = 64  # for which locality is looked at
WINDOWS = 0.1  # weight of the recorded windows among the scenarios


def balance(
    loads: Loads,
    topology: Topology,
    redundant: int = 0,
    *,
    old: Placement | None = None,
    budget: int | None = None,
    objective: str = "robust",
    seed: int = 0,
) -> Placement:
    """A placement of the layers of `loads` on the cards of `topology`, with `redundant` slots a layer beyond one for
    each expert (any number; cards differ by one slot at most).

    objective: `robust` expects other loads next time and a split of each step's rows over replicas; `known` takes the
    loads as certain and shares as even; `local` has even shares too and sends tokens to fewer other nodes. old: start
    from it and move few slots, `budget` at most over all layers. The same arguments give the same placement.
    InputError where that cannot be.
    """
    if objective not in OBJECTIVES:
        raise InputError(f"objective {objective!r} is not one of {', '.join(OBJECTIVES)}")
    check_fit(loads, topology, redundant)
    room_R = rooms(loads.experts, topology, redundant)
    if old is not None:
        _check_old(old, loads, topology)
    budgets = _shares_of(budget, len(loads.layers))
    chosen = OBJECTIVES[objective]

    def one(row: int) -> Ints:
        slots_RS = None if old is None else old.slots_LRS[old.row_of(loads.layers[row])]
        return _layer(loads, row, topology, room_R, chosen, slots_RS, budgets[row], seed)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(one, range(len(loads.layers))))
    return Placement(np.stack(found), loads.experts, loads.layers)


def rooms(experts: int, topology: Topology, redundant: int) -> Ints:
    """Slots of each rank that are used [R]: as even as they can be, larger ones spread over the nodes."""
    ranks = topology.ranks
    least, more = divmod(experts + redundant, ranks)
    order = np.argsort([topology.card_of(r) * topology.nodes + topology.node_of(r) for r in range(ranks)])
    room_R = np.full(ranks, least, dtype=np.int64)
    room_R[order[:more]] += 1
    return room_R


def _layer(
    loads: Loads,
    row: int,
    topology: Topology,
    room_R: Ints,
    objective: Objective,
    old_RS: Ints | None,
    budget: int | None,
    seed: int,
) -> Ints:
    windows_WE = loads.counts_WLE[:, row].astype(np.float64)
    some = windows_WE.sum(1) > 0
    windows_WE, weights_W = windows_WE[some], loads.weights_W[some]
    total_E = np.einsum("w,we->e", weights_W, windows_WE)
    shares_E = total_E / total_E.sum()
    windows_WE = windows_WE / windows_WE.sum(1, keepdims=True)
    weights_W = weights_W / weights_W.sum()
    rng = np.random.default_rng([seed, loads.layers[row]])
    # Tokens take long to sample: only for a search that weighs copies, or a placement that is arranged after it.
    located = 1 < topology.nodes <= MOST_NODES and (old_RS is None or objective.copies > 0)
    tokens_TK = sample(loads, row, objective.tokens, seed) if located else None
    scenarios, weights = _forecast(windows_WE, weights_W, objective, rng)
    goal = Goal(
        shares_E, scenarios, weights, objective.even, objective.slack, objective.risk, objective.deviation,
        topology.nodes, tokens_TK, objective.copies,
    )  # fmt: skip
    seeds = (int(number) for number in rng.integers(1 << 62, size=16))
    if old_RS is None:
        return _fresh(goal, room_R, objective, tokens_TK, seeds)
    goal = replace(goal, old_RS=old_RS, budget=budget, enough=ENOUGH)
    mended_RS = _mend(_fit(old_RS, shares_E, room_R), room_R, goal, seeds)
    if budget is not None or _highest(mended_RS, shares_E) <= 1 + ENOUGH:
        return mended_RS
    # Small changes do not get there.
    fresh_RS = _aligned(_fresh(goal, room_R, objective, None, seeds), old_RS, room_R, len(shares_E))
    gained = _value(mended_RS, goal, objective) - _value(fresh_RS, goal, objective)
    more = sum(taken(fresh_RS, old_RS, len(shares_E)) - taken(mended_RS, old_RS, len(shares_E)))
    return fresh_RS if gained > WORTH * more / room_R.sum() else mended_RS


def _fresh(
    goal: Goal, room_R: Ints, objective: Objective, tokens_TK: Ints | None, seeds: Iterator[int]
) -> Ints:
    goal = replace(goal, old_RS=None, budget=None, enough=None)
    counts_E = replicate((goal.shares_E + 1e-6) ** objective.greed, int(room_R.sum()), len(room_R))
    slots_RS = pack(goal.shares_E, counts_E, room_R)
    if not native.available("balance"):
        return slots_RS
    if tokens_TK is not None and objective.copies:  # where the search weighs copies, it gets a good start
        slots_RS = arrange(slots_RS, room_R, goal.nodes, tokens_TK, next(seeds))
    heat = objective.heat
    if not objective.scenarios:
        # Far from level, other numbers of replicas have to be found, which takes heat; near it, heat undoes the start.
        loads_R = even(slots_RS, goal.shares_E)
        heat = min(heat, HEAT * float(((loads_R / loads_R.mean() - 1) ** 2).sum()))
    slots_RS = improve(slots_RS, room_R, goal, objective.tries, heat, next(seeds), objective.cold)
    if tokens_TK is not None and not objective.copies:
        slots_RS = arrange(slots_RS, room_R, goal.nodes, tokens_TK, next(seeds))
    return slots_RS


def _mend(slots_RS: Ints, room_R: Ints, goal: Goal, seeds: Iterator[int]) -> Ints:
    """The old placement, changed in few slots: first only where one makes much of a difference, then where less, until
    the cards are level enough."""
    goal = Goal(
        goal.shares_E, even=3.0, slack=ENOUGH - 0.01, old_RS=goal.old_RS, budget=goal.budget, enough=ENOUGH
    )
    for move in MOVES:
        if not native.available("balance") or _highest(slots_RS, goal.shares_E) <= 1 + ENOUGH:
            break
        slots_RS = improve(slots_RS, room_R, replace(goal, move=move), TRIES, 0.0, next(seeds))
    return slots_RS


def _aligned(new_RS: Ints, old_RS: Ints, room_R: Ints, experts: int) -> Ints:
    """The same cards on such ranks that have many of their experts already."""
    shared_RR = held(new_RS, experts).astype(np.int64) @ held(old_RS, experts).astype(np.int64).T
    shared_RR[room_R[:, None] != room_R] = -1
    out = np.full_like(new_RS, EMPTY)
    for place in np.argsort(-shared_RR, axis=None, kind="stable"):
        card, rank = np.unravel_index(place, shared_RR.shape)
        if shared_RR[card, rank] >= 0:
            out[rank] = new_RS[card]
            shared_RR[card], shared_RR[:, rank] = -1, -1
    return out


def _value(slots_RS: Ints, goal: Goal, objective: Objective) -> float:
    """The fullest card over the mean by the loads themselves: split, where the objective expects that."""
    if not objective.scenarios:
        return _highest(slots_RS, goal.shares_E)
    return _fullest(level(slots_RS, goal.shares_E[None])[0])


def _highest(slots_RS: Ints, shares_E: Floats) -> float:
    return _fullest(even(slots_RS, shares_E))


def _fullest(loads_R: Floats) -> float:
    return float(loads_R.max() / loads_R.mean())


def _forecast(
    windows_WE: Floats, weights_W: Floats, objective: Objective, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Loads that may come [N, E] and their weights: the windows as they are, and variations of them in turn."""
    if not objective.scenarios:
        return np.empty((0, windows_WE.shape[1])), np.empty(0)
    number = objective.scenarios
    at = rng.choice(len(windows_WE), number, p=weights_W) if len(windows_WE) > 1 else np.zeros(number, int)
    noise = rng.standard_normal((number, windows_WE.shape[1]))
    mean = windows_WE.mean(1, keepdims=True)
    varied = mean * ((windows_WE + 1e-3 * mean) / mean) ** (1 - objective.reversion)
    scenarios = varied[at] * np.exp(objective.deviation * noise)
    weights = np.full(number, (1 - WINDOWS) / number)
    return np.concatenate([windows_WE, scenarios]), np.concatenate([WINDOWS * weights_W, weights])


def _fit(old_RS: Ints, shares_E: Floats, room_R: Ints) -> Ints:
    """The old slots in the new room: replicas give way where there is less, further ones fill what is more."""
    lists = [[int(e) for e in own if e != EMPTY] for own in old_RS]
    counts_E = held(old_RS, len(shares_E)).sum(0)
    for rank, own in enumerate(lists):
        while len(own) > room_R[rank]:  # an expert that is lost is packed again
            give = min(own, key=lambda e: (counts_E[e] == 1, shares_E[e] / max(counts_E[e], 1)))
            own.remove(give)
            counts_E[give] -= 1
    total, goal = int(room_R.sum()), np.maximum(counts_E, 1)
    while goal.sum() < min(total, len(room_R) * len(goal)):
        goal[np.argmax(np.where(goal < len(room_R), shares_E / goal, -1.0))] += 1
    while goal.sum() > total:
        goal[np.argmin(np.where(goal > 1, shares_E / goal, np.inf))] -= 1
    for expert in np.repeat(np.arange(len(goal)), np.maximum(counts_E - goal, 0)).tolist():
        next(own for own in lists if expert in own).remove(expert)
    return pack(shares_E + 1e-9, goal, room_R, lists)


def _check_old(old: Placement, loads: Loads, topology: Topology) -> None:
    experts = loads.experts
    if old.experts != experts or old.slots_LRS.shape[1] != topology.ranks:
        raise InputError(
            f"the old placement has {old.experts} experts on {old.slots_LRS.shape[1]} cards, but the loads are of "
            f"{experts} experts and there are {topology.ranks} cards"
        )
    missing = [layer for layer in loads.layers if layer not in old.layers]
    if missing:
        raise InputError(f"the old placement has no layer {missing[0]}, for which there are loads")


def _shares_of(budget: int | None, parts: int) -> list[int | None]:
    if budget is None:
        return [None] * parts
    if budget < 0:
        raise InputError(f"a budget of {budget} moves; must be at least 0")
    return [budget * (i + 1) // parts - budget * i // parts for i in range(parts)]


def even_cards(placement: Placement, counts_LE: Floats) -> Floats:
    """Load of each card [L, R] where the replicas of an expert share its load evenly."""
    return np.stack(
        [even(slots, counts) for slots, counts in zip(placement.slots_LRS, counts_LE, strict=True)]
    )


def split_cards(placement: Placement, counts_LE: Floats) -> Floats:
    """Load of each card [L, R] as a split over the replicas by these loads leaves it."""
    return np.stack(
        [level(slots, counts[None])[0] for slots, counts in zip(placement.slots_LRS, counts_LE, strict=True)]
    )


def moves(old: Placement, new: Placement) -> int:
    """Experts that a rank of `new` has and did not have in `old`, over the layers of both."""
    return sum(
        int(taken(new.slots_LRS[i], old.slots_LRS[old.row_of(layer)], new.experts).sum())
        for i, layer in enumerate(new.layers)
        if layer in old.layers
    )
