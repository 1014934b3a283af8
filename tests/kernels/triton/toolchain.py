"""The compilers that kernels are checked with, none of which needs a card: `python -m tests.kernels.triton.toolchain`
puts them, each in a folder of its own since two of them are packages of one name, where tests look for them."""

import argparse
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kernels import installed
from tests.kernels.installed import ROOT

# Without what they depend on: torch and numpy are the project's, but where a compiler wants an older one.
PACKAGES = {
    "triton": ("triton==3.7.1",),
    "triton-ascend": ("triton-ascend==3.2.0", "pybind11==3.1.0", "numpy==2.3.5"),
    "bishengir": ("ascendnpu-ir==1.2.0",),
}
PROGRAMS = ("mlir-opt-19", "mlir-translate-19", "llc-19", "cc")
ADVICE = "python -m tests.kernels.triton.toolchain; apt install mlir-19-tools llvm-19 gcc"


@dataclass(frozen=True)
class Check:
    """What a checker needs, and the variables of its environment."""

    packages: tuple[str, ...]
    programs: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()


CHECKS = {
    "interpreter": Check(("triton",), variables=(("TRITON_INTERPRET", "1"),)),
    "model": Check(("triton",), variables=(("TRITON_INTERPRET", "1"),)),
    "quantised_model": Check(("triton",), variables=(("TRITON_INTERPRET", "1"),)),
    "moe_ops": Check(("triton",), variables=(("TRITON_INTERPRET", "1"),)),
    "stores": Check(("triton-ascend",)),
    "gaps": Check(("triton-ascend",)),
    "ops": Check(("triton",), variables=(("TRITON_INTERPRET", "1"),)),
    "fusing": Check(("triton",), variables=(("TRITON_INTERPRET", "1"),)),
    "launches": Check(("triton",), variables=(("TRITON_INTERPRET", "1"),)),
    "cubins": Check(("triton",)),
    "cuda_limits": Check(("triton",)),
    "linalg": Check(("triton-ascend",), PROGRAMS),
    "bishengir": Check(("triton-ascend", "bishengir")),
    "limits": Check(("triton-ascend", "bishengir"), PROGRAMS),
}


def place(package: str) -> Path:
    return installed.place(PACKAGES[package])


def missing(check: str) -> list[str]:
    need = CHECKS[check]
    return [p for p in need.packages if not place(p).is_dir()] + [
        p for p in need.programs if not shutil.which(p)
    ]


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"tests.kernels.triton.{module}", *arguments]


def environment(check: str, cache: str) -> dict[str, str]:
    """In which a checker's module finds its compilers. cache: a folder for what they keep."""
    paths = [str(place(p)) for p in CHECKS[check].packages] + [str(ROOT)]
    own = {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": cache, **dict(CHECKS[check].variables)}
    return {**os.environ, **own}


def found(check: str, *kernels: str) -> list[dict[str, Any]]:
    """What a checker says of the examples of these kernels, or of all."""
    with tempfile.TemporaryDirectory() as cache:
        return installed.lines(check, command("worker", check, *kernels), environment(check, cache))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for package in PACKAGES:
        if not place(package).is_dir():
            installed.install(PACKAGES[package])
        print(place(package), flush=True)
    if absent := [program for program in PROGRAMS if shutil.which(program) is None]:
        sys.exit(f"not found: {', '.join(absent)}; apt install mlir-19-tools llvm-19 gcc")


if __name__ == "__main__":
    main()
