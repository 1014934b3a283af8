"""Placements of experts in the files of several engines.

A file's layers are all rows of the loads, dense ones too, or those with experts only; which, their number says.
- expertmesh: what `expertmesh balance --json` prints: `placement` [layers][ranks][slots], -1 where a slot is empty;
- sglang, for --init-expert-location: `physical_to_logical_map` [layers][slots], all layers;
- vllm-ascend, for expert_map_path: `layer_list` of `device_list` of `device_expert`, MoE layers;
- vllm, for its offline EPLB, which is a proposal as yet: a line `eplb_initial_mapping`, MoE layers;
- trtllm, for moe_config.load_balancer: YAML with `initial_global_assignments` by layer number.
All but the first have equally many experts on each card and no empty slots.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from expertmesh.balancer.eplb import without_twins
from expertmesh.balancer.files import read
from expertmesh.balancer.formats import as_ids
from expertmesh.errors import InputError
from expertmesh.mesh.loads import Loads
from expertmesh.mesh.placement import EMPTY, Ints, Placement
from expertmesh.mesh.topology import Topology

PLACEMENT_FORMAT = "expertmesh-placement"


def read_placement(path: str | Path, loads: Loads, topology: Topology) -> Placement:
    """The placement of the layers of `loads` on these ranks. An expert that another engine has twice on a card is there
    once, beside an empty slot. InputError, naming the file, where it holds none that fits."""
    path = Path(path)
    document = read(path)
    try:
        slots_LRS = _slots(document, loads, topology.ranks)
        if slots_LRS.shape[1] != topology.ranks:
            raise InputError(f"places experts on {slots_LRS.shape[1]} cards, not on {topology.ranks}")
        return Placement(slots_LRS, loads.experts, loads.layers)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def every_row(placement: Placement, rows: int) -> Ints:
    """[rows, ranks, slots]: all rows of the loads, dense ones empty."""
    full = np.full((rows, *placement.slots_LRS.shape[1:]), EMPTY, dtype=np.int64)
    full[list(placement.layers)] = placement.slots_LRS
    return full


def write_text(kind: str, placement: Placement, rows: int) -> str:
    """What a file of this kind (one of WRITERS) says. rows: how many the loads have. InputError where it cannot say
    this placement."""
    return WRITERS[kind](placement, rows)


def _slots(document: Any, loads: Loads, ranks: int) -> Ints:
    """[layers, ranks, slots] of the layers of `loads`."""
    if isinstance(document, list) and document and all(isinstance(item, dict) for item in document):
        document = next((item for item in document if "initial_global_assignments" in item), document[0])
    if not isinstance(document, dict):
        return _of_layers(as_ids(document), loads, ranks)
    if "placement" in document:
        own = as_ids(document["placement"])
        if own.ndim != 3:
            raise InputError(f"`placement` has shape {list(own.shape)}, not [layers, ranks, slots]")
        if document.get("experts", loads.experts) != loads.experts:
            raise InputError(f"places {document['experts']} experts; the loads have {loads.experts}")
        return own[_rows(len(own), loads)]
    if "physical_to_logical_map" in document:
        return _of_layers(as_ids(document["physical_to_logical_map"]), loads, ranks)
    if "layer_list" in document:
        return _of_layers(as_ids(_device_lists(document["layer_list"])), loads, ranks)
    if isinstance(document.get("initial_global_assignments"), dict):
        return _of_numbers(document["initial_global_assignments"], loads, ranks)
    raise InputError("holds no placement of a known format")


def _of_layers(slots: Ints, loads: Loads, ranks: int) -> Ints:
    """From [layers, slots of all ranks], or [layers, ranks, slots]."""
    if slots.ndim not in (2, 3) or not slots.size:
        raise InputError(f"a placement of shape {list(slots.shape)}, not [layers, ranks, slots]")
    if slots.ndim == 2:
        if slots.shape[1] % ranks:
            raise InputError(f"{slots.shape[1]} slots of a layer do not divide by {ranks} cards")
        slots = slots.reshape(len(slots), ranks, -1)
    return without_twins(slots[_rows(len(slots), loads)])


def _rows(layers: int, loads: Loads) -> list[int]:
    """Which of a file's layers are those of the loads."""
    if layers == loads.rows:
        return list(loads.layers)
    if layers == len(loads.layers):
        return list(range(layers))
    has = len(loads.layers)
    raise InputError(f"places {layers} layers; the loads have {has} with experts, of {loads.rows}")


def _of_numbers(document: Mapping[str, Any], loads: Loads, ranks: int) -> Ints:
    """By layer number, where all are there, else in their order."""
    try:
        by_number = {int(key): row for key, row in document.items()}
    except ValueError:
        raise InputError("`initial_global_assignments` is not by layer number") from None
    if set(loads.layers) <= set(by_number):
        by_number = {layer: by_number[layer] for layer in loads.layers}
    return _of_layers(as_ids([by_number[layer] for layer in sorted(by_number)]), loads, ranks)


def _device_lists(layers: Any) -> Any:
    try:
        return [[device["device_expert"] for device in layer["device_list"]] for layer in layers]
    except (TypeError, KeyError):
        raise InputError("`layer_list` is not of `device_list` of `device_expert`") from None


def _expertmesh(placement: Placement, rows: int) -> str:
    slots = every_row(placement, rows).tolist()
    return _line({"format": PLACEMENT_FORMAT, "experts": placement.experts, "placement": slots})


def _sglang(placement: Placement, rows: int) -> str:
    """Dense layers have rows too, which SGLang does not look at: its own default."""
    flat_LP = _flat(placement, "sglang")
    full = np.tile(np.arange(flat_LP.shape[1]) % placement.experts, (rows, 1))
    full[list(placement.layers)] = flat_LP
    return _line({"physical_to_logical_map": full.tolist()})


def _ascend(placement: Placement, rows: int) -> str:
    _flat(placement, "vllm-ascend")
    layers = [
        {
            "layer_id": number,
            "device_count": len(slots_RS),
            "device_list": [
                {"device_id": i, "device_expert": held} for i, held in enumerate(slots_RS.tolist())
            ],
        }
        for number, slots_RS in enumerate(placement.slots_LRS)
    ]
    return _line({"moe_layer_count": len(layers), "layer_list": layers})


def _vllm(placement: Placement, rows: int) -> str:
    flat_LP = _flat(placement, "vllm")
    slots = flat_LP.shape[1]
    return _line(
        {
            "record_type": "eplb_initial_mapping",
            "version": 1,
            "num_redundant_experts": slots - placement.experts,
            "num_slots": slots,
            "initial_global_assignments": {str(i): row for i, row in enumerate(flat_LP.tolist())},
        }
    )


def _trtllm(placement: Placement, rows: int) -> str:
    flat_LP = _flat(placement, "trtllm")
    lines = [f"  {layer}: {row}" for layer, row in zip(placement.layers, flat_LP.tolist(), strict=True)]
    end = [f"num_slots: {flat_LP.shape[1]}", "layer_updates_per_iter: 0", ""]
    return "\n".join(["initial_global_assignments:", *lines, *end])


WRITERS: dict[str, Callable[[Placement, int], str]] = {
    "expertmesh": _expertmesh,
    "sglang": _sglang,
    "vllm": _vllm,
    "vllm-ascend": _ascend,
    "trtllm": _trtllm,
}


def _flat(placement: Placement, kind: str) -> Ints:
    """[layers, slots of all ranks]. InputError where slots are empty."""
    slots_LRS = placement.slots_LRS
    if (slots_LRS == EMPTY).any():
        layer, rank, _ = np.argwhere(slots_LRS == EMPTY)[0]
        raise InputError(
            f"a {kind} file has no empty slots, but layer {placement.layers[layer]} has one on card {rank}; "
            f"choose --redundant so that the slots of a layer divide by {slots_LRS.shape[1]} cards"
        )
    return slots_LRS.reshape(len(slots_LRS), -1)


def _line(document: Any) -> str:
    return json.dumps(document, separators=(",", ":")) + "\n"
