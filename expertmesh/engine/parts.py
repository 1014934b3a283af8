"""Where a rank's time goes inside a step, measured at the collectives that the model names anyway.

Between two collectives a rank computes: up to `dispatch` what belongs to its own rows, up to `combine` the routed
experts. So the clock is read where the model calls its step, on every Nth step only, and the model does not know.
"""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from expertmesh.comm.base import Collectives, Exchange, Group, Received

T = TypeVar("T")

EVERY = 8  # steps of which one is measured
# attention: with router, shared experts, dense layers and head, all that is computed for rows of the TP group; gather:
# collectives of the TP group; dispatch, experts, combine: of routed experts.
RANK_PARTS = ("attention", "gather", "dispatch", "experts", "combine")


class Parts:
    """Seconds by part of one rank, and how many steps they are of."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """clock: reads seconds when all that was asked of the device has been computed."""
        self._clock = clock
        self.steps = 0
        self.seconds = dict.fromkeys(RANK_PARTS, 0.0)
        self._passed = 0
        self._last = 0.0

    def of_step(self, collectives: Collectives, micro_batches: int) -> Collectives:
        """What to compute the next step with; the same choice on all ranks. Two micro-batches that take turns have no
        parts in a row: such steps are not measured."""
        self._passed += 1
        if self._passed < EVERY or micro_batches > 1:
            return collectives
        self._passed = 0
        return Timed(collectives, self)

    def start(self) -> None:
        self._last = self._clock()

    def lap(self, part: str) -> None:
        """What was done since the last lap."""
        now = self._clock()
        self.seconds[part] += now - self._last
        self._last = now

    def reset(self) -> None:
        self.steps = 0
        self.seconds = dict.fromkeys(RANK_PARTS, 0.0)


class Timed:
    """Collectives, and the exchange among them, that read the clock. Implements `comm.base.Collectives`, `Exchange`."""

    def __init__(self, inner: Collectives, parts: Parts) -> None:
        self._inner, self._exchange, self._parts = inner, inner.exchange, parts

    @property
    def exchange(self) -> Exchange:
        return self

    def run(self, programs: Sequence[Callable[[], T]]) -> list[T]:
        self._parts.start()
        results = self._inner.run(programs)
        self._parts.lap("attention")
        self._parts.steps += 1
        return results

    def group(self, rows: int) -> Group:
        group = self._inner.group(rows)
        return group if group.whole else _TimedGroup(group, self._parts)

    def prepare(self, pieces: int, split: str, rows: int) -> None:
        self._exchange.prepare(pieces, split, rows)

    def dispatch(self, layer: int, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received:
        self._parts.lap("attention")
        received = self._exchange.dispatch(layer, x_TD, experts_TK, weights_TK)
        self._parts.lap("dispatch")
        return received

    def combine(self, y_RD: Tensor, received: Received) -> Tensor:
        self._parts.lap("experts")
        y_TD = self._exchange.combine(y_RD, received)
        self._parts.lap("combine")
        return y_TD


class _TimedGroup:
    """A TP group that reads the clock. Implements `comm.base.Group`."""

    whole = False

    def __init__(self, inner: Group, parts: Parts) -> None:
        self._inner, self._parts, self.leads = inner, parts, inner.leads

    def all_gather(self, *rows: Tensor) -> tuple[Tensor, ...]:
        return self._timed(lambda: self._inner.all_gather(*rows))

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        return self._timed(lambda: self._inner.reduce_scatter(rows))

    def gather_rows(self, mine: Tensor, wanted: Sequence[int]) -> Tensor:
        return self._timed(lambda: self._inner.gather_rows(mine, wanted))

    def gather_columns(self, part: Tensor) -> Tensor | None:
        return self._timed(lambda: self._inner.gather_columns(part))

    def _timed(self, collective: Callable[[], T]) -> T:
        self._parts.lap("attention")
        result = collective()
        self._parts.lap("gather")
        return result
