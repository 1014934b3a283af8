"""What native exchanges have in common: experts are slots, rows are shared out to replicas evenly, and limits are
found out before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmesh.comm.base import Comm
from expertmesh.config import EngineConfig, ModelConfig
from expertmesh.errors import InputError
from expertmesh.mesh.placement import Placement
from expertmesh.mesh.topology import Topology


@dataclass(frozen=True)
class StepShape:
    """What a step may ask of an exchange. hidden: numbers in a row; choices: experts of a row; rows: of a rank, at
    most; dtype: of rows."""

    hidden: int
    choices: int
    rows: int
    dtype: torch.dtype

    @staticmethod
    def of(model: ModelConfig, config: EngineConfig, topology: Topology) -> "StepShape":
        dtype = torch.float32 if config.dtype_of(model) == "float32" else torch.bfloat16
        rows = -(-config.max_batch_tokens // topology.tp)
        return StepShape(model.hidden_size, model.num_experts_per_tok, rows, dtype)


class EvenSlots:
    """Slots of a rank's rows where each replica serves a fixed share of the ranks: a table on the card."""

    def __init__(self, comm: Comm, placement: Placement) -> None:
        self.per_rank = placement.slots_per_rank
        self.total = self.per_rank * comm.topology.ranks
        self._slots = {
            layer: torch.from_numpy(placement.choices(layer, comm.topology)[comm.rank]).to(comm.device)
            for layer in placement.layers
        }

    def choose(self, layer: int, experts_TK: Tensor) -> Tensor:
        """Slots of the cluster."""
        return self._slots[layer][experts_TK]


def too_many(rows: int, limit: int, topology: Topology) -> list[str]:
    """What is to be said of rows of a rank above a limit, if anything."""
    if rows <= limit:
        return []
    return [
        f"{rows} rows of a rank in a step, at most {limit}: set max_batch_tokens to {limit * topology.tp}"
    ]


def refuse(name: str, problems: Sequence[str]) -> None:
    """InputError where there are problems."""
    if problems:
        raise InputError(
            f"exchange {name} cannot do this: {'; '.join(problems)}; or take exchange two_tier, without these limits"
        )


def slots_in_order(counts_S: Tensor, rows: int) -> Tensor:
    """[R, 1]: the slot of each of `rows` rows that lie in the order of slots, counts_S of each; -1 for those behind."""
    number = torch.arange(rows, device=counts_S.device)
    slots = torch.searchsorted(counts_S.cumsum(0), number, right=True)
    return torch.where(slots < len(counts_S), slots, -1)[:, None]
