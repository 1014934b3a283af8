"""`python -m tests.kernels.triton.tune [KERNEL ...]`: writes the tiles of kernels on all targets but the CPU."""

import argparse
import json
import subprocess
import sys
import tempfile

from expertmesh.errors import KernelFailure
from expertmesh.kernels.triton.tiles import ASCEND, CPU, CUDA, FILE, table
from tests.kernels.triton.examples import targets_of
from tests.kernels.triton.toolchain import ADVICE, ROOT, command, environment, missing

TITLE = """\
# Tile sizes of each kernel on each target, and options of CUDA's compiler (README.md). Written by
# `python -m tests.kernels.triton.tune`, but for those of "cpu".
"""


def fitted(kernel: str, target: str) -> dict[str, int]:
    check = "bishengir" if target in ASCEND else "cubins"
    if absent := missing(check):
        raise KernelFailure(kernel, target, f"not installed: {', '.join(absent)} ({ADVICE})")
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            command("fit", target, kernel), env=environment(check, cache), cwd=ROOT, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    if done.returncode:
        raise KernelFailure(kernel, target, done.stderr.strip()[-2000:])
    chosen: dict[str, int] = json.loads(done.stdout)
    return chosen


def written(tiles: dict[str, dict[str, dict[str, int]]]) -> str:
    lines = [TITLE]
    for kernel, targets in tiles.items():
        inside = {t: ", ".join(f"{n} = {v}" for n, v in chosen.items()) for t, chosen in targets.items()}
        entries = (f"{t} = {{ {text} }}" if text else f"{t} = {{}}" for t, text in inside.items())
        lines.append("\n".join((f"[{kernel}]", *entries, "")))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernels", nargs="*", help="(default: all)")
    asked = parser.parse_args().kernels
    tiles = {kernel: {t: dict(v) for t, v in targets.items()} for kernel, targets in table().items()}
    try:
        for kernel in asked or tiles:
            found = {
                target: fitted(kernel, target) for target in (*CUDA, *ASCEND) if target in targets_of(kernel)
            }
            tiles[kernel] = {CPU: tiles[kernel][CPU], **found}
            print(kernel, found, flush=True)
            FILE.write_text(written(tiles), encoding="utf-8")
    except KernelFailure as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
