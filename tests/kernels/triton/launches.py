"""What is said where a kernel cannot be launched: on a card that it has no tiles for, and where something fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import triton
import triton.language as tl

from expertmesh.errors import KernelFailure
from expertmesh.kernels.triton import kernel as launching
from expertmesh.kernels.triton import tiles
from expertmesh.kernels.triton.kernel import Kernel
from expertmesh.kernels.triton.table import KERNELS
from tests.kernels.triton.example import Example, Maker


@triton.jit
def failing(x_T, N: tl.constexpr):
    """A sum of tiles of different sizes."""
    tl.store(x_T, tl.arange(0, N) + tl.arange(0, 2 * N))


@contextmanager
def told(said: list[str]) -> Iterator[None]:
    try:
        yield
    except KernelFailure as error:
        said.append(str(error))


def check(examples: list[Example]) -> Iterator[dict[str, Any]]:
    make, said = Maker(), list[str]()
    small = next(e for e in examples if e.kernel == "gate_up_int8" and not e.full)
    with mock.patch.object(launching, "target_of", lambda device: "sm_100"), told(said):
        KERNELS["gate_up_int8"](**small.arguments(make))
    made = {"failing": {tiles.CPU: dict[str, int]()}}
    with mock.patch.object(tiles, "table", lambda: made), told(said):
        Kernel(failing, grid=lambda a: (1,), outputs=("x_T",))(x_T=make.normal(32), N=16)
    for example, wrong in zip(("no tiles", "a failure"), said, strict=True):
        yield {"example": example, "wrong": wrong}
