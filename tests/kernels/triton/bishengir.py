"""Kernels through BiShengIR, up to the closed compiler that only comes with a card's toolkit: whether everything fits
into the memories of a core, and how the work is split between its matrix and its vector units."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expertmesh.errors import KernelFailure
from expertmesh.kernels.triton.kernel import Kernel
from expertmesh.kernels.triton.table import KERNELS
from expertmesh.kernels.triton.tiles import ASCEND
from tests.kernels.triton.ascend import first_error, linalg, lowered
from tests.kernels.triton.example import Example, Maker
from tests.kernels.triton.handshakes import mismatch
from tests.kernels.triton.toolchain import ADVICE

# As triton-ascend calls it for these cards.
FLAGS = (
    "--enable-auto-multi-buffer=True", "--enable-auto-bind-sub-block=True", "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true", "--enable-triton-kernel-compile=true",
)  # fmt: skip
LAST_STEP = "External hivmc run fails"
# Bytes of each memory of a core, as the compiler says of both cards.
MEMORIES = {"UB": 192 << 10, "L1": 512 << 10, "L0C": 128 << 10}
SPACES = {"ub": "UB", "cbuf": "L1", "cc": "L0C"}
WIDTHS = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "bf16": 2, "f16": 2, "f32": 4}


def compiled(kernel: Kernel, every: dict[str, Any], target: str) -> str:
    """The IR of the last step before the closed compiler. KernelFailure where a compiler refuses it or does not fit it
    on the chip, or is not there."""
    source = linalg(kernel, every, target)
    found = (Path(p) / "ascendnpuir" / "bin" / "bishengir-compile" for p in sys.path)
    program = next((p for p in found if p.is_file()), None)
    if program is None:
        raise KernelFailure(kernel.name, target, f"bishengir-compile is not installed ({ADVICE})")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.mlir"
        # What kind of kernel it is is found out again.
        file.write_text(re.sub(r', mix_mode = "[^"]*"', "", source))
        command = [
            program,
            file,
            f"--target={target}",
            *FLAGS,
            f"--save-temps={folder}",
            "-o",
            file.with_suffix(".o"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        made = Path(folder) / "module.hivm.opt.mlir"
        if LAST_STEP not in done.stderr or not made.exists():
            raise KernelFailure(kernel.name, target, first_error(done.stderr))
        return made.read_text()


def functions(module: str) -> dict[str, str]:
    """Name -> text of what runs on a core."""
    parts = re.split(r"\n  func\.func ", module)[1:]
    bodies = {m[1]: part for part in parts if (m := re.match(r"@(\w+)\(", part))}
    return {name: body for name, body in bodies.items() if "function_kind<DEVICE>" in body}


def taken(body: str) -> dict[str, int]:
    """Bytes up to the end of the last buffer in each memory."""
    constants = {
        name: int(value) for name, value in re.findall(r"(%\w+) = arith\.constant (-?\d+) : i64", body)
    }
    most: dict[str, int] = {}
    for at, shape, kind, space in re.findall(
        r"pointer_cast\((%\w+)[^)]*\) :\s*memref<((?:\d+x)*)(\w+)[^#]*#hivm\.address_space<(\w+)>", body
    ):
        size = WIDTHS[kind]
        for side in shape.split("x")[:-1]:
            size *= int(side)
        most[SPACES[space]] = max(most.get(SPACES[space], 0), constants[at] + size)
    return most


def ttir(kernel: Kernel, every: dict[str, Any], target: str) -> str:
    return str(lowered(kernel, every, target)[0])


def misfit(kernel: Kernel, every: dict[str, Any], target: str) -> str:
    """What is wrong with these tiles; empty if nothing is."""
    try:
        compiled(kernel, every, target)
    except KernelFailure as error:
        return str(error)
    return ""


def fault(memories: dict[str, int], parts: dict[str, str]) -> str:
    """What is wrong with what was compiled; empty if nothing is."""
    if over := {name: size for name, size in memories.items() if size > MEMORIES[name]}:
        return f"more bytes than there are: {over}"
    # The matrix part's name, ..._aic, comes before the vector part's, ..._aiv.
    return mismatch(*(parts[name] for name in sorted(parts))) if len(parts) == 2 else ""


def check(examples: list[Example]) -> Iterator[dict[str, Any]]:
    for example in examples:
        for target in (t for t in ASCEND if example.full and t in example.targets):
            kernel = KERNELS[example.kernel]
            every = kernel.complete(example.arguments(Maker("meta")), target)
            line: dict[str, Any] = {"example": str(example), "target": target}
            try:
                parts = functions(compiled(kernel, every, target))
            except KernelFailure as error:
                yield line | {"wrong": str(error)}
                continue
            memories: dict[str, int] = {}
            for body in parts.values():
                memories |= {name: max(size, memories.get(name, 0)) for name, size in taken(body).items()}
            signals = sum(body.count("sync_block_set") for body in parts.values())
            line |= {"bytes": memories, "parts": sorted(parts), "signals": signals}
            yield line | {"wrong": fault(memories, parts)}
