"""The few numbers of the cost model that are fitted, not published."""

import tomllib
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from expertmesh.planner.facts import folder


@dataclass(frozen=True)
class Parameters:
    """What each is, its unit and its bounds: parameters.toml."""

    memory_efficiency: float
    matmul_efficiency: float
    attention_efficiency: float
    softmax_flops: float
    tile_rows: float
    tile_depth: float
    layer_kernels: float
    eager_us: float
    passes: float
    decode_passes: float
    link_efficiency: float
    overlap_cost: float
    collective_us: float
    collective_across_us: float
    step_us: float
    request_us: float
    ranks_us: float
    skew: float
    skew_left: float
    unevenness: float


@dataclass(frozen=True)
class Bounds:
    prior: float
    width: float
    low: float
    high: float
    unit: str
    meaning: str


def parameters_file() -> Path:
    return folder("parameters.toml")


NAMES = tuple(f.name for f in fields(Parameters))


@lru_cache
def parameters() -> Parameters:
    """The fitted ones."""
    table = tomllib.loads(parameters_file().read_text(encoding="utf-8"))
    return Parameters(**{name: float(table[name]["value"]) for name in NAMES})


def bounds() -> dict[str, Bounds]:
    table = tomllib.loads(parameters_file().read_text(encoding="utf-8"))
    return {name: Bounds(**{k: t[k] for k in Bounds.__dataclass_fields__}) for name, t in table.items()}
