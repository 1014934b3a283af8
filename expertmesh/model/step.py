"""What the model is handed for one step: its rows, the cache, and the collectives. On one rank those are identities."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from expertmesh.kernels import AttentionRows, Rotary


class Group(Protocol):
    """The TP group: ranks of one node that share the heads of attention."""

    def all_gather(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Rows of the whole group, in rank order, from each rank's own."""
        ...

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """Sum over the group of every rank's rows; each rank gets its own share of them."""
        ...

    def all_gather_columns(self, part: Tensor) -> Tensor:
        """The last axis put together from each rank's part."""
        ...


@dataclass(frozen=True)
class Received:
    """Rows that came here for my slots, and what combine needs to send the results back.

    slots_RK holds -1 for choices that other ranks serve.
    """

    layer: int
    x_RD: Tensor
    slots_RK: Tensor
    weights_RK: Tensor


class Exchange(Protocol):
    """Sends rows to the ranks that hold their experts, and results back. combine takes what dispatch returned."""

    def dispatch(self, layer: int, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received: ...

    def combine(self, y_RD: Tensor, received: Received) -> Tensor: ...


class Alone:
    """Group and exchange of an engine of one rank: everything is here already, slot e holds expert e."""

    def all_gather(self, *rows: Tensor) -> tuple[Tensor, ...]:
        return rows

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        return rows

    def all_gather_columns(self, part: Tensor) -> Tensor:
        return part

    def dispatch(self, layer: int, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received:
        return Received(layer, x_TD, experts_TK, weights_TK)

    def combine(self, y_RD: Tensor, received: Received) -> Tensor:
        return y_RD


@dataclass
class Loads:
    """How many rows chose each expert, per layer with routed experts. Rows beyond `real` are padding, not counted."""

    counts: dict[int, Tensor] = field(default_factory=dict)

    def record(self, layer: int, experts_TK: Tensor, experts: int) -> None:
        new = torch.bincount(experts_TK.flatten(), minlength=experts)
        old = self.counts.get(layer)
        self.counts[layer] = new if old is None else old.add_(new)


@dataclass(frozen=True)
class Step:
    """One step of the model. tokens_T are the TP group's rows; cache has one paged tensor [pages, page, C + P] per
    layer; rotary and rows belong to the group's rows."""

    tokens_T: Tensor
    rotary: Rotary
    rows: AttentionRows
    cache: list[Tensor]
    tp: Group
    exchange: Exchange
    loads: Loads
