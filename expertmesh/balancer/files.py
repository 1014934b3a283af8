"""A file as plain lists, dicts and numpy arrays, whatever it is written in; found out from its content.

JSON, JSON lines, CSV, numpy's .npy and .npz, torch's .pt, safetensors, TensorRT-LLM's YAML.
Nothing in a file is executed.
"""

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from expertmesh.errors import InputError

SAFETENSORS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip


def read(path: Path) -> Any:
    """InputError, naming the file, where it cannot be read or is of no known kind."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read: {reason}") from None
    if not data.strip():
        raise InputError(f"{path}: the file is empty")
    kind, parse = _kind(data)
    try:
        return parse(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    # What a broken file raises in the libraries that read it is not documented; torch raises anything.
    except Exception as error:
        reason = str(error).split("\n")[0][:120]
        raise InputError(f"{path}: not readable as {kind}: {reason or type(error).__name__}") from None


def _kind(data: bytes) -> tuple[str, Callable[[bytes], Any]]:
    if data.startswith(npy.MAGIC_PREFIX):
        return "a numpy array", _npy
    if data.startswith(b"PK\x03\x04"):
        return "a zip archive of numpy or torch", _zip
    if data.startswith(b"\x80\x02"):
        return "a torch file", _torch
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        return "safetensors", _safetensors
    if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        return "JSON", _json
    if b"initial_global_assignments:" in data:
        return "YAML of TensorRT-LLM", _yaml
    return "CSV", _csv


def _npy(data: bytes) -> Any:
    return npy.read_array(io.BytesIO(data), allow_pickle=False)


def _zip(data: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        if any(name.endswith("data.pkl") for name in names):
            return _torch(data)
        arrays = [name for name in names if name.endswith(".npy")]
        if not arrays:
            raise InputError("a zip archive with no arrays in it")
        # Texts beside the arrays may be stored as objects, which only unpickling would read.
        plain = (name for name in arrays if b"'|O'" not in archive.open(name).read(256))
        return {name.removesuffix(".npy"): _npy(archive.read(name)) for name in plain}


def _torch(data: bytes) -> Any:
    import torch  # takes its time, and no other kind needs it

    return _plain(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))


def _plain(value: Any) -> Any:
    """Tensors as arrays."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "is_floating_point"):
        return (value.double() if value.is_floating_point() else value).numpy()
    return value


def _safetensors(data: bytes) -> Any:
    """Format: 8 bytes with the header's length, the header in JSON, the tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        flat = np.frombuffer(data[start + first : start + last], dtype=SAFETENSORS[entry["dtype"]])
        out[name] = flat.reshape(entry["shape"])
    return out


def _json(data: bytes) -> Any:
    text = data.decode("utf-8-sig")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2 or not all(line.lstrip().startswith("{") for line in lines):
            raise
        return [json.loads(line) for line in lines]
    except RecursionError:
        raise InputError("JSON that is nested too deeply") from None


def _yaml(data: bytes) -> Any:
    """Of YAML only what TensorRT-LLM's tools write: a line with a list for each layer."""
    lines = re.findall(r"^ +'?(\d+)'?: *\[([\d, ]*)\] *$", data.decode("utf-8-sig"), re.MULTILINE)
    if not lines:
        raise InputError("no list of experts in a line for each layer")
    return {"initial_global_assignments": {layer: [int(x) for x in row.split(",")] for layer, row in lines}}


def _csv(data: bytes) -> Any:
    """Without a header a row for each layer, a column for each expert. With one, either the same after a column
    `layer`, or the columns layer, expert, count, and window where there are several. Separated by , ; tabs or blanks.
    Lines that begin with # are comments."""
    lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise InputError("no rows but comments")
    separator = next((mark for mark in "\t;, " if mark in lines[0]), ",")
    rows = list(csv.reader(lines, delimiter=separator, skipinitialspace=True))
    names = [name.strip().lower() for name in rows[0]]
    if _is_number(names[0]):
        return [_numbers(row, number) for number, row in enumerate(rows)]
    values = [_numbers(row, number) for number, row in enumerate(rows[1:], 1)]
    if not values:
        raise InputError("neither JSON nor another known kind, and as CSV it has no rows after the header")
    if {"layer", "expert", "count"} <= set(names):
        return _long(names, values)
    if names[0] == "layer":
        return {str(_whole(row[0])): row[1:] for row in values}
    return values


def _long(names: list[str], values: list[list[float]]) -> Any:
    """[windows, layers, experts]: one count a row."""
    odd = next((i for i, row in enumerate(values, 1) if len(row) != len(names)), None)
    if odd is not None:
        raise InputError(f"row {odd} has {len(values[odd - 1])} values under {len(names)} names")
    columns = dict(zip(names, zip(*values, strict=True), strict=True))
    where = [
        [_whole(x) for x in columns.get(name, [0] * len(values))] for name in ("window", "layer", "expert")
    ]
    shape = [max(places) + 1 for places in where]
    if np.prod(shape, dtype=float) > max(1e4, 1e3 * len(values)):
        raise InputError(
            f"{len(values)} counts for {shape[0]} windows of {shape[1]} layers, {shape[2]} experts"
        )
    counts = np.zeros(shape)
    np.add.at(counts, tuple(where), columns["count"])
    return counts


def _numbers(row: list[str], number: int) -> list[float]:
    try:
        return [float(text) for text in row]
    except ValueError:
        odd = next(text for text in row if not _is_number(text))
        raise InputError(f"row {number}: {odd[:40]!r} is not a number") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _whole(value: float) -> int:
    if not 0 <= value < 2**31 or value != int(value):
        raise InputError(f"{value:g} is not the number of a layer, an expert or a window")
    return int(value)
