"""Rows as bytes: formats on the wire, and messages as `mesh.traffic` counts them.

Rows travel as a tuple of byte matrices, numbers and where the format has them scales, so that no transport knows
formats. What is done once for a message is done in numpy: its arrays are small, and a call costs a fifth of torch's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from expertmesh.mesh.traffic import Format, padded

Bytes: TypeAlias = NDArray[np.uint8]
Rows: TypeAlias = tuple[Bytes, ...]  # each [T, bytes of a row]
Ints: TypeAlias = NDArray[np.int64]
DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn,
}  # fmt: skip
LARGEST = {"int8": 127.0, "fp8": 448.0}


def format_name(dtype: torch.dtype) -> str:
    """Name of the plain format of a model's type."""
    return str(dtype).removeprefix("torch.")


def quantise(x_TD: Tensor, form: Format) -> Rows:
    """Rows in a format, in a processor's memory."""
    # By way of one axis: without any rows, two come with strides that torch does not take back.
    return tuple(part.flatten().numpy().reshape(part.shape) for part in quantised(x_TD, form))


def dequantise(rows: Rows, form: Format, dtype: torch.dtype) -> Tensor:
    """Rows in the model's type."""
    return restored([torch.from_numpy(part) for part in rows], form, dtype)


def quantised(x_TD: Tensor, form: Format) -> tuple[Tensor, ...]:
    """Bytes of rows in a format, each [T, bytes of a row], where they lie: as they are, or with a scale for every block
    of numbers, symmetric around 0."""
    if not form.scaled:
        return (_bytes(x_TD.to(DTYPES[form.name])),)
    blocks = _blocks(x_TD.float(), form)
    # A block of zeros has scale 1: anything but 0.
    scale = blocks.abs().amax(-1) / LARGEST[form.name]
    scale = torch.where(scale > 0, scale, 1.0)
    numbers = (blocks / scale.unsqueeze(-1)).flatten(1)[:, : x_TD.shape[1]]
    return _bytes((numbers.round() if form.name == "int8" else numbers).to(DTYPES[form.name])), _bytes(scale)


def restored(parts: Sequence[Tensor], form: Format, dtype: torch.dtype) -> Tensor:
    """The rows of such bytes in the model's type."""
    numbers = parts[0].view(DTYPES[form.name])
    if not form.scaled:
        return numbers.to(dtype)
    scale = parts[1].view(torch.float32)
    return (_blocks(numbers.float(), form) * scale.unsqueeze(-1)).flatten(1)[:, : numbers.shape[1]].to(dtype)


def _bytes(rows: Tensor) -> Tensor:
    # By way of one axis: without any rows, two may have strides that torch finds no way around.
    return rows.contiguous().flatten().view(torch.uint8).view(len(rows), rows.shape[1] * rows.dtype.itemsize)


def _blocks(x_TD: Tensor, form: Format) -> Tensor:
    """[T, blocks, numbers of a block], the last block filled up with zeros."""
    short = -x_TD.shape[1] % form.scaled
    blocks: Tensor = pad(x_TD, (0, short)).unflatten(-1, (-1, form.scaled))
    return blocks


def chosen(rows: Rows, first: int, end: int) -> Rows:
    """Some of the rows, not copied."""
    return tuple(part[first:end] for part in rows)


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows of several messages, one after the other."""
    filled = [rows for rows in parts if len(rows[0])] or list(parts[:1])
    return (
        filled[0] if len(filled) == 1 else tuple(np.concatenate(each) for each in zip(*filled, strict=True))
    )


def pack_rows(buffer: Bytes, rows: Rows) -> None:
    """Rows, without a word on which they are, into a buffer of `mesh.traffic.rows_bytes`."""
    at = 0
    for part in rows:
        buffer[at : at + part.size].reshape(part.shape)[:] = part
        at += padded(part.size)


def unpack_rows(buffer: Bytes, count: int, width: int, form: Format) -> Rows:
    """Read in place."""
    return _carve_rows(buffer, 0, count, width, form)[0]


@dataclass(frozen=True)
class Message:
    """Rows and, for each, the slots that it was sent for. counts_R: slots per row; slots_E and weights_E: the slots
    of the first row, then of the second, and so on."""

    rows: Rows
    counts_R: NDArray[np.uint8]
    slots_E: NDArray[np.int32]
    weights_E: NDArray[np.float32]

    @property
    def count(self) -> int:
        return len(self.counts_R)


def pack(
    buffer: Bytes, rows: Rows, index: Ints, counts_R: Ints, slots_E: Ints, weights_E: NDArray[np.float32]
) -> None:
    """A message of the rows at `index` into a buffer of `mesh.traffic.message_bytes`; empty where there are none."""
    count, entries = len(index), len(slots_E)
    if not count:
        return
    buffer[:8].view(np.int32)[:] = count, entries
    at = 8
    for part in rows:
        size = count * part.shape[1]
        # "clip" writes without a detour; no index is outside.
        part.take(index, axis=0, out=buffer[at : at + size].reshape(count, part.shape[1]), mode="clip")
        at += padded(size)
    for values, dtype in ((counts_R, np.uint8), (slots_E, np.int32), (weights_E, np.float32)):
        view, at = _carve(buffer, at, np.dtype(dtype), (len(values),))
        view[:] = values


def unpack(buffer: Bytes, width: int, form: Format) -> Message:
    """The parts of a message, read in place."""
    count, entries = buffer[:8].view(np.int32).tolist() if len(buffer) else (0, 0)
    rows, at = _carve_rows(buffer, 8 if count else 0, count, width, form)
    counts_R, at = _carve(buffer, at, np.dtype(np.uint8), (count,))
    slots_E, at = _carve(buffer, at, np.dtype(np.int32), (entries,))
    weights_E, at = _carve(buffer, at, np.dtype(np.float32), (entries,))
    return Message(rows, counts_R, slots_E, weights_E)


def _carve(
    buffer: Bytes, at: int, dtype: "np.dtype[Any]", shape: tuple[int, ...]
) -> tuple[NDArray[Any], int]:
    """A typed view of the bytes from `at` on, and where the next part begins."""
    size = math.prod(shape) * dtype.itemsize
    return buffer[at : at + size].view(dtype).reshape(shape), at + padded(size)


def _carve_rows(buffer: Bytes, at: int, count: int, width: int, form: Format) -> tuple[Rows, int]:
    byte = np.dtype(np.uint8)
    numbers, at = _carve(buffer, at, byte, (count, width * form.itemsize))
    if not form.scaled:
        return (numbers,), at
    scales, at = _carve(buffer, at, byte, (count, form.scales(width) * 4))
    return (numbers, scales), at
