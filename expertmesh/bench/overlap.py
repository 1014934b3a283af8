"""Whole steps of the engine with and without overlap, in turns on the same engine, and what "auto" makes of it."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from expertmesh.engine.engine import Engine
from expertmesh.engine.plan import Planner
from expertmesh.request import SamplingParams

DECODE_PROMPT = 32
DECODE_TOKENS = 480
LEARNING = 12  # steps in which "auto" may try both


@dataclass(frozen=True)
class Load:
    """What every TP group computes in a step: so many requests, of so many rows each (1: decoding)."""

    requests: int
    rows: int

    @property
    def name(self) -> str:
        return f"decode {self.requests}" if self.rows == 1 else f"prefill {self.requests}x{self.rows}"


def bench_overlap(engine: Engine, loads: list[Load], steps: int, rate: float | None) -> dict[str, Any]:
    """Medians over `steps` steps of each kind. rate: bits/s of a node's link, where it is known: then also how much of
    the time there is to hide, and how much of that is hidden. on: how many times faster than off; auto: its time over
    that of the better of both, so 1 is ideal."""
    return {load.name: _measure(_Driver(engine, load), steps, rate) for load in loads}


def _measure(driver: "_Driver", steps: int, rate: float | None) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"off": [], "on": [], "auto": []}
    planners = {mode: driver.planner(mode) for mode in seconds}
    for _ in range(2):
        for mode in ("off", "on"):
            driver.step(planners[mode])
    wire = driver.wire(planners["off"], rate) if rate else None
    for _ in range(LEARNING):
        driver.step(planners["auto"])
    order = list(seconds)
    for _ in range(steps):
        for mode in order:
            seconds[mode].append(driver.step(planners[mode]))
        order.append(order.pop(0))  # none always comes after the same other one
    driver.end()
    median = {mode: statistics.median(found) for mode, found in seconds.items()}
    off, on = median["off"], median["on"]
    report: dict[str, Any] = {"seconds": median, "on": off / on, "auto": median["auto"] / min(off, on)}
    if wire is not None:
        most = min(wire, off - wire)
        report |= {"wire_seconds": wire, "hidden": (off - on) / most if most > 0 else 0.0}
    return report


class _Driver:
    """Keeps an engine at one load."""

    def __init__(self, engine: Engine, load: Load) -> None:
        self._engine, self._load = engine, load
        self._groups = engine.layout.topology.groups
        self._generator = torch.Generator().manual_seed(1)

    def planner(self, mode: str) -> Planner:
        return self._engine.new_planner(mode)

    def step(self, planner: Planner) -> float:
        """Seconds of one step."""
        engine = self._engine
        engine.planner = planner
        if self._load.rows > 1:
            self._submit(self._load.rows, 1)
        elif not engine.busy:
            self._submit(DECODE_PROMPT, min(DECODE_TOKENS, (engine.config.max_context or 0) - DECODE_PROMPT))
            self._all_decode()
        start = time.perf_counter()
        engine.step()
        return time.perf_counter() - start

    def wire(self, planner: Planner, rate: float) -> float:
        """Seconds that the busiest link takes for the bytes of one step."""
        ranks, topology = self._engine.ranks, self._engine.layout.topology
        ranks.reset()
        self.step(planner)
        across = [0] * topology.nodes
        for sent in ranks.sent():
            node = topology.node_of(sent.rank)
            across[node] += sum(sent.across(purpose) for purpose in ("dispatch", "combine"))
        return max(across) * 8 / rate

    def end(self) -> None:
        self._engine.abort_all()

    def _submit(self, length: int, max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        for _ in range(self._load.requests * self._groups):
            prompt = torch.randint(
                min(self._engine.model.vocab_size, 1000), (length,), generator=self._generator
            )
            self._engine.submit(prompt.tolist(), params)

    def _all_decode(self) -> None:
        """Until every request has its first token."""
        waiting = self._load.requests * self._groups
        while waiting > 0:
            waiting -= sum(len(output.token_ids) == 1 for output in self._engine.step())
