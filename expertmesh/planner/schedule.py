"""Overlap of two micro-batches, as a schedule: each alternates between computing and travelling, and neither resource
serves both at once."""

from collections.abc import Sequence

LAYERS = 4  # until a layer takes as long as the one before it


def two_batches(stages: Sequence[tuple[float, bool]]) -> float:
    """Seconds of a layer for both micro-batches in the steady state. stages: of one of them in one layer, in order:
    (seconds, whether it travels). Whoever is ready first goes first."""
    free = {False: 0.0, True: 0.0}  # when the processor and the links are free
    ready = [0.0, 0.0]  # when each micro-batch is
    ends = [0.0]
    todo = [[(layer, s) for layer in range(2 * LAYERS) for s in range(len(stages))] for _ in range(2)]
    done = [0.0] * (2 * LAYERS)
    while todo[0] or todo[1]:
        # Whoever can start first; of two that can, the one that is behind.
        who = min(
            (b for b in (0, 1) if todo[b]),
            key=lambda b: (max(ready[b], free[stages[todo[b][0][1]][1]]), -len(todo[b])),
        )
        layer, s = todo[who].pop(0)
        seconds, travels = stages[s]
        end = max(ready[who], free[travels]) + seconds
        ready[who] = free[travels] = end
        done[layer] = max(done[layer], end)
    ends += done
    return (ends[-1] - ends[LAYERS]) / LAYERS
