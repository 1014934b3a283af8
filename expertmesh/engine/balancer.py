"""Keeps the cards level while requests go on: watches the loads, plans, moves experts in small portions.

Planning runs in a thread beside the steps, the way to the new placement included. What it finds is carried out only if
it pays: in the time for which loads stay as they have been, the steps gain more than the moved bytes cost. A portion
takes about a tenth of a step, if it is more than the least; each expert is compared with its source before it serves;
where anything fails, the placement that is in force stays.
"""

import logging
import re
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

from expertmesh.comm.local import cores
from expertmesh.config.engine import EVERY
from expertmesh.engine.ranks import Ranks
from expertmesh.errors import RankFailure
from expertmesh.mesh.balance import balance, even_cards, split_cards
from expertmesh.mesh.layout import Layout
from expertmesh.mesh.loads import Floats, Loads
from expertmesh.mesh.migration import Round, rounds
from expertmesh.mesh.placement import EMPTY, Ints, Placement

CHECK = 64  # steps between looks at the loads
KEEP = 0.5  # of what was known before a look remains
ROWS = 64  # of each expert's mean load, from which on loads are more than noise
HORIZON = 16  # looks for which loads are taken to stay as they have been
COMPUTED = 0.5  # part of a step that the experts take
PORTION = 0.1  # of a step's time for a portion of a move
FIRST = 1 << 18  # bytes of the first portion, and the least
RATE = 1e9  # bytes a second that are expected before any has moved

Found: TypeAlias = tuple[Placement, list[Round]]  # a placement, and how to come to it


@dataclass
class BalanceState:
    """What the balancer does, for people and for metrics. imbalance: the fullest card over the mean, over the layers,
    by the loads of the last look, as the placement and what has shared rows out most of the time leave it, None while
    these are too few to tell; seconds: spent on moving."""

    mode: str
    doing: str = "watching"
    imbalance: float | None = None
    looks: int = 0
    plans: int = 0
    refused: int = 0
    swaps: int = 0
    moved: int = 0
    moved_bytes: int = 0
    seconds: float = 0.0
    failures: int = 0
    error: str | None = None


class Balancer:
    """Of one engine with several ranks. The engine calls `after_step` between two steps."""

    def __init__(
        self,
        mode: str,
        ranks: Ranks,
        layout: Layout,
        expert_bytes: int,
        plan: Callable[..., Placement] = balance,
    ) -> None:
        """mode: auto or every=N; expert_bytes: of one expert of a layer."""
        every = re.fullmatch(EVERY, mode)
        self._every = int(every[1]) if every else CHECK
        self._always = every is not None
        self._ranks, self._size, self._plan = ranks, expert_bytes, plan
        self._topology, self.placement = layout.topology, layout.placement
        slots = self.placement.slots_LRS
        self._redundant = int((slots[0] != EMPTY).sum()) - self.placement.experts
        self._counted: dict[int, Floats] = {}
        self._resets = ranks.resets
        self._loads_LE = np.zeros((len(self.placement.layers), self.placement.experts))
        self._steps, self._step_seconds = 0, 0.0
        self._shared = {
            "even": 0.0,
            "split": 0.0,
        }  # seconds of steps since the last look, by how rows were shared out
        self._split = False
        self._pool = ThreadPoolExecutor(1, "balancer")
        self._planned: Future[Found] | None = None
        self._rounds: deque[Round] = deque()
        self._staged, self._portion = 0, FIRST
        self._stopped = self._closed = False
        self.state = BalanceState(mode)

    def after_step(self, seconds: float, split: bool) -> None:
        """seconds: that the step has taken; split: whether its rows were levelled by counts, not shared evenly.
        RankFailure where a rank fails; anything else that goes wrong here stops the balancer and nothing but it."""
        if self._stopped:
            return
        try:
            self._advance(seconds, split)
        except RankFailure:
            raise
        except Exception as error:
            self._stopped = True
            self.state.doing = "stopped"
            self._fail(f"stopped: {type(error).__name__}: {error}")

    def _advance(self, seconds: float, split: bool) -> None:
        self._steps += 1
        self._shared["split" if split else "even"] += seconds
        self._step_seconds += 0.1 * (seconds - self._step_seconds) if self._step_seconds else seconds
        if self._rounds:
            self._move()
        elif self._planned is not None and self._planned.done():
            self._decide()
        elif self._planned is None and self._steps % self._every == 0:
            self._look()

    def wait(self) -> None:
        """Until a plan that is being made has been made."""
        if self._planned is not None:
            wait([self._planned])

    def close(self) -> None:
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def report(self) -> dict[str, Any]:
        return asdict(self.state)

    def _look(self) -> None:
        """Loads since the last look, into a window that forgets; then plan, if there is enough in it."""
        if self._resets != self._ranks.resets:
            self._resets, self._counted = self._ranks.resets, {}
        counts = {layer: rows.numpy().astype(np.float64) for layer, rows in self._ranks.loads().items()}
        new_LE = np.zeros_like(self._loads_LE)
        for row, layer in enumerate(self.placement.layers):
            if layer in counts:
                new_LE[row] = counts[layer] - self._counted.get(layer, 0.0)
        self._counted = counts
        self._split = self._shared["split"] > self._shared["even"]
        self._shared = dict.fromkeys(self._shared, 0.0)
        self._loads_LE = KEEP * self._loads_LE + new_LE
        self.state.looks += 1
        if (self._loads_LE.mean(1) < (0 if self._always else ROWS)).any() or not self._loads_LE.any(1).all():
            return
        self.state.imbalance = self._imbalance(self.placement)
        self._planned = self._pool.submit(self._find, self._loads_LE.copy(), self.placement)
        self.state.doing = "planning"

    def _find(self, loads_LE: Floats, old: Placement) -> Found:
        """A few layers at a time: it has to end soon when the engine is closed, for the interpreter waits for it."""
        slots: list[Ints] = []
        for first in range(0, len(old.layers), at_once := max(4, cores())):
            if self._closed:
                return old, []
            rows = slice(first, first + at_once)
            loads = Loads(loads_LE[None, rows], np.ones(1), old.layers[rows])
            part = Placement(old.slots_LRS[rows], old.experts, loads.layers)
            slots += list(self._plan(loads, self._topology, self._redundant, old=part).slots_LRS)
        new = Placement(np.stack(slots), old.experts, old.layers)
        return new, rounds(old, new, self._topology)

    def _imbalance(self, placement: Placement) -> float:
        cards: Callable[[Placement, Floats], Floats] = split_cards if self._split else even_cards
        loads_LR = cards(placement, self._loads_LE)
        return float((loads_LR.max(1) / loads_LR.mean(1)).mean())

    def _decide(self) -> None:
        assert self._planned is not None
        planned, self._planned = self._planned, None
        self.state.doing = "watching"
        try:
            new, way = planned.result()
        except Exception as error:
            self._fail(f"planning failed: {type(error).__name__}: {error}")
            return
        self.state.plans += 1
        count = sum(len(one.moves) for one in way)
        if count and (self._always or self._pays(new, count)):
            self._rounds = deque(way)
            self._staged = 0
            self.state.doing = "moving"
            _log().info("%d experts move, %.1f MB", count, count * self._size / 1e6)
        elif count:
            self.state.refused += 1

    def _pays(self, new: Placement, count: int) -> bool:
        """Whether the time that steps will gain is more than that of moving."""
        now, then = self._imbalance(self.placement), self._imbalance(new)
        gained = self._step_seconds * COMPUTED * (now - then) / now * self._every * HORIZON
        rate = self.state.moved_bytes / self.state.seconds if self.state.seconds else RATE
        return gained > count * self._size / rate

    def _move(self) -> None:
        """One portion of the first round; when all of it is there and the same as its source, it takes effect."""
        first, begin = self._rounds[0], time.perf_counter()
        stop = min(self._size, self._staged + self._portion)
        self._ranks.stage(first.moves, self._staged, stop)
        staged, self._staged = stop - self._staged, stop
        taken = time.perf_counter() - begin
        if stop == self._size and self._verified(first):
            placement = self.placement.replaced(first.slots)
            self._ranks.commit(first.moves, placement)
            self.placement = placement
            self._rounds.popleft()
            self._staged = 0
            self.state.swaps += 1
            self.state.moved += len(first.moves)
            if not self._rounds:
                self.state.doing = "watching"
                self.state.imbalance = self._imbalance(placement)
        self.state.moved_bytes += staged * len(first.moves)
        self.state.seconds += time.perf_counter() - begin
        fitting = int(staged * PORTION * self._step_seconds / max(taken, 1e-6))
        self._portion = max(FIRST, min(self._size, fitting, 2 * self._portion))

    def _verified(self, first: Round) -> bool:
        for move, (given, came) in zip(first.moves, self._ranks.checksums(first.moves), strict=True):
            if given != came:
                self._rounds.clear()
                self.state.doing = "watching"
                self._fail(
                    f"expert {move.expert} of layer {move.layer} came to rank {move.rank} with checksum {came:08x}, "
                    f"but has {given:08x} on rank {move.source}; the placement stays as it was"
                )
                return False
        return True

    def _fail(self, why: str) -> None:
        self.state.failures += 1
        self.state.error = why
        _log().warning("balancer: %s", why)


def _log() -> logging.Logger:
    return logging.getLogger(__name__)
