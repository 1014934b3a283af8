"""How long the steps of an instance take whose TP groups are not equally full. Times of decoding are interpolated."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import floor, log

from expertmesh.planner.costs import Step, decode_step, prefill_step
from expertmesh.planner.deployment import Decode, Deployment, Prefill
from expertmesh.planner.parameters import Parameters

RATIO = 1.2  # of neighbours on the grid of batches and of tokens


@dataclass(frozen=True)
class Chunk:
    """Tokens of a prompt that a group computes in one step, after `start` others."""

    tokens: float
    start: float


class Clock:
    """Seconds of steps. Rows of all groups meet at the experts, for all else the fullest group is waited for: a step is
    one in which all groups are as full, less what the experts would take more than with the mean."""

    def __init__(self, deployment: Deployment, p: Parameters | None = None) -> None:
        self._deployment, self._p = deployment, p
        self._decode = lru_cache(maxsize=None)(self._decode_at)
        self._prefill = lru_cache(maxsize=None)(self._prefill_at)

    def decode(self, fullest: float, mean: float, tokens: float) -> float:
        """A step with so many requests in the fullest group and in the mean one; tokens: in the fullest's cache."""
        full, experts = self._between(fullest, tokens)
        if mean >= fullest:
            return full
        level, fewer = self._between(mean, tokens * mean / fullest)
        return max(level, full - (experts - fewer))

    def prefill(self, groups: Iterable[list[Chunk]], number: int) -> float:
        """A step in which groups compute these chunks; number: of groups, idle ones among them."""
        groups = [chunks for chunks in groups if chunks]
        fullest = max(groups, key=lambda chunks: sum(c.tokens for c in chunks))
        every = [c for chunks in groups for c in chunks]
        full, experts = self._prefill(*_summed(fullest, 1))
        level, fewer = self._prefill(*_summed(every, number))
        return max(level, full - (experts - fewer))

    def _between(self, batch: float, tokens: float) -> tuple[float, float]:
        """Seconds of a step and of its experts, bilinear between points of the grid."""
        i, u = _place(batch)
        j, v = _place(max(tokens, 1.0))
        corners = [
            (self._decode(i, j), (1 - u) * (1 - v)),
            (self._decode(i + 1, j), u * (1 - v)),
            (self._decode(i, j + 1), (1 - u) * v),
            (self._decode(i + 1, j + 1), u * v),
        ]
        return sum(c[0] * w for c, w in corners), sum(c[1] * w for c, w in corners)

    def _decode_at(self, i: int, j: int) -> tuple[float, float]:
        batch = RATIO**i
        return _seconds(decode_step(self._deployment, Decode(batch, RATIO**j / batch), self._p))

    def _prefill_at(self, tokens: float, length: float, cached: float) -> tuple[float, float]:
        load = Prefill(tokens / self._deployment.topology.tp, length, cached)
        return _seconds(prefill_step(self._deployment, load, self._p))


def _place(x: float) -> tuple[int, float]:
    """The point of the grid below x, and how far x is towards the next one."""
    i = floor(log(x) / log(RATIO) + 1e-9)
    return i, (x / RATIO**i - 1) / (RATIO - 1)


def _seconds(step: Step) -> tuple[float, float]:
    return step.seconds, step.by_part.get("experts", 0.0)


def _summed(chunks: list[Chunk], groups: int) -> tuple[float, float, float]:
    """One prompt that stands for all of these: tokens of a group, a length and a number cached, such that each token
    sees as many others as it does on average."""
    tokens = sum(c.tokens for c in chunks)
    seen = sum(c.tokens * (c.start + c.tokens / 2) for c in chunks) / tokens
    mean = tokens / len(chunks)
    cached = max(0.0, seen - mean / 2)
    return tokens / groups, cached + mean, cached
