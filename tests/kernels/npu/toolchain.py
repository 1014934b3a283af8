"""torch_npu without a card or CANN: `python -m tests.kernels.npu.toolchain` puts it where tests look for it.

The wheel is Huawei's own: schemas, shape functions and the way of every call. What it links against, CANN's libraries,
are empty here: each function that it looks for is there and does nothing.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.kernels import installed

PACKAGES = ("torch-npu==2.13.0",)
PROGRAMS = ("nm", "readelf", "cc")
ADVICE = "python -m tests.kernels.npu.toolchain; apt install gcc binutils"
# Names of CANN's functions: of its runtime, collectives, profiler, graph engine and transformer library.
CANN = re.compile("acl|Hccl|Msprof|rt[A-Z]|ge|_ZN3atb|_ZNK?2ge")


def missing() -> list[str]:
    here = [] if installed.place(PACKAGES).is_dir() else list(PACKAGES)
    return here + [program for program in PROGRAMS if not shutil.which(program)]


def stub(folder: Path) -> None:
    """Puts the libraries that are missing beside torch_npu's own."""
    own, torchs = sorted(folder.rglob("*.so")), sorted((Path(torch.__file__).parent / "lib").glob("*.so*"))
    wanted = _names("--undefined-only", own) - {
        name.split("@")[0] for name in _names("--defined-only", [*own, *torchs])
    }
    # Those of the system carry a version.
    functions = sorted(name for name in wanted if CANN.match(name) and "@" not in name)
    headers = _said("readelf", "-d", *map(str, own))
    libraries = set(re.findall(r"\(NEEDED\).*\[(lib.*\.so)\]", headers)) - {
        file.name for file in [*own, *torchs]
    }
    with tempfile.TemporaryDirectory() as scratch:
        source, made = Path(scratch) / "stub.c", Path(scratch) / "stub.so"
        source.write_text(
            "".join(
                f'int f{i}(void) __asm__("{name}"); int f{i}(void) {{ return 0; }}\n'
                for i, name in enumerate(functions)
            )
        )
        _said("cc", "-shared", "-fPIC", "-o", str(made), str(source))
        for name in libraries:
            shutil.copy(made, folder / "torch_npu" / "lib" / name)


def _names(kind: str, files: list[Path]) -> set[str]:
    said = _said("nm", "-D", kind, "--format=posix", *map(str, files))
    return {line.split()[0] for line in said.splitlines() if line and not line.endswith(":")}


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def environment() -> dict[str, str]:
    """In which torch_npu is found; torch does not load it by itself."""
    paths = os.pathsep.join((str(installed.place(PACKAGES)), str(installed.ROOT)))
    return {"PYTHONPATH": paths, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONWARNINGS": "ignore"}


def found(check: str) -> list[dict[str, Any]]:
    """What a module of this folder says."""
    command = [sys.executable, "-m", "tests.kernels.npu.worker", check]
    return installed.lines(check, command, environment())


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if absent := [program for program in PROGRAMS if shutil.which(program) is None]:
        sys.exit(f"not found: {', '.join(absent)}; apt install gcc binutils")
    if not installed.place(PACKAGES).is_dir():
        installed.install(PACKAGES, stub)
    print(installed.place(PACKAGES))


if __name__ == "__main__":
    main()
