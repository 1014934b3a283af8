"""A side of a comparison: whose ops run, on which device, with numbers and weights that are the same for both."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expertmesh.bench.accelerator.outcome import NotApplicable
from expertmesh.bench.accelerator.sizes import Shape
from expertmesh.bench.kernels import random_numbers
from expertmesh.config.precision import FP8, PLAIN, W8A8, Format, MatrixKind
from expertmesh.convert.formats import BLOCK, fp8_blocks
from expertmesh.engine.storage import dequantise_blocks
from expertmesh.errors import InputError
from expertmesh.kernels import Kernels
from expertmesh.kernels.memory import Kept


@dataclass(frozen=True)
class Precision:
    """In what rows and weights are; format: how weights of products are kept. bound: how far results may be from the
    reference's, in the largest number of those."""

    dtype: torch.dtype
    format: Format
    bound: float


PRECISIONS = {
    "float32": Precision(torch.float32, PLAIN, 1e-4),
    "bfloat16": Precision(torch.bfloat16, PLAIN, 0.03),
    "w8a8": Precision(torch.bfloat16, W8A8, 0.06),
    "fp8": Precision(torch.bfloat16, FP8, 0.12),
}


@dataclass
class Side:
    """Whose ops run, and where their inputs are. page: tokens of a page of the cache; interleaved: how the rotary parts
    of weights lie. taken: bytes of the inputs so far."""

    kernels: Kernels
    where: torch.device
    precision: Precision
    compute: torch.dtype
    page: int
    interleaved: bool
    taken: float = field(default=0.0, init=False)

    def numbers(self, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        made = random_numbers(*shape, scale=scale, seed=seed, dtype=self.precision.dtype)
        return self.there(made.to(self.compute))

    def there(self, made: Tensor) -> Tensor:
        self.taken += made.nbytes
        return made.to(self.where)

    def matrix(self, *shape: int, seed: int, split: int = 1, kind: MatrixKind = "linear") -> Any:
        """Weights [..., N, K], as the kernels keep them. NotApplicable where they do not in this format."""
        weight = random_numbers(*shape, scale=shape[-1] ** -0.5, seed=seed, dtype=self.precision.dtype)
        fp8 = self.precision.format is FP8
        if self.compute is torch.float32 and self.precision.dtype is not torch.float32:  # the reference
            return self.there(_rounded(weight) if fp8 else weight.float())
        kept = Kept(self.precision.dtype, self.where)
        try:
            made = self.kernels.matrix(tuple(shape), split, self._format(kind), kept)
        except InputError as error:
            raise NotApplicable(str(error)) from None
        for part, values in _each(made, weight):
            if not fp8:
                part.copy_(values)
                continue
            numbers, scales = fp8_blocks(values.float())
            for row in range(0, shape[-2], BLOCK):
                part[row : row + BLOCK].keep_fp8(numbers[row : row + BLOCK], scales[row // BLOCK])
        self.taken += made.nbytes
        return made

    def _format(self, kind: MatrixKind) -> Format:
        """In which these kernels keep what is to be quantised so."""
        format = self.precision.format
        if format is PLAIN:
            return format
        found = self.kernels.precision(format.name).format(kind, BLOCK, cut=False)
        if found is PLAIN:
            raise NotApplicable(f"{format.name} weights before attention stay as they are computed")
        return found

    def latent_up(self, s: Shape, seed: int) -> Any:
        kv_b = self.numbers(s.heads * (s.nope + s.value), s.latent, seed=seed, scale=s.latent**-0.5)
        made = self.kernels.latent_up(s.heads, s.nope, s.value, s.latent, Kept(self.compute, self.where))
        made.copy_(kv_b)
        return made


def _each(made: Any, weight: Tensor) -> list[tuple[Any, Tensor]]:
    """Each [N, K] of what is made, and of its numbers."""
    return [(made[i], weight[i]) for i in range(len(weight))] if weight.dim() == 3 else [(made, weight)]


def _rounded(weight: Tensor) -> Tensor:
    """What is left of numbers in FP8 blocks, float32."""
    out = torch.empty(weight.shape)
    ranges = [range(size) for size in weight.shape[-2:]]
    for part, values in _each(out, weight):
        numbers, scales = fp8_blocks(values.float())
        dequantise_blocks(numbers, scales, (BLOCK, BLOCK), ranges, part)
    return out
