"""Tiles of the expert layer's kernels, the best first. Their time no constants tell, since how many rows an expert has
is known when they run: as many rows as experts of a decoding step have share one reading of weights, and then as much
as fits is read at a time."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from expertmesh.errors import KernelFailure
from expertmesh.kernels.triton.kernel import Kernel
from expertmesh.kernels.triton.tiles import CUDA

# Streaming multiprocessors, and cores with a matrix unit.
CORES = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "Ascend910B1": 24, "Ascend910_9391": 24}
OPTIONS = {"num_warps": (4, 8), "num_stages": (3, 2)}
TILES: dict[str, dict[str, tuple[int, ...]]] = {
    "router_scores": {"BLOCK_T": (64, 32, 16), "BLOCK_E": (128, 64), "BLOCK_D": (64, 32)},
    "gate": {"BLOCK_T": (4, 2, 1)},
    "expert_order": {"BLOCK_P": (128, 64, 32)},
    "permute": {"BLOCK_D": (8192, 4096, 2048, 1024)},
    "unpermute": {"BLOCK_D": (4096, 2048, 1024)},
    "quantise": {"BLOCK_D": (4096, 2048, 1024)},
    "dequantise": {"BLOCK_D": (4096, 2048, 1024)},
} | {
    name + variant: {"BLOCK_P": (64, 32, 16), columns: (128, 64), depth: depths}
    for name, columns, depth in (("gate_up", "BLOCK_I", "BLOCK_D"), ("down", "BLOCK_D", "BLOCK_I"))
    for variant, depths in (("", (256, 128, 64)), ("_int8", (128,)), ("_fp8", (128,)), ("_bytes", (128, 64)))
}


def programs(kernel: Kernel, target: str) -> dict[str, tuple[int, ...]]:
    """How many share the work, where a kernel wants to know: one for each core that multiplies; for others Ascend has
    two vector units for each of these, and a core of CUDA keeps several programs of few warps."""
    if "PROGRAMS" not in kernel.parameters:
        return {}
    each = 1 if kernel.products else 8 if target in CUDA else 2
    return {"PROGRAMS": (each * CORES[target],)}


def candidates(kernel: Kernel, target: str) -> Iterator[dict[str, int]]:
    ranges = programs(kernel, target) | TILES[kernel.name] | (OPTIONS if target in CUDA else {})
    for values in product(*ranges.values()):
        yield dict(zip(ranges, values, strict=True))


def first_fitting(
    kernel: Kernel, target: str, calls: list[dict[str, Any]], misfit: Callable[..., str]
) -> dict[str, int]:
    """calls: arguments of every call that has to fit."""
    said = ""
    for chosen in candidates(kernel, target):
        tried = (misfit(kernel, kernel.complete(arguments, target, chosen), target) for arguments in calls)
        if not (said := next(filter(None, tried), "")):
            return chosen
    raise KernelFailure(kernel.name, target, f"no candidate fits; of the last one: {said}")
