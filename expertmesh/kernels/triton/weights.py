"""Memory for matrices of 8-bit numbers as kernels in Triton read them: the order of a checkpoint, scales beside it.

Whole numbers have a scale for each output (W8A8), FP8 the blocks of a checkpoint as they are (DeepSeek-V3, section
3.3.2). Cards without FP8 get the same numbers as bytes.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from expertmesh.config.precision import FP8, PLAIN, W8A8, Format, Precision
from expertmesh.errors import InputError
from expertmesh.kernels.memory import Kept
from expertmesh.kernels.triton import tiles
from expertmesh.kernels.whole import whole_rows


@dataclass(frozen=True)
class Rowwise(Format):
    """A format in the order of a checkpoint; code and per_chunk are the CPU's."""

    def scale_rows(self, rows: int) -> int:
        """How many rows of a matrix of so many share a scale: those of a block, where it is made of whole ones. Else a
        TP rank's part may begin inside of a block, and each row has its own."""
        return self.group if self.group and rows % self.group == 0 else 1

    def part_bytes(self, rows: int, columns: int) -> tuple[int, int, int]:
        groups = -(-columns // self.group) if self.group else 1
        return rows * columns, rows // self.scale_rows(rows) * groups * self.scale_bytes, 0


FORMATS = {f.name: Rowwise(f.name, f.code, f.per_chunk, f.group) for f in (W8A8, FP8)}
# What they are kept as, by the name of `quantise`. Products of the prologue are fused with the norms around them, in
# kernels that read numbers: those weights stay as they are computed.
PRECISIONS = {
    "none": Precision(),
    **{name: Precision(format, format, prologue=PLAIN) for name, format in FORMATS.items()},
}


@dataclass(frozen=True)
class Quantised:
    """Matrices [..., N, K] of 8-bit numbers, a float32 scale for each block of `rows` x `group`: scales [..., N / rows,
    K / group]. uint8 are FP8 (E4M3) by their bits, and multiply bfloat16; rows of others are quantised too.

    Indexing gives rows to fill: `w[first:last]`, `w[slot]`, `w[slot, first:last]`.
    """

    numbers: Tensor
    scales: Tensor
    rows: int
    group: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.numbers.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.numbers.dtype

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + self.scales.nbytes

    @property
    def keeps_fp8(self) -> bool:
        """Whether blocks of a checkpoint stay as they are."""
        return self.numbers.dtype != torch.int8

    def numel(self) -> int:
        return prod(self.shape)

    def element_size(self) -> int:
        return self.numbers.element_size()

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def __getitem__(self, index: Any) -> "Quantised":
        """Rows begin with a block, or end inside of the one that they begin in and are all of a matrix' rows there."""
        *slot, last = index if isinstance(index, tuple) else (index,)
        if not isinstance(last, slice):
            slot, last = [last], slice(None)
        numbers, scales = (t[slot[0]] if slot else t for t in (self.numbers, self.scales))
        first, end, _ = last.indices(numbers.shape[0])
        return Quantised(
            numbers[first:end], scales[first // self.rows : -(-end // self.rows)], self.rows, self.group
        )

    def copy_(self, values: Tensor) -> None:
        """values [N, K], of any type."""
        self.keep_int8(*whole_rows(values))

    def keep_int8(self, values: Tensor, scales: Tensor) -> None:
        """Whole numbers [N, K] and the size of one of them in each row, [N]. InputError where these are FP8."""
        if self.keeps_fp8:
            raise InputError("quantise fp8 keeps FP8 weights as they are, and here are some of another type")
        self.numbers.copy_(values)
        self.scales.copy_(scales.reshape(self.scales.shape))

    def keep_fp8(self, values: Tensor, scales: Tensor) -> None:
        """FP8 numbers [N, K] of one row of a checkpoint's blocks, and the scales of those, [K / group]."""
        self.numbers.view(torch.uint8).copy_(values.view(torch.uint8))
        self.scales.copy_(scales[: self.scales.shape[-1]].expand(self.scales.shape))

    def slot_bytes(self, slot: int) -> list[Tensor]:
        """The memory of one [N, K], as bytes."""
        return [t[slot].flatten().view(torch.uint8) for t in (self.numbers, self.scales)]


def matrix(shape: tuple[int, ...], split: int, format: Format, kept: Kept) -> Tensor | Quantised:
    """Uninitialised. InputError for a format that no product here has."""
    if format is PLAIN:
        return kept.empty(*shape)
    if format.name not in FORMATS:
        raise InputError(
            f"{format.name} weights cannot be computed with on an accelerator; use quantise none, {', '.join(FORMATS)}"
        )
    own, (*lead, rows, columns) = FORMATS[format.name], shape
    dtype = _dtype(own, kept.device)
    shared, group = own.scale_rows(rows // split), own.group or columns
    scales = kept.empty(*lead, rows // shared, -(-columns // group), dtype=torch.float32)
    return Quantised(kept.empty(*shape, dtype=dtype), scales, shared, group)


def _dtype(format: Format, device: torch.device) -> torch.dtype:
    """Of the numbers on this device. InputError where it has no kernels for them."""
    target, kernels = tiles.target_of(device), tiles.table()
    if format.name == FP8.name:
        return torch.float8_e4m3fn if target in kernels["gate_up_fp8"] else torch.uint8
    if target not in kernels["gate_up_int8"]:
        raise InputError(f"there are no {format.name} products for {target}; use quantise none")
    return torch.int8
