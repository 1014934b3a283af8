"""How a tensor lies in a checkpoint's files, and how it comes out of them: a rank's part of it into its place, or some
rows of it as numbers.

Official layouts have FP8 blocks with scales of blocks. ModelSlim's have whole numbers of 8 bits with a scale for each
row (`X.weight`, `X.weight_scale`, `X.weight_offset`), compressed-tensors' of 4 bits, eight in a word, with a scale for
each group of a row (`X.weight_packed`, `X.weight_scale`, `X.weight_shape`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from expertmesh.engine.safetensors import Entry
from expertmesh.errors import InputError

# Of each axis of a matrix, what a rank holds of it.
Ranges: TypeAlias = Sequence[range]
STEP = 1024  # rows that are expanded at a time; of whole blocks for whoever packs them
WORD = 8  # numbers of 4 bits in a word of 32


class Stored(Protocol):
    """A tensor of the model as the files keep it. entries: all that it is kept in."""

    @property
    def entries(self) -> tuple[Entry, ...]: ...

    def load(self, ranges: Ranges, target: Any) -> int:
        """Fill the target with this part. Returns the bytes that are read."""
        ...

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last), or elements of a vector, as float32 numbers; memory holds no more of the file."""
        ...


@dataclass(frozen=True)
class Plain:
    """As it is."""

    entry: Entry

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.entry,)

    def load(self, ranges: Ranges, target: Any) -> int:
        where = tuple(slice(r.start, r.stop) for r in ranges)
        self.entry.read(lambda whole: target.copy_(whole[where]))
        return int(target.numel()) * self.entry.dtype.itemsize

    def rows(self, first: int, last: int) -> Tensor:
        return self.entry.rows(first, last).float()


@dataclass(frozen=True)
class Fp8Blocks:
    """FP8 with a scale for each block. Rows that are asked for begin with a block."""

    name: str
    entry: Entry
    scale: Entry
    block: tuple[int, int]

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.entry, self.scale

    def load(self, ranges: Ranges, target: Any) -> int:
        scale = _sizes(self.name, self.scale.rows(0, self.scale.shape[0]).float())
        where = tuple(slice(r.start, r.stop) for r in ranges)
        self.entry.read(lambda whole: dequantise_blocks(whole[where], scale, self.block, ranges, target))
        return int(target.numel()) + scale.numel() * 4

    def rows(self, first: int, last: int) -> Tensor:
        values = self.entry.rows(first, last)
        out = torch.empty(values.shape)
        scale = _sizes(self.name, self.scale.rows(0, self.scale.shape[0]).float())
        dequantise_blocks(values, scale, self.block, (range(first, last), range(values.shape[1])), out)
        return out


@dataclass(frozen=True)
class Int8Rows:
    """Whole numbers of 8 bits with a scale for each row. Where the scale of rows was made for activations of one fixed
    scale (W8A8, not dynamic), it is in `deq_scale`, multiplied with `input_scale`: what is multiplied with these rows
    is quantised row by row here, which no such scale is needed for."""

    name: str
    parts: dict[str, Entry]

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self.parts.values())

    def load(self, ranges: Ranges, target: Any) -> int:
        rows, columns = ranges
        self._check_symmetric()
        scales = self._scales(rows.start, rows.stop)

        def fill(whole: Tensor) -> None:
            values = whole[rows.start : rows.stop, columns.start : columns.stop]
            for first in range(0, len(rows), STEP):
                _keep_int8(
                    target[first : first + STEP], values[first : first + STEP], scales[first : first + STEP]
                )

        self.parts["weight"].read(fill)
        return int(target.numel()) + scales.numel() * 4

    def rows(self, first: int, last: int) -> Tensor:
        if first == 0:  # once, for all rows
            self._check_symmetric()
        return self.parts["weight"].rows(first, last).float() * self._scales(first, last)[:, None]

    def _scales(self, first: int, last: int) -> Tensor:
        if "weight_scale" in self.parts:
            return _sizes(self.name, self.parts["weight_scale"].rows(first, last).float().flatten())
        scale = self.parts["deq_scale"].rows(first, last).flatten()
        if scale.dtype == torch.int64:  # the bits of a float32 number, as some of Ascend's ops take it
            scale = scale.to(torch.int32).view(torch.float32)
        return _sizes(self.name, scale.float() / self._first("input_scale"))

    def _first(self, part: str) -> float:
        return float(self.parts[part].rows(0, 1).float().flatten()[0])

    def _check_symmetric(self) -> None:
        """InputError where numbers are not counted from 0, or come with a bias that no tensor of the model is."""
        count = self.parts["weight"].shape[0]
        offset = self.parts.get("weight_offset")
        if offset is not None and offset.rows(0, count).any():
            raise InputError(f"{self.name}: weight_offset is not 0; only symmetric numbers are read")
        if "quant_bias" not in self.parts:
            return
        shift = self._first("input_offset") if "input_offset" in self.parts else 0.0
        for first in range(0, count, STEP):
            last = min(first + STEP, count)
            sums = self.parts["weight"].rows(first, last).sum(1, dtype=torch.int64).double()
            bias = self.parts["quant_bias"].rows(first, last).flatten().double() + sums * shift
            # Whole numbers on both sides, but the offset may have been rounded to 8 bits of precision.
            if (bias.abs() > 1 + sums.abs() * abs(shift) / 256).any():
                raise InputError(f"{self.name}: quant_bias holds a bias, and the model has none there")


@dataclass(frozen=True)
class Int4Groups:
    """Whole numbers of 4 bits with a scale for each group of a row."""

    name: str
    packed: Entry
    scale: Entry
    shape: Entry
    columns: int
    group: int

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.packed, self.scale, self.shape

    def load(self, ranges: Ranges, target: Any) -> int:
        rows, columns = ranges
        for first in range(rows.start, rows.stop, STEP):
            last = min(first + STEP, rows.stop)
            to = target[first - rows.start : last - rows.start]
            keep = getattr(to, "keep_int4", None)
            if keep is not None and self.group == 128 and len(columns) == self.columns:
                keep(*self._kept(first, last))
            else:
                to.copy_(self.rows(first, last)[:, columns.start : columns.stop])
        return int(target.numel()) // 2 + self.scale.length

    def rows(self, first: int, last: int) -> Tensor:
        values, scales = self._kept(first, last)
        return values.float() * scales.repeat_interleave(self.group, dim=1)[:, : self.columns]

    def _kept(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Numbers [rows, columns] as int8 and scales [rows, groups]."""
        values = unpack_int4(self.packed.rows(first, last))[:, : self.columns]
        return values, _sizes(self.name, self.scale.rows(first, last).float())


def pack_int4(values: Tensor) -> Tensor:
    """int8 [N, K] of -8 to 7 -> int32 [N, ceil(K / 8)]: 8 higher, the first number in the lowest bits."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % WORD))
    bits = (padded.int() + 8).view(values.shape[0], -1, WORD) << torch.arange(0, 32, 4, dtype=torch.int32)
    # No two have a bit in common, and what leaves 32 bits at the upper end is the sign.
    return bits.sum(-1, dtype=torch.int32)


def unpack_int4(words: Tensor) -> Tensor:
    """The inverse of `pack_int4`, int8 [N, 8 * words]."""
    bits = (words[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    return (bits - 8).to(torch.int8).flatten(1)


def dequantise_blocks(
    part: Tensor, scale: Tensor, block: tuple[int, int], ranges: Ranges, target: Any
) -> None:
    """target = part * the scale of each element's block (DeepSeek-V3, section 3.3.2), or both as they are where they
    are to be kept.

    part is rows ranges[0] and columns ranges[1] of the whole matrix: it may start and end inside a block, so the
    scales are found by absolute row and column. Works block row by block row, to need little memory.
    """
    all_rows, columns = ranges
    column_scale = scale[:, torch.arange(columns.start, columns.stop) // block[1]]
    start = all_rows.start
    while start < all_rows.stop:
        stop = min(all_rows.stop, (start // block[0] + 1) * block[0])
        local = slice(start - all_rows.start, stop - all_rows.start)
        rows, scales = target[local], scale[start // block[0]]
        if getattr(rows, "keeps_fp8", False):
            rows.keep_fp8(part[local], scales[columns.start // block[1] :])
        else:
            rows.copy_(part[local].float() * column_scale[start // block[0]])
        start = stop


def _keep_int8(target: Any, values: Tensor, scales: Tensor) -> None:
    keep = getattr(target, "keep_int8", None)
    if keep is not None:
        keep(values, scales)
    else:
        target.copy_(values.float() * scales[:, None])


def _sizes(name: str, scale: Tensor) -> Tensor:
    """Scales as they are. InputError where they cannot be some."""
    if not (scale.isfinite() & (scale >= 0)).all():
        raise InputError(f"{name}: its scales are not all finite and at least 0; the file is damaged")
    return scale
