"""Memory for weights, in huge pages where the system has them: reading them once a token misses the TLB otherwise."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

HUGE = 2 << 20
SLAB = 32 << 20
LINE = 64


class Arena:
    """Zeroed memory that is never given back piece by piece. Small pieces share a slab; what is not touched takes no
    memory."""

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """Bytes, beginning on a cache line."""
        if size >= SLAB:
            return _map(size)
        if size > self._slab.numel():
            self._slab = _map(SLAB)
        taken = self._slab[:size]
        self._slab = self._slab[-(-size // LINE) * LINE :]
        return taken


def _map(size: int) -> Tensor:
    """The mapping goes with the last tensor on it."""
    mapped = mmap.mmap(-1, -(-size // HUGE) * HUGE + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system built without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    first = -whole.data_ptr() % HUGE
    return whole[first : first + size]


class Kept:
    """Where weights are kept, and in which type those that are not quantised."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        # Without memory on the meta device, which knows sizes only.
        self.memory = Arena() if device.type == "cpu" else None

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
