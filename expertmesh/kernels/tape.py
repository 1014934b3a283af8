"""A step's ops in a row, recorded once and run again with one call: as a graph is on an accelerator.

What changes from step to step is written into the tensors that the recorded ops read. Between ops there is no Python,
no allocation and no start of threads.
"""

import ctypes
import math
import weakref
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Pool:
    """Memory for what ops return. A piece is taken again when no tensor is on it any more; by a tape that records also
    when it holds what another tape computes, for they never run at the same time."""

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        piece = next((p for p in self._pieces if size <= p.memory.size <= 2 * size + 4096 and p.free), None)
        if piece is None:
            piece = _Piece(np.empty(max(1, size), dtype=np.uint8))
            self._pieces.append(piece)
        return torch.from_numpy(piece.take(size)).view(dtype).view(*shape)


@dataclass
class _Piece:
    memory: NDArray[np.uint8]
    taken: Callable[[], Any] = lambda: None

    @property
    def free(self) -> bool:
        return self.taken() is None

    def take(self, size: int) -> NDArray[np.uint8]:
        """An array of its own, that lives as long as tensors on it."""
        part = self.memory[:size]
        self.taken = weakref.ref(part)
        return part


class Tape:
    """Ops of a native library, in order."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.whole = True
        self._words = array("q")

    def add(self, words: Sequence[int]) -> None:
        self._words.extend(words)

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
