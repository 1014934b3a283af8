"""Matrices in the order in which the CPU's kernels read them (`native/cpu/product.h`), as bfloat16 or quantised.

Blocks of 16 rows, and of each a chunk of 64 bytes at a time: a product reads one stream of memory from end to end.
"""

import ctypes
from functools import cached_property
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from expertmesh.config.precision import FP8, INT4, LANES, PLAIN, W8A8, Format
from expertmesh.errors import InputError
from expertmesh.kernels.memory import Arena


class _Place:
    """What a loader asks of the place that a tensor goes to."""

    shape: tuple[int, ...]
    dtype = torch.bfloat16

    def numel(self) -> int:
        return prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize


class Packed(_Place):
    """Weights [..., N, K], packed. Every part of `rows` rows begins with a block of its own.

    Indexing gives rows to fill, as with a tensor that is not packed: `w[slot, :width].copy_(rows)`.
    """

    def __init__(
        self, library: ctypes.CDLL, shape: tuple[int, ...], split: int, format: Format, memory: Arena | None
    ) -> None:
        """split: into how many parts the rows of each [N, K] are divided; memory: None for sizes without memory."""
        self.library, self.shape, self.split, self.format = library, shape, split, format
        self.rows, self.columns = shape[-2] // split, shape[-1]
        self.parts = prod(shape[:-2]) * split
        sizes = [self.parts * size for size in format.part_bytes(self.rows, self.columns)]
        take = memory.take if memory else lambda size: torch.empty(size, dtype=torch.uint8, device="meta")
        self.data, self.scale, self.sums = (take(size) for size in sizes)

    @cached_property
    def words(self) -> list[int]:
        """As an op is given it."""
        scale, sums = self.scale.data_ptr(), self.sums.data_ptr()
        return [self.data.data_ptr(), self.format.code, self.parts, self.rows, self.columns, scale, sums]

    @cached_property
    def _described(self) -> Any:
        return (ctypes.c_int64 * len(self.words))(*self.words)

    @property
    def nbytes(self) -> int:
        return self.data.numel() + self.scale.numel() + self.sums.numel()

    @property
    def part_bytes(self) -> int:
        return self.data.numel() // self.parts if self.parts else 0

    def data_ptr(self) -> int:
        return self.data.data_ptr()

    def __getitem__(self, index: Any) -> "PackedRows":
        """[slot], [slot, first:last] or, of a matrix, [first:last]."""
        *lead, last = index if isinstance(index, tuple) else (index,)
        height = self.shape[-2]
        if len(self.shape) > 2 and not isinstance(last, slice):
            return PackedRows(self, last * height, (last + 1) * height)
        first = lead[0] * height if lead else 0
        start, stop, _ = last.indices(height)
        return PackedRows(self, first + start, first + stop)

    def copy_(self, values: Tensor) -> None:
        self[:].copy_(values)

    def slot_bytes(self, slot: int) -> list[Tensor]:
        """The memory of one [N, K], as bytes."""
        kept = [t for t in (self.data, self.scale, self.sums) if t.numel()]
        return [t.view(self.shape[0], -1)[slot] for t in kept]

    def unpacked(self) -> Tensor:
        """What products see, float32 [..., N, K]."""
        out = torch.empty(self.parts, self.rows, self.columns)
        for part in range(self.parts):
            out[part] = _part_of(self, part)
        return out.view(self.shape)


class PackedRows(_Place):
    """Some rows of packed weights, counted over all parts: where a loader writes them to."""

    def __init__(self, packed: Packed, start: int, stop: int) -> None:
        self.packed, self.start, self.stop = packed, start, stop
        self.shape = (stop - start, packed.columns)

    def data_ptr(self) -> int:
        """Another one for other rows, though their bytes lie between those of others."""
        return self.packed.data_ptr() + self.start

    def __getitem__(self, rows: slice) -> "PackedRows":
        start, stop, _ = rows.indices(self.shape[0])
        return PackedRows(self.packed, self.start + start, self.start + stop)

    def copy_(self, values: Tensor) -> None:
        """values [rows, K], of any type."""
        packed, quantised = self.packed, self.packed.format is not PLAIN
        values = values.to(torch.float32 if quantised else torch.bfloat16)
        if values.stride(1) != 1:
            values = values.contiguous()
        for part, first, last, begin in self._by_part():
            some = values[begin : begin + last - first]
            if quantised:
                self._quantise(some, part, first)
                continue
            packed.library.pack_rows(
                _pointer(some.data_ptr()), _word(some.stride(0)), _word(first), _word(last - first),
                _word(packed.columns), _pointer(packed.data_ptr() + part * packed.part_bytes),
                _word(torch.get_num_threads()),
            )  # fmt: skip

    @property
    def keeps_fp8(self) -> bool:
        """Whether blocks of a checkpoint stay as they are."""
        return self.packed.format is FP8

    def keep_fp8(self, values: Tensor, scales: Tensor) -> None:
        """FP8 values [rows, K] of one row of a checkpoint's blocks, and the scales of those, float32 [groups]."""
        packed, scales = self.packed, scales.contiguous()
        values = values.view(torch.uint8)
        if values.stride(1) != 1:
            values = values.contiguous()
        for part, first, last, begin in self._by_part():
            some = values[begin : begin + last - first]
            packed.library.keep_fp8_rows(
                _pointer(some.data_ptr()), _word(some.stride(0)), _word(first), _word(last - first),
                _pointer(scales.data_ptr()), packed._described, _word(part),
            )  # fmt: skip

    def keep_int8(self, values: Tensor, scales: Tensor) -> None:
        """Whole numbers [rows, K] and the size of one of them in each row, float32 [rows]: bit by bit as they are where
        that is how these are kept."""
        if self.packed.format is W8A8:
            self._keep_whole(values, scales[:, None])
        else:
            self.copy_(values.float() * scales[:, None])

    def keep_int4(self, values: Tensor, scales: Tensor) -> None:
        """The same of numbers from -8 to 7, and their size in each group of 128, float32 [rows, groups]."""
        if self.packed.format is INT4:
            self._keep_whole(values, scales)
        else:
            wide = scales.repeat_interleave(128, dim=1)[:, : values.shape[1]]
            self.copy_(values.float() * wide)

    def _keep_whole(self, values: Tensor, scales: Tensor) -> None:
        packed, values, scales = self.packed, values.contiguous(), scales.float().contiguous()
        for part, first, last, begin in self._by_part():
            packed.library.keep_whole_rows(
                _pointer(values[begin:].data_ptr()), _word(values.stride(0)), _word(first), _word(last - first),
                _pointer(scales[begin:].data_ptr()), packed._described, _word(part),
            )  # fmt: skip

    def _by_part(self) -> list[tuple[int, int, int, int]]:
        """Part, first and last row in it, and where those begin among these rows."""
        height, out = self.packed.rows, []
        for part in range(self.start // height, -(-self.stop // height)):
            first, last = max(self.start, part * height), min(self.stop, (part + 1) * height)
            out.append((part, first - part * height, last - part * height, first - self.start))
        return out

    def _quantise(self, values: Tensor, part: int, first: int) -> None:
        packed = self.packed
        if packed.format is FP8:
            raise InputError("quantise fp8 keeps FP8 weights as they are, and here are some of another type")
        if not packed.library.quantise_rows(
            _pointer(values.data_ptr()), _word(values.stride(0)), _word(first), _word(values.shape[0]),
            packed._described, _word(part), _word(torch.get_num_threads()),
        ):  # fmt: skip
            raise InputError(
                f"weights of {packed.rows} rows cannot be quantised: they come in pieces that are not of whole "
                f"blocks of {LANES}; run this model without quantise"
            )


class PackedLatentUp(_Place):
    """The up-projection of the latents, [heads * (N + V), C], as attention wants it: the keys' part of each head turned
    over, [C, N], for queries to be multiplied with, and the values' part as it is, [V, C]."""

    def __init__(self, keys: Packed, values: Packed, nope: int) -> None:
        self.keys, self.values, self.nope = keys, values, nope
        self.heads, self.value = keys.parts, values.rows
        self.shape = (self.heads * (nope + self.value), values.columns)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def data_ptr(self) -> int:
        return self.keys.data_ptr()

    def __getitem__(self, rows: slice) -> "_LatentRows":
        return _LatentRows(self, *rows.indices(self.shape[0])[:2])

    def copy_(self, values: Tensor) -> None:
        self[:].copy_(values)

    def unpacked(self) -> Tensor:
        heads = self.keys.unpacked().view(self.heads, self.values.columns, self.nope)
        values = self.values.unpacked().view(self.heads, self.value, -1)
        return torch.cat((heads.transpose(1, 2), values), dim=1).flatten(0, 1)


class _LatentRows:
    """Rows of a checkpoint's tensor. They come in any pieces."""

    def __init__(self, up: PackedLatentUp, start: int, stop: int) -> None:
        self.up, self.start, self.stop = up, start, stop

    def __getitem__(self, rows: slice) -> "_LatentRows":
        start, stop, _ = rows.indices(self.stop - self.start)
        return _LatentRows(self.up, self.start + start, self.start + stop)

    def copy_(self, values: Tensor) -> None:
        """Keys come as columns, so a part of a head is put in by taking out what is there of it."""
        up, height = self.up, self.up.nope + self.up.value
        for head in range(self.start // height, -(-self.stop // height)):
            first, last = max(self.start, head * height), min(self.stop, (head + 1) * height)
            some = values[first - self.start : last - self.start]
            first, last = first - head * height, last - head * height
            keys, others = some[: max(0, up.nope - first)], some[max(0, up.nope - first) :]
            if keys.shape[0]:
                rows = slice(head * up.keys.rows, (head + 1) * up.keys.rows)
                whole = keys.shape[0] == up.nope
                new = keys.t() if whole else _part_of(up.keys, head)
                if not whole:
                    new[:, first : first + keys.shape[0]] = keys.t()
                PackedRows(up.keys, rows.start, rows.stop).copy_(new)
            if others.shape[0]:
                at = head * up.value + max(first, up.nope) - up.nope
                PackedRows(up.values, at, at + others.shape[0]).copy_(others)


def _part_of(packed: Packed, part: int) -> Tensor:
    out = torch.empty(packed.rows, packed.columns)
    packed.library.widen_part(packed._described, _word(part), _pointer(out.data_ptr()))
    return out


# What kernels keep the weights of a product in, and the up-projection of the latents: made, filled and read by the same
# kernels. A tensor for library kernels, packed for our own.
Weight: TypeAlias = Any
LatentUp: TypeAlias = Any


def slot_bytes(weight: Weight, slot: int) -> list[Tensor]:
    """The memory of one slot's [N, K] as bytes, which is what moves when an expert does."""
    if isinstance(weight, Tensor):
        return [weight[slot].view(torch.uint8).flatten()]
    parts: list[Tensor] = weight.slot_bytes(slot)
    return parts


def _word(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)


def _pointer(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)
