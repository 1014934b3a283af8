"""Packages that only checks of kernels need, each set in a folder of its own, and programs that run where they are."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = Path.home() / ".cache" / "expertmesh" / "kernel-compilers"


def place(packages: Sequence[str]) -> Path:
    """Where they are: the name says which versions."""
    return FOLDER / "+".join(packages).replace("==", "-")


def install(packages: Sequence[str], prepare: Callable[[Path], None] = lambda folder: None) -> None:
    """Into a folder beside their place, and there in one step: nobody finds half of it. Without what they depend on."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        made = Path(scratch) / "made"
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(made),
            *packages,
        ]
        if status := subprocess.run(pip, check=False).returncode:
            sys.exit(f"{', '.join(packages)}: not installed, pip ended with status {status}")
        prepare(made)
        os.replace(made, place(packages))


def lines(check: str, command: Sequence[str], environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the program of a check prints: JSON, one value a line."""
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{check} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]
