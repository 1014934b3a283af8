"""Which expert is in which slot of which rank, and which of its replicas a rank sends its rows to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from expertmesh.errors import InputError
from expertmesh.mesh.topology import Topology

Ints: TypeAlias = NDArray[np.int64]
EMPTY = -1


@dataclass(frozen=True, eq=False)
class Placement:
    """Experts in slots. slots_LRS: the expert in each slot of each rank, -1 where it is empty; layers: the numbers
    of the model's layers that the first axis stands for.

    A slot of the whole cluster is numbered rank * S + its place in the rank. InputError where an expert has no slot
    or a rank has two slots with one expert.
    """

    slots_LRS: Ints
    experts: int
    layers: tuple[int, ...]
    # Choices that were asked for, by the layer's slots: layers are often alike, and all ranks of a process ask.
    _choices: dict[tuple[bytes, Topology], Ints] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        slots = self.slots_LRS
        if slots.ndim != 3 or slots.shape[0] != len(self.layers):
            raise InputError(
                f"placement: shape {slots.shape} is not [layers, ranks, slots] of {len(self.layers)} layers"
            )
        if slots.size and (slots.min() < EMPTY or slots.max() >= self.experts):
            raise InputError(f"placement: names experts that are not from 0 to {self.experts - 1}")
        for layer, slots_RS in zip(self.layers, slots, strict=True):
            held = np.zeros((slots.shape[1], self.experts + 1), dtype=np.int64)
            np.add.at(held, (np.arange(slots.shape[1])[:, None], slots_RS), 1)
            held = held[:, : self.experts]  # the last column counts empty slots
            homeless = np.flatnonzero(held.sum(0) == 0)
            if homeless.size:
                raise InputError(f"placement: layer {layer} has no slot for expert {homeless[0]}")
            if held.size and held.max() > 1:
                rank, expert = np.argwhere(held > 1)[0]
                raise InputError(f"placement: layer {layer} has expert {expert} twice on rank {rank}")

    @property
    def slots_per_rank(self) -> int:
        return int(self.slots_LRS.shape[2])

    def row_of(self, layer: int) -> int:
        """Where a layer of the model is on the first axis."""
        return self.layers.index(layer)

    def of_rank(self, rank: int) -> dict[int, tuple[int, ...]]:
        """For each layer the expert in each of the rank's slots."""
        return {layer: tuple(self.slots_LRS[i, rank].tolist()) for i, layer in enumerate(self.layers)}

    def replaced(self, slots_of: Mapping[int, Ints]) -> "Placement":
        """With other slots [R, S] in these layers."""
        slots_LRS = self.slots_LRS.copy()
        for layer, slots_RS in slots_of.items():
            slots_LRS[self.row_of(layer)] = slots_RS
        return Placement(slots_LRS, self.experts, self.layers)

    def choices(self, layer: int, topology: Topology) -> Ints:
        """[R, E]: the slot that each rank sends the rows of each expert to, see `choose_replicas`."""
        slots_RS = self.slots_LRS[self.row_of(layer)]
        key = (slots_RS.tobytes(), topology)
        if key not in self._choices:
            self._choices[key] = choose_replicas(slots_RS, self.experts, topology)
        return self._choices[key]


def choose_replicas(slots_RS: Ints, experts: int, topology: Topology) -> Ints:
    """Slot [R, E] for the rows of every rank and expert.

    Each replica serves an equal share of the ranks (they differ by one at most), so that equal ranks load replicas
    equally; within that, a rank sends to its own card where it can, else inside its node, else anywhere.
    """
    ranks, size = slots_RS.shape
    out = np.empty((ranks, experts), dtype=np.int64)
    nodes = np.arange(ranks) // topology.cards_per_node
    where = np.argsort(slots_RS, axis=None, kind="stable")
    found = slots_RS.ravel()[where]
    for expert in range(experts):
        slots = where[np.searchsorted(found, expert) : np.searchsorted(found, expert, side="right")]
        out[:, expert] = slots[0] if slots.size == 1 else _share(slots, slots // size, nodes)
    return out


def _share(slots: Ints, hosts: Ints, nodes: Ints) -> Ints:
    """Ranks over the replicas of one expert. Distance 0: my card, 1: my node, 2: another node. Nearest first, and a
    replica takes no more than its share."""
    ranks, replicas = len(nodes), len(slots)
    mine = np.arange(ranks)[:, None] == hosts
    near = nodes[:, None] == nodes[hosts]
    distance = np.where(mine, 0, np.where(near, 1, 2))
    room = np.full(replicas, ranks // replicas)
    spare = ranks - int(room.sum())  # this many replicas serve one rank more
    chosen = np.full(ranks, -1, dtype=np.int64)
    for step in range(3):
        for rank in range(ranks):
            if chosen[rank] >= 0:
                continue
            # Of those at this distance the one with most room; equal ones take turns.
            ready = [
                ((room[i] > 0, room[i], (i - rank) % replicas), i)
                for i in range(replicas)
                if distance[rank, i] <= step and (room[i] > 0 or (room[i] == 0 and spare))
            ]
            if ready:
                best = max(ready)[1]
                spare -= room[best] == 0
                room[best] -= 1
                chosen[rank] = best
    return slots[chosen]


def default_placement(
    experts: int, layers: Sequence[int], topology: Topology, redundant: int = 0
) -> Placement:
    """Experts in their order, evenly over the ranks, and `redundant` further slots a layer for replicas.

    In order means by routing group: where the nodes divide the groups, or the groups the nodes, a group stays on its
    nodes, and a token that is limited to some groups is sent to no more nodes (DeepSeek-V3, section 2.1.2). Replicas
    stay in their expert's node for the same reason, on another card, until all cards there have it. Without loads every
    expert counts the same.
    """
    ranks = topology.ranks
    if redundant < 0:
        raise InputError(f"placement: {redundant} redundant slots; must be at least 0")
    if redundant > experts * (ranks - 1):
        raise InputError(
            f"placement: {redundant} redundant slots a layer, but {experts} experts on {ranks} cards can use "
            f"{experts * (ranks - 1)} at most"
        )
    parts = np.array_split(np.arange(experts), ranks)
    extra = _replicas(parts, topology, redundant)
    size = max(len(a) + len(b) for a, b in zip(parts, extra, strict=True))
    slots_RS = np.full((ranks, size), EMPTY, dtype=np.int64)
    for rank, (own, more) in enumerate(zip(parts, extra, strict=True)):
        slots_RS[rank, : len(own) + len(more)] = [*own, *more]
    slots_LRS = np.repeat(slots_RS[None], len(layers), axis=0)
    return Placement(slots_LRS, experts, tuple(layers))


def _replicas(parts: Sequence[Ints], topology: Topology, redundant: int) -> list[list[int]]:
    """Experts of the redundant slots of each rank. A card takes one from the card before it in its node, the next
    one from the card before that, and so on: where all cards of a node have as many, each gives what it takes."""
    within = topology.cards_per_node
    hosts = {int(e): [rank] for rank, part in enumerate(parts) for e in part}
    extra: list[list[int]] = [[] for _ in range(topology.ranks)]
    for _ in range(redundant):
        ready = [r for r in range(topology.ranks) if _candidates(r, hosts, within)]
        if not ready:  # all cards of every node have all that is in it
            within, ready = topology.ranks, list(range(topology.ranks))
        rank = min(ready, key=lambda r: (len(parts[r]) + len(extra[r]), topology.card_of(r), r))
        turn = len(extra[rank])
        expert = min(
            _candidates(rank, hosts, within),
            key=lambda e: (len(hosts[e]), (rank - hosts[e][0] - 1 - turn) % within, e),
        )
        hosts[expert].append(rank)
        extra[rank].append(expert)
    return extra


def _candidates(rank: int, hosts: dict[int, list[int]], within: int) -> list[int]:
    """Experts of so many ranks around this one that are not on it."""
    return [e for e, at in hosts.items() if at[0] // within == rank // within and rank not in at]
