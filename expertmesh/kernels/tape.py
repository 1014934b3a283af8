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
from functools import partial
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


class Recorder(Protocol):
    """Kernels that write down what they compute."""

    def recording(self, tape: Tape) -> AbstractContextManager[None]:
        """What is computed meanwhile goes on the tape."""
        ...

    def replay(self, tape: Tape) -> None:
        """Compute it again."""
        ...


@dataclass(frozen=True)
class Recorded:
    """A step: where its result is, each time that `again` has computed it. None: it cannot be computed again."""

    out: Tensor
    again: Callable[[], None] | None


class Graph(Protocol):
    """What a step is recorded in once and run again with one call: a tape, or a graph of a card (`capture`).

    ahead: a step is recorded before its rows are there, on rows that do nothing; else by computing it.
    """

    ahead: bool

    def size(self, rows: int) -> int:
        """Of how many rows the step is that serves so many."""
        ...

    def record(self, compute: Callable[[], Tensor]) -> Recorded:
        """NotCaptured where that does not work; then nothing else has changed."""
        ...


class NotCaptured(RuntimeError):
    """Why a step could not be recorded."""


class Taped:
    """Tapes of one rank, which share memory. Implements `Graph`."""

    ahead = False

    def __init__(self, recorder: Recorder) -> None:
        self._recorder, self._pool = recorder, Pool()

    def size(self, rows: int) -> int:
        return rows

    def record(self, compute: Callable[[], Tensor]) -> Recorded:
        tape = Tape(self._pool)
        with self._recorder.recording(tape):
            out = compute()
        return Recorded(out, partial(self._recorder.replay, tape) if tape.whole else None)
