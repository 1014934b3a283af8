"""Overlap of two micro-batches, as a schedule: each alternates between computing and travelling, and neither resource
serves both at once."""

from collections.abc import Sequence
from math import inf

LAYERS = 4  # until a layer takes as long as the one before it


def two_batches(stages: Sequence[tuple[float, bool]]) -> float:
    """Seconds of a layer for both micro-batches in the steady state. stages: of one of them in one layer, in order:
    (seconds, whether it travels). Whoever is ready first goes first."""
    free = [0.0, 0.0]  # when the processor and the links are free
    ready, at = [0.0, 0.0], [0, 0]  # when each micro-batch is, and which stage is its next one
    count, last = len(stages), 2 * LAYERS * len(stages)
    done = [0.0] * (2 * LAYERS)
    while at[0] < last or at[1] < last:
        starts = [max(ready[b], free[stages[at[b] % count][1]]) if at[b] < last else inf for b in (0, 1)]
        # Whoever can start first; of two that can, the one that is behind.
        who = 0 if starts[0] < starts[1] or (starts[0] == starts[1] and at[0] <= at[1]) else 1
        layer, s = divmod(at[who], count)
        seconds, travels = stages[s]
        at[who] += 1
        ready[who] = free[travels] = starts[who] + seconds
        done[layer] = max(done[layer], ready[who])
    return (done[-1] - done[LAYERS - 1]) / LAYERS
