"""Random clusters, placements and routings."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.mesh.placement import EMPTY, Placement
from expertmesh.mesh.topology import Topology


@dataclass(frozen=True)
class Case:
    """One layer's exchange: rows of every rank, their experts and weights."""

    topology: Topology
    placement: Placement
    x: list[Tensor]
    experts: list[Tensor]
    weights: list[Tensor]

    @property
    def ranks(self) -> range:
        return range(self.topology.ranks)

    @property
    def slots(self) -> list[np.ndarray]:
        """Slots chosen for each rank's rows."""
        choices = self.placement.choices(0, self.topology)
        return [choices[rank][self.experts[rank].numpy()] for rank in self.ranks]


@st.composite
def topologies(draw: st.DrawFn, most: int = 12) -> Topology:
    nodes = draw(st.integers(1, 4))
    return Topology(nodes, draw(st.integers(1, max(1, most // nodes))), 1)


@st.composite
def placements(draw: st.DrawFn, topology: Topology, experts: int) -> Placement:
    """Any legal placement of one layer: replicas anywhere, empty slots anywhere."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    ranks = topology.ranks
    hosts = [set(generator.choice(ranks, size=1).tolist()) for _ in range(experts)]
    for _ in range(draw(st.integers(0, 2 * experts))):
        hosts[generator.integers(experts)].add(int(generator.integers(ranks)))
    held = [[e for e in range(experts) if rank in hosts[e]] for rank in range(ranks)]
    size = max(map(len, held)) + draw(st.integers(0, 2))
    slots = np.full((1, ranks, size), EMPTY, dtype=np.int64)
    for rank, mine in enumerate(held):
        slots[0, rank, generator.permutation(size)[: len(mine)]] = mine
    return Placement(slots, experts, (0,))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    topology = draw(topologies())
    experts = draw(st.integers(1, 20))
    placement = draw(placements(topology, experts))
    choices = draw(st.integers(1, min(experts, 5)))
    width = draw(st.sampled_from([1, 7, 16, 130]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = draw(st.lists(st.integers(0, 6), min_size=topology.ranks, max_size=topology.ranks))
    return Case(
        topology,
        placement,
        [torch.randn(n, width, generator=generator) for n in rows],
        [_distinct(n, experts, choices, generator) for n in rows],
        [torch.rand(n, choices, generator=generator) for n in rows],
    )


def _distinct(rows: int, experts: int, choices: int, generator: torch.Generator) -> Tensor:
    if not rows:
        return torch.zeros(0, choices, dtype=torch.int64)
    return torch.stack([torch.randperm(experts, generator=generator)[:choices] for _ in range(rows)])
