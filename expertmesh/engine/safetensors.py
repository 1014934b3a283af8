"""Byte ranges of safetensors files.

The safetensors library hands out whole tensors or copies of slices and keeps the file mapped while it is open, which
counts as this process's memory. Ranks of a large model want the opposite: part of a tensor, straight into its place.
The format is a length, a JSON header and raw bytes (https://huggingface.co/docs/safetensors).
"""

import json
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expertmesh.errors import InputError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
}
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    length: int

    def read(self, use: "Any") -> None:
        """Call use(tensor) with a view of the bytes in the file; it must copy what it keeps."""
        if self.length == 0:
            use(torch.empty(self.shape, dtype=self.dtype))
            return
        start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            # A private mapping, so that torch sees writable memory; nothing is ever written.
            mapped = mmap.mmap(
                file.fileno(), self.length + self.offset - start, offset=start, access=mmap.ACCESS_COPY
            )
        flat = torch.frombuffer(mapped, dtype=torch.uint8)[self.offset - start :]
        if self.offset % self.dtype.itemsize:
            flat = flat.clone()  # some writers do not align
        use(flat.view(self.dtype).view(self.shape))
        # The mapping goes with the last view of it.

    def rows(self, first: int, last: int) -> torch.Tensor:
        """A copy of rows [first, last), read and not mapped: a file's mapped pages count as this process's memory."""
        row = self.length // self.shape[0] if self.shape[0] else 0
        data = bytearray((last - first) * row)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + first * row)
            view, done = memoryview(data), 0
            while done < len(data):
                read = file.readinto(view[done:])
                if not read:
                    raise InputError(f"{self.file}: ended while it was read; it has been changed meanwhile")
                done += read
        if not data:
            return torch.empty((last - first, *self.shape[1:]), dtype=self.dtype)
        flat = torch.frombuffer(data, dtype=torch.uint8)
        return flat.view(self.dtype).view(last - first, *self.shape[1:])


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file. InputError where the file is not whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise InputError(
                f"{file}: not a whole safetensors file: its header claims {length} bytes, the file has {size}; "
                "download it again"
            )
        try:
            header = json.loads(stream.read(length))
            entries = {
                name: _entry(file, 8 + length, item)
                for name, item in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{file}: its safetensors header cannot be read ({error})") from None
    end = max((e.offset + e.length for e in entries.values()), default=8 + length)
    if end > size:
        raise InputError(
            f"{file}: truncated: {size} bytes, but its tensors end at byte {end}; download the file again"
        )
    return entries


def _entry(file: Path, base: int, item: dict[str, Any]) -> Entry:
    dtype = DTYPES.get(item["dtype"])
    if dtype is None:
        raise ValueError(f"tensors of type {item['dtype']} belong to no supported model")
    begin, end = item["data_offsets"]
    shape = tuple(item["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"shape {list(shape)} and bytes {begin} to {end} are not all counts")
    expected = dtype.itemsize
    for size in shape:
        expected *= size
    if end - begin != expected:
        raise ValueError(f"a tensor of shape {list(shape)} cannot lie in bytes {begin} to {end}")
    return Entry(file, dtype, shape, base + begin, end - begin)
