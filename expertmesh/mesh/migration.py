"""From one placement to another while both serve: in rounds, after each of which every expert has a slot.

A rank takes one expert a round, for that is what it has spare memory for. An expert with one slot can only be replaced
when it arrives elsewhere in the same round, so moves form chains: a rank takes an expert, drops one in its place, which
another rank takes, and so on, until something is dropped that has other replicas, or a slot was empty, or the chain
closes to a ring.
"""

from collections.abc import Iterator
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
    """The moves from old to new, which have the same layers and slots a rank. What ranks keep stays in its slot, so
    the last round leaves the experts of `new` on their ranks, maybe in other slots there."""
    current = {layer: old.slots_LRS[row].copy() for row, layer in enumerate(old.layers)}
    chains = {
        layer: _chains(current[layer], new.slots_LRS[new.row_of(layer)], new.experts) for layer in old.layers
    }
    out: list[Round] = []
    waiting = {layer: next(found, None) for layer, found in chains.items()}
    while any(waiting.values()):
        busy: set[int] = set()
        moves: list[Move] = []
        changed: dict[int, list[tuple[int, int, int]]] = {}
        for layer, chain in waiting.items():
            ranks = {rank for rank, _, _ in chain or ()}
            if not chain or busy & ranks:
                continue
            busy |= ranks
            moves += [_move(layer, current[layer], *step, topology) for step in chain]
            changed[layer] = chain
        for layer, chain in changed.items():
            for rank, slot, expert in chain:
                current[layer][rank, slot] = expert
            waiting[layer] = next(chains[layer], None)
        out.append(Round(tuple(moves), {layer: current[layer].copy() for layer in changed}))
    return out


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


def _chains(start_RS: Ints, goal_RS: Ints, experts: int) -> Iterator[list[tuple[int, int, int]]]:
    """Chains of one layer, each as (rank, slot, expert) that it takes; each is to be done before the next is asked
    for, and is entered here."""
    slots_RS = start_RS.copy()
    wanted = [set(goal[goal != EMPTY].tolist()) for goal in goal_RS]
    count = np.bincount(slots_RS[slots_RS != EMPTY], minlength=experts)
    while True:
        missing = [sorted(want - set(have.tolist())) for want, have in zip(wanted, slots_RS, strict=True)]
        first = next((rank for rank, some in enumerate(missing) if some), None)
        if first is None:
            return
        chain = _chain(first, missing, slots_RS, wanted, count)
        for rank, slot, expert in chain:
            if slots_RS[rank, slot] != EMPTY:
                count[slots_RS[rank, slot]] -= 1
            slots_RS[rank, slot] = expert
            count[expert] += 1
        yield chain


def _chain(
    rank: int, missing: list[list[int]], slots_RS: Ints, wanted: list[set[int]], count: Ints
) -> list[tuple[int, int, int]]:
    expert = missing[rank][0]
    chain: list[tuple[int, int, int]] = []
    at: dict[int, int] = {}
    while True:
        if rank in at:  # closes here: what led to it is left for later
            ring = chain[at[rank] :]
            return [(ring[0][0], ring[0][1], expert), *ring[1:]]
        surplus = [
            (slot, e) for slot, e in enumerate(slots_RS[rank].tolist()) if e == EMPTY or e not in wanted[rank]
        ]
        # An empty slot, or one whose expert is elsewhere too, ends the chain.
        slot, dropped = min(surplus, key=lambda s: (s[1] != EMPTY, s[1] != EMPTY and count[s[1]] < 2, s[0]))
        at[rank] = len(chain)
        chain.append((rank, slot, expert))
        if dropped == EMPTY or count[dropped] > 1:
            return chain
        expert = dropped
        rank = next(r for r, some in enumerate(missing) if dropped in some)
