"""An engine that is filled with requests to what it has room for, and counted: what its ranks hold, and what a step of
decoding computes and sends. Ranks are threads."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertmesh.bench.exchange import PHASES
from expertmesh.comm.base import Exchange, Received
from expertmesh.comm.group import Clustered
from expertmesh.config import EngineConfig
from expertmesh.config.engine import parse_size
from expertmesh.engine.engine import Engine
from expertmesh.engine.ranks import ThreadRanks
from expertmesh.errors import InputError
from expertmesh.kernels.packed import Packed, PackedLatentUp
from expertmesh.mesh.placement import Ints
from expertmesh.model.deepseek import DeepSeek
from expertmesh.model.layers import DenseFFN
from expertmesh.model.mla import MLA
from expertmesh.model.moe import MoE
from expertmesh.model.step import Loads
from expertmesh.request import SamplingParams

PAGE = 32
MOST_STEPS = (PAGE - 4) // 2


@dataclass(frozen=True)
class Trial:
    """What both clusters are given. memory: of a rank, as `EngineConfig.memory_per_rank`; None: such that the weights
    take FILLED of it in the first layout. context: tokens of every request, prompt and output; most: requests that a TP
    group runs at most; steps: that are counted of each load."""

    memory: str | None = None
    context: int = 256
    most: int = 64
    steps: int = 4
    dtype: str = "auto"
    quantise: str = "none"
    exchange: str = "two_tier"
    redundant: int = 0

    def __post_init__(self) -> None:
        if self.memory is not None:
            parse_size("memory_per_rank", self.memory)
        if not 1 <= self.steps <= MOST_STEPS:
            raise InputError(f"steps is {self.steps}, but must be from 1 to {MOST_STEPS}")
        if self.context <= PAGE:
            raise InputError(f"context is {self.context}, but must be more than a page of {PAGE} tokens")
        if self.most < 1:
            raise InputError("requests must be at least 1")

    @property
    def prompt(self) -> int:
        """Tokens of a prompt: what is decoded does not begin a new page."""
        return (self.context - 1) // PAGE * PAGE + 1

    def config(self, memory: str | None) -> EngineConfig:
        # Rows go to replicas by fixed shares, so that the choices of experts tell all that is sent.
        return EngineConfig(
            self.dtype,
            self.quantise,
            device="cpu",
            max_context=self.context,
            max_batch_requests=self.most,
            max_batch_tokens=self.most * self.prompt,
            page_size=PAGE,
            memory_per_rank=memory,
            prefix_cache=False,
            exchange=self.exchange,
            redundant=self.redundant,
            overlap="off",
            split="even",
        )


def capacity(pages: int, context: int) -> int:
    """Requests of so many tokens that a scheduler lets run at a time: beside the pages of each there must be one for
    every request that runs already."""
    each = -(-context // PAGE)
    return max(1, 1 + (pages - each) // (each + 1)) if pages >= each else 0


def memory_of(kinds: Mapping[str, int], cache: int, pages: int) -> dict[str, Any]:
    weights = {"kinds": dict(sorted(kinds.items())), "weights": sum(kinds.values())}
    return weights | {"cache": cache, "cache_pages": pages, "cache_tokens": pages * PAGE}


def held_bytes(model: DeepSeek) -> Counter[str]:
    """Bytes of the memory that a rank's modules hold their weights in, by kind: counted, not computed."""
    counts: Counter[str] = Counter(norm=model.norm.nbytes)
    seen = {id(model.embedding.weight): model.embedding.weight, id(model.head.weight): model.head.weight}
    counts["embedding"] = sum(weight.nbytes for weight in seen.values())  # tied ones are one
    for module in (module for modules in model.layers for module in modules):
        for name, memory in vars(module).items():
            if isinstance(memory, Tensor | Packed | PackedLatentUp):
                counts[_kind(module, name)] += memory.nbytes
    return counts


def _kind(module: MLA | MoE | DenseFFN, name: str) -> str:
    if name.endswith("norm"):
        return "norm"
    if isinstance(module, MLA):
        return "attention"
    if isinstance(module, DenseFFN):
        return "dense"
    return "router" if name in ("router", "bias") else "shared" if name.startswith("shared_") else "routed"


class _Recorder(Loads):
    """Counts as the engine does, and keeps every row's experts."""

    repeatable = False

    def __init__(self, loads: Loads) -> None:
        super().__init__(loads._count)
        self.chosen: dict[int, list[Ints]] = {}

    def record(self, layer: int, experts_TK: Tensor, experts: int) -> None:
        super().record(layer, experts_TK, experts)
        self.chosen.setdefault(layer, []).append(experts_TK.numpy().copy())

    def reset(self) -> None:
        super().reset()
        self.chosen.clear()


class _Counting:
    """An exchange that counts what comes. Implements `comm.base.Exchange`. rows: for experts of this rank, one for each
    of its choices; touched: experts of this rank that got any, over layers and steps."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.rows = self.touched = 0

    def prepare(self, pieces: int, split: str, rows: int) -> None:
        self._exchange.prepare(pieces, split, rows)

    def dispatch(self, layer: int, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received:
        received = self._exchange.dispatch(layer, x_TD, experts_TK, weights_TK)
        slots = received.slots_RK[received.slots_RK >= 0]
        self.rows += slots.numel()
        self.touched += slots.unique().numel()
        return received

    def combine(self, y_RD: Tensor, received: Received) -> Tensor:
        return self._exchange.combine(y_RD, received)


@dataclass(frozen=True)
class Counted:
    """Of the engine's steps. chosen: for each rank, by layer, experts [T, K] of its rows in each step; rows: that
    each rank's experts computed in all; across, inside: bytes of a step; touched: the share of experts with rows;
    seconds: of a step here."""

    chosen: list[dict[int, list[Ints]]]
    rows: Ints
    across: float
    inside: float
    touched: float
    seconds: float


class Run:
    """An engine that is kept at one load. limit: requests of a group, where that is not what there is room for."""

    limit: int | None = None

    def __init__(self, engine: Engine, trial: Trial) -> None:
        assert isinstance(engine.ranks, ThreadRanks)
        self.engine, self.trial, self.ranks = engine, trial, engine.ranks
        self.groups = engine.scheduler.schedulers
        self.recorders, self.exchanges = [], []
        for runner in self.ranks.runners:
            assert isinstance(runner.collectives, Clustered)
            runner.loads = recorder = _Recorder(runner.loads)
            runner.collectives.exchange = exchange = _Counting(runner.collectives.exchange)
            self.recorders.append(recorder)
            self.exchanges.append(exchange)

    @property
    def packed(self) -> bool:
        return self.ranks.runners[0].model.kernels.graph is not None

    @property
    def requests(self) -> int:
        """That run in each group."""
        (running,) = {len(group.running) for group in self.groups}
        return running

    def memory(self) -> dict[str, Any]:
        """Of the fullest rank."""
        runner = max(self.ranks.runners, key=lambda runner: sum(held_bytes(runner.model).values()))
        cache = sum(layer.nbytes for layer in runner.cache)
        return memory_of(held_bytes(runner.model), cache, runner.cache[0].shape[0])

    def fill(self) -> None:
        """As many requests as there is room for, all of them decoding, and two more for each group that find none."""
        trial, pages = self.trial, self.groups[0].cache.pages
        room = capacity(pages, trial.context)
        if not room:
            raise InputError(
                f"the weights leave room for {pages * PAGE} tokens of cache on a rank, and a request takes "
                f"{trial.context}; allow more memory per rank"
            )
        generator = torch.Generator().manual_seed(1)
        params = SamplingParams(max_tokens=trial.context - trial.prompt, temperature=0, ignore_eos=True)
        for _ in range(min(trial.most, room + 2) * len(self.groups)):
            prompt = torch.randint(self.engine.model.vocab_size, (trial.prompt,), generator=generator)
            self.engine.submit(prompt.tolist(), params)
        self.engine.step()

    def keep(self, requests: int) -> None:
        """In each group no more than these."""
        self.limit = requests
        for group in self.groups:
            for request in [*group.waiting, *group.running[requests:]]:
                self.engine.abort(request.id)

    def measure(self) -> Counted:
        ranks, steps, layout = self.ranks, self.trial.steps, self.engine.layout
        ranks.reset()
        for exchange in self.exchanges:
            exchange.rows = exchange.touched = 0
        start = time.perf_counter()
        for _ in range(steps):
            self.engine.step()
        seconds = (time.perf_counter() - start) / steps
        sent, chosen = ranks.sent(), [recorder.chosen for recorder in self.recorders]
        across = sum(s.across(phase) for s in sent for phase in PHASES)
        inside = sum(s.in_node("attention") + sum(s.in_node(phase) for phase in PHASES) for s in sent)
        slots = int((layout.placement.slots_LRS >= 0).sum()) * steps
        return Counted(
            chosen,
            np.array([exchange.rows for exchange in self.exchanges]),
            across / steps,
            inside / steps,
            sum(exchange.touched for exchange in self.exchanges) / slots,
            seconds,
        )
