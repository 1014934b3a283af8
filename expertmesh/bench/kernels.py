"""Ops of one rank, each beside what PyTorch takes for the same, and beside what the machine could do at most.

Everything takes turns in one process, so that a change of the machine's speed meets all of it. The memory that is read
is so much, by the cycling copies of an op's weights, that no cache holds it.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from expertmesh.config.precision import PLAIN, W8A8, Format
from expertmesh.kernels.cpu import Cpu
from expertmesh.kernels.memory import Arena, Kept

BF16 = torch.bfloat16
COLD = 1 << 30  # bytes that are read before any of them is read again
SECONDS = 0.05  # of a measurement at least
PRODUCT = 512, 4096, 4096  # rows, outputs and inputs of the products that the peak is measured with


@dataclass(frozen=True)
class Precision:
    """How our ops keep weights. tolerance: how far results may be from the reference's, in its largest number."""

    format: Format
    weight_bytes: float
    tolerance: float


PRECISIONS = {"bf16": Precision(PLAIN, 2, 0.03), "w8a8": Precision(W8A8, 1, 0.06)}


@dataclass(frozen=True)
class Way:
    """One way to compute an op. call: with which of `copies` copies of the weights -> what comes out."""

    call: Callable[[int], Any]
    copies: int


@dataclass(frozen=True)
class Case:
    """An op at one size. ours: by precision; theirs: the fastest is the baseline; beside: for the record.

    weights: numbers that our ways read in their precision, and other_bytes that they read besides; flops, at the `peak`
    of products of this type, or of the precision. expected: what copy 0 gives, after `before` and `seen`. bars: by
    precision.
    """

    op: str
    size: str
    tokens: int
    ours: Mapping[str, Way]
    theirs: Mapping[str, Way]
    expected: Callable[[], Sequence[Tensor]]
    weights: float
    flops: float
    beside: Mapping[str, Way] = field(default_factory=dict)
    other_bytes: float = 0
    peak: str | None = None
    seen: Callable[[Any], Sequence[Tensor]] = lambda out: out
    bars: Mapping[str, float] = field(default_factory=dict)
    before: Callable[[], Any] = lambda: None


class Ceilings:
    """What nothing can be faster than on this machine: reading memory, and products of large matrices."""

    def __init__(self, kernels: Cpu, cold: int = COLD, product: tuple[int, int, int] = PRODUCT) -> None:
        rows, outputs, inputs = product
        self.kernels = kernels
        self.memory = Arena().take(cold)
        self.memory.fill_(1)
        self.x, self.weight = random_numbers(rows, inputs), random_numbers(outputs, inputs)
        self.few, self.wide = self.x[: -(-rows // 4)].float(), self.weight.float()
        self.kept = {name: keep(kernels, p, self.weight) for name, p in PRECISIONS.items()}
        self.flops = 2 * rows * outputs * inputs

    def measure(self) -> dict[str, float]:
        """Bytes/s of reading, and multiplications and additions a second by type."""
        threads = torch.get_num_threads()
        memory = self.memory.data_ptr(), self.memory.numel(), threads
        found = {"read": self.memory.numel() / seconds_of(lambda: self.kernels.read_memory(*memory))}
        for name, kept in self.kept.items():
            found[name] = self.flops / seconds_of(partial(self.kernels.linear, self.x, kept))
        found["torch bf16"] = self.flops / seconds_of(lambda: self.x @ self.weight.t())
        few = self.flops * self.few.shape[0] / self.x.shape[0]
        found["float32"] = few / seconds_of(lambda: self.few @ self.wide.t())
        return found


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def random_numbers(*shape: int, scale: float = 1.0, seed: int = 1, dtype: torch.dtype = BF16) -> Tensor:
    """Large ones repeat themselves, which no product minds."""
    count, most = math.prod(shape), 1 << 22
    some = torch.randn(min(count, most), generator=torch.Generator().manual_seed(seed)) * scale
    return some.to(dtype).repeat(-(-count // most))[:count].view(shape).contiguous()


def keep(kernels: Any, precision: Precision, weight: Tensor, split: int = 1) -> Any:
    """Weights [..., N, K] as our ops want them, in memory of their own, on the same device."""
    kept = kernels.matrix(tuple(weight.shape), split, precision.format, Kept(weight.dtype, weight.device))
    if weight.dim() == 2:
        kept.copy_(weight)
    for slot in range(weight.shape[0]) if weight.dim() == 3 else ():
        kept[slot].copy_(weight[slot])
    return kept


def copies_of(size: float, cold: int) -> int:
    """How many copies of so many bytes no cache holds."""
    return max(1, math.ceil(cold / size))


def bench(cases: Iterable[Case], ceilings: Ceilings, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each case and precision."""
    with torch.inference_mode():
        for case in cases:
            yield from measure(case, ceilings, rounds)


def measure(case: Case, ceilings: Ceilings, rounds: int) -> list[dict[str, Any]]:
    """Medians over rounds in which all ways and the ceilings take turns. RuntimeError where one is wrong."""
    ways = {**case.ours, **case.theirs, **case.beside}
    errors = check(case, ways)
    ceilings.measure()
    calls = {
        name: max(1, math.ceil(SECONDS / seconds_of(partial(way.call, 0)))) for name, way in ways.items()
    }
    turns = dict.fromkeys(ways, 0)
    times: dict[str, list[float]] = {name: [] for name in ways}
    limits: list[dict[str, float]] = []
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            for turn in range(turns[name], turns[name] + calls[name]):
                way.call(turn % way.copies)
            times[name].append((time.perf_counter() - start) / calls[name])
            turns[name] += calls[name]
        limits.append(ceilings.measure())
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return [row(case, name, seconds, median(limits), errors[name]) for name in case.ours]


def median(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def check(case: Case, ways: Mapping[str, Way]) -> dict[str, float]:
    """How far each way is from the reference, in the reference's largest number."""
    expected, errors = [t.float().clone() for t in case.expected()], {}
    for name, way in ways.items():
        case.before()
        found = [t.float() for t in case.seen(way.call(0))]
        errors[name] = max(
            float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True)
        )
        if not errors[name] <= (PRECISIONS[name] if name in case.ours else PRECISIONS["bf16"]).tolerance:
            raise RuntimeError(
                f"{case.op}, {case.size}, {case.tokens} tokens: {name} is {errors[name]:.2g} off"
            )
    return errors


def row(
    case: Case, precision: str, seconds: Mapping[str, float], ceiling: Mapping[str, float], error: float
) -> dict[str, Any]:
    """floor_seconds: what reading and multiplying take at least; of_ceiling: the share of our time that this is, and
    limit of the baseline's: below it no ratio can be."""
    baseline = min(case.theirs, key=seconds.__getitem__)
    reading = (case.weights * PRECISIONS[precision].weight_bytes + case.other_bytes) / ceiling["read"]
    peak = case.peak or precision
    computing = case.flops / max(ceiling[name] for name in (peak, f"torch {peak}") if name in ceiling)
    floor = max(reading, computing)
    return {
        "op": case.op,
        "size": case.size,
        "tokens": case.tokens,
        "precision": precision,
        "seconds": seconds[precision],
        "baseline": baseline,
        "others": {name: seconds[name] for name in (*case.theirs, *case.beside)},
        "ratio": seconds[precision] / seconds[baseline],
        "bar": case.bars.get(precision),
        "limit": floor / seconds[baseline],
        "bound": "memory" if reading >= computing else "products",
        "floor_seconds": floor,
        "of_ceiling": floor / seconds[precision],
        "ceilings": dict(ceiling),
        "error": error,
    }
