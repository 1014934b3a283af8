"""One rank: nothing to say to anybody."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from expertmesh.comm.base import Received

T = TypeVar("T")


class Alone:
    """The collectives of a cluster of one rank: everything is here already, slot e holds expert e. Implements
    `comm.base.Collectives`, `Group` and `Exchange`."""

    leads = True
    whole = True

    def prepare(self, pieces: int, split: str, rows: int) -> None:
        pass

    @property
    def exchange(self) -> "Alone":
        return self

    def run(self, programs: Sequence[Callable[[], T]]) -> list[T]:
        return [program() for program in programs]

    def group(self, rows: int) -> "Alone":
        return self

    def all_gather(self, *rows: Tensor) -> tuple[Tensor, ...]:
        return rows

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        return rows

    def gather_rows(self, mine: Tensor, wanted: Sequence[int]) -> Tensor:
        if list(wanted) == list(range(mine.shape[0])):
            return mine
        return mine[torch.tensor(wanted, dtype=torch.int64).to(mine.device)]

    def gather_columns(self, part: Tensor) -> Tensor | None:
        return part

    def dispatch(self, layer: int, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received:
        return Received(layer, x_TD, experts_TK, weights_TK)

    def combine(self, y_RD: Tensor, received: Received) -> Tensor:
        return y_RD
