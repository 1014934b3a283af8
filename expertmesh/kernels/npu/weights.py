"""Memory for weights in the order in which torch_npu's products want them: [K, N], as numbers or as INT8 (W8A8).

A loader fills rows of the [N, K] that checkpoints have. What single products read becomes FRACTAL_NZ on a card when it
is first used; experts keep their order, since they move from rank to rank by their bytes.
"""

from functools import cached_property
from math import prod
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from expertmesh.config.precision import PLAIN, W8A8, Format
from expertmesh.errors import InputError
from expertmesh.kernels.memory import Kept
from expertmesh.kernels.whole import whole_rows

# ACL_FORMAT_FRACTAL_NZ: blocks of 16 rows and 32 bytes, as matrix units read them.
FRACTAL_NZ = 29


class Matrix:
    """Weights [..., N, K]. Indexing gives rows to fill: `w[first:last]`, `w[slot]`, `w[slot, first:last]`."""

    def __init__(self, data: Tensor, scales: Tensor | None) -> None:
        """data [..., K, N]; scales [..., N] of INT8, one for each output."""
        self.data, self.scales = data, scales
        self._lock = Lock()
        self._parts: tuple[Matrix, Matrix] | None = None
        *lead, columns, rows = data.shape
        self.shape = (*lead, rows, columns)
        self.dtype = data.dtype
        self.nbytes = data.nbytes + (0 if scales is None else scales.nbytes)

    @classmethod
    def new(cls, shape: tuple[int, ...], format: Format, kept: Kept) -> "Matrix":
        """Uninitialised. InputError for a format that no product here has."""
        *lead, rows, columns = shape
        if format is PLAIN:
            return cls(kept.empty(*lead, columns, rows), None)
        if format is not W8A8:
            raise InputError(
                f"{format.name} weights cannot be computed with on Ascend; use quantise none or w8a8"
            )
        # Grouped products whose results are bfloat16 want scales that are too.
        scales = kept.empty(*lead, rows, dtype=torch.bfloat16 if lead else torch.float32)
        return cls(kept.empty(*lead, columns, rows, dtype=torch.int8), scales)

    @property
    def quantised(self) -> bool:
        return self.scales is not None

    def numel(self) -> int:
        return prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def data_ptr(self) -> int:
        return self.data.data_ptr()

    def __getitem__(self, index: Any) -> "_Rows":
        *slot, last = index if isinstance(index, tuple) else (index,)
        if len(self.shape) > 2 and not isinstance(last, slice):
            slot, last = [last], slice(None)
        data, scales = self.data, self.scales
        if slot:
            data, scales = data[slot[0]], None if scales is None else scales[slot[0]]
        return _Rows(data[:, last], None if scales is None else scales[last])

    def copy_(self, values: Tensor) -> None:
        self[:].copy_(values)

    def keep_int8(self, values: Tensor, scales: Tensor) -> None:
        self[:].keep_int8(values, scales)

    @cached_property
    def native(self) -> Tensor:
        """[K, N] as products of one matrix read it: loaded, and not to be written again."""
        self.data = fractal(self.data)
        return self.data

    def columns(self, at: int) -> "tuple[Matrix, Matrix]":
        """Outputs before and from `at` as matrices of their own, once and for all: this one gives up its memory."""
        with self._lock:  # ranks that are threads share weights
            if self._parts is None:
                self._parts = self._part(slice(at)), self._part(slice(at, None))
                self.data = self.data.new_empty(0)
            return self._parts

    def _part(self, rows: slice) -> "Matrix":
        scales = None if self.scales is None else self.scales[rows].contiguous()
        return Matrix(self.data[:, rows].contiguous(), scales)

    def slot_bytes(self, slot: int) -> list[Tensor]:
        """The memory of one [N, K], as bytes."""
        kept = [t for t in (self.data, self.scales) if t is not None]
        return [t[slot].flatten().view(torch.uint8) for t in kept]


class _Rows:
    """Some rows of a matrix, where a loader writes them to."""

    def __init__(self, data_KN: Tensor, scales_N: Tensor | None) -> None:
        self.data, self.scales = data_KN, scales_N
        self.shape, self.dtype = (data_KN.shape[1], data_KN.shape[0]), data_KN.dtype

    def numel(self) -> int:
        return self.data.numel()

    def element_size(self) -> int:
        return self.data.element_size()

    def data_ptr(self) -> int:
        return self.data.data_ptr()

    def __getitem__(self, rows: slice) -> "_Rows":
        return _Rows(self.data[:, rows], None if self.scales is None else self.scales[rows])

    def copy_(self, values: Tensor) -> None:
        """values [rows, K], of any type."""
        if self.scales is None:
            self.data.copy_(values.t())
            return
        self.keep_int8(*whole_rows(values, self.scales.dtype))

    def keep_int8(self, values: Tensor, scales: Tensor) -> None:
        """values int8 [rows, K] and scales [rows]: symmetric, one for each output."""
        if self.scales is None:
            self.copy_(values.float() * scales.float()[:, None])
            return
        self.data.copy_(values.t())
        self.scales.copy_(scales.flatten())


class LatentUp:
    """The up-projection of the latents, [heads * (N + V), C]: keys [H, N, C], which queries absorb, and values
    [H, C, V], which attention's results are multiplied with."""

    def __init__(self, heads: int, nope: int, value: int, latent: int, kept: Kept) -> None:
        self.keys, self.values = kept.empty(heads, nope, latent), kept.empty(heads, latent, value)
        self.shape = (heads * (nope + value), latent)
        self.nbytes = self.keys.nbytes + self.values.nbytes
        self.dtype = self.keys.dtype

    def numel(self) -> int:
        return prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def data_ptr(self) -> int:
        return self.keys.data_ptr()

    def __getitem__(self, rows: slice) -> "_LatentRows":
        return _LatentRows(self, torch.arange(self.shape[0])[rows])

    def copy_(self, values: Tensor) -> None:
        self[:].copy_(values)


class _LatentRows:
    """Rows of a checkpoint's tensor. They come in any pieces."""

    def __init__(self, up: LatentUp, rows: Tensor) -> None:
        self.up, self.rows = up, rows

    def __getitem__(self, rows: slice) -> "_LatentRows":
        return _LatentRows(self.up, self.rows[rows])

    def copy_(self, values: Tensor) -> None:
        keys, others = self.up.keys, self.up.values
        nope, value = keys.shape[1], others.shape[2]
        head, at = self.rows // (nope + value), self.rows % (nope + value)
        where = keys.device
        key, values = at < nope, values.to(keys)
        keys[head[key].to(where), at[key].to(where)] = values[key.to(where)]
        others[head[~key].to(where), :, (at[~key] - nope).to(where)] = values[~key.to(where)]


def fractal(data: Tensor) -> Tensor:
    """FRACTAL_NZ on a card; elsewhere there is no such order."""
    if data.device.type != "npu":
        return data
    import torch_npu

    cast: Tensor = torch_npu.npu_format_cast(data, FRACTAL_NZ)
    return cast
