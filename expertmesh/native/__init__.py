"""C++ that is compiled when it is first needed, and kept. Without a compiler its callers use their plain versions.

A library is one source file with a C interface. It is built next to the source, in the folder that Python keeps its own
compiled files in, or where that is not writable in the user's cache; its name says what it was made of, so that a
changed source makes another one.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")
ADVICE = "install g++ or clang++"


class NotBuilt(RuntimeError):
    """Why a library is not there, and what to do."""


def library(name: str) -> ctypes.CDLL:
    """Loads native/<name>.cpp, building it before where that has not been done. NotBuilt where it cannot be; that is
    found out once."""
    found = _found(name)
    if isinstance(found, NotBuilt):
        raise found.with_traceback(None)
    return found


@functools.cache
def _found(name: str) -> ctypes.CDLL | NotBuilt:
    try:
        return _load(name)
    except NotBuilt as error:
        return error
    except OSError as error:  # a full disk; a file that another system has built
        return NotBuilt(f"{name} cannot be built or loaded: {error}")


def _load(name: str) -> ctypes.CDLL:
    source = SOURCES / f"{name}.cpp"
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    stem = f"{name}-{_fingerprint(source)}-{platform.machine()}.so"
    folders = [SOURCES / "__pycache__", Path.home() / ".cache" / "expertmesh"]
    for folder in folders:
        if (folder / stem).exists():
            return ctypes.CDLL(str(folder / stem))
    if compiler is None:
        raise NotBuilt(f"no C++ compiler is installed; {ADVICE}")
    for folder in folders:
        if _writable(folder):
            return ctypes.CDLL(str(_build(compiler, source, folder / stem)))
    raise NotBuilt(f"neither {folders[0]} nor {folders[1]} can be written to")


def available(name: str) -> bool:
    try:
        library(name)
    except NotBuilt:
        return False
    return True


def _fingerprint(source: Path) -> str:
    return hashlib.sha256(source.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _build(compiler: str, source: Path, target: Path) -> Path:
    """Under another name first: several processes may build at the same time, and none may load half a file."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        done = subprocess.run([compiler, *FLAGS, "-o", made, source], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
            raise NotBuilt(f"{compiler} fails on {source.name}: {said}; {ADVICE}")
        os.replace(made, target)
    return target


def pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    """To the memory of a contiguous array, which has to stay alive until the call is over."""
    return ctypes.c_void_p(array.ctypes.data)


def unsigned(number: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(number)


def real(number: float) -> ctypes.c_double:
    return ctypes.c_double(number)
