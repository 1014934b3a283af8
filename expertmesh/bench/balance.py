"""What a placement of experts is worth: this balancer, EPLB, and experts in order without replicas, on the same loads.

The first workload is planned for; what follows is judged by the others too, as loads are known only afterwards. `even`
means that the replicas of an expert share its rows evenly, `split` that each step's rows are split by its own counts
(`mesh/split.py`).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from expertmesh import native
from expertmesh.balancer.plans import Plan, in_order, published, timed
from expertmesh.errors import InputError
from expertmesh.llm import LLM
from expertmesh.mesh.balance import OBJECTIVES, balance, moves
from expertmesh.mesh.loads import Floats, Loads
from expertmesh.mesh.locality import Gate, cross_node_copies, sample
from expertmesh.mesh.placement import Placement
from expertmesh.mesh.split import Split, level
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import FORMATS, rows_bytes
from expertmesh.request import SamplingParams

NAMES = OURS, EPLB, ORDER = "expertmesh", "EPLB", "in order"
DEFAULT, KNOWN = "robust", "known"
WIDTH = 7168  # DeepSeek-V3
LEVEL = 0.1  # spread for which replicas are counted
STRIDE = 4
STEP_TOKENS = 128  # of each card
DEMO = Topology(2, 4)  # that the demo model is planned for, with a replica on each card
DEMO_REQUESTS, DEMO_TOKENS = 32, 64


@dataclass(frozen=True)
class Size:
    """How much is measured: single steps a layer, timed splits, layers and workloads at most."""

    steps: int = 20
    timed: int = 200
    layers: int | None = None
    workloads: int | None = None


FULL, QUICK = Size(), Size(3, 5, 2, 3)


def bench_balance(
    workloads: dict[str, Loads], topology: Topology, redundant: int, size: Size = FULL
) -> dict[str, Any]:
    """All figures of workloads of one model. A plan that there is not (EPLB needs equal cards) is None."""
    workloads = {name: _cut(loads, size.layers) for name, loads in [*workloads.items()][: size.workloads]}
    bench = _Bench(workloads, topology, redundant, size)
    first = bench.first
    report: dict[str, Any] = {
        "workloads": list(workloads),
        "nodes": topology.nodes,
        "cards": topology.cards_per_node,
        "layers": len(first.layers),
        "experts": first.experts,
        "redundant": redundant,
        "compiled": native.available("balance"),
    }
    stages: dict[str, Callable[[], Any]] = {
        "known": bench.known,
        "redundancy": bench.redundancy,
        "next": bench.next,
        "shifts": bench.shifts,
        "steps": bench.steps,
        "copies": bench.copies,
        "split_microseconds": bench.split_microseconds,
    }
    for name, stage in tqdm(stages.items(), desc="measuring", leave=False, disable=None):
        report[name] = stage()
    return report


def demo_loads(prompts: dict[str, str]) -> dict[str, Loads]:
    """What the demo model's experts got while it continued each prompt some times, at temperature 0.7 (seeded)."""
    found = {}
    with LLM(device="cpu") as llm:
        for name, prompt in prompts.items():
            llm.engine.ranks.reset()
            params = [
                SamplingParams(max_tokens=DEMO_TOKENS, temperature=0.7, seed=seed, ignore_eos=True)
                for seed in range(DEMO_REQUESTS)
            ]
            llm.generate([prompt] * len(params), params)
            counts = llm.engine.ranks.loads()
            found[name] = Loads.of(np.stack([counts[layer].numpy() for layer in sorted(counts)]))
    return found


class _Bench:
    """One method for each figure; plans are kept."""

    def __init__(self, workloads: dict[str, Loads], topology: Topology, redundant: int, size: Size) -> None:
        self._workloads, self._topology, self._redundant, self._size = workloads, topology, redundant, size
        self._main, *self._others = workloads
        self.first = workloads[self._main]
        self._made: dict[tuple[str, str, int], Plan | None] = {}

    def known(self) -> dict[str, Any]:
        """Where the loads are those that were planned for, with even shares."""
        out: dict[str, Any] = {}
        for name, how in ((OURS, KNOWN), (EPLB, EPLB), (ORDER, ORDER)):
            plan = self._plan(self._main, how)
            out[name] = plan and {**plan.judged(self.first)["even"], "seconds": plan.seconds}
        return out

    def redundancy(self) -> dict[str, int | None]:
        """The fewest redundant slots a layer for which the mean spread is less than `LEVEL`; None: more than twice as
        many as are asked for, or never."""
        return {
            name: next((r for r in range(0, 2 * self._redundant + 1, STRIDE) if self._level(how, r)), None)
            for name, how in ((OURS, KNOWN), (EPLB, EPLB))
        } | {ORDER: 0 if self._level(ORDER, 0) else None}

    def next(self) -> dict[str, Any]:
        """Planned for one workload, judged by another: every pair, and the means over them."""
        pairs = [
            {
                "planned": a,
                "judged": b,
                **{
                    name: plan and plan.judged(self._workloads[b])
                    for name, plan in self._plans(a, self._redundant).items()
                },
            }
            for a in self._workloads
            for b in self._workloads
            if a != b
        ]
        return {"pairs": pairs, "mean": {name: _mean([pair[name] for pair in pairs]) for name in NAMES}}

    def shifts(self) -> list[dict[str, Any]]:
        """From the first workload's plan to one for another workload: slots that change, and what that gives."""
        return [self._shift(name) for name in self._others]

    def _shift(self, name: str) -> dict[str, Any]:
        loads, plans = self._workloads[name], self._plans(self._main, self._redundant)
        ours, published, anew = plans[OURS], plans[EPLB], self._plan(name, EPLB)
        assert ours is not None
        old, slots = ours.placement, self.first.experts + self._redundant
        made = timed(lambda: balance(loads, self._topology, self._redundant, old=old))

        def changed(before: Placement, plan: Plan) -> dict[str, Any]:
            moved = moves(before, plan.placement)
            return {"moves": moved, "share": moved / (slots * len(loads.layers)), **plan.judged(loads)}

        return {
            "to": name,
            "before": ours.judged(loads),
            OURS: {**changed(old, made), "seconds": made.seconds},
            EPLB: changed(published.placement, anew) if published and anew else None,
        }

    def steps(self) -> dict[str, Any]:
        """Steps of `STEP_TOKENS` tokens a card, drawn without replacement from what was planned for: the fullest card
        over the mean one, the mean over layers and steps."""
        rng = np.random.default_rng(0)
        draws = STEP_TOKENS * self._topology.ranks * Gate.of(self.first.experts, self.first.groups).chosen
        steps_LNE = [_drawn(counts, draws, self._size.steps, rng) for counts in self.first.total_LE]
        out: dict[str, Any] = {}
        for redundant in (self._redundant, 2 * self._redundant):
            plans = self._plans(self._main, redundant) if self._fits(redundant) else {}
            out[str(redundant)] = {
                name: plan and _over_steps(plan, steps_LNE) for name, plan in plans.items()
            }
        return out

    def copies(self) -> dict[str, Any]:
        """Copies of a token to other nodes, a node counting once, by objective; and bytes across nodes there and back,
        as a share of those of plain BF16 rows to every chosen expert (`flat`)."""
        out: dict[str, Any] = {}
        for how in (*OBJECTIVES, EPLB, ORDER):
            plan = self._plan(self._main, how)
            if plan is None:
                out[how] = None
                continue
            copies = cross_node_copies(plan.placement, self.first, self._topology)
            out[how] = {
                "copies": copies,
                "seconds": plan.seconds,
                **plan.judged(self.first),
                "bytes": self._bytes(copies),
            }
        return out

    def split_microseconds(self) -> float:
        """Of the split of a step for one rank and layer: wishes, plan and assignment."""
        plan = self._plan(self._main, DEFAULT)
        assert plan is not None
        topology, found = self._topology, []
        split = Split(plan.placement.slots_LRS[0], self.first.experts, topology)
        tokens_TK = sample(self.first, 0, topology.ranks * STEP_TOKENS)
        experts_RTK = tokens_TK.reshape(topology.ranks, STEP_TOKENS, -1)
        counts = np.stack(
            [split.wish(experts_TK, rank).counts_2P for rank, experts_TK in enumerate(experts_RTK)]
        )
        for turn in range(self._size.timed):
            rank = turn % topology.ranks
            start = time.perf_counter()
            wish = split.wish(experts_RTK[rank], rank)
            split.assign(wish, rank, *split.settle(counts, rank))
            found.append(time.perf_counter() - start)
        return statistics.median(found) * 1e6

    def _plans(self, workload: str, redundant: int) -> dict[str, Plan | None]:
        hows = {OURS: DEFAULT, EPLB: EPLB, ORDER: ORDER}
        return {name: self._plan(workload, how, redundant) for name, how in hows.items()}

    def _plan(self, workload: str, how: str, redundant: int | None = None) -> Plan | None:
        """how: one of our objectives, or another planner."""
        slots = 0 if how == ORDER else self._redundant if redundant is None else redundant
        key = workload, how, slots
        if key not in self._made:
            self._made[key] = _make(self._workloads[workload], self._topology, how, slots)
        return self._made[key]

    def _level(self, how: str, redundant: int) -> bool:
        if not self._fits(redundant):
            return False
        plan = self._plan(self._main, how, redundant)
        return plan is not None and plan.judged(self.first)["even"]["mean_spread"] < LEVEL

    def _fits(self, redundant: int) -> bool:
        return redundant <= self.first.experts * (self._topology.ranks - 1)

    def _bytes(self, copies: float) -> dict[str, float] | None:
        plain, small = (rows_bytes(1, WIDTH, FORMATS[name]) for name in ("bfloat16", "int8"))
        chosen = Gate.of(self.first.experts, self.first.groups).chosen
        flat = 2 * plain * chosen * (1 - 1 / self._topology.nodes)
        if not flat:
            return None
        sent = {"bfloat16": 2 * plain, "int8": small + plain, "int8_both": 2 * small}
        return {name: copies * row / flat for name, row in sent.items()}


def _make(loads: Loads, topology: Topology, how: str, redundant: int) -> Plan | None:
    if how == ORDER:
        return in_order(loads, topology)
    if how != EPLB:
        return timed(lambda: balance(loads, topology, redundant, objective=how))
    try:
        return published(loads, topology, redundant)
    except InputError:
        return None


def _cut(loads: Loads, layers: int | None) -> Loads:
    tokens = None if loads.tokens_LTK is None else loads.tokens_LTK[:layers]
    counts_WLE = loads.counts_WLE[:, :layers]
    return replace(loads, counts_WLE=counts_WLE, layers=loads.layers[:layers], tokens_LTK=tokens)


def _drawn(counts_E: Floats, draws: int, steps: int, rng: np.random.Generator) -> Floats:
    """Rows of each expert in steps [N, E]. Records too small or too large to draw from are scaled."""
    total = float(counts_E.sum())
    within = total if 2 * draws <= total < 5e8 else min(max(total, 16.0 * draws), 5e8)
    whole_E = np.rint(counts_E * (within / total)).astype(np.int64)
    return rng.multivariate_hypergeometric(whole_E, draws, steps, method="marginals").astype(np.float64)


def _over_steps(plan: Plan, steps_LNE: Sequence[Floats]) -> dict[str, float]:
    even = [plan.even(np.stack(steps)) for steps in zip(*steps_LNE, strict=True)]
    split = [level(s, steps) for s, steps in zip(plan.placement.slots_LRS, steps_LNE, strict=True)]
    return {
        name: float(np.mean([_fullest(c) for c in cards]))
        for name, cards in (("even", even), ("split", split))
    }


def _fullest(loads_NR: Floats) -> float:
    return float((loads_NR.max(1) / loads_NR.mean(1)).mean())


def _mean(found: Sequence[Any]) -> Any:
    """Of equal nested figures; None where one is missing."""
    if not found or any(one is None for one in found):
        return None
    if isinstance(found[0], dict):
        return {key: _mean([one[key] for one in found]) for key in found[0]}
    return statistics.fmean(found)
