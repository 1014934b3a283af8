"""Kernels lowered for Ascend to linalg, and that run on this processor, against their references."""

import ctypes
import itertools
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertmesh.errors import KernelFailure
from expertmesh.kernels.triton.kernel import Kernel
from expertmesh.kernels.triton.table import KERNELS
from expertmesh.kernels.triton.tiles import ASCEND, CPU
from tests.kernels.triton.ascend import first_error, linalg
from tests.kernels.triton.example import Example, Maker
from tests.kernels.triton.interpreter import errors
from tests.kernels.triton.toolchain import ADVICE

# From operations on tensors to loops over memory, and from these to LLVM's.
PASSES = (
    "--allow-unregistered-dialect", "--convert-elementwise-to-linalg",
    "--one-shot-bufferize=allow-return-allocs-from-loops", "--convert-linalg-to-loops", "--expand-strided-metadata",
    "--lower-affine", "--convert-scf-to-cf", "--convert-cf-to-llvm",
    "--convert-math-to-llvm", "--convert-math-to-libm", "--arith-expand=include-bf16", "--convert-arith-to-llvm",
    "--finalize-memref-to-llvm", "--convert-func-to-llvm", "--convert-index-to-llvm", "--reconcile-unrealized-casts",
)  # fmt: skip
COPY = Path(__file__).with_name("memref_copy.c")


def built(kernel: str, source: str, folder: Path) -> ctypes.CDLL:
    """A kernel's linalg as a library of this processor. KernelFailure where a tool is missing or fails."""
    steps: tuple[Sequence[str | Path], ...] = (
        ("mlir-opt-19", "in.mlir", *PASSES, "-o", "llvm.mlir"),
        ("mlir-translate-19", "--mlir-to-llvmir", "llvm.mlir", "-o", "kernel.ll"),
        ("llc-19", "-O2", "--relocation-model=pic", "--filetype=obj", "kernel.ll", "-o", "kernel.o"),
        ("cc", "-O2", "-shared", "-fPIC", COPY, "kernel.o", "-o", "kernel.so", "-lm"),
    )
    (folder / "in.mlir").write_text(source)
    for command in steps:
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise KernelFailure(kernel, CPU, f"{command[0]} is not installed ({ADVICE})") from None
        if done.returncode:
            raise KernelFailure(kernel, CPU, f"{command[0]}: {first_error(done.stderr)}")
    return ctypes.CDLL(str(folder / "kernel.so"))


def words(value: Any) -> list[Any]:
    """An argument as the library takes it: of a tensor its memory, offset, size and stride."""
    if isinstance(value, Tensor):
        return memory(value.data_ptr(), value.numel())
    return [ctypes.c_int32(value) if isinstance(value, int) else ctypes.c_float(value)]


def memory(address: int, size: int) -> list[Any]:
    return [*(ctypes.c_void_p(address),) * 2, *map(ctypes.c_int64, (0, size, 1))]


def run(kernel: Kernel, every: dict[str, Any]) -> None:
    """All programs one after the other. Two further arguments come before the kernel's, a lock and a workspace, which
    are for cores that work together; six after them, how many programs there are and which one this is."""
    given = [
        every[name]
        for name, constant in kernel.parameters.items()
        if not constant and every[name] is not None
    ]
    grid = (*kernel.grid(every), 1, 1)[:3]
    with tempfile.TemporaryDirectory() as folder:
        made = built(kernel.name, linalg(kernel, every, ASCEND[0], named=False), Path(folder))
        function = getattr(made, kernel.function.fn.__name__)
        fixed = [*memory(0, 0), *memory(0, 0), *(word for value in given for word in words(value))]
        for place in itertools.product(*map(range, grid)):
            function(*fixed, *map(ctypes.c_int32, (*grid, *place)))


def check(examples: list[Example]) -> Iterator[dict[str, Any]]:
    for example in examples:
        if not example.full and ASCEND[0] in example.targets:
            kernel, arguments = KERNELS[example.kernel], example.arguments(Maker(dtype=torch.bfloat16))
            expected = example.reference(arguments)
            run(kernel, kernel.complete(arguments, CPU))
            found = {name: arguments[name] for name in kernel.outputs}
            yield {"example": str(example), "dtype": "torch.bfloat16", "errors": errors(found, expected)}
