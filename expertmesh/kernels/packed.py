"""Matrices in the order in which the CPU's kernels read them (`native/cpu/product.h`).

Blocks of 16 rows, and of each a chunk of 64 bytes at a time: a product reads one stream of memory from end to end.
"""

import ctypes
from functools import cached_property
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

LANES, CHUNK_BYTES = 16, 64


class Packed:
    """Weights [..., N, K], packed. Every part of `rows` rows begins with a block of its own.

    Indexing gives rows to fill, as with a tensor that is not packed: `w[slot, :width].copy_(rows)`.
    """

    def __init__(
        self, library: ctypes.CDLL, shape: tuple[int, ...], split: int, dtype: torch.dtype, data: Tensor
    ) -> None:
        """split: into how many parts the rows of each [N, K] are divided; data: `bytes_of` bytes."""
        self.library, self.shape, self.split, self.dtype, self.data = library, shape, split, dtype, data
        self.rows, self.columns = shape[-2] // split, shape[-1]
        self.parts = prod(shape[:-2]) * split

    @staticmethod
    def bytes_of(shape: tuple[int, ...], split: int) -> int:
        """Of bfloat16 weights: rows fill up blocks, and columns chunks."""
        blocks, chunks = -(-shape[-2] // split // LANES), -(-shape[-1] * 2 // CHUNK_BYTES)
        return prod(shape[:-2]) * split * blocks * chunks * LANES * CHUNK_BYTES

    @cached_property
    def words(self) -> list[int]:
        """As an op is given it."""
        return [self.data.data_ptr(), 0, self.parts, self.rows, self.columns, 0, 0]

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def part_bytes(self) -> int:
        return self.data.numel() // self.parts if self.parts else 0

    def numel(self) -> int:
        return prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

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

    def slot_bytes(self, slot: int) -> Tensor:
        """The memory of one [N, K], as bytes."""
        return self.data.view(self.shape[0], -1)[slot]

    def unpacked(self) -> Tensor:
        """As a tensor, for tests."""
        out = torch.empty(self.parts * self.rows, self.columns, dtype=self.dtype)
        for part in range(self.parts):
            to = out[part * self.rows].data_ptr() if self.rows else 0
            self.library.unpack_rows(
                _pointer(self.data_ptr() + part * self.part_bytes), _word(0), _word(self.rows), _word(self.columns),
                _pointer(to), _word(self.columns),
            )  # fmt: skip
        return out.view(self.shape)


class PackedRows:
    """Some rows of packed weights, counted over all parts: where a loader writes them to."""

    def __init__(self, packed: Packed, start: int, stop: int) -> None:
        self.packed, self.start, self.stop = packed, start, stop
        self.shape, self.dtype = (stop - start, packed.columns), packed.dtype

    def numel(self) -> int:
        return prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def data_ptr(self) -> int:
        """Another one for other rows, though their bytes lie between those of others."""
        return self.packed.data_ptr() + self.start

    def __getitem__(self, rows: slice) -> "PackedRows":
        start, stop, _ = rows.indices(self.shape[0])
        return PackedRows(self.packed, self.start + start, self.start + stop)

    def copy_(self, values: Tensor) -> None:
        """values [rows, K], of any type."""
        packed = self.packed
        values = values.to(packed.dtype)
        if values.stride(1) != 1:
            values = values.contiguous()
        for part in range(self.start // packed.rows, -(-self.stop // packed.rows)):
            first, last = max(self.start, part * packed.rows), min(self.stop, (part + 1) * packed.rows)
            packed.library.pack_rows(
                _pointer(values.data_ptr() + (first - self.start) * values.stride(0) * 2),
                _word(values.stride(0)), _word(first - part * packed.rows), _word(last - first),
                _word(packed.columns), _pointer(packed.data_ptr() + part * packed.part_bytes),
                _word(torch.get_num_threads()),
            )  # fmt: skip


class PackedLatentUp:
    """The up-projection of the latents, [heads * (N + V), C], as attention wants it: the keys' part of each head turned
    over, [C, N], for queries to be multiplied with, and the values' part as it is, [V, C]."""

    def __init__(self, keys: Packed, values: Packed, nope: int) -> None:
        self.keys, self.values, self.nope = keys, values, nope
        self.heads, self.value = keys.parts, values.rows
        self.shape, self.dtype = (self.heads * (nope + self.value), values.columns), keys.dtype

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def numel(self) -> int:
        return prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

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
    """Rows of a checkpoint's tensor. They come in any pieces, but each is kept until its head is whole."""

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
                old = None if whole else _unpacked_part(up.keys, head)
                new = keys.t() if old is None else old
                if old is not None:
                    old[:, first : first + keys.shape[0]] = keys.t()
                PackedRows(up.keys, rows.start, rows.stop).copy_(new.contiguous())
            if others.shape[0]:
                at = head * up.value + max(first, up.nope) - up.nope
                PackedRows(up.values, at, at + others.shape[0]).copy_(others)


def _unpacked_part(packed: Packed, part: int) -> Tensor:
    out = torch.empty(packed.rows, packed.columns, dtype=packed.dtype)
    packed.library.unpack_rows(
        _pointer(packed.data_ptr() + part * packed.part_bytes), _word(0), _word(packed.rows),
        _word(packed.columns), _pointer(out.data_ptr()), _word(packed.columns),
    )  # fmt: skip
    return out


# What kernels keep the weights of a product in, and the up-projection of the latents: made, filled and read by the same
# kernels. A tensor for library kernels, packed for our own.
Weight: TypeAlias = Any
LatentUp: TypeAlias = Any


def slot_bytes(weight: Weight, slot: int) -> Tensor:
    """The memory of one slot's [N, K] as bytes, which is what moves when an expert does."""
    if isinstance(weight, Packed):
        return weight.slot_bytes(slot)
    assert isinstance(weight, Tensor)
    return weight[slot].view(torch.uint8).flatten()


def _word(number: int) -> ctypes.c_int64:
    return ctypes.c_int64(number)


def _pointer(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)
