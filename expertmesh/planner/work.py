"""One part of a step: what it takes of which resource, and how long that is."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from expertmesh.planner.cards import Arithmetic, Card
from expertmesh.planner.parameters import Parameters

Bound: TypeAlias = Literal["compute", "memory", "link in node", "link across", "latency"]


@dataclass(frozen=True)
class Part:
    """Of one rank in one step. seconds: as modelled; floor: what its resources need at their peak, without any start;
    bound: the resource that takes longest; travels: whether it occupies links and not the processor."""

    name: str
    seconds: float
    floor: float
    bound: Bound
    travels: bool = False

    def times(self, count: float) -> "Part":
        return Part(self.name, self.seconds * count, self.floor * count, self.bound, self.travels)


@dataclass(frozen=True)
class Rates:
    """What a card does in a second, at its peak and as is reached."""

    card: Card
    p: Parameters
    eager: bool = False  # kernels are started one by one, and not as a graph that is run again
    cached: float = 0.0  # share of what is read that a cache holds from the step before

    def compute(
        self, name: str, flops: float, padded: float, arithmetic: Arithmetic, read: float, launches: float = 0.0,
        attention: bool = False,
    ) -> Part:  # fmt: skip
        """flops: needed; padded: done, tiles being whole; read: bytes of memory; launches: kernels started."""
        peak, bandwidth = self.card.tflops(arithmetic) * 1e12, self._bandwidth
        efficiency = self.p.attention_efficiency if attention else self.p.matmul_efficiency
        compute, memory = padded / (peak * efficiency), read / (bandwidth * self.p.memory_efficiency)
        start = launches * (self.card.launch_us + (self.p.eager_us if self.eager else 0.0)) * 1e-6
        busy = max(compute, memory)
        bound: Bound = "latency" if start > busy else "compute" if compute > memory else "memory"
        return Part(name, busy + start, max(flops / peak, read / bandwidth), bound)

    @property
    def _bandwidth(self) -> float:
        """Bytes/s of reading, part of which is from the cache."""
        memory = self.card.memory_gbs * 1e9
        if not self.cached:
            return memory
        return 1 / (self.cached / (self.card.cache_gbs * 1e9) + (1 - self.cached) / memory)

    def matmul(
        self, name: str, rows: float, inputs: float, outputs: float, weight_bytes: float,
        arithmetic: Arithmetic, launches: float = 0.0,
    ) -> Part:  # fmt: skip
        """A product of rows with one matrix."""
        flops = 2.0 * rows * inputs * outputs
        done = 2.0 * (rows + self.p.tile_rows / 2) * (inputs + self.p.tile_depth) * outputs
        read = inputs * outputs * weight_bytes + 2.0 * rows * (inputs + outputs)
        return self.compute(name, flops, done, arithmetic, read, launches)

    def travel(
        self, name: str, start_us: float, node: float, across: float, fill: float = 0.0, bulk: bool = False
    ) -> Part:
        """node, across: bytes of one rank over its links; fill: share of the quicker tier that does not overlap; bulk:
        of many rows."""
        near = node / ((self.card.bulk_gbs if bulk else self.card.node_gbs) * 1e9)
        far = across / (self.card.across_gbs * 1e9)
        busy = (max(near, far) + fill * min(near, far)) / self.p.link_efficiency
        start = start_us * 1e-6
        bound: Bound = "latency" if start > busy else "link across" if far > near else "link in node"
        return Part(name, start + busy, max(near, far), bound, travels=True)


def joined(name: str, parts: list[Part]) -> Part:
    """One after the other, as one part: bound by the longest."""
    longest = max(parts, key=lambda part: part.seconds)
    return Part(
        name, sum(p.seconds for p in parts), sum(p.floor for p in parts), longest.bound, longest.travels
    )
