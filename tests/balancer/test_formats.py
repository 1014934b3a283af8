"""Loads as several engines record them, told apart by content; files that hold none."""

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expertmesh import InputError
from expertmesh.balancer.formats import loads_document, read_loads
from expertmesh.mesh.loads import Loads

# Two windows of three layers, of which the first is dense, with four experts.
COUNTS = np.array([[[0] * 4, [5, 0, 2, 1], [1, 1, 1, 9]], [[0] * 4, [1, 1, 1, 1], [4, 0, 0, 2]]])
SUM = COUNTS.sum(0)
# Six physical experts; counts by them add up to COUNTS[0].
MAP = np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 0, 3], [0, 1, 2, 3, 3, 3]])
PHYSICAL = np.array([[0] * 6, [1, 2, 0, 4, 1, 0], [1, 1, 1, 2, 3, 4]])


def write(folder: Path, content: Any) -> Path:
    """Under a name that says nothing."""
    file = folder / "recorded"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def pt(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def jsonl(*records: dict[str, Any]) -> str:
    return "\n".join(map(json.dumps, records)) + "\n"


def vllm_line(step: int, load: np.ndarray) -> dict[str, Any]:
    record = {"record_type": "eplb_load_stats", "version": 1, "step": step, "num_ranks": 2}
    return {**record, "expert_load": load.tolist(), "p2l_map": MAP.tolist()}


def csv(rows: Any, separator: str = ",", header: str = "") -> str:
    return header + "\n".join(separator.join(map(str, row)) for row in rows) + "\n"


def test_the_maps_of_these_tests() -> None:
    added = np.zeros((3, 4), dtype=int)
    np.add.at(added, (np.arange(3)[:, None], MAP), PHYSICAL)
    assert added.tolist() == COUNTS[0].tolist()


WINDOWS = {
    "json": COUNTS.tolist(),
    "sglang json": {"logical_count": COUNTS.tolist()},
    "sglang pt": pt(
        {"rank": 0, "logical_count": torch.tensor(COUNTS), "average_utilization_rate_over_window": None}
    ),
    "own": {"format": "expertmesh-loads", "counts": COUNTS[:, 1:].tolist(), "layers": [1, 2]},
    "lines": jsonl(*({"logical_count": window.tolist()} for window in COUNTS)),
    "npy": npy(COUNTS.astype(np.int32)),
    "npz": npz(counts=COUNTS),
    "npz of any name": npz(anything=COUNTS.astype(np.float32)),
    "pt": pt(torch.tensor(COUNTS, dtype=torch.bfloat16)),
    "old pt": pt(torch.tensor(COUNTS), _use_new_zipfile_serialization=False),
    "long csv": csv(
        [(w, layer, e, COUNTS[w, layer, e]) for w, layer, e in np.ndindex(COUNTS.shape)],
        header="window,layer,expert,count\n",
    ),
}
SUMS = {
    "json": SUM.tolist(),
    "with a mark": "\ufeff" + json.dumps(SUM.tolist()),
    "sglang json": {"logical_count": SUM.astype(float).tolist()},
    "by layer": {"2": SUM[2].tolist(), "1": SUM[1].tolist()},
    "csv": csv(SUM),
    "csv with tabs": csv(SUM, "\t"),
    "csv with blanks": "# from numpy.savetxt\n" + csv(SUM, "  "),
    "csv with a header": csv(SUM, ";", "a;b;c;d\n"),
    "csv of layers": csv([(i, *row) for i, row in enumerate(SUM.tolist()) if i], header="layer,0,1,2,3\n"),
    "long csv": csv([(1, e, c) for e, c in enumerate(SUM[1])] + [(2, e, c) for e, c in enumerate(SUM[2])],
                    header="Layer, expert, count\n"),
}  # fmt: skip


@pytest.mark.parametrize("content", WINDOWS.values(), ids=WINDOWS)
def test_windows(content: Any, tmp_path: Path) -> None:
    loads = read_loads(write(tmp_path, content))
    assert loads.counts_WLE.tolist() == COUNTS[:, 1:].tolist()
    assert (loads.layers, loads.rows) == ((1, 2), 3)


@pytest.mark.parametrize("content", SUMS.values(), ids=SUMS)
def test_sums(content: Any, tmp_path: Path) -> None:
    loads = read_loads(write(tmp_path, content))
    assert loads.counts_WLE.tolist() == [SUM[1:].tolist()] and (loads.layers, loads.rows) == ((1, 2), 3)


PHYSICALS = {
    "vllm lines": jsonl(
        {"record_type": "eplb_load_meta", "version": 1, "num_ranks": 2},
        vllm_line(1, PHYSICAL),
        vllm_line(2, PHYSICAL * 0),
        vllm_line(3, PHYSICAL * 2),
    ),
    "vllm line": vllm_line(1, PHYSICAL),
    "vllm state": pt(
        {
            "expert_load_window": torch.tensor(np.stack([PHYSICAL, 0 * PHYSICAL, 2 * PHYSICAL])),
            "physical_to_logical_map": torch.tensor(MAP),
        }
    ),
    "sglang passes": pt(
        {
            "records": [
                {
                    "forward_pass_id": i,
                    "rank": 0,
                    "global_physical_count": torch.tensor(PHYSICAL * i, dtype=torch.int32),
                }
                for i in (1, 2)
            ],
            "last_physical_to_logical_map": torch.tensor(MAP),
        }
    ),
}


@pytest.mark.parametrize("name", PHYSICALS)
def test_physical_experts_are_added_up(name: str, tmp_path: Path) -> None:
    windows = [COUNTS[0, 1:].tolist(), (2 * COUNTS[0, 1:]).tolist()]
    counts = read_loads(write(tmp_path, PHYSICALS[name])).counts_WLE
    assert counts.tolist() == (windows[:1] if name == "vllm line" else windows)


def test_vllm_ascend_counts_by_card_and_slot(tmp_path: Path) -> None:
    # Two cards with three slots: card 0 has experts 2, 0, 1 and card 1 has 1, 3 and nothing.
    maps = np.array([[[1, 2, 0, -1], [-1, 0, -1, 1]]])
    load = np.array([[[7, 5, 1], [2, 4, 99]]])
    loads = read_loads(write(tmp_path, {"moe_load": load.tolist(), "expert_maps": maps.tolist()}))
    assert loads.counts_WLE.tolist() == [[[5, 3, 7, 4]]]
    stages = pt({"moe_load": torch.tensor(np.stack([load, load])), "expert_maps": torch.tensor(maps)})
    assert read_loads(write(tmp_path, stages)).counts_WLE.tolist() == [[[5, 3, 7, 4]]] * 2


@pytest.mark.parametrize("key", ["ids", "routed_experts"])
def test_records_of_tokens(key: str, tmp_path: Path) -> None:
    ids_TLK = np.array([[[0, 2], [1, 1]], [[2, 3], [-1, -1]]], dtype=np.int8)
    loads = read_loads(write(tmp_path, npz(**{key: ids_TLK, "domain": np.array(["tales", "poetry"])})))
    assert loads.counts_WLE.tolist() == [[[1, 0, 2, 1], [0, 2, 0, 0]]]
    assert loads.tokens_LTK is not None and loads.tokens_LTK.tolist() == ids_TLK.transpose(1, 0, 2).tolist()
    assert read_loads(write(tmp_path, npz(**{key: ids_TLK})), experts=6).experts == 6
    assert read_loads(write(tmp_path, npz(**{key: ids_TLK, "experts": 5}))).experts == 5


def test_sglang_tokens_have_physical_experts(tmp_path: Path) -> None:
    physical_LTK = np.array([[[4, 1], [3, -1]], [[0, 5], [2, 1]]])
    map_LP = np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 0, 3]])
    count_LP = np.array([[0, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 1]])
    record = {
        "topk_ids_of_layer": torch.tensor(physical_LTK),
        "global_physical_count": torch.tensor(count_LP),
    }
    document = {
        "records": [{**record, "input_ids": [1, 2]}],
        "last_physical_to_logical_map": torch.tensor(map_LP),
    }
    loads = read_loads(write(tmp_path, pt(document)))
    assert loads.tokens_LTK is not None
    assert loads.tokens_LTK.tolist() == [[[0, 1], [3, -1]], [[3, 3], [1, 2]]]
    counted = Loads.of_tokens(loads.tokens_LTK, 4).counts_WLE.tolist()
    assert counted == loads.counts_WLE.tolist() == [[[1, 1, 0, 1], [0, 1, 1, 2]]]


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    header, data = {}, b""
    for name, tensor in tensors.items():
        part = tensor.astype("<i8").tobytes()
        header[name] = {
            "dtype": "I64",
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(part)],
        }
        data += part
    text = json.dumps({"__metadata__": {"a": "b"}, **header}).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_the_folder_of_tensorrt_llm(tmp_path: Path) -> None:
    """Ranks are added up, iterations are windows, layers have their numbers."""
    for rank in (0, 1):
        rows = {f"{100 + w}_{layer}": COUNTS[w, layer] * (1 + rank) for w in (0, 1) for layer in (1, 2)}
        (tmp_path / f"rank{rank}.safetensors").write_bytes(safetensors(rows))
    (tmp_path / "rank0_raw.safetensors").write_bytes(b"not read")
    loads = read_loads(tmp_path)
    assert loads.counts_WLE.tolist() == (3 * COUNTS[:, 1:]).tolist() and (loads.layers, loads.rows) == (
        (1, 2),
        3,
    )
    (tmp_path / "rank1.safetensors").write_bytes(safetensors({"101_3": COUNTS[0, 1]}))
    with pytest.raises(InputError, match="no counts of iteration and layer"):
        read_loads(tmp_path)


def test_own_loads_come_back(tmp_path: Path) -> None:
    loads = Loads.of(COUNTS, [0.5, 3], groups=2)
    again = read_loads(write(tmp_path, loads_document(loads)))
    assert loads_document(again) == loads_document(loads)


WRONG = {
    "empty": (b" \n", "the file is empty"),
    "negative": ([[1, -1]], "-1 at layer 0, expert 1 is negative"),
    "not a number": ("[[1, NaN]]", "nan at layer 0, expert 1 is not a finite number"),
    "infinite": ("[[1, 1e999]]", "inf at layer 0, expert 1"),
    "zero": ([[0, 0]], "all are zero"),
    "no rows": ([], "shape [0] is not"),
    "empty rows": ([[], []], "shape [1, 2, 0] is not"),
    "flat": ([1, 2, 3], "shape [3] is not"),
    "texts": ([["a", "b"]], "no plain numbers"),
    "null": ([[1, None]], "no plain numbers"),
    "booleans": ([[True, False]], "no plain numbers"),
    "a number": ("[3", "not readable as JSON"),
    "rows": ([[1, 2], [1]], "row 1 has 1 values, row 0 has 2"),
    "windows": ([[[1, 2]], [[1, 2], [3, 4]]], "window 1 has 2 x 2 values, window 0 has 1 x 2"),
    "rows of windows": ([[[1, 2], [3, 4]], [[1, 2], [3]]], "rows of window 1 have different lengths"),
    "lines of windows": (jsonl({"counts": [[1]]}, {"counts": [[1, 2]]}), "window 1 has 2 experts, window 0 has 1"),
    "a placement": ({"physical_to_logical_map": [[0, 1]]}, "holds a placement, not loads"),
    "another document": ({"model": "x", "tokens": 3}, "no loads found under its names model, tokens"),
    "nothing": ({}, "no loads found"),
    "deep": ("[" * 100_000, "JSON"),
    "half a file": (npy(COUNTS)[:-8], "not readable as a numpy array"),
    "half an archive": (npz(counts=COUNTS)[:200], "not readable as a zip archive"),
    "an archive of nothing": (b"PK\x03\x04", "not readable as a zip archive"),
    "half a torch file": (pt(torch.tensor(COUNTS))[:300], "not readable as"),
    "objects": (npy(np.array([[1, None]], dtype=object)), "not readable as a numpy array"),
    "bytes": (bytes(range(128, 256)), "not readable as CSV"),
    "csv": ("1,2\n3,x\n", "row 1: 'x' is not a number"),
    "csv rows": ("1,2\n3\n", "row 1 has 1 values, row 0 has 2"),
    "csv comments": ("# 1,2\n", "no rows but comments"),
    "csv header": ("layer,expert,count\n", "no rows after the header"),
    "csv width": ("layer,expert,count\n1,2\n", "row 1 has 2 values under 3 names"),
    "csv place": ("layer,expert,count\n1,2.5,1\n", "2.5 is not the number of"),
    "csv far": ("layer,expert,count\n1000000,1000000,1\n", "1 counts for 1 windows of 1000001 layers"),
    "map": ({**vllm_line(1, PHYSICAL), "p2l_map": [[0, 1]]}, "do not fit the physical_to_logical_map [1, 2]"),
    "no map": ({"expert_load_window": COUNTS.tolist()}, "need the physical_to_logical_map"),
    "map of -1": ({**vllm_line(1, PHYSICAL), "p2l_map": (MAP - 1).tolist()}, "is not [layers, physical experts]"),
    "idle vllm": (jsonl(vllm_line(1, PHYSICAL * 0), vllm_line(2, PHYSICAL * 0)), "no lines of eplb_load_stats"),
    "ascend": ({"moe_load": [[[1, 2]]]}, "expert_maps has to be with it"),
    "ascend slots": ({"moe_load": [[[1, 2]]], "expert_maps": [[[0, 2]]]}, "names slot 2 of 2"),
    "ids": (npz(ids=np.array([[[0.5]]])), "expert numbers must be whole numbers"),
    "own layers": ({"format": "expertmesh-loads", "counts": [[1]], "layers": [1, 2]}, "does not number the 1 layers"),
    "own rows": ({"format": "expertmesh-loads", "counts": [[1, 2]], "layers": [5], "rows": 3}, "does not fit"),
    "own groups": ({"format": "expertmesh-loads", "counts": [[1, 2]], "groups": 3}, "do not divide into 3 groups"),
    "own weights": ({"format": "expertmesh-loads", "counts": [[1, 2]], "weights": [1, 2]}, "2 weights of 1 windows"),
    "expert": ({"ids": [[[5_000_000_000]]]}, "5000000001 experts a layer; 65536 are the most"),
    "map of experts": ({"expert_load": [[1]], "p2l_map": [[5_000_000_000]]}, "is not [layers, physical experts]"),
    "flat ids": ({"routed_experts": [[1]]}, "`routed_experts` has shape [1, 1], not [tokens, layers, choices]"),
    "ids without end": ({"ids": [[[1e30]]]}, "expert numbers must be whole numbers"),
    "experts": ({"ids": [[[1]]], "experts": [4, 5]}, "`experts` is not one number"),
    "no own counts": ({"format": "expertmesh-loads"}, "has no `counts`"),
    "far layer": ({"99999": [1, 2]}, "no loads found"),
    "a word": ("null", "neither JSON nor another known kind"),
    "records": (pt({"records": [], "last_physical_to_logical_map": torch.tensor(MAP)}), "no global_physical_count"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_files_without_loads(content: Any, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, content)
    with pytest.raises(InputError) as raised:
        read_loads(file)
    text = str(raised.value)
    assert (
        text.startswith(f"{file}: ") and text.count(str(file)) == 1 and message in text and "\n" not in text
    )


def test_no_file_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_loads(tmp_path / "none")
    with pytest.raises(InputError, match="without the files rank"):
        read_loads(tmp_path)


def test_another_number_of_experts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 4 experts a layer, not 8"):
        read_loads(write(tmp_path, SUM.tolist()), experts=8)


class Harmful:
    """Unpickled, it would make a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.path),))


def test_nothing_in_a_torch_file_is_executed(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        file = write(tmp_path, pt({"logical_count": Harmful(str(made))}, **options))
        with pytest.raises(InputError, match="not readable as"):
            read_loads(file)
    assert not made.exists()
