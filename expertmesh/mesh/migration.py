"""From one placement to another while both serve: in rounds, after each of which every expert has a slot.

A rank takes one expert a round, for that is what it has spare memory for. An expert with one slot can only be replaced
when it arrives elsewhere in the same round, so moves form chains: a rank takes an expert, drops one in its place, which
another rank takes, and so on, until something is dropped that has other replicas, or a slot was empty, or the chain
closes to a ring.
"""

from dataclasses import dataclass

import numpy as np

from expertmesh.mesh.placement import EMPTY, Ints, Placement
from expertmesh.mesh.topology import Topology


@dataclass(frozen=True)
class Move:
    """An expert of a layer is copied from a slot of one rank into a slot of another one; slots count inside their
    rank."""

    layer: int
    expert: int
    source: int
    source_slot: int
    rank: int
    slot: int


@dataclass(frozen=True)
class Round:
    """Moves that take effect together, no two of them on one rank. slots: of the layers that change, afterwards, each
    [R, S]."""

    moves: tuple[Move, ...]
    slots: dict[int, Ints]


def rounds(old: Placement, new: Placement, topology: Topology) -> list[Round]:
    """The moves from old to new, which have the same layers and slots a rank. What ranks keep stays in its slot. After
    the last round each rank has the experts of `new`, maybe in other slots, in the layers that have changed."""
    layers = {
        layer: _Layer(old.slots_LRS[row], new.slots_LRS[new.row_of(layer)], new.experts)
        for row, layer in enumerate(old.layers)
    }
    out: list[Round] = []
    while True:
        busy: set[int] = set()
        moves: list[Move] = []
        changed: set[int] = set()
        for number, layer in layers.items():
            before_RS = layer.slots_RS.copy()
            while (chain := layer.chain(busy)) is not None:
                busy |= {rank for rank, _, _ in chain}
                moves += [_move(number, before_RS, *step, topology) for step in chain]
                changed.add(number)
        if not moves:
            return out
        out.append(Round(tuple(moves), {number: layers[number].result() for number in changed}))


def _move(layer: int, slots_RS: Ints, rank: int, slot: int, expert: int, topology: Topology) -> Move:
    """From the nearest rank that has the expert: in the node, on the rail, anywhere."""
    sources = np.argwhere(slots_RS == expert).tolist()
    source, source_slot = min(
        sources,
        key=lambda s: (
            topology.node_of(s[0]) != topology.node_of(rank),
            topology.card_of(s[0]) != topology.card_of(rank),
        ),
    )
    return Move(layer, expert, source, source_slot, rank, slot)


class _Layer:
    """One layer on its way."""

    def __init__(self, start_RS: Ints, goal_RS: Ints, experts: int) -> None:
        self.slots_RS = start_RS.copy()
        self._wanted = [set(goal[goal != EMPTY].tolist()) for goal in goal_RS]
        self._count = np.bincount(start_RS[start_RS != EMPTY], minlength=experts)
        self._missing = [
            sorted(want - set(have.tolist())) for want, have in zip(self._wanted, start_RS, strict=True)
        ]

    def result(self) -> Ints:
        """Slots after a round. When all has come, what nobody wants any more goes: its share of rows was planned for
        other ranks."""
        out_RS = self.slots_RS.copy()
        if not any(self._missing):
            for slots, want in zip(out_RS, self._wanted, strict=True):
                slots[~np.isin(slots, sorted(want))] = EMPTY
        return out_RS

    def chain(self, busy: set[int]) -> list[tuple[int, int, int]] | None:
        """A chain of (rank, slot, expert that it takes) on ranks that are not busy, which has been entered here; None
        where there is none."""
        for first, some in enumerate(self._missing):
            if some and first not in busy:
                chain = self._from(first)
                if busy.isdisjoint(rank for rank, _, _ in chain):
                    self._enter(chain)
                    return chain
        return None

    def _from(self, rank: int) -> list[tuple[int, int, int]]:
        expert = self._missing[rank][0]
        chain: list[tuple[int, int, int]] = []
        at: dict[int, int] = {}
        while rank not in at:
            surplus = [
                (slot, e)
                for slot, e in enumerate(self.slots_RS[rank].tolist())
                if e == EMPTY or e not in self._wanted[rank]
            ]
            # An empty slot, or one whose expert is elsewhere too, ends the chain.
            slot, dropped = min(
                surplus, key=lambda s: (s[1] != EMPTY, s[1] != EMPTY and self._count[s[1]] < 2, s[0])
            )
            at[rank] = len(chain)
            chain.append((rank, slot, expert))
            if dropped == EMPTY or self._count[dropped] > 1:
                return chain
            expert = dropped
            rank = next(r for r, some in enumerate(self._missing) if dropped in some)
        # It closes here; what led to the ring is left for later.
        ring = chain[at[rank] :]
        return [(ring[0][0], ring[0][1], expert), *ring[1:]]

    def _enter(self, chain: list[tuple[int, int, int]]) -> None:
        for rank, slot, expert in chain:
            dropped = self.slots_RS[rank, slot]
            if dropped != EMPTY:
                self._count[dropped] -= 1
            self.slots_RS[rank, slot] = expert
            self._count[expert] += 1
            self._missing[rank].remove(expert)
