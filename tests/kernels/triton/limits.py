"""What Ascend's compilers refuse: tiles that are too large, and loads with a stride of two, because of which rotary
rows are de-interleaved when weights are loaded. A compiler that no longer does is worth knowing of. And what is said
where a tool is missing."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import triton
import triton.language as tl

from expertmesh.errors import KernelFailure
from expertmesh.kernels.triton.kernel import Kernel
from expertmesh.kernels.triton.table import KERNELS
from expertmesh.kernels.triton.tiles import ASCEND, CPU
from tests.kernels.triton.ascend import linalg
from tests.kernels.triton.bishengir import misfit
from tests.kernels.triton.example import Example, Maker
from tests.kernels.triton.linalg import built

TOO_LARGE = {"BLOCK_T": 128, "BLOCK_X": 1024, "BLOCK_D": 512}


@triton.jit
def interleaved(x_TX, out_TH, C: tl.constexpr, H: tl.constexpr):
    """The second numbers of pairs, out of rows [C + 2 H]."""
    t, h = tl.program_id(0), tl.arange(0, H)
    tl.store(out_TH + t * H + h, tl.load(x_TX + t * (C + 2 * H) + C + 2 * h + 1))


def check(examples: list[Example]) -> Iterator[dict[str, Any]]:
    make, kernel = Maker("meta"), KERNELS["mla_down"]
    full = next(e for e in examples if e.kernel == "mla_down" and e.full)
    for target in ASCEND:
        every = kernel.complete(full.arguments(make), target, TOO_LARGE)
        yield {
            "example": "tiles that are too large",
            "target": target,
            "wrong": misfit(kernel, every, target),
        }
    strided = Kernel(interleaved, grid=lambda a: (1,), outputs=("out_TH",), products=False)
    every = {"x_TX": make.empty(4, 576), "out_TH": make.empty(4, 32), "C": 512, "H": 32}
    try:
        linalg(strided, every, ASCEND[0])
        wrong = ""
    except KernelFailure as error:
        wrong = str(error)
    yield {"example": "a stride of two", "target": ASCEND[0], "wrong": wrong}
    every = kernel.complete(full.arguments(make), ASCEND[0])
    with mock.patch.object(sys, "path", [p for p in sys.path if "ascendnpu-ir" not in p]):
        yield {"example": "no BiShengIR", "target": ASCEND[0], "wrong": misfit(kernel, every, ASCEND[0])}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, PATH=folder):
        try:
            built(kernel.name, "", Path(folder))
            wrong = ""
        except KernelFailure as error:
            wrong = str(error)
    yield {"example": "no MLIR", "target": CPU, "wrong": wrong}
