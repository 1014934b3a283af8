"""`python -m tests.native.sanitized`: random ops under sanitizers, for every variant of the kernels that this processor
runs; of one variant whose memory the compiler sees, whether threads wait for each other where they have to; and as the
kernels are compiled, whether results have the same bits with any number of threads, NEON's on an emulated processor."""

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from expertmesh.kernels.cpu import variants
from expertmesh.native import FLAGS as AS_KERNELS

SOURCE = Path(__file__).with_suffix(".cpp")
COMMON = ("-std=c++17", "-w", "-Wno-psabi", "-pthread")
FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer")
MEMORY = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
THREADS = ("-fsanitize=thread",)
ARM, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ADVICE = "apt install g++-aarch64-linux-gnu qemu-user"


def check(
    name: str, flags: tuple[str, ...], programs: int, compiler: str = "c++", emulator: tuple[str, ...] = ()
) -> bool:
    """Builds the program and runs it; what it finds goes to the standard error stream."""
    with tempfile.TemporaryDirectory() as folder:
        built = str(Path(folder) / "sanitized")
        subprocess.run([compiler, *COMMON, *flags, str(SOURCE), "-o", built], check=True)
        command = [*emulator, built, "0", str(programs)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(f"{name}: {done.stdout.strip() or 'FAILED'}", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=300, help="of up to three ops (default: 300)")
    programs = parser.parse_args().programs
    found = variants()
    good = [check(f"bits of {v.name}", (*AS_KERNELS, *v.flags), programs) for v in found]
    if platform.machine() == "x86_64":
        if missing := [tool for tool in (ARM, EMULATOR) if shutil.which(tool) is None]:
            print(f"bits of NEON: {' and '.join(missing)} not found; {ADVICE}")
            good.append(False)
        else:
            good.append(check("bits of NEON", (*AS_KERNELS, "-static"), programs, ARM, (EMULATOR,)))
    good += [check(v.name, (*FLAGS, *v.flags, *MEMORY), programs) for v in found]
    portable = next(v for v in found if "avx512_bf16" not in v.needs)
    good.append(check(f"threads of {portable.name}", (*FLAGS, *portable.flags, *THREADS), programs // 2))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
