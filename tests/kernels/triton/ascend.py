"""Kernels lowered by Huawei's compilers as far as these go without a card: Triton's IR, then linalg."""

import re
import subprocess
from typing import Any

from triton._C.libtriton import ir
from triton.backends.ascend import compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError

from expertmesh.errors import KernelFailure
from expertmesh.kernels.triton.kernel import Kernel
from tests.kernels.triton.signature import signature


def lowered(kernel: Kernel, every: dict[str, Any], target: str) -> tuple[Any, Any]:
    """The kernel with all its parameters in Triton's IR, and the compiler's options."""
    types, constants, _ = signature(kernel, every)
    backend = compiler.AscendBackend(GPUTarget("npu", target, 0))
    options, context = backend.parse_options({}), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(kernel.function, types, constants)
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    return compiler.make_ttir(module, dict(options.__dict__), options), options


def linalg(kernel: Kernel, every: dict[str, Any], target: str, named: bool = True) -> str:
    """named: sums and products by name, as BiShengIR wants them. KernelFailure where the compiler refuses it."""
    try:
        module, options = lowered(kernel, every, target)
        made: str = compiler.ttir_to_linalg(module, dict(options.__dict__), options, named_ops=named)
    except CompilationError as error:
        raise KernelFailure(kernel.name, target, last_line(error)) from None
    except subprocess.CalledProcessError as error:
        raise KernelFailure(kernel.name, target, first_error(error.stderr.decode())) from None
    return made


def last_line(error: Exception) -> str:
    """What is wrong: a frontend quotes the whole source before it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:400]


def first_error(said: str) -> str:
    """Which memory is too small, where that is it; else the first line that calls itself an error."""
    for word in ("overflow, requires", "error:", ""):
        for line in said.splitlines():
            if word in line:
                return re.sub(r"^loc\(.*?\): error: ", "", line)[:400]
    return "no message"
