"""Kernels compiled for CUDA without a card: registers, memory on the chip, spills, and which matrix instructions."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError, make_backend
from triton.runtime.errors import TritonError

from expertmesh.errors import KernelFailure
from expertmesh.kernels.triton.kernel import OPTIONS, Kernel
from expertmesh.kernels.triton.table import KERNELS
from expertmesh.kernels.triton.tiles import CUDA
from tests.kernels.triton.example import Example, Maker
from tests.kernels.triton.signature import signature

# Bytes of shared memory that a program can have, and columns of tensor memory (NVIDIA's tuning guides).
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
TENSOR_MEMORY = 512
# Warp-group products of Hopper, and those of Blackwell, whose sums are in tensor memory.
MATRIX = {"sm_80": r"\bmma\.sync", "sm_90": r"\bwgmma\.mma_async", "sm_100": r"\btcgen05\.mma"}


def compiled(kernel: Kernel, every: dict[str, Any], target: str) -> Any:
    """For an architecture, with all parameters and options. KernelFailure where the compiler refuses it."""
    types, constants, attributes = signature(kernel, every)
    source = ASTSource(kernel.function, types, constants, attributes)
    options = {name: every[name] for name in OPTIONS if name in every}
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    try:
        return triton.compile(source, target=gpu, options=options)
    except (CompilationError, TritonError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[-1][:400]
        raise KernelFailure(kernel.name, target, said) from None


def ttir(kernel: Kernel, every: dict[str, Any], target: str) -> str:
    """The kernel before anything of a card is in it; empty where its tiles are none that CUDA can have."""
    types, constants, attributes = signature(kernel, every)
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    backend, context = make_backend(gpu), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options({})
    source, maps = ASTSource(kernel.function, types, constants, attributes), backend.get_module_map()
    try:
        made = source.make_ir(gpu, options, backend.get_codegen_implementation(options), maps, context)
    except CompilationError:
        return ""
    return str(backend.make_ttir(made, {}, options, gpu.arch))


def resources(made: Any) -> dict[str, int]:
    """What the assembled kernel takes: registers of a thread, bytes of shared and of local memory (spills)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said.stdout))
    return {
        "registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"]),
        "shared": made.metadata.shared, "tensor_memory": getattr(made.metadata, "tmem_size", 0) or 0,
    }  # fmt: skip


def fault(kernel: Kernel, made: Any, target: str) -> str:
    """What is wrong with it; empty if nothing is."""
    took, most = resources(made), {"spilled": 0, "shared": SHARED[target], "tensor_memory": TENSOR_MEMORY}
    if over := [f"{name} {took[name]} of {room}" for name, room in most.items() if took[name] > room]:
        return f"does not fit: {', '.join(over)}"
    if kernel.products != bool(re.search(MATRIX[target], made.asm["ptx"])):
        return "products are not on matrix units" if kernel.products else "products that were not declared"
    return ""


def misfit(kernel: Kernel, every: dict[str, Any], target: str) -> str:
    """What is wrong with these tiles; empty if nothing is."""
    try:
        said = fault(kernel, compiled(kernel, every, target), target)
    except KernelFailure as error:
        return str(error)
    return said and str(KernelFailure(kernel.name, target, said))


def check(examples: list[Example]) -> Iterator[dict[str, Any]]:
    for example in examples:
        for target in (t for t in CUDA if example.full and t in example.targets):
            kernel, line = KERNELS[example.kernel], {"example": str(example), "target": target}
            try:
                made = compiled(kernel, kernel.complete(example.arguments(Maker("meta")), target), target)
            except KernelFailure as error:
                yield line | {"wrong": str(error)}
                continue
            matrix = len(re.findall(MATRIX[target], made.asm["ptx"]))
            wrong = {"wrong": fault(kernel, made, target)}
            yield line | {"matrix": matrix, **resources(made), **wrong}
