"""What is said where CUDA's compiler refuses a kernel, and where tiles are too large for it."""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from expertmesh.kernels.triton.kernel import Kernel
from expertmesh.kernels.triton.table import KERNELS
from expertmesh.kernels.triton.tiles import CUDA
from tests.kernels.triton.cubins import misfit
from tests.kernels.triton.example import Example, Maker

TOO_LARGE = {"BLOCK_T": 256, "BLOCK_X": 256, "BLOCK_D": 128, "num_warps": 8, "num_stages": 3}


@triton.jit
def uneven(x_T, N: tl.constexpr):
    """Tiles have powers of two."""
    t = tl.arange(0, N)
    tl.store(x_T + t, tl.load(x_T + t))


def check(examples: list[Example]) -> Iterator[dict[str, Any]]:
    make, large = Maker("meta"), KERNELS["mla_down"]
    full = next(e for e in examples if e.kernel == "mla_down" and e.full)
    refused = Kernel(uneven, grid=lambda a: (1,), outputs=("x_T",), products=False)
    for target in CUDA:
        wrong = misfit(refused, {"x_T": make.empty(24), "N": 24}, target)
        yield {"example": "a kernel that is refused", "target": target, "wrong": wrong}
        wrong = misfit(large, large.complete(full.arguments(make), target, TOO_LARGE), target)
        yield {"example": "tiles that are too large", "target": target, "wrong": wrong}
