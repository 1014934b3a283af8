"""One model on a smaller and on a larger cluster, every rank of both with the same memory: what ranks hold, how many
requests that leaves room for, and what a step of them computes and sends. Counted on the engine, ranks being threads,
beside what is predicted of it without running anything."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expertmesh.bench.counting import PAGE, Run, Trial, capacity, memory_of
from expertmesh.bench.exchange import PHASES
from expertmesh.bench.steptime import Step, step_seconds, work_of
from expertmesh.config import EngineConfig, ModelConfig, cache_bytes_per_token
from expertmesh.config.engine import parse_size
from expertmesh.engine.engine import Engine
from expertmesh.errors import InputError
from expertmesh.mesh.layout import Layout
from expertmesh.mesh.placement import Ints
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import Algorithm, Traffic, algorithm, traffic
from expertmesh.planner.cards import Card
from expertmesh.planner.costs import decode_step
from expertmesh.planner.deployment import Decode, Deployment
from expertmesh.planner.formats import of_engine
from expertmesh.weights import Shard, static_bytes

# Of the memory of the first layout's ranks the weights are so much, where no memory is given: 46.3 of 64 GB, as
# DeepSeek-V3 in 8 bits has it on 16 cards in this engine's layout.
FILLED = 0.72


def bench_scale(folder: Path, topologies: Sequence[Topology], trial: Trial, card: Card) -> dict[str, Any]:
    """The report of `expertmesh bench scale`. InputError where a layout does not fit into the memory."""
    model = ModelConfig.from_folder(folder)
    if not model.moe_layers:
        raise InputError(f"{folder}: this model has no routed experts that a larger cluster could spread")
    layouts = [Layout.of(model, topology, trial.exchange, trial.redundant) for topology in topologies]
    if any(layout.topology.ranks == 1 for layout in layouts):
        raise InputError("one rank sends nothing; compare layouts of two ranks or more, such as 2x8 and 8x8")
    memory = trial.memory or str(round(sum(static_of(model, layouts[0], trial).values()) / FILLED))
    found: list[dict[str, Any]] = []
    for layout in layouts:
        equal = found[0]["loads"]["full"]["counted"]["requests_per_group"] if found else None
        found.append(_Trial(folder, model, layout, trial, memory).run(card, equal))
    return {
        "model": folder.resolve().name,
        "card": card.name,
        "memory_per_rank": parse_size("memory_per_rank", memory),
        **asdict(trial),
        "layouts": found,
        "ratios": {which: ratios(found[0], found[-1], which) for which in ("counted", "predicted")},
    }


def ratios(first: dict[str, Any], last: dict[str, Any], which: str) -> dict[str, float | None]:
    """Of the last layout to the first, None where that has nothing. full: as many requests as there is room for; equal:
    as many in each group as the first layout has room for."""

    def figures(x: dict[str, Any]) -> dict[str, float]:
        memory, (full, equal) = x["memory"][which], (x["loads"][load][which] for load in ("full", "equal"))
        names = (
            "requests", "requests_per_group", "tokens_per_card", "tokens_per_expert", "across_per_token",
            "tokens_per_second_and_card",
        )  # fmt: skip
        return {
            "routed": memory["kinds"]["routed"],
            "weights": memory["weights"],
            "cache_tokens": memory["cache_tokens"],
            **{name: full[name] for name in names},
            "tokens_per_expert_equal": equal["tokens_per_expert"],
            "step_seconds_equal": equal["seconds"]["total"],
            "step_seconds_equal_without_starting": equal["seconds"]["total_without_starting"],
        }

    before, after = figures(first), figures(last)
    return {name: after[name] / value if value else None for name, value in before.items()}


def static_of(model: ModelConfig, layout: Layout, trial: Trial, packed: bool = False) -> Counter[str]:
    """Predicted bytes of rank 0's weights by kind; all ranks hold as many."""
    dtype = EngineConfig(trial.dtype).dtype_of(model)
    shard = Shard.of(0, layout.topology, layout.placement)
    return static_bytes(model, dtype, shard, trial.quantise, packed=packed)


class _Trial:
    """One layout."""

    def __init__(self, folder: Path, model: ModelConfig, layout: Layout, trial: Trial, memory: str) -> None:
        self.folder, self.model, self.layout, self.trial, self.memory = folder, model, layout, trial, memory
        self.dtype = EngineConfig(trial.dtype).dtype_of(model)
        self.itemsize = 4 if self.dtype == "float32" else 2

    def run(self, card: Card, equal: int | None) -> dict[str, Any]:
        """equal: requests of a group in the first layout, which are run here too; None: this is the first."""
        topology = self.layout.topology
        engine = Engine(self.folder, self.trial.config(self.memory), topology)
        try:
            run = Run(engine, self.trial)
            self.static = static_of(self.model, self.layout, self.trial, run.packed)
            memory = {"counted": run.memory(), "predicted": self._memory()}
            run.fill()
            loads = {"full": self._load(run, card)}
            if equal is not None:
                run.keep(equal)
            loads["equal"] = loads["full"] if equal is None else self._load(run, card)
        finally:
            engine.close()
        return {
            "nodes": topology.nodes,
            "cards": topology.cards_per_node,
            "attention_tp": topology.tp,
            "memory": memory,
            "loads": loads,
        }

    def _memory(self) -> dict[str, Any]:
        """Predicted."""
        page = cache_bytes_per_token(self.model, self.dtype) * PAGE
        pages = (parse_size("memory_per_rank", self.memory) - sum(self.static.values())) // page
        return memory_of(self.static, pages * page, pages)

    def _load(self, run: Run, card: Card) -> dict[str, Any]:
        """What is counted in a step, and what is predicted of it."""
        limit = run.limit if run.limit is not None else self.trial.most
        requests = min(capacity(self._memory()["cache_pages"], self.trial.context), limit)
        counted = run.measure()
        law = self._law(counted.chosen, self.layout.how)
        flat = self._law(counted.chosen, algorithm("flat"))
        return {
            "counted": self._figures(
                run.requests, counted.rows, counted.across, counted.inside, counted.touched, card, seen=True
            ),
            "predicted": self._figures(
                requests,
                law.rows_R,
                *self._sent(law, requests),
                self._touched(requests),
                card,
            ),
            "across_per_token_flat": self._sent(flat, requests)[0] / (requests * self._groups),
            "measured_seconds": counted.seconds,
        }

    def _touched(self, requests: int) -> float:
        """The share of experts that have rows, if each token chose among all of them alike."""
        share = self.model.num_experts_per_tok / self.model.n_routed_experts
        return float(1 - (1 - share) ** (requests * self._groups))

    @property
    def _groups(self) -> int:
        return self.layout.topology.groups

    def _figures(
        self,
        requests: int,
        rows_R: Ints,
        across: float,
        inside: float,
        touched: float,
        card: Card,
        seen: bool = False,
    ) -> dict[str, Any]:
        """requests: of a group; rows_R: that each rank's experts compute in the steps that were run; across, inside:
        bytes of all ranks in a step; touched: the share of experts that have rows. seen: the planner is told how uneven
        the rows were, and does not assume it."""
        c, topology = self.model, self.layout.topology
        tokens, ranks = requests * self._groups, topology.ranks
        rows = rows_R / self.trial.steps
        dense = rows.sum() / (len(c.moe_layers) * c.n_routed_experts)
        step = Step(requests, self.trial.context, float(rows.max()), touched, across / ranks, inside / ranks)
        per_token = cache_bytes_per_token(c, self.dtype)
        work = work_of(c, self.static, per_token, self._weight_size, topology.tp, step)
        seconds = step_seconds(work, card, "int8" if self.trial.quantise == "w8a8" else "bf16")
        return {
            "requests": tokens,
            "requests_per_group": requests,
            "tokens_per_card": tokens / ranks,
            "tokens_per_expert": float(dense),
            "tokens_per_expert_and_card_token": float(dense) * ranks / tokens,
            "touched_experts": touched,
            "busiest_rank": float(rows.max() / rows.mean()),
            "across_per_token": across / tokens,
            "inside_per_token": inside / tokens,
            "seconds": seconds,
            "planner_seconds": self._planned(
                requests, card, float(rows.max() / rows.mean()) if seen else None
            ),
            "tokens_per_second_and_card": tokens / ranks / seconds["total"],
        }

    def _planned(self, requests: int, card: Card, imbalance: float | None) -> float:
        """What the planner says of such a step, none of whose experts were placed by loads."""
        deployment = Deployment(
            self.model, card, self.layout.topology, redundant=self.trial.redundant,
            weight_precision=of_engine(self.trial.quantise), exchange=self.trial.exchange, balance="none",
            imbalance=imbalance,
        )  # fmt: skip
        return decode_step(deployment, Decode(requests, self.trial.context)).seconds

    @property
    def _weight_size(self) -> float:
        return 1 if self.trial.quantise == "w8a8" else self.itemsize

    def _law(self, chosen: Sequence[Mapping[int, list[Ints]]], how: Algorithm) -> Traffic:
        """Of the same choices of experts, all steps and layers together."""
        topology, placement = self.layout.topology, self.layout.placement
        total: Traffic | None = None
        for layer in placement.layers:
            choices = placement.choices(layer, topology)
            for step in range(self.trial.steps):
                slots = [choices[rank][one[layer][step]] for rank, one in enumerate(chosen)]
                size = placement.slots_per_rank, self.model.hidden_size
                one_step = traffic(slots, topology, *size, self.dtype, how)
                total = one_step if total is None else total + one_step
        assert total is not None
        return total

    def _sent(self, law: Traffic, requests: int) -> tuple[float, float]:
        """Predicted bytes of all ranks in a step, to other nodes and inside of nodes."""
        topology, steps = self.layout.topology, self.trial.steps
        across = sum(law.across(phase, topology) for phase in PHASES) / steps
        every = int((law.dispatch_RR + law.combine_RR).sum()) / steps
        tokens = requests * self._groups
        return across, every - across + tokens * tp_bytes(self.model, topology.tp, self.itemsize)


def tp_bytes(c: ModelConfig, tp: int, itemsize: int) -> int:
    """Bytes that the ranks of a TP group send each other for a row that is decoded. Every rank but its own gets what is
    gathered of it, and sends what is summed up: the low-rank queries and latents and the output of each attention, rows
    and output of the dense layers, the embedding; then rows for the head, and its logits to the first rank."""
    if tp == 1:
        return 0
    dense = c.num_hidden_layers - len(c.moe_layers)
    attention = (c.q_lora_rank or c.hidden_size) + c.latent_dim + c.hidden_size
    numbers = attention * c.num_hidden_layers + 2 * c.hidden_size * (dense + 1) + c.vocab_size // tp
    return (tp - 1) * numbers * itemsize
