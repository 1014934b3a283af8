"""What the model is handed for one step: its rows, the cache, and the collectives of its rank."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertmesh.comm.base import Exchange, Group
from expertmesh.kernels import AttentionRows, Rotary


@dataclass
class Loads:
    """How many of this rank's own rows chose each expert, per layer with routed experts."""

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
