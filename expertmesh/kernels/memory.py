"""Memory for weights, in huge pages where the system has them: reading them once a token misses the TLB otherwise; and
for the latent cache."""

import math
import mmap
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

# What kernels keep the latent cache of a layer in: made, written and read by the same kernels.
Cache: TypeAlias = Any

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


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory is taken when it is first written: a cache sized for the worst case costs nothing at first.

    Zeros and not just any memory, since attention reads whole pages and masks what is not written yet.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    flat = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(flat).view(dtype).view(shape)


def latent_cache(
    pages: int, page: int, latent: int, rope: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Of one layer, [pages, page, C + P]: a token's latent, and behind it the rotated key that all heads share."""
    return zeros((pages, page, latent + rope), dtype, device)
