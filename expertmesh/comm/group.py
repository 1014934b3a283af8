"""Collectives of a TP group, made of the transport's one primitive.

Every rank sends each other rank of the group what it needs, which is as many bytes as a ring sends, needs no equal
shares, and sums in the order of the ranks whatever the transport: results are the same bits on all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from expertmesh.comm.alone import Alone
from expertmesh.comm.base import Comm, Exchange, Group

T = TypeVar("T")


def shares(rows: int, ranks: int) -> list[int]:
    """Rows of a step over the ranks of a group: equal but for one."""
    return [rows // ranks + (i < rows % ranks) for i in range(ranks)]


class Clustered:
    """The collectives of one rank of several. Implements `comm.base.Collectives`."""

    def __init__(self, comm: Comm, exchange: Exchange) -> None:
        self.comm, self.exchange = comm, exchange
        self._tp_ranks = comm.topology.tp_ranks(comm.rank)

    def run(self, programs: Sequence[Callable[[], T]]) -> list[T]:
        if len(programs) == 1:
            return [programs[0]()]
        with self.comm.helped():
            return self.comm.turns.run(programs)

    def group(self, rows: int) -> Group:
        if len(self._tp_ranks) == 1:
            return Alone()
        return TPGroup(self.comm, self._tp_ranks, shares(rows, len(self._tp_ranks)))


@dataclass(frozen=True)
class TPGroup:
    """The TP group of one rank in one step. counts: rows of each rank. Implements `comm.base.Group`."""

    comm: Comm
    ranks: tuple[int, ...]
    counts: Sequence[int]

    whole = False

    @property
    def leads(self) -> bool:
        return self.comm.rank == self.ranks[0]

    def all_gather(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Several tensors in one exchange: row by row, side by side."""
        mine = torch.cat([_bytes(t) for t in rows], dim=-1) if len(rows) > 1 else _bytes(rows[0])
        sizes = [count * mine.shape[1] for count in self.counts]
        parts = self.comm.exchange("attention", self.ranks, [mine.flatten()] * len(self.ranks), sizes)
        every = torch.cat(parts).view(-1, mine.shape[1])
        widths = [t.shape[1] * t.dtype.itemsize for t in rows]
        return tuple(
            part.contiguous().view(t.dtype) for part, t in zip(every.split(widths, dim=1), rows, strict=True)
        )

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        me = self.ranks.index(self.comm.rank)
        width = rows.shape[1] * rows.dtype.itemsize
        parts = [part.flatten() for part in _bytes(rows).split(list(self.counts))]
        sizes = [self.counts[me] * width] * len(self.ranks)
        came = self.comm.exchange("attention", self.ranks, parts, sizes)
        out = torch.zeros(self.counts[me], rows.shape[1], dtype=torch.float32, device=rows.device)
        for part in came:
            out += part.view(rows.dtype).view(out.shape)
        return out.to(rows.dtype)

    def gather_rows(self, mine: Tensor, wanted: Sequence[int]) -> Tensor:
        ends = np.cumsum(self.counts)
        owners = np.searchsorted(ends, wanted, side="right")
        order = np.argsort(owners, kind="stable")  # what comes is in the order of the ranks
        me = self.ranks.index(self.comm.rank)
        first = int(ends[me]) - self.counts[me]
        own = torch.from_numpy(np.asarray(wanted, dtype=np.int64)[owners == me] - first).to(mine.device)
        counts = np.bincount(owners, minlength=len(self.ranks)).tolist()
        (came,) = TPGroup(self.comm, self.ranks, counts).all_gather(mine[own])
        return came[torch.from_numpy(np.argsort(order)).to(mine.device)]

    def gather_columns(self, part: Tensor) -> Tensor | None:
        data, nothing = _bytes(part).flatten(), part.new_empty(0, dtype=torch.uint8)
        parts = [data if rank == self.ranks[0] else nothing for rank in self.ranks]
        sizes = [data.numel() if self.leads else 0] * len(self.ranks)
        came = self.comm.exchange("attention", self.ranks, parts, sizes)
        return torch.cat([c.view(part.dtype).view(part.shape) for c in came], dim=-1) if self.leads else None


def _bytes(rows: Tensor) -> Tensor:
    """[T, bytes of a row]."""
    return rows.contiguous().view(torch.uint8).view(rows.shape[0], rows.shape[1] * rows.dtype.itemsize)
