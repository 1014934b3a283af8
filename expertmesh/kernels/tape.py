"""A step's ops in a row, recorded once and run again with one call: as a graph is on an accelerator.

What changes from step to step is written into the tensors that the recorded ops read. Between ops there is no Python,
no allocation and no start of threads.
"""

import ctypes
import math
import sys
from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Pool:
    """Memory for what ops return while a tape records. A piece is taken again when no tensor is on it any more, also by
    tapes that are recorded later: they never run at the same time."""

    def __init__(self) -> None:
        self._pieces: list[NDArray[np.uint8]] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = max(1, math.prod(shape) * dtype.itemsize)
        fitting = [p for p in self._pieces if size <= p.size <= 2 * size + 4096]
        # Known to the list of pieces, to that of fitting ones, to the loop and to the call.
        free = next((p for p in fitting if sys.getrefcount(p) == 4), None)
        if free is None:
            free = np.empty(size, dtype=np.uint8)
            self._pieces.append(free)
        return torch.from_numpy(free)[: math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)


class Tape:
    """Ops of a native library, in order."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.whole = True
        self._words = array("q")
        self._kept: list[object] = []

    def add(self, words: Sequence[int]) -> None:
        self._words.extend(words)

    def keep(self, *read: object) -> None:
        """Memory that the ops read stays as long as the tape."""
        self._kept.extend(read)

    def spoil(self) -> None:
        """Something was computed that the tape does not know."""
        self.whole = False

    @property
    def program(self) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
        address, count = self._words.buffer_info()
        return ctypes.c_void_p(address), ctypes.c_int64(count)


class Graph(Protocol):
    """What records ops."""

    def recording(self, tape: Tape) -> AbstractContextManager[None]:
        """What is computed meanwhile goes on the tape."""
        ...

    def replay(self, tape: Tape) -> None:
        """Compute it again."""
        ...
