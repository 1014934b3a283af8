"""Rows as bytes: formats on the wire, and messages as `mesh.traffic` counts them.

Rows travel as a tuple, (x,) or (q, scale), so that no transport knows formats.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from expertmesh.mesh.traffic import Format, message_bytes, padded, rows_bytes

Rows: TypeAlias = tuple[Tensor, ...]
DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn,
}  # fmt: skip
LARGEST = {"int8": 127.0, "fp8": 448.0}


def format_name(dtype: torch.dtype) -> str:
    """Name of the plain format of a model's type."""
    return str(dtype).removeprefix("torch.")


def quantise(x_TD: Tensor, form: Format) -> Rows:
    """Rows in a format: as they are, or with a scale for every block of numbers, symmetric around 0."""
    if not form.scaled:
        return (x_TD.to(DTYPES[form.name]),)
    blocks = _blocks(x_TD.float(), form)
    # A block of zeros has scale 1: anything but 0.
    scale = blocks.abs().amax(-1) / LARGEST[form.name]
    scale = torch.where(scale > 0, scale, 1.0)
    numbers = (blocks / scale.unsqueeze(-1)).flatten(1)[:, : x_TD.shape[1]]
    return (numbers.round() if form.name == "int8" else numbers).to(DTYPES[form.name]), scale


def dequantise(rows: Rows, form: Format, dtype: torch.dtype) -> Tensor:
    """Rows in the model's type."""
    if not form.scaled:
        return rows[0].to(dtype)
    numbers, scale = rows
    return (_blocks(numbers.float(), form) * scale.unsqueeze(-1)).flatten(1)[:, : numbers.shape[1]].to(dtype)


def _blocks(x_TD: Tensor, form: Format) -> Tensor:
    """[T, blocks, numbers of a block], the last block filled up with zeros."""
    short = -x_TD.shape[1] % form.scaled
    blocks: Tensor = pad(x_TD, (0, short)).unflatten(-1, (-1, form.scaled))
    return blocks


def pack_rows(rows: Rows, index: Tensor, form: Format) -> Tensor:
    """The rows at `index` as bytes."""
    width = rows[0].shape[1]
    buffer = torch.empty(rows_bytes(index.shape[0], width, form), dtype=torch.uint8)
    _fill_rows(buffer, 0, rows, index, form)
    return buffer


def unpack_rows(buffer: Tensor, count: int, width: int, form: Format) -> Rows:
    return _carve_rows(buffer, 0, count, width, form)[0]


@dataclass(frozen=True)
class Message:
    """Rows and, for each, the slots that it was sent for. counts_R: slots per row; slots_E and weights_E: the slots
    of the first row, then of the second, and so on."""

    rows: Rows
    counts_R: Tensor
    slots_E: Tensor
    weights_E: Tensor

    @property
    def count(self) -> int:
        return self.counts_R.shape[0]


def pack(
    rows: Rows, index: Tensor, counts_R: Tensor, slots_E: Tensor, weights_E: Tensor, form: Format
) -> Tensor:
    """A message of the rows at `index` as bytes, empty where there are none."""
    count, entries, width = index.shape[0], slots_E.shape[0], rows[0].shape[1]
    buffer = torch.empty(message_bytes(count, entries, width, form), dtype=torch.uint8)
    if not count:
        return buffer
    buffer[:8].view(torch.int32).copy_(torch.tensor([count, entries], dtype=torch.int32))
    at = _fill_rows(buffer, 8, rows, index, form)
    for values, dtype in ((counts_R, torch.uint8), (slots_E, torch.int32), (weights_E, torch.float32)):
        view, at = _carve(buffer, at, dtype, tuple(values.shape))
        view.copy_(values)
    return buffer


def unpack(buffer: Tensor, width: int, form: Format) -> Message:
    """The parts of a message, read in place."""
    count, entries = buffer[:8].view(torch.int32).tolist() if buffer.shape[0] else (0, 0)
    rows, at = _carve_rows(buffer, 8 if count else 0, count, width, form)
    counts_R, at = _carve(buffer, at, torch.uint8, (count,))
    slots_E, at = _carve(buffer, at, torch.int32, (entries,))
    weights_E, at = _carve(buffer, at, torch.float32, (entries,))
    return Message(rows, counts_R, slots_E, weights_E)


def _carve(buffer: Tensor, at: int, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """A typed view of the bytes from `at` on, and where the next part begins."""
    size = math.prod(shape) * dtype.itemsize
    return buffer[at : at + size].view(dtype).view(shape), at + padded(size)


def _carve_rows(buffer: Tensor, at: int, count: int, width: int, form: Format) -> tuple[Rows, int]:
    numbers, at = _carve(buffer, at, DTYPES[form.name], (count, width))
    if not form.scaled:
        return (numbers,), at
    scales, at = _carve(buffer, at, torch.float32, (count, form.scales(width)))
    return (numbers, scales), at


def _fill_rows(buffer: Tensor, at: int, rows: Rows, index: Tensor, form: Format) -> int:
    views, end = _carve_rows(buffer, at, index.shape[0], rows[0].shape[1], form)
    for view, values in zip(views, rows, strict=True):
        if values.dtype == torch.float8_e4m3fn:  # has no index_select
            view, values = view.view(torch.uint8), values.view(torch.uint8)
        torch.index_select(values, 0, index, out=view)
    return end
