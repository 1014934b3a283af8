"""C++ that is compiled when it is first needed, and kept. Without a compiler its callers use their plain versions.

A library is one source file with a C interface, and the headers beside it. It is built next to the source, in the
folder that Python keeps its own compiled files in, or where that is not writable in the user's cache; its name says
what it was made of, so that a changed source makes another one.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-w")
ADVICE = "install g++ or clang++"


class NotBuilt(RuntimeError):
    """Why a library is not there, and what to do."""


def library(name: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Loads native/<name>.cpp, built with these further flags of the compiler, building it before where that has not
    been done. NotBuilt where it cannot be; that is found out once."""
    found = _found(name, flags)
    if isinstance(found, NotBuilt):
        raise found.with_traceback(None)
    return found


@functools.cache
def _found(name: str, flags: tuple[str, ...]) -> ctypes.CDLL | NotBuilt:
    try:
        return _load(name, (*FLAGS, *flags))
    except NotBuilt as error:
        return error
    except OSError as error:  # a full disk; a file that another system has built
        return NotBuilt(f"{name} cannot be built or loaded: {error}")


def _load(name: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    source = SOURCES / f"{name}.cpp"
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    stem = f"{source.stem}-{_fingerprint(source, flags)}-{platform.machine()}.so"
    folders = [SOURCES / "__pycache__"]
    with suppress(RuntimeError):  # a user whom the system does not know has no home
        folders.append(Path.home() / ".cache" / "expertmesh")
    for folder in folders:
        if (folder / stem).exists():
            return ctypes.CDLL(str(folder / stem))
    if compiler is None:
        raise NotBuilt(f"no C++ compiler is installed; {ADVICE}")
    for folder in folders:
        if _writable(folder):
            with _alone(folder):
                if not (folder / stem).exists():
                    _build(compiler, source, flags, folder / stem)
            return ctypes.CDLL(str(folder / stem))
    raise NotBuilt(f"there is nowhere to write to: {', '.join(map(str, folders))}")


def available(name: str) -> bool:
    try:
        library(name)
    except NotBuilt:
        return False
    return True


def _fingerprint(source: Path, flags: tuple[str, ...]) -> str:
    headers = sorted(source.parent.glob("*.h"))
    parts = [file.read_bytes() for file in (source, *headers)] + [" ".join(flags).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time builds, and the others wait and find it built: on a new machine all ranks ask at once."""
    with (folder / "building").open("w") as file:
        with suppress(OSError):  # a file system without locks: then each builds for itself
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(compiler: str, source: Path, flags: tuple[str, ...], target: Path) -> None:
    """Under another name first: no process may load half a file.

    In two steps: linked without the flags, a library that was compiled for OpenMP brings no runtime of its own but
    takes that of the process, which is torch's. Two teams of threads that spin beside each other cost a factor of ten.
    """
    logging.getLogger(__name__).info("compiling %s for this processor, once: a few seconds", source.stem)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        compiled, made = Path(scratch) / "compiled.o", Path(scratch) / target.name
        steps = [*flags, "-c", str(source), "-o", str(compiled)], ["-shared", str(compiled), "-o", str(made)]
        for command in steps:
            done = subprocess.run([compiler, *command], capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
                # Where it includes another file, the first lines say only how it came to be there.
                said = next((line for line in lines if "error" in line), lines[0])
                raise NotBuilt(f"{compiler} fails on {source.name}: {said}; {ADVICE}")
        os.replace(made, target)


def pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    """To the memory of a contiguous array, which has to stay alive until the call is over."""
    return ctypes.c_void_p(array.ctypes.data)


def unsigned(number: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(number)


def real(number: float) -> ctypes.c_double:
    return ctypes.c_double(number)
