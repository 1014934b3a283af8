"""Which tensors of a checkpoint's files make up one matrix that is kept as whole numbers, and what is wrong with them.

ModelSlim's description (`quant_model_description.json`) names every tensor with its type: FLOAT for what is not
quantised. Conventions: https://gitcode.com/Ascend/msmodelslim, and the readers of vllm-ascend.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from expertmesh.config import ModelConfig
from expertmesh.config.model import DESCRIPTIONS, read_object
from expertmesh.engine.safetensors import Entry
from expertmesh.engine.storage import WORD, Int4Groups, Int8Rows, Stored
from expertmesh.errors import InputError
from expertmesh.weights import Weight

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Types of matrices that are kept as 8-bit whole numbers with a scale for each row.
INT8_TYPES = ("W8A8_DYNAMIC", "W8A8", "W8A8_MIX")
# Beside `weight`, where they are: the types that each may have. All have a number for each row, or one in all.
INT8_PARTS: dict[str, tuple[torch.dtype, ...]] = {
    "weight_scale": FLOATS,
    "weight_offset": (*FLOATS, torch.int8),
    "input_scale": FLOATS,
    "input_offset": (*FLOATS, torch.int8),
    "deq_scale": (torch.float32, torch.int64),
    "quant_bias": (torch.int32,),
}
SINGLE_NUMBERS = ("input_scale", "input_offset")


@dataclass
class Claims:
    """matrices: those that are kept as whole numbers, by the name that they have unquantised; stored: how, where
    nothing is wrong; problems: what is wrong; taken: the tensors of the files that are theirs."""

    matrices: set[str] = field(default_factory=set)
    stored: dict[str, Stored] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)


def claim(
    folder: Path, config: ModelConfig, weights: Mapping[str, Weight], entries: Mapping[str, Entry]
) -> Claims:
    """InputError where ModelSlim's description cannot be used."""
    claims = Claims()
    if config.int8_rows:
        types = _description(folder)
        for name, weight in weights.items():
            kind = types.get(name, "FLOAT")
            if kind in INT8_TYPES and len(weight.shape) == 2:
                _claim_int8(claims, name, weight.shape, entries)
            elif kind != "FLOAT":
                claims.problems.append(
                    f"type of {name}: {kind} by its description; only FLOAT and, of matrices, "
                    f"{', '.join(INT8_TYPES)} are read"
                )
        _claim_zeros(claims, weights, entries)
    if config.int4_group is not None:
        for name, weight in weights.items():
            if len(weight.shape) == 2 and f"{name}_packed" in entries:
                _claim_int4(claims, name, weight.shape, config.int4_group, entries)
    return claims


def _description(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob(DESCRIPTIONS))
    if not files:
        raise InputError(
            f"{folder}: config.json says that it is quantised for Ascend, and {DESCRIPTIONS} is missing"
        )
    types = read_object(files[0])
    metadata = types.get("metadata")
    if isinstance(metadata, Mapping) and metadata.get("quarot"):
        raise InputError(
            f"{files[0]}: rotations of activations (quarot) are not computed; quantise without them"
        )
    return types


def _claim_int8(claims: Claims, name: str, shape: tuple[int, ...], entries: Mapping[str, Entry]) -> None:
    stem = name.removesuffix("weight")
    parts = {part: entries[stem + part] for part in ("weight", *INT8_PARTS) if stem + part in entries}
    claims.taken |= {stem + part for part in parts}
    if "weight" not in parts:
        return  # missing, as any tensor may be
    claims.matrices.add(name)
    wrong = []
    for part, entry in parts.items():
        count = 1 if part in SINGLE_NUMBERS else shape[0]
        wanted = (shape,) if part == "weight" else ((count,), (count, 1))
        allowed = (torch.int8,) if part == "weight" else INT8_PARTS[part]
        if entry.shape not in wanted:
            wrong.append(
                f"shape of {stem}{part}: {list(entry.shape)} in the file, {list(wanted[0])} in the model"
            )
        if entry.dtype not in allowed:
            wrong.append(f"type of {stem}{part}: {entry.dtype} in the file, {allowed[0]} by its description")
    if "weight_scale" not in parts and not {"deq_scale", "input_scale"} <= parts.keys():
        wrong.append(f"missing: {stem}weight_scale")
    claims.problems += wrong
    claims.stored[name] = Int8Rows(name, parts)


def _claim_zeros(claims: Claims, weights: Mapping[str, Weight], entries: Mapping[str, Entry]) -> None:
    """Biases of norms, which some tools write for a model that has none: all 0."""
    for name in entries.keys() - weights.keys():
        if name.endswith("norm.bias"):
            claims.taken.add(name)
            if entries[name].rows(0, entries[name].shape[0]).any():
                claims.problems.append(f"surplus: {name}, which is not 0: norms of this model have no bias")


def _claim_int4(
    claims: Claims, name: str, shape: tuple[int, ...], group: int, entries: Mapping[str, Entry]
) -> None:
    rows, columns = shape
    stem = name.removesuffix("weight")
    floats: tuple[torch.dtype, ...] = FLOATS
    integers: tuple[torch.dtype, ...] = (torch.int64, torch.int32)
    wanted = {
        "weight_packed": ((rows, -(-columns // WORD)), (torch.int32,)),
        "weight_scale": ((rows, -(-columns // group)), floats),
        "weight_shape": ((2,), integers),
    }
    parts = {part: entries[stem + part] for part in wanted if stem + part in entries}
    claims.matrices.add(name)
    claims.taken |= {stem + part for part in parts}
    wrong = [f"missing: {stem}{part}" for part in wanted if part not in parts]
    for part, entry in parts.items():
        size, types = wanted[part]
        if entry.shape != size:
            wrong.append(f"shape of {stem}{part}: {list(entry.shape)} in the file, {list(size)} in the model")
        if entry.dtype not in types:
            wrong.append(f"type of {stem}{part}: {entry.dtype} in the file, {types[0]} by config.json")
    if not wrong and tuple(parts["weight_shape"].rows(0, 2).tolist()) != shape:
        wrong.append(f"value of {stem}weight_shape: not {list(shape)}, as in the model")
    claims.problems += wrong
    if not wrong:
        claims.stored[name] = Int4Groups(
            name, parts["weight_packed"], parts["weight_scale"], parts["weight_shape"], columns, group
        )
