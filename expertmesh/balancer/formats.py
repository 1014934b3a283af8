"""Loads and placements of experts in the files of several engines.

Loads are read from
- ExpertMesh: {"format": "expertmesh-loads", "counts": [windows][layers][experts], "layers", "weights", "groups"};
- SGLang's expert distribution recorder (srt/eplb/expert_distribution.py): `logical_count` [steps, layers, experts] of
  the modes stat and stat_approx, `records` of per_pass and per_token;
- vLLM: lines of `eplb_load_stats` (`expert_load` and `p2l_map`), its `expert_load_window` with the
  `physical_to_logical_map`, and `routed_experts` of its outputs;
- vllm-ascend (eplb/eplb_updator.py): `moe_load` [layers, ranks, slots] with `expert_maps` [layers, ranks, experts];
- TensorRT-LLM (examples/wide_ep/ep_load_balancer): the folder that EXPERT_STATISTIC_PATH names;
- anybody: [layers, experts] or [windows, layers, experts] as JSON, .npy, .npz, .pt or CSV, and routing records `ids`
  [tokens, layers, choices], -1 where there is none.
What an engine counted by physical experts is added up to logical ones.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.files import read
from expertmesh.errors import InputError
from expertmesh.mesh.loads import MOST, MOST_EXPERTS, Loads, as_counts, join, spread
from expertmesh.mesh.placement import Ints

LOADS_FORMAT = "expertmesh-loads"
RECORDS = ("ids", "routed_experts", "topk_ids")
COUNTS = ("logical_count", "counts", "expert_load", "loads", "weight")
MAPS = ("physical_to_logical_map", "last_physical_to_logical_map", "p2l_map")
# What only a placement has.
PLACEMENTS = ("placement", "physical_to_logical_map", "layer_list", "initial_global_assignments")


def read_loads(path: str | Path, experts: int | None = None) -> Loads:
    """Loads of one file, or of a folder of TensorRT-LLM. experts: how many a layer has, where a routing record may
    not name them all. InputError, naming the file, where it holds no loads."""
    path = Path(path)
    try:
        loads = _folder(path) if path.is_dir() else _loads(read(path), experts)
        if experts is not None and loads.experts != experts:
            raise InputError(f"has {loads.experts} experts a layer, not {experts}")
    except InputError as error:
        raise InputError(f"{path}: {str(error).removeprefix(f'{path}: ').removeprefix('loads: ')}") from None
    return loads


def loads_document(loads: Loads) -> dict[str, Any]:
    """To be written as JSON, and read by `read_loads`. Token records are left out."""
    return {
        "format": LOADS_FORMAT,
        "counts": loads.counts_WLE.tolist(),
        "layers": list(loads.layers),
        "weights": loads.weights_W.tolist(),
        "groups": loads.groups,
        "rows": loads.rows,
    }


def _loads(document: Any, experts: int | None) -> Loads:
    if isinstance(document, list) and document and all(isinstance(item, dict) for item in document):
        return _lines(document, experts)
    if not isinstance(document, dict):
        return Loads.of(as_array(document))
    if document.get("format") == LOADS_FORMAT:
        return _own(document)
    if "records" in document:
        return _sglang_records(document)
    if "moe_load" in document:
        return _ascend(document)
    for key in RECORDS:
        if key in document:
            size = as_ids(document.get("experts", -1 if experts is None else experts))
            if size.ndim:
                raise InputError("`experts` is not one number")
            ids_TLK = _of_three(document[key], key, "tokens, layers, choices")
            return Loads.of_tokens(ids_TLK.transpose(1, 0, 2), None if size < 0 else int(size))
    if "expert_load_window" in document:
        return Loads.of(_logical(as_array(document["expert_load_window"]), _map_of(document)))
    for key in COUNTS:
        if key in document:
            counts = as_array(document[key])
            return Loads.of(_logical(counts, _map_of(document)) if "p2l_map" in document else counts)
    return _by_name(document)


def _by_name(document: Mapping[Any, Any]) -> Loads:
    """Rows by the numbers of their layers, or the only array that is there."""
    if any(key in document for key in PLACEMENTS):
        raise InputError("holds a placement, not loads")
    if document and all(re.fullmatch(r"\d{1,4}", str(key)) for key in document):
        by_layer = {int(key): row for key, row in document.items()}
        rows_LE = as_array([by_layer[layer] for layer in sorted(by_layer)])
        return Loads.of(spread(as_counts(rows_LE[None]), sorted(by_layer), max(by_layer) + 1))
    arrays = [item for item in document.values() if isinstance(item, np.ndarray) and item.ndim in (2, 3)]
    if len(arrays) == 1 and len(document) == 1:
        return Loads.of(arrays[0])
    names = ", ".join(str(key)[:30] for key in list(document)[:5])
    raise InputError(f"no loads found under its names {names}; known are {', '.join((*COUNTS, *RECORDS))}")


def _lines(documents: Sequence[dict[str, Any]], experts: int | None) -> Loads:
    """A window each; of vLLM's lines those with loads, of which steps of no tokens are left out."""
    if any("record_type" in item for item in documents):
        documents = [item for item in documents if item.get("record_type") == "eplb_load_stats"]
        documents = [item for item in documents if as_array(item.get("expert_load", [])).any()]
        if not documents:
            raise InputError("no lines of eplb_load_stats with any load")
    return join([_loads(item, experts) for item in documents])


def _own(document: Mapping[str, Any]) -> Loads:
    if "counts" not in document:
        raise InputError("has no `counts`")
    counts = as_array(document["counts"])
    counts_WLE = as_counts(counts[None] if counts.ndim == 2 else counts)
    layers = document.get("layers") or list(range(counts_WLE.shape[1]))
    known = isinstance(layers, list) and all(map(_is_count, layers)) and len(set(layers)) == len(layers)
    if not known or len(layers) != counts_WLE.shape[1]:
        raise InputError(f"`layers` does not number the {counts_WLE.shape[1]} layers of `counts`")
    rows, groups = document.get("rows") or max(layers) + 1, document.get("groups")
    if not _is_count(rows) or rows <= max(layers) or not (groups is None or _is_count(groups)):
        raise InputError("`rows` or `groups` does not fit its layers and experts")
    weights = document.get("weights")
    full = spread(counts_WLE, layers, rows)
    return Loads.of(full, None if weights is None else as_array(weights), groups=groups)


def _sglang_records(document: Mapping[str, Any]) -> Loads:
    """One window for each forward pass; the ids are of physical experts."""
    map_LP, records = _map_of(document), document["records"]
    records = [record for record in records if isinstance(record, dict)] if isinstance(records, list) else []
    if not records or not all("global_physical_count" in record for record in records):
        raise InputError("`records` has no global_physical_count")
    counts = [_logical(as_array(record["global_physical_count"]), map_LP) for record in records]
    key = "topk_ids_of_layer"
    ids = [_of_three(record[key], key, "layers, tokens, choices") for record in records if key in record]
    if not ids:
        return Loads.of(as_array(counts))
    if len({(len(ids_LTK), ids_LTK.shape[2]) for ids_LTK in ids}) > 1:
        raise InputError(f"`{key}` differs in its layers or choices from record to record")
    physical_LTK = np.concatenate(ids, axis=1)
    if len(physical_LTK) != len(map_LP) or physical_LTK.max() >= map_LP.shape[1]:
        raise InputError("its ids do not fit the physical_to_logical_map")
    logical_LTK = np.take_along_axis(map_LP, np.maximum(physical_LTK, 0).reshape(len(map_LP), -1), axis=1)
    tokens_LTK = np.where(physical_LTK < 0, -1, logical_LTK.reshape(physical_LTK.shape))
    return Loads.of(as_array(counts), tokens_LTK=tokens_LTK)


def _ascend(document: Mapping[str, Any]) -> Loads:
    maps = next((document[key] for key in ("expert_maps", "expert_map") if key in document), None)
    if maps is None:
        raise InputError("moe_load counts by card and slot; expert_maps has to be with it")
    maps_LRE, load = as_ids(maps), as_array(document["moe_load"])
    load_WLRS = load[None] if load.ndim == 3 else load
    if load_WLRS.ndim != 4 or load_WLRS.shape[1:3] != maps_LRE.shape[:2]:
        raise InputError(f"moe_load {list(load.shape)} does not fit expert_maps {list(maps_LRE.shape)}")
    if maps_LRE.max() >= load_WLRS.shape[3]:
        raise InputError(f"expert_maps names slot {maps_LRE.max()} of {load_WLRS.shape[3]}")
    held = maps_LRE >= 0
    padded = np.broadcast_to(np.maximum(maps_LRE, 0), (len(load_WLRS), *maps_LRE.shape))
    return Loads.of((np.take_along_axis(load_WLRS, padded, axis=3) * held).sum(2))


def _folder(path: Path) -> Loads:
    """rank*.safetensors with a tensor of counts by logical expert named iteration_layer; ranks are added up."""
    files = sorted(f for f in path.glob("rank*.safetensors") if not f.stem.endswith("_raw"))
    if not files:
        raise InputError("a folder without the files rank*.safetensors of TensorRT-LLM")
    counts: dict[tuple[int, int], NDArray[Any]] = {}
    for file in files:
        for name, counts_E in read(file).items():
            if not re.fullmatch(r"\d{1,9}_\d{1,4}", name) or counts_E.ndim != 1:
                raise InputError(f"{file.name}: {name[:40]} is not a row of counts named iteration_layer")
            key = (int(name.split("_")[0]), int(name.split("_")[1]))
            if key in counts and counts[key].shape != counts_E.shape:
                raise InputError(f"{file.name}: {name} has {counts_E.size} experts, not {counts[key].size}")
            counts[key] = counts[key] + counts_E if key in counts else counts_E.astype(np.float64)
    steps, layers = (sorted({key[axis] for key in counts}) for axis in (0, 1))
    missing = [(step, layer) for step in steps for layer in layers if (step, layer) not in counts]
    if missing or not counts:
        raise InputError(f"no counts of iteration and layer {missing[0] if missing else ''}".rstrip())
    rows = as_array([[counts[step, layer] for layer in layers] for step in steps])
    return Loads.of(spread(as_counts(rows), layers, layers[-1] + 1))


def _map_of(document: Mapping[str, Any]) -> Ints:
    found = next((document[key] for key in MAPS if key in document), None)
    if found is None:
        raise InputError("counts by physical experts need the physical_to_logical_map beside them")
    map_LP = as_ids(found)
    if map_LP.ndim != 2 or not map_LP.size or map_LP.min() < 0 or map_LP.max() >= MOST_EXPERTS:
        raise InputError("its physical_to_logical_map is not [layers, physical experts] of expert numbers")
    return map_LP


def _logical(counts: NDArray[Any], map_LP: Ints) -> NDArray[Any]:
    """[..., L, P] by physical experts -> [..., L, E]."""
    if counts.shape[-2:] != map_LP.shape:
        raise InputError(
            f"counts of shape {list(counts.shape)} do not fit the physical_to_logical_map {list(map_LP.shape)}"
        )
    flat = counts.reshape(-1, *map_LP.shape)
    out = np.zeros((*flat.shape[:2], int(map_LP.max()) + 1), dtype=counts.dtype)
    np.add.at(out, (np.arange(len(flat))[:, None, None], np.arange(len(map_LP))[:, None], map_LP), flat)
    return out.reshape(*counts.shape[:-1], -1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**4


def as_ids(value: Any) -> Ints:
    """Whole numbers, of nested lists or an array of any shape. InputError where they are none."""
    found = as_array(value)
    unsure = found.dtype.kind != "i"
    if unsure and (found.dtype.kind not in "uf" or not (np.abs(found) < MOST).all() or (found % 1).any()):
        raise InputError("expert numbers must be whole numbers")
    return found.astype(np.int64)


def _of_three(value: Any, key: str, axes: str) -> Ints:
    found = as_ids(value)
    if found.ndim != 3:
        raise InputError(f"`{key}` has shape {list(found.shape)}, not [{axes}]")
    return found


def as_array(value: Any) -> NDArray[Any]:
    """Nested lists as an array. InputError where lists are of different length, or hold no numbers."""
    if isinstance(value, np.ndarray):
        return value
    try:
        found = np.asarray(value)
    except ValueError:
        raise InputError(_unequal(value)) from None
    if found.dtype.kind not in "iufb":
        raise InputError("holds values that are no plain numbers")
    return found


def _unequal(value: Any) -> str:
    """Where nested lists first differ in shape."""
    deep = isinstance(value[0], list) and bool(value[0]) and isinstance(value[0][0], list)
    name, first = "window" if deep else "row", None
    for number, item in enumerate(value):
        try:
            shape = " x ".join(map(str, np.shape(item))) or "one"
        except ValueError:
            return f"rows of {name} {number} have different lengths"
        first = first or shape
        if shape != first:
            return f"{name} {number} has {shape} values, {name} 0 has {first}"
    return "rows have different lengths"
