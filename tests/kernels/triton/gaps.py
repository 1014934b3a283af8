"""A kernel as none may be: its store has a mask with gaps."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from expertmesh.kernels.triton.kernel import Kernel
from expertmesh.kernels.triton.tiles import ASCEND
from tests.kernels.triton.ascend import linalg
from tests.kernels.triton.example import Example
from tests.kernels.triton.stores import written_again


@triton.jit
def with_gaps(x_T, T, N: tl.constexpr):
    t = tl.arange(0, N)
    x = tl.load(x_T + t, mask=t < T, other=0)
    tl.store(x_T + t, x + 1, mask=(t < T) & (x > 0))


def check(examples: list[Example]) -> Iterator[dict[str, Any]]:
    kernel = Kernel(with_gaps, grid=lambda a: (1,), outputs=("x_T",), products=False)
    every = {"x_T": torch.empty(16, dtype=torch.int32, device="meta"), "T": 9, "N": 16}
    yield {"example": kernel.name, "again": written_again(linalg(kernel, every, ASCEND[0]))}
