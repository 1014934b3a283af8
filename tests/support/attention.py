"""Rows of several sequences over a paged cache, as a step has them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmesh.kernels.table import AttentionRows
from expertmesh.kernels.types import Prefill


@dataclass(frozen=True)
class Sizes:
    heads: int = 4
    nope: int = 12
    rope: int = 8
    value: int = 10
    latent: int = 16
    page: int = 4

    @property
    def cached(self) -> int:
        return self.latent + self.rope


def rows_of(sequences: Sequence[tuple[int, int]], sizes: Sizes, seed: int = 0) -> tuple[AttentionRows, int]:
    """(known tokens, rows of this step) of each sequence, those of one row first -> the rows and the number of
    pages. Pages are scattered at random, and some belong to nobody."""
    needed = [-(-known // sizes.page) for known, _ in sequences]
    total = sum(needed) + 3
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    pages = [p.clone() for p in order[: sum(needed)].split(needed)] if needed else []
    slots, prefills, first = [], [], 0
    for (known, count), mine in zip(sequences, pages, strict=True):
        positions = torch.arange(known - count, known)
        slots.append(mine[positions // sizes.page] * sizes.page + positions % sizes.page)
        if count > 1:
            prefills.append(Prefill(first, count, known, mine))
        first += count
    decoding = [(known, mine) for (known, count), mine in zip(sequences, pages, strict=True) if count == 1]
    table = torch.nn.utils.rnn.pad_sequence([m for _, m in decoding], batch_first=True) if decoding else None
    rows = AttentionRows(
        slots_T=torch.cat(slots) if slots else torch.zeros(0, dtype=torch.int64),
        decoding=len(decoding),
        pages_BM=torch.zeros(0, dtype=torch.int64) if table is None else table,
        lengths_B=torch.tensor([known for known, _ in decoding], dtype=torch.int64),
        prefills=tuple(prefills),
    )
    return rows, total


def row_count(sequences: Sequence[tuple[int, int]]) -> int:
    return sum(count for _, count in sequences)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
