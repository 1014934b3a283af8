"""One layer's exchange of a given shape, without a model: rows, their routing, and what the law says of it."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from expertmesh.bench.gloo import NAME as PLAIN_COLLECTIVE
from expertmesh.device import free_memory
from expertmesh.engine.memory import MOST_RANKS
from expertmesh.engine.plan import pieces_of
from expertmesh.errors import InputError
from expertmesh.kernels import Routing
from expertmesh.kernels.reference import route
from expertmesh.mesh.placement import Placement, default_placement
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import Traffic, algorithm, check_choices, traffic

PLAIN = "bfloat16"


@dataclass(frozen=True)
class Workload:
    """One layer's exchange. The defaults are DeepSeek-V3's. pieces: of a rank's rows on their way; 0: as many as the
    engine would make. timeout: seconds until a rank that does not answer is given up."""

    nodes: int = 8
    cards: int = 8
    tokens: int = 64
    hidden: int = 7168
    experts: int = 256
    groups: int = 8
    groups_per_token: int = 4
    experts_per_token: int = 8
    redundant: int = 0
    seed: int = 0
    rounds: int = 3
    pieces: int = 0
    timeout: float = 300.0

    def check(self) -> None:
        """InputError where this cannot be run."""
        for name in self.__dataclass_fields__:
            low = int(name not in ("redundant", "seed", "pieces"))
            if not low <= getattr(self, name) <= 1 << 31:
                raise InputError(f"{name} is {getattr(self, name)}, but must be from {low} to {1 << 31}")
        if self.experts % self.groups:
            raise InputError(f"{self.groups} groups do not divide {self.experts} experts")
        if self.groups_per_token > self.groups:
            raise InputError(f"{self.groups_per_token} groups a token, but there are {self.groups}")
        if self.topology.ranks > MOST_RANKS:
            raise InputError(f"{self.topology.ranks} ranks on one machine; at most {MOST_RANKS} are possible")
        if self.experts_per_token > self.experts // self.groups * self.groups_per_token:
            raise InputError(
                f"{self.groups_per_token} groups hold fewer than {self.experts_per_token} experts"
            )
        check_choices(self.experts_per_token)
        # The flat algorithm holds a copy of a row for every choice, packed, on its way and as a result.
        wanted = self.topology.ranks * self.tokens * self.hidden * self.experts_per_token * 2 * 5
        if wanted > (free := free_memory()):
            raise InputError(
                f"{self.topology.ranks} ranks with {self.tokens} rows each need about {wanted / 1e9:.1f} GB, and "
                f"{free / 1e9:.1f} GB are free here; take fewer ranks, tokens or hidden"
            )
        _ = self.placement  # refuses what has no room

    @property
    def topology(self) -> Topology:
        return Topology(self.nodes, self.cards, 1)

    @property
    def cut(self) -> int:
        """Pieces of each rank's rows."""
        return self.pieces or pieces_of(self.tokens, 2 * self.hidden)

    @cached_property
    def placement(self) -> Placement:
        return default_placement(self.experts, [0], self.topology, self.redundant)

    def routed(self, rank: int) -> tuple[Tensor, Tensor]:
        """Experts and weights of a rank's rows: scores uniform in (0, 1), chosen by the model's own rule."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + rank)
        scores = torch.rand(self.tokens, self.experts, generator=generator).clamp(1e-6, 1 - 1e-6)
        routing = Routing(
            self.experts_per_token, self.groups, self.groups_per_token, "noaux_tc", "sigmoid", True, 2.5
        )
        return route(scores.logit(), None, routing)

    def rows(self, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + rank + 500_000)
        return torch.randn(self.tokens, self.hidden, generator=generator).to(torch.bfloat16)


def predict(workload: Workload, name: str) -> Traffic:
    """What `mesh.traffic` says of an algorithm; the plain collective is flat, in one piece."""
    topology, placement = workload.topology, workload.placement
    choices = placement.choices(0, topology)
    slots = [choices[rank][workload.routed(rank)[0].numpy()] for rank in range(topology.ranks)]
    how, pieces = (algorithm("flat"), 1) if name == PLAIN_COLLECTIVE else (algorithm(name), workload.cut)
    return traffic(slots, topology, placement.slots_per_rank, workload.hidden, PLAIN, how, pieces)
