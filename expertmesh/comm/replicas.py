"""Which replica of its expert each row goes to, step by step.

"even": each replica serves a fixed, equal share of the ranks (`Placement.choices`). "now": every rank learns how many
rows of all ranks go to each slot in this step, before any leaves, and all come to one plan that levels the ranks
(`mesh.split`). "last": the same plan by the counts of the layer's last step, which have travelled beside its rows, so
that nobody waits for them.
"""

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from expertmesh.comm.base import Comm, Transfer
from expertmesh.mesh.placement import Ints, Placement
from expertmesh.mesh.split import Small, Split

Counts: TypeAlias = NDArray[np.unsignedinteger[Any]]


class Gathering:
    """Counts of all ranks, brought to all of them in two hops: over my rail, and inside my node."""

    def __init__(self, comm: Comm, mine: Counts) -> None:
        self._comm, self._mine = comm, mine
        self._transfer = self._start(comm.topology.rail_ranks(comm.rank), mine)

    def forward(self) -> None:
        """Hand on what came from the other nodes."""
        self._transfer = self._start(self._comm.topology.node_ranks(self._comm.rank), self._arrived())

    def result(self) -> Counts:
        """Like mine, with one axis more in front: the ranks."""
        topology, shape = self._comm.topology, self._mine.shape
        by_card = self._arrived().reshape(topology.cards_per_node, topology.nodes, *shape)
        return by_card.swapaxes(0, 1).reshape(topology.ranks, *shape)

    def _start(self, ranks: tuple[int, ...], counts: Counts) -> Transfer:
        part = torch.from_numpy(np.ascontiguousarray(counts).view(np.uint8).reshape(-1))
        return self._comm.start("counts", ranks, [part] * len(ranks), [part.numel()] * len(ranks))

    def _arrived(self) -> Counts:
        return np.concatenate([part.cpu().numpy() for part in self._transfer.wait()]).view(self._mine.dtype)


class Replicas:
    """Of one rank. how: see above; rows: of a rank in a step, at most, so that counts travel in as few bytes as hold
    that. Both are the same on all ranks."""

    def __init__(self, comm: Comm, placement: Placement, tolerance: float = 0.0) -> None:
        """tolerance: how far above the mean a rank may be for the sake of fewer copies to other nodes."""
        self.how, self.rows = "even", 0
        self._comm, self._tolerance = comm, tolerance
        self._splits: dict[int, Split] = {}
        self._even: dict[int, Ints] = {}
        self._known: dict[int, Small] = {}
        self.put(placement)

    def put(self, placement: Placement) -> None:
        """Choose by this placement from now on. What is known of layers that have changed is forgotten."""
        topology, rank = self._comm.topology, self._comm.rank
        for row, layer in enumerate(placement.layers):
            slots_RS = placement.slots_LRS[row]
            old = self._splits.get(layer)
            if old is None or not np.array_equal(old.slots_RS, slots_RS):
                self._splits[layer] = Split(slots_RS, placement.experts, topology)
                self._even[layer] = placement.choices(layer, topology)[rank]
                self._known.pop(layer, None)
        self.placement = placement

    def choose(self, layer: int, experts_TK: Ints) -> tuple[Ints, Gathering | None]:
        """Slots [T, K] of the cluster, and counts that are under way: `learn` takes them when the rows have come."""
        split, rank = self._splits[layer], self._comm.rank
        if self.how == "even" or not split.replicated:
            return self._even[layer][experts_TK], None
        wish = split.wish(experts_TK, rank)
        gathering = Gathering(self._comm, wish.counts_2P.astype(np.min_scalar_type(self.rows)))
        if self.how == "now":
            self._comm.turns.turn()
            gathering.forward()
            self.learn(layer, gathering)
        known, slots_TK = self._known.get(layer), wish.slots_TK
        if known is not None:
            slots_TK = split.assign(wish, rank, *split.settle(known, rank, self._tolerance))
        return slots_TK, None if self.how == "now" else gathering

    def learn(self, layer: int, gathering: Gathering) -> None:
        """The counts of a step, after they have been handed on."""
        self._known[layer] = gathering.result().astype(np.int32)
