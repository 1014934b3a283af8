"""What the model is handed for one step: its rows, the cache, and the collectives of its rank."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from expertmesh.comm.base import Exchange, Group
from expertmesh.kernels import AttentionRows, Rotary
from expertmesh.kernels.memory import Cache


class Counts(Protocol):
    """Who is told which experts rows choose."""

    def record(self, layer: int, experts_TK: Tensor, experts: int) -> None:
        """experts: how many the layer has."""
        ...


class Loads:
    """How many of this rank's own rows chose each expert, per layer with routed experts. Implements `Counts`."""

    # Whether what is recorded is an op like any other, so that a step that is run again counts again.
    repeatable = True

    def __init__(self, count: Callable[[Tensor, Tensor], None]) -> None:
        """count: the op that adds chosen experts to counts."""
        self._count = count
        self.counts: dict[int, Tensor] = {}

    def record(self, layer: int, experts_TK: Tensor, experts: int) -> None:
        counts = self.counts.get(layer)
        if counts is None:
            counts = self.counts[layer] = torch.zeros(experts, dtype=torch.int64, device=experts_TK.device)
        self._count(experts_TK, counts)

    def on_host(self) -> dict[int, Tensor]:
        """Counts where the driver can read them: on a processor themselves."""
        return {layer: counts.cpu() for layer, counts in self.counts.items()}

    @torch.inference_mode()
    def reset(self) -> None:
        for counts in self.counts.values():
            counts.zero_()


@dataclass(frozen=True)
class Step:
    """One step of the model. tokens_T are the TP group's rows; cache has the paged latents of each layer
    (`kernels.table.NewCache`); rotary and rows belong to the group's rows."""

    tokens_T: Tensor
    rotary: Rotary
    rows: AttentionRows
    cache: list[Cache]
    tp: Group
    exchange: Exchange
    loads: Counts
