"""Steps of the engine on this machine, beside what is predicted of them for the card that `bench machine` makes of it.

Steps of decoding and of prefill over layouts, batches, contexts and precisions. Where there are more ranks than cores,
they share them. Ratios between cases are scored above all: they say whether a planner puts them in the right order, and
a machine's own constant is in all of them.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from expertmesh.comm.local import cores
from expertmesh.config import EngineConfig, ModelConfig
from expertmesh.engine.engine import Engine
from expertmesh.errors import InputError
from expertmesh.mesh.topology import Topology
from expertmesh.planner.cards import NUMBERS, Card
from expertmesh.planner.costs import decode_step, prefill_step
from expertmesh.planner.deployment import Decode, Deployment, Prefill
from expertmesh.planner.formats import of_engine
from expertmesh.request import SamplingParams

PAGE = 32
SPARE = 128  # tokens beyond the context: those whose prompts are read first go on while others are read
WARM = 2  # steps of a kind before those that count: tapes are recorded, memory is touched


@dataclass(frozen=True)
class Case:
    """One step. requests: of each TP group; rows: of each of them, 1 for decoding; context: tokens of each that are
    known when the step is through."""

    folder: Path
    topology: Topology
    quantise: str
    requests: int
    rows: int
    context: int

    @property
    def decodes(self) -> bool:
        return self.rows == 1


# Seconds of a step.
Predict: TypeAlias = Callable[[Case], float]


@dataclass(frozen=True)
class Grid:
    """Which cases there are, for each model. batches, contexts: of decoding; prompts: tokens of one prompt in prefill.
    turns: how often all cases of an engine are measured, one after the other; rounds: steps of each then. The fastest
    of all counts: what disturbs one makes it longer."""

    topologies: tuple[Topology, ...] = (Topology(1, 1, 1), Topology(1, 2, 1), Topology(1, 2, 2))
    quantise: tuple[str, ...] = ("none", "w8a8")
    batches: tuple[int, ...] = (1, 4, 16, 64)
    contexts: tuple[int, ...] = (128, 1024)
    prompts: tuple[int, ...] = (128, 512)
    rounds: int = 5
    turns: int = 2

    def __post_init__(self) -> None:
        for name in ("batches", "contexts", "prompts"):
            if not all(size >= 1 for size in getattr(self, name)):
                raise InputError(f"--{name}: sizes must be at least 1")
        if self.rounds < 1 or self.turns < 1:
            raise InputError("--rounds and --turns must be at least 1")
        least = len(self.batches) * (WARM + self.rounds) // 2 + 2
        if self.contexts and min(self.contexts) < least:
            raise InputError(
                f"--contexts: at least {least} tokens for {self.rounds} rounds of {len(self.batches)} batches"
            )

    def cases(self, folder: Path, topology: Topology, quantise: str) -> Iterator[Case]:
        for context in self.contexts:
            for batch in self.batches:
                yield Case(folder, topology, quantise, batch, 1, context)
        for tokens in self.prompts:
            yield Case(folder, topology, quantise, 1, tokens, tokens)


def bench_planned(folders: Sequence[Path], grid: Grid, predict: Predict) -> dict[str, Any]:
    """The report of `expertmesh bench planner`. spread: of a case's slowest turn to its fastest, and their median: far
    above 1 the machine was disturbed. InputError where there is no case."""
    rows = []
    for folder in folders:
        for topology in grid.topologies:
            for quantise in grid.quantise:
                cases = list(grid.cases(folder, topology, quantise))
                if not cases:
                    raise InputError("nothing to measure: give --batches and --contexts, or --prompts")
                rows += [
                    asdict(case)
                    | {"folder": folder.resolve().name, "measured": min(turns), "predicted": predict(case)}
                    | {"spread": max(turns) / min(turns)}
                    for case, turns in zip(cases, measure(cases, grid), strict=True)
                ]
    spread = statistics.median(row["spread"] for row in rows)
    return {"rounds": grid.rounds, "turns": grid.turns, "spread": spread, "rows": rows, **score(rows)}


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """error: mean of |predicted / measured - 1|; factor: the geometric mean of predicted / measured over all rows;
    ratio_error: what is left of the error when every prediction is divided by it; by_phase: the same of decoding and
    prefill, all by the one factor; pair_error: mean of |ln| of how far the ratio of two cases is from the measured one,
    over all pairs, as a share."""
    logs = [math.log(row["predicted"] / row["measured"]) for row in rows]
    factor = statistics.fmean(logs)
    phases = {"decode": [row["rows"] == 1 for row in rows], "prefill": [row["rows"] > 1 for row in rows]}
    pairs = [abs(a - b) for i, a in enumerate(logs) for b in logs[:i]]

    def error(logs: Sequence[float]) -> float | None:
        return statistics.fmean(abs(math.exp(log) - 1) for log in logs) if logs else None

    return {
        "error": error(logs),
        "factor": math.exp(factor),
        "ratio_error": error([log - factor for log in logs]),
        "by_phase": {
            phase: error([log - factor for log, one in zip(logs, chosen, strict=True) if one])
            for phase, chosen in phases.items()
        },
        "pair_error": math.expm1(statistics.fmean(pairs)) if pairs else 0.0,
    }


def measure(cases: Sequence[Case], grid: Grid) -> list[list[float]]:
    """Seconds of the fastest step of each case in each turn, on one engine: all are of one model, layout and
    precision."""
    first = cases[0]
    longest = max(case.context for case in cases)
    config = EngineConfig(
        device="cpu",
        quantise=first.quantise,
        max_context=longest + SPARE,
        max_batch_requests=max(case.requests for case in cases),
        max_batch_tokens=max(2048, *(case.requests * case.rows for case in cases)),
        page_size=PAGE,
        cache_tokens=max(case.requests * (case.context + SPARE) for case in cases),
        prefix_cache=False,
        ranks="processes" if first.topology.ranks > 1 else "threads",
        overlap="off",
        split="even",
    )
    engine = Engine(first.folder, config, first.topology)
    try:
        turns = [_turn(engine, cases, grid.rounds) for _ in range(grid.turns)]
        return [[turn[case] for turn in turns] for case in cases]
    finally:
        engine.close()


def _turn(engine: Engine, cases: Sequence[Case], rounds: int) -> dict[Case, float]:
    """Seconds of the fastest step of each case. Those that decode at one context take turns on the same requests, of
    which ever fewer are kept: prompts are computed once."""
    found = {case: _prefill(engine, case, rounds) for case in cases if not case.decodes}
    for context in dict.fromkeys(case.context for case in cases if case.decodes):
        batches = [case for case in cases if case.decodes and case.context == context]
        found |= _decode(engine, sorted(batches, key=lambda case: -case.requests), rounds)
    return found


def _submit(engine: Engine, case: Case, prompt: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(prompt)
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    for _ in range(case.requests * engine.layout.topology.groups):
        text = torch.randint(engine.model.vocab_size, (prompt,), generator=generator)
        engine.submit(text.tolist(), params)


def _decode(engine: Engine, cases: Sequence[Case], rounds: int) -> dict[Case, float]:
    """The largest batch comes first, and the youngest requests are kept: they have generated least meanwhile. The
    context is reached in the middle of all steps."""
    steps = len(cases) * (WARM + rounds)
    groups = engine.scheduler.schedulers
    _submit(engine, cases[0], max(1, cases[0].context - steps // 2), steps + SPARE - PAGE)
    while any(group.waiting or any(r.computed < r.prompt_length for r in group.running) for group in groups):
        engine.step()
    found = {}
    for case in cases:
        for group in groups:
            if len(group.running) < case.requests:
                raise InputError(
                    f"--contexts {case.context} with --batches {case.requests}: too many to be read at once"
                )
            for request in group.running[: -case.requests]:
                engine.abort(request.id)
        found[case] = min([_timed(engine) for _ in range(WARM + rounds)][WARM:])
    engine.abort_all()
    return found


def _prefill(engine: Engine, case: Case, rounds: int) -> float:
    found = []
    for _ in range(WARM + rounds):
        _submit(engine, case, case.rows, 1)
        found.append(_timed(engine))
    return min(found[WARM:])


def _timed(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def planner(card: Card) -> Predict:
    """What the planner says. card: the whole machine, of which each rank has its share."""

    def predict(case: Case) -> float:
        deployment = Deployment(
            ModelConfig.from_folder(case.folder),
            share(card, case.topology.ranks),
            case.topology,
            weight_precision=of_engine(case.quantise),
            balance="none",
        )
        if case.decodes:
            return decode_step(deployment, Decode(case.requests, case.context)).seconds
        tokens = case.requests * case.rows / deployment.topology.tp
        return prefill_step(deployment, Prefill(tokens, case.rows)).seconds

    return predict


def share(card: Card, ranks: int) -> Card:
    """One of so many ranks of a machine that is described as one card. Only a rank that is alone runs tapes; where
    there are more ranks than cores, what is not kernels takes as much longer."""
    crowded, starts = max(1.0, ranks / cores()), {}
    if ranks > 1:
        reached = card.reached
        starts = {
            "eager_us": 0.0,
            "collective_us": crowded * reached.collective_us,
            "ranks_us": ranks / 2 * reached.ranks_us,
            "step_us": crowded * reached.step_us,
        }
        card = replace(card, launch_us=crowded * (card.launch_us + reached.eager_us))
    divided = (name for name in NUMBERS if name.endswith("_tflops") or name.startswith(("memory_", "cache_")))
    return replace(
        card,
        **{name: getattr(card, name) / ranks for name in divided},
        cards_per_node=ranks,
        domain_ranks=ranks,
        dispatch_us=crowded * card.dispatch_us,
        combine_us=crowded * card.combine_us,
        parameters={**card.parameters, **starts},
    )
