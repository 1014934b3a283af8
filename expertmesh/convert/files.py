"""Files that are there whole or not at all: written beside their place, on the disk, and then renamed."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertmesh.convert.formats import Written
from expertmesh.engine.safetensors import DTYPES
from expertmesh.errors import InputError

NAMES = {dtype: name for name, dtype in DTYPES.items()}
PART = ".part"  # what the name of a file ends with until it is whole
PIECE = 1 << 22


@contextmanager
def told(out: Path) -> Iterator[None]:
    """An error of the system while writing to the folder becomes an InputError that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(out).free / 1e6
            raise InputError(
                f"{out}: the disk is full ({free:,.1f} MB free); make room and start again: what is done stays done"
            ) from None
        raise InputError(f"{error.filename or out}: {error.strerror}") from None


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """InputError where another process is writing to this folder."""
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another conversion is writing to this folder") from None
        yield
    finally:
        os.close(handle)


@contextmanager
def whole(path: Path) -> Iterator[int]:
    """A new file to write to. When the block ends it takes the place of `path`; where it fails, nothing has changed."""
    part = path.with_name(path.name + PART)
    handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        try:
            yield handle
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, data: Any) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    with whole(path) as handle:
        write_at(handle, 0, text.encode())


def copy(source: Path, path: Path) -> None:
    with source.open("rb") as stream, whole(path) as handle:
        offset = 0
        while piece := stream.read(PIECE):
            write_at(handle, offset, piece)
            offset += len(piece)


def write_at(handle: int, offset: int, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(handle, view, offset)
        view, offset = view[done:], offset + done


def checksum(path: Path) -> str:
    """SHA-256, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


class Tensors:
    """The tensors of one safetensors file, each written row by row from its first. Those of wide numbers come first, so
    that all are aligned."""

    def __init__(self, handle: int, tensors: Sequence[Written]) -> None:
        self._handle = handle
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for tensor in sorted(tensors, key=lambda t: -t.dtype.itemsize):
            offsets[tensor.name] = end
            header[tensor.name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [end, end + tensor.nbytes],
            }
            end += tensor.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        self._at = {name: base + offset for name, offset in offsets.items()}
        write_at(handle, 0, len(text).to_bytes(8, "little") + text)
        os.truncate(handle, base + end)

    def append(self, name: str, rows: Tensor) -> None:
        flat = rows.contiguous().flatten().view(torch.uint8)
        write_at(self._handle, self._at[name], flat.numpy().data)
        self._at[name] += flat.numel()
