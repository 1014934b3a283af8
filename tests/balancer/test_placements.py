"""Placements in the files of several engines."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from expertmesh import InputError, Topology
from expertmesh.balancer.placements import WRITERS, every_row, read_placement, write_text
from expertmesh.mesh.loads import Loads
from expertmesh.mesh.placement import EMPTY, Placement

TOPOLOGY = Topology(1, 2)
# Three layers, the first of them dense; four experts.
LOADS = Loads.of(np.array([[0] * 4, [1, 2, 3, 4], [4, 3, 2, 1]]))
SLOTS = np.array([[[0, 2, 1], [3, 1, 2]], [[3, 0, 1], [2, 0, 3]]])
PLACEMENT = Placement(SLOTS, 4, (1, 2))
DENSE = [0, 1, 2, 3, 0, 1]
FLAT = SLOTS.reshape(2, 6).tolist()


def read(folder: Path, content: Any, loads: Loads = LOADS) -> Placement:
    file = folder / "placement"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_placement(file, loads, TOPOLOGY)


def devices(slots_LRS: Any) -> dict[str, Any]:
    layers = [[{"device_id": j, "device_expert": d} for j, d in enumerate(layer)] for layer in slots_LRS]
    listed = [{"layer_id": i, "device_count": 2, "device_list": layer} for i, layer in enumerate(layers)]
    return {"moe_layer_count": len(listed), "layer_list": listed}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_written_is_read(kind: str, tmp_path: Path) -> None:
    again = read(tmp_path, write_text(kind, PLACEMENT, LOADS.rows))
    assert again.slots_LRS.tolist() == SLOTS.tolist() and again.layers == (1, 2)


def test_what_other_engines_read() -> None:
    written = {kind: write_text(kind, PLACEMENT, LOADS.rows) for kind in WRITERS}
    # SGLang hands the whole document to a function with this one argument; all layers of the model have rows.
    assert json.loads(written["sglang"]) == {"physical_to_logical_map": [DENSE, *FLAT]}
    assert json.loads(written["vllm-ascend"]) == devices(SLOTS.tolist())
    assert json.loads(written["vllm"]) == {
        "record_type": "eplb_initial_mapping",
        "version": 1,
        "num_redundant_experts": 2,
        "num_slots": 6,
        "initial_global_assignments": {"0": FLAT[0], "1": FLAT[1]},
    }
    assert yaml.safe_load(written["trtllm"]) == {
        "num_slots": 6,
        "initial_global_assignments": {1: FLAT[0], 2: FLAT[1]},
        "layer_updates_per_iter": 0,
    }
    own = json.loads(written["expertmesh"])
    assert own["placement"] == [[[EMPTY] * 3] * 2, *SLOTS.tolist()] and own["experts"] == 4


def test_every_row_has_dense_layers_too() -> None:
    assert every_row(PLACEMENT, 4).tolist() == [[[-1] * 3] * 2, *SLOTS.tolist(), [[-1] * 3] * 2]


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "expertmesh"])
def test_other_engines_have_no_empty_slots(kind: str) -> None:
    slots = SLOTS.copy()
    slots[1, 1, 1] = EMPTY
    placement = Placement(slots, 4, (1, 2))
    with pytest.raises(InputError, match=f"a {kind} file has no empty slots, but layer 2 has one on card 1"):
        write_text(kind, placement, LOADS.rows)
    assert json.loads(write_text("expertmesh", placement, 3))["placement"][2][1] == [2, -1, 3]


FORMS = {
    "of all rows": {"placement": [[[-1] * 3] * 2, *SLOTS.tolist()]},
    "of layers with experts": {"placement": SLOTS.tolist(), "experts": 4},
    "a list": FLAT,
    "a list with ranks": SLOTS.tolist(),
    "sglang": {"physical_to_logical_map": [DENSE, *FLAT]},
    "vllm lines": '{"a": 1}\n' + json.dumps({"initial_global_assignments": {"7": FLAT[0], "12": FLAT[1]}}),
    "yaml": f"layer_updates_per_iter: 0\ninitial_global_assignments:\n  1: {FLAT[0]}\n  '2': {FLAT[1]}\n  9: [0]\n",
}  # fmt: skip


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS)
def test_forms(content: Any, tmp_path: Path) -> None:
    assert read(tmp_path, content).slots_LRS.tolist() == SLOTS.tolist()


def test_torch_files(tmp_path: Path) -> None:
    torch.save({"physical_to_logical_map": torch.tensor(FLAT)}, tmp_path / "x")
    assert read_placement(tmp_path / "x", LOADS, TOPOLOGY).slots_LRS.tolist() == SLOTS.tolist()


def test_twins_of_other_engines_are_there_once(tmp_path: Path) -> None:
    twins = [[0, 2, 0, 3, 1, 1], FLAT[1]]
    assert read(tmp_path, twins).slots_LRS[0].tolist() == [[0, 2, EMPTY], [3, 1, EMPTY]]
    with pytest.raises(InputError, match="has expert 0 twice on rank 0"):
        read(tmp_path, {"placement": np.reshape(twins, (2, 2, 3)).tolist()})


WRONG = {
    "homeless": ({"placement": [[[0, 1], [2, 1]]] * 2}, "layer 1 has no slot for expert 3"),
    "dense there": (
        {"placement": [SLOTS[0].tolist(), [[-1] * 3] * 2, SLOTS[1].tolist()]},
        "layer 1 has no slot",
    ),
    "foreign experts": ({"placement": [[[0, 1], [2, 4]]] * 2}, "names experts that are not from 0 to 3"),
    "negative": ({"placement": [[[0, 1], [2, -2]]] * 2}, "names experts that are not from 0 to 3"),
    "huge": ({"placement": [[[0, 1], [2, 2**62]]] * 2}, "names experts that are not from 0 to 3"),
    "fractions": ({"placement": [[[0, 1], [2, 0.5]]] * 2}, "expert numbers must be whole numbers"),
    "texts": ({"placement": [[["a", "b"]]]}, "no plain numbers"),
    "cards": ({"placement": [[[0, 1, 2, 3]]] * 2}, "places experts on 1 cards, not on 2"),
    "layers": ({"placement": SLOTS.tolist() * 2}, "places 4 layers; the loads have 2 with experts, of 3"),
    "shape": ({"placement": FLAT}, "`placement` has shape [2, 6], not [layers, ranks, slots]"),
    "ragged": ({"placement": [[[0, 1], [2]], [[3], [0]]]}, "different lengths"),
    "experts": ({"placement": SLOTS.tolist(), "experts": 8}, "places 8 experts; the loads have 4"),
    "null": ({"placement": None}, "no plain numbers"),
    "nothing": ({"placement": []}, "shape [0]"),
    "slots": (
        {"physical_to_logical_map": [[0, 1, 2, 3, 0]] * 2},
        "5 slots of a layer do not divide by 2 cards",
    ),
    "flat": ([0, 1, 2, 3], "a placement of shape [4]"),
    "devices": ({"layer_list": [{"device_list": [[0, 1]]}]}, "`layer_list` is not of"),
    "device lists": ({"layer_list": 3}, "`layer_list` is not of"),
    "layer names": ({"initial_global_assignments": {"a": [0]}}, "is not by layer number"),
    "assignments": ({"initial_global_assignments": [1]}, "holds no placement of a known format"),
    "loads": ({"logical_count": [[1]]}, "holds no placement of a known format"),
    "text": ("{'placement': 1}", "not readable as JSON"),
    "yaml": ("initial_global_assignments:\n- 1\n", "not readable as YAML|no list of experts"),
    "empty": ("", "the file is empty"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_broken_files(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        read(tmp_path, content)
    text = str(raised.value)
    assert text.startswith(f"{tmp_path}/placement: ") and "\n" not in text
    assert any(part in text for part in message.split("|")), text
