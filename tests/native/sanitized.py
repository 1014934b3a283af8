"""`python -m tests.native.sanitized`: random ops under sanitizers, for every variant of the kernels that this processor
runs; and, of one variant whose memory the compiler sees, whether threads wait for each other where they have to."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from expertmesh.kernels.cpu import variants

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O1", "-g", "-w", "-Wno-psabi", "-fno-omit-frame-pointer", "-pthread")
MEMORY = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
THREADS = ("-fsanitize=thread",)


def check(name: str, flags: tuple[str, ...], programs: int) -> bool:
    """Builds the program and runs it; what it finds goes to the standard error stream."""
    with tempfile.TemporaryDirectory() as folder:
        built = str(Path(folder) / "sanitized")
        subprocess.run(["c++", *FLAGS, *flags, str(SOURCE), "-o", built], check=True)
        done = subprocess.run([built, "0", str(programs)], stdout=subprocess.PIPE, text=True, check=False)
    print(f"{name}: {done.stdout.strip() or 'FAILED'}", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=300, help="of up to three ops (default: 300)")
    programs = parser.parse_args().programs
    found = variants()
    good = [check(v.name, (*v.flags, *MEMORY), programs) for v in found]
    portable = next(v for v in found if "avx512_bf16" not in v.needs)
    good.append(check(f"threads of {portable.name}", (*portable.flags, *THREADS), programs // 2))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
