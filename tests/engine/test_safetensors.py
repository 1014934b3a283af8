"""Byte ranges of safetensors files: what the library writes is read, what is broken is refused by name."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from expertmesh import InputError
from expertmesh.engine.safetensors import Entry, read_header
from tests.support.files import write_header


def value(entry: Entry) -> Tensor:
    copies: list[Tensor] = []
    entry.read(lambda whole: copies.append(whole.clone()))
    return copies[0]


def test_every_type_as_the_library_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    types = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.int64]
    tensors = {str(t): (torch.arange(35).reshape(5, 7) - 17).to(t) for t in types}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "single": torch.ones(1, 1, 1)}
    save_file(tensors, file, metadata={"format": "pt"})
    entries = read_header(file)
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert entries[name].shape == tuple(tensor.shape)
        assert entries[name].length == tensor.numel() * tensor.element_size()
        assert torch.equal(value(entries[name]).double(), tensor.double())


def test_tensors_that_are_not_aligned(tmp_path: Path) -> None:
    """The library pads its headers, other writers need not."""
    file = tmp_path / "odd.safetensors"
    header = {
        "a": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    size = write_header(file, json.dumps(header).encode() + b" " * 3)
    with file.open("ab") as stream:
        stream.write(bytes([0x38, 0xB8, 0x40]) + struct.pack("<2f", 1.5, -2.5))
    entries = read_header(file)
    assert entries["b"].offset == size + 3 and entries["b"].offset % 4
    assert value(entries["a"]).float().tolist() == [1.0, -1.0, 2.0]
    assert value(entries["b"]).tolist() == [1.5, -2.5]


def test_tensors_beyond_the_first_page(tmp_path: Path) -> None:
    """A mapping begins at a multiple of the system's page size; tensors begin anywhere."""
    file = tmp_path / "model.safetensors"
    tensors = {f"t{i}": torch.arange(i * 997, dtype=torch.float32) + i for i in range(1, 9)}
    save_file(tensors, file)
    for name, entry in read_header(file).items():
        assert torch.equal(value(entry), tensors[name])


def test_reading_does_not_write(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4)}, file)
    before = file.read_bytes()
    read_header(file)["a"].read(lambda whole: whole.zero_())
    assert file.read_bytes() == before


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN_HEADERS: dict[str, Any] = {
    "text": b"not json at all",
    "list": b"[1, 2, 3]",
    "deep": b"[" * 100_000,
    "not_unicode": b'{"\xff": 1}',
    "item_is_text": {"a": "F32"},
    "no_type": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "unknown_type": {"a": GOOD | {"dtype": "I4"}},
    "type_is_list": {"a": GOOD | {"dtype": ["F32"]}},
    "no_shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "shape_is_number": {"a": GOOD | {"shape": 2}},
    "shape_of_fractions": {"a": GOOD | {"shape": [2.0]}},
    "shape_of_lists": {"a": GOOD | {"shape": [[2]]}},
    "negative_shape": {"a": GOOD | {"shape": [-1, -2]}},
    "other_size": {"a": GOOD | {"shape": [3]}},
    "backwards": {"a": GOOD | {"data_offsets": [8, 0]}},
    "before_the_data": {"a": GOOD | {"data_offsets": [-8, 0]}},
    "three_offsets": {"a": GOOD | {"data_offsets": [0, 4, 8]}},
    "fractional_offsets": {"a": GOOD | {"data_offsets": [0.0, 8.0]}},
    "beyond_the_end": {"a": GOOD | {"data_offsets": [1000, 1008]}},
    "huge": {"a": {"dtype": "F32", "shape": [1 << 60, 1 << 60], "data_offsets": [0, 1 << 122]}},
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_broken_header(tmp_path: Path, case: str) -> None:
    file = tmp_path / "broken.safetensors"
    write_header(file, BROKEN_HEADERS[case])
    with file.open("ab") as stream:
        stream.write(bytes(16))
    with pytest.raises(InputError, match=r"broken\.safetensors"):
        read_header(file)


@pytest.mark.parametrize(
    "content", [b"", b"short", struct.pack("<Q", 0), struct.pack("<Q", 1 << 63), bytes(100)]
)
def test_no_header(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.safetensors: not a whole safetensors file"):
        read_header(file)


@given(cut=st.integers(0, 100))
def test_truncated_anywhere(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    file = tmp_path_factory.mktemp("cut") / "model.safetensors"
    save_file({"a": torch.ones(7), "b": torch.ones(3, 5)}, file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * cut // 101])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        read_header(file)


@given(st.binary(max_size=60))
def test_garbage(tmp_path_factory: pytest.TempPathFactory, garbage: bytes) -> None:
    file = tmp_path_factory.mktemp("garbage") / "x.safetensors"
    write_header(file, garbage)
    try:
        assert read_header(file) == {}
    except InputError as error:
        assert "x.safetensors" in str(error)
