"""Tile sizes that are worth trying, of each kernel, and options of CUDA's compiler."""

from collections.abc import Iterator
from itertools import product
from typing import TypeAlias

from expertmesh.kernels.triton.tiles import CUDA

Sizes: TypeAlias = tuple[int, ...]
ROWS, COLUMNS, DEPTHS = (128, 64, 32, 16), (256, 128, 96, 64, 32, 16), (512, 256, 128, 64, 32)
# CUDA's tiles are powers of two, its products of several warps have 64 rows or more, and shallow tiles leave room for
# the next ones to be loaded meanwhile.
CUDA_ROWS, CUDA_COLUMNS, CUDA_DEPTHS = (128, 64), (256, 128, 64, 32, 16), (128, 64)
OPTIONS = {"num_warps": (4, 8, 16), "num_stages": (3, 2, 1)}


def tiles(kernel: str, rows: Sizes, columns: Sizes, depths: Sizes) -> dict[str, Sizes]:
    """Ranges of each tile."""
    every: dict[str, dict[str, Sizes]] = {
        "mla_down": {"BLOCK_T": rows, "BLOCK_X": columns, "BLOCK_D": depths},
        "mla_norm": {},
        "mla_up": {"BLOCK_T": rows, "BLOCK_Q": depths, "BLOCK_C": depths},
        "mla_decode": {"BLOCK_H": rows},
        "mla_merge": {"BLOCK_B": rows, "BLOCK_C": depths},
        "mla_expand": {"BLOCK_X": columns, "BLOCK_C": depths},
        "mla_prefill": {"BLOCK_T": rows},
    }
    return every[kernel]


def candidates(kernel: str, target: str) -> Iterator[dict[str, int]]:
    """Those of a target; Ascend has no options."""
    cuda = target in CUDA
    sizes = (CUDA_ROWS, CUDA_COLUMNS, CUDA_DEPTHS) if cuda else (ROWS, COLUMNS, DEPTHS)
    ranges = tiles(kernel, *sizes) | (OPTIONS if cuda else {})
    for values in product(*ranges.values()):
        yield dict(zip(ranges, values, strict=True))
