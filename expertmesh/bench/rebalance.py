"""What level cards are worth when the traffic changes: the demo model's routing while domains come and go.

The model writes in each domain, and which experts every token chose is recorded. A step draws tokens from the domains
of its time, the same for all ways of placing experts; each way then shares the rows out and moves experts with the code
of the engine (`mesh.split`, `engine.balancer`). No cluster of cards is here, so their time is modelled: a layer takes
as long as its fullest card, `Model` says how long a row, a moved expert and an exchange of counts take.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertmesh.balancer.eplb import eplb
from expertmesh.engine.balancer import Balancer
from expertmesh.errors import InputError
from expertmesh.llm import LLM
from expertmesh.mesh.balance import balance
from expertmesh.mesh.layout import Layout
from expertmesh.mesh.loads import Floats, Loads
from expertmesh.mesh.migration import Move
from expertmesh.mesh.placement import Ints, Placement, default_placement
from expertmesh.mesh.search import even, taken
from expertmesh.mesh.split import level
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import algorithm
from expertmesh.model.step import Loads as Recorded
from expertmesh.request import SamplingParams

DOMAINS = {
    "english": (
        "Once upon a time",
        "The old man said",
        "It was a dark night, and",
        "In the middle of the wood",
    ),
    "chinese": ("春眠不覺曉", "明月", "江南好", "白日依山盡"),
    "code": ("def main(", "import os\n", "class Node:\n", "for name in sorted("),
}
# What comes and goes, each for as many steps.
PHASES = (
    ("english",), ("code",), ("english", "chinese"), ("chinese",), ("code",), ("english", "chinese", "code"),
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """Times of a card, of DeepSeek-V3's size in FP8: a row through an expert is 88 MFLOP, an expert 44 MB. row: seconds
    (at 200 TFLOP/s); expert: seconds that a rank needs to take one (at 50 GB/s); counts: seconds of their exchange,
    two hops."""

    row: float = 0.44e-6
    expert: float = 0.88e-3
    counts: float = 20e-6


@dataclass(frozen=True)
class Traffic:
    """steps: of each phase; rows: tokens of each card in a step; every: steps between looks at the loads."""

    nodes: int = 8
    cards: int = 8
    redundant: int = 64
    rows: int = 128
    steps: int = 200
    every: int = 25
    seed: int = 0


class _Recorder(Recorded):
    """Keeps every token's experts."""

    repeatable = False

    def __init__(self) -> None:
        super().__init__(lambda experts, counts: None)
        self.chosen: dict[int, list[Ints]] = {}

    def record(self, layer: int, experts_TK: Tensor, experts: int) -> None:
        self.chosen.setdefault(layer, []).append(experts_TK.numpy().copy())


def recorded(texts: int = 64, tokens: int = 160) -> tuple[dict[str, Ints], int]:
    """Experts [tokens, layers, K] that the demo model chose while it wrote in each domain, and how many it has."""
    out = {}
    with LLM(device="cpu") as llm:
        (runner,) = llm.engine.ranks.runners  # type: ignore[attr-defined]
        for name, prompts in DOMAINS.items():
            runner.loads = recorder = _Recorder()
            params = [
                SamplingParams(max_tokens=tokens, temperature=1.0, seed=i, ignore_eos=True)
                for i in range(texts)
            ]
            llm.generate([prompts[i % len(prompts)] for i in range(texts)], params)
            layers = [np.concatenate(recorder.chosen[layer]) for layer in sorted(recorder.chosen)]
            out[name] = np.stack(layers, axis=1)
        return out, llm.engine.model.n_routed_experts


def bench_rebalance(traffic: Traffic, model: Model) -> dict[str, Any]:
    """Modelled seconds of each way, and throughput against experts in order without replicas."""
    topology = Topology(traffic.nodes, traffic.cards)
    tokens, experts = recorded()
    layers = next(iter(tokens.values())).shape[1]
    if (experts + traffic.redundant) % topology.ranks:
        raise InputError(
            f"EPLB needs {experts} experts and the redundant slots to divide by {topology.ranks} cards"
        )
    steps = list(_steps(traffic, topology.ranks, tokens, experts))
    way_of = partial(_Way, traffic, model, topology, experts, layers)
    ways = {
        "in order, no replicas": way_of(redundant=0),
        "EPLB of the last window": way_of(at_once=True),
        "ExpertMesh, even shares": way_of(plan=balance),
        "ExpertMesh, split, no moves": way_of(split=True),
        "ExpertMesh": way_of(plan=balance, split=True),
    }
    rows = []
    for name, way in ways.items():
        begin = time.perf_counter()
        for counts_LE in steps:
            way.step(counts_LE)
        way.close()
        rows.append({"name": name, **way.report(), "wall_seconds": time.perf_counter() - begin})
    for row in rows:
        row["throughput"] = rows[0]["seconds"] / row["seconds"]
    return {"steps": len(steps), "rows_per_card": traffic.rows, "layers": layers, "ways": rows}


def _steps(traffic: Traffic, ranks: int, tokens: dict[str, Ints], experts: int) -> Any:
    """Rows of all cards for each expert [L, E], step by step."""
    rng = np.random.default_rng(traffic.seed)
    for phase in PHASES:
        pool = np.concatenate([tokens[name] for name in phase])
        for _ in range(traffic.steps):
            drawn = pool[rng.integers(len(pool), size=ranks * traffic.rows)]
            yield np.stack(
                [np.bincount(drawn[:, i].ravel(), minlength=experts) for i in range(drawn.shape[1])]
            ).astype(np.float64)


@dataclass
class _Spent:
    computing: float = 0.0
    moving: float = 0.0
    counting: float = 0.0
    rows: float = 0.0
    fullest: float = 0.0


@dataclass
class _Way:
    """Implements what a balancer needs of `engine.ranks.Ranks`."""

    traffic: Traffic
    model: Model
    topology: Topology
    experts: int
    layers: int
    redundant: int | None = None
    plan: Callable[..., Placement] | None = None
    split: bool = False
    at_once: bool = False
    resets: int = 0
    spent: _Spent = field(default_factory=_Spent)

    def __post_init__(self) -> None:
        slots = self.traffic.redundant if self.redundant is None else self.redundant
        self.placement = default_placement(self.experts, range(self.layers), self.topology, slots)
        self._counts = {layer: torch.zeros(self.experts) for layer in range(self.layers)}
        layout = Layout(self.topology, self.placement, algorithm("two_tier"))
        self._balancer, self._steps, self._moved = None, 0, 0
        if self.plan is not None:
            mode = f"every={self.traffic.every}"
            self._balancer = Balancer(mode, self, layout, SIZE, self.plan)  # type: ignore[arg-type]

    def step(self, counts_LE: Floats) -> None:
        placement = self.placement if self._balancer is None else self._balancer.placement
        for layer in range(self.layers):
            cards_R = self._cards(placement.slots_LRS[layer], counts_LE[layer])
            self.spent.computing += float(cards_R.max()) * self.model.row
            self.spent.rows += float(cards_R.mean())
            self.spent.fullest += float(cards_R.max())
            self._counts[layer] += torch.from_numpy(counts_LE[layer]).float()
        if self.split:
            self.spent.counting += self.layers * self.model.counts
        self._steps += 1
        if self._balancer is not None:
            self._balancer.after_step(1.0, self.split)
            self._balancer.wait()  # a plan is there at the next step: real time does not count here
        elif self.at_once and self._steps % self.traffic.every == 0:
            self._replace()

    def _replace(self) -> None:
        """EPLB's plan of the last window, at once."""
        counts_LE = np.stack([self._counts[layer].numpy() for layer in range(self.layers)])
        new = eplb(Loads.of(counts_LE), self.topology, self.traffic.redundant)
        pairs = zip(new.slots_LRS, self.placement.slots_LRS, strict=True)
        taken_R = sum(taken(*pair, self.experts) for pair in pairs)
        self.spent.moving += int(np.max(taken_R)) * self.model.expert
        self._moved += int(np.sum(taken_R))
        self.placement = new
        for rows in self._counts.values():
            rows.zero_()

    def _cards(self, slots_RS: Ints, counts_E: Floats) -> Floats:
        if self.split:
            cards_R: Floats = np.ceil(level(slots_RS, counts_E[None])[0] - 1e-6)
            return cards_R
        return even(slots_RS, counts_E)

    def loads(self) -> dict[int, Tensor]:
        return {layer: rows.clone() for layer, rows in self._counts.items()}

    def stage(self, moves: Sequence[Move], start: int, stop: int) -> None:
        self.spent.moving += (stop - start) / SIZE * self.model.expert

    def checksums(self, moves: Sequence[Move]) -> list[tuple[int, int]]:
        return [(0, 0)] * len(moves)

    def commit(self, moves: Sequence[Move], placement: Placement) -> None:
        pass

    def close(self) -> None:
        if self._balancer is not None:
            self._balancer.close()

    def report(self) -> dict[str, Any]:
        s, state = self.spent, self._balancer.report() if self._balancer else {}
        return {
            "seconds": s.computing + s.moving + s.counting,
            "computing": s.computing,
            "moving": s.moving,
            "counting": s.counting,
            "max_over_mean": s.fullest / s.rows,
            "moved": state.get("moved", self._moved),
            "failures": state.get("failures", 0),
        }


SIZE = 1 << 16  # bytes of an expert here: what moves is its time, in `Model`
