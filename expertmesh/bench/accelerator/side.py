"""A side of a comparison: whose ops run, on which device, with numbers and weights that are the same for both."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from expertmesh.bench.accelerator.outcome import NotApplicable
from expertmesh.bench.accelerator.sizes import Shape
from expertmesh.bench.kernels import random_numbers
from expertmesh.config.precision import FP8, PLAIN, W8A8, Format, MatrixKind
from expertmesh.errors import InputError
from expertmesh.kernels import Kernels
from expertmesh.kernels.memory import Kept

BLOCK = 128  # rows and columns of an FP8 block
LARGEST = 448.0  # of float8_e4m3fn


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
        blocks = _blocks(weight) if self.precision.format is FP8 else None
        if self.compute is torch.float32 and self.precision.dtype is not torch.float32:  # the reference
            return self.there(weight.float() if blocks is None else _meaning(*blocks))
        kept = Kept(self.precision.dtype, self.where)
        try:
            made = self.kernels.matrix(tuple(shape), split, self._format(kind), kept)
        except InputError as error:
            raise NotApplicable(str(error)) from None
        for index in ((slot,) for slot in range(shape[0])) if len(shape) == 3 else ((),):
            part, values = (made[index], weight[index]) if index else (made, weight)
            if blocks is None:
                part.copy_(values)
                continue
            numbers, scales = (b[index] if index else b for b in blocks)
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


def _blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 numbers [..., N, K] and scales of blocks [..., N / 128, K / 128], of which the last ones may be partial."""
    rows, columns = weight.shape[-2:]
    whole = pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = whole.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scales = blocks.abs().amax(dim=(-1, -3)) / LARGEST
    numbers = (blocks / scales[..., :, None, :, None]).flatten(-2).flatten(-3, -2)[..., :rows, :columns]
    return numbers.to(torch.float8_e4m3fn), scales


def _meaning(numbers: Tensor, scales: Tensor) -> Tensor:
    rows, columns = numbers.shape[-2:]
    return (
        numbers.float()
        * scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :rows, :columns]
    )
