"""Products and what is around them: with weights as numbers by torch itself, W8A8 by torch_npu's quantised products.

Signatures and shapes are documented in `kernels.table`, semantics in `kernels.reference`.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from expertmesh.config.precision import Format
from expertmesh.kernels import reference
from expertmesh.kernels.memory import Kept
from expertmesh.kernels.npu.ops import Ops
from expertmesh.kernels.npu.weights import LatentUp, Matrix


@dataclass(frozen=True)
class Rows:
    """Rows [T, K] as a product wants them: INT8 with a scale each, float32 [T], where its weights are INT8. dtype: of
    the results."""

    numbers: Tensor
    scales: Tensor | None
    dtype: torch.dtype


class Products:
    """The ops of the table that are products of rows with one matrix."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    # Calls of a library that has nothing to add to them.
    embed, add, count = (
        staticmethod(reference.embed),
        staticmethod(reference.add),
        staticmethod(reference.count),
    )

    def matrix(self, shape: tuple[int, ...], split: int, format: Format, kept: Kept) -> Matrix:
        return Matrix.new(shape, format, kept)

    def latent_up(self, heads: int, nope: int, value: int, latent: int, kept: Kept) -> LatentUp:
        return LatentUp(heads, nope, value, latent, kept)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        if not x_TD.shape[0]:
            return x_TD
        return cast(Tensor, self._ops.call("npu_rms_norm", x_TD, weight_D, epsilon=eps)[0])

    def linear(self, x_TD: Tensor, weight: Matrix | Tensor, bias: Tensor | None = None) -> Tensor:
        """A tensor [X, D] is an embedding that is the head too."""
        if isinstance(weight, Tensor):
            return torch_linear(x_TD, weight, bias)
        return self.product(self.rows(x_TD, weight), weight, bias)

    def logits(self, x_TD: Tensor, weight: Matrix | Tensor) -> Tensor:
        return self.linear(x_TD, weight).float()

    def swiglu(self, x_TD: Tensor, gate_up: Matrix, down: Matrix) -> Tensor:
        both = self.linear(x_TD, gate_up)
        return self.product(self.activated(both, down), down)

    def rows(self, x_TD: Tensor, weight: Matrix) -> Rows:
        if not weight.quantised or not x_TD.shape[0]:
            return Rows(x_TD, None, x_TD.dtype)
        numbers, scales = self._ops.call("npu_dynamic_quant", x_TD)
        return Rows(numbers, scales, x_TD.dtype)

    def activated(self, both_TJ: Tensor, down: Matrix, counts_S: Tensor | None = None) -> Rows:
        """SiLU of the first half of the columns times the second, for a product with `down`. counts_S: how many rows
        each group has, where those behind all groups need not be computed."""
        if not down.quantised or not both_TJ.shape[0]:
            both_TJ = self._ops.call("npu_swiglu", both_TJ) if both_TJ.shape[0] else both_TJ.chunk(2, -1)[0]
            return Rows(both_TJ, None, both_TJ.dtype)
        grouped = counts_S is not None and self._ops.allows(
            "npu_dequant_swiglu_quant:groups", both_TJ.dtype, J=both_TJ.shape[1]
        )
        numbers, scales = self._ops.call(
            "npu_dequant_swiglu_quant:groups" if grouped else "npu_dequant_swiglu_quant",
            both_TJ,
            group_index=counts_S if grouped else None,
            activate_left=True,
            quant_mode=1,
        )
        return Rows(numbers, scales, both_TJ.dtype)

    def product(self, x: Rows, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        if not x.numbers.shape[0]:
            return x.numbers.new_empty(0, weight.shape[0])
        if x.scales is None:
            plain = torch.mm(x.numbers, weight.native)
            return plain if bias is None else plain + bias
        return cast(
            Tensor,
            self._ops.call(
                "npu_quant_matmul", x.numbers, weight.native, weight.scales, pertoken_scale=x.scales, bias=bias,
                output_dtype=x.dtype,
            ),
        )  # fmt: skip
