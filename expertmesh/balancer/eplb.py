"""The published expert balancer, to compare with: https://github.com/deepseek-ai/EPLB, described in its README.

Written after its description, with its results: the most loaded expert gets the next replica; the heaviest item goes
to the lightest pack that has room. Two modes: global, and hierarchical, which first packs the routing groups into
nodes and then does the same in each node.
"""

import numpy as np

from expertmesh.errors import InputError
from expertmesh.mesh.loads import Floats, Loads
from expertmesh.mesh.placement import EMPTY, Ints, Placement
from expertmesh.mesh.topology import Topology


def eplb(loads: Loads, topology: Topology, redundant: int, groups: int | None = None) -> Placement:
    """A placement by EPLB. Replicas of an expert that it puts on one card twice are left there once, their second
    slot empty; `eplb_slots` has what it gives. groups as there."""
    slots_LRS = eplb_slots(loads.total_LE, topology, redundant, groups)
    return Placement(without_twins(slots_LRS), loads.experts, loads.layers)


def eplb_slots(counts_LE: Floats, topology: Topology, redundant: int, groups: int | None = None) -> Ints:
    """[layers, ranks, slots]: the expert in each slot. groups: how many routing groups the experts form, for the
    hierarchical mode; None for the global one. InputError where EPLB has no plan: it needs equal parts everywhere."""
    layers, experts = counts_LE.shape
    nodes, hierarchical = (topology.nodes, groups) if groups is not None else (1, 1)
    cards, slots = topology.ranks // nodes, experts + redundant
    if redundant < 0 or slots % topology.ranks:
        raise InputError(
            f"EPLB: {experts} experts and {redundant} replicas do not divide by {topology.ranks} cards"
        )
    if hierarchical < 1 or experts % hierarchical or hierarchical % nodes:
        raise InputError(f"EPLB: {experts} experts in {hierarchical} groups do not divide by {nodes} nodes")
    size = experts // hierarchical
    counts_LGE = counts_LE.reshape(layers, hierarchical, size)
    groups_LNG = _pack(counts_LGE.sum(2), nodes)
    experts_XE = (groups_LNG[..., None] * size + np.arange(size)).reshape(layers * nodes, -1)
    counts_XE = np.take_along_axis(counts_LE, experts_XE.reshape(layers, -1), axis=1).reshape(
        experts_XE.shape
    )
    held_XP, replicas_XE = _replicate(counts_XE, slots // nodes)
    shares_XP = np.take_along_axis(counts_XE / replicas_XE, held_XP, axis=1)
    packed_XP = _pack(shares_XP, cards).reshape(layers * nodes, -1)
    local_XP = np.take_along_axis(held_XP, packed_XP, axis=1)
    return np.take_along_axis(experts_XE, local_XP, axis=1).reshape(layers, topology.ranks, -1)


def without_twins(slots_LRS: Ints) -> Ints:
    """With each expert once on a rank: its further slots there are empty."""
    out = slots_LRS.copy()
    for slot in range(1, out.shape[2]):
        twin_LR = (out[:, :, :slot] == out[:, :, slot : slot + 1]).any(axis=2)
        out[:, :, slot] = np.where(twin_LR, EMPTY, out[:, :, slot])
    return out


def slot_loads(slots_LRS: Ints, counts_LE: Floats) -> Floats:
    """[layers, ranks], as the slots of an expert share its rows evenly, two on one card too."""
    layers, ranks, _ = slots_LRS.shape
    flat_LP = slots_LRS.reshape(layers, -1)
    held_LP = flat_LP != EMPTY
    rows = np.broadcast_to(np.arange(layers)[:, None], flat_LP.shape)
    replicas_LE = np.zeros(counts_LE.shape)
    np.add.at(replicas_LE, (rows[held_LP], flat_LP[held_LP]), 1)
    share_LE = counts_LE / np.maximum(replicas_LE, 1)
    share_LP = np.take_along_axis(share_LE, np.maximum(flat_LP, 0), axis=1) * held_LP
    loads_LR: Floats = share_LP.reshape(layers, ranks, -1).sum(axis=2)
    return loads_LR


def _replicate(counts_XE: Floats, slots: int) -> tuple[Ints, Ints]:
    """The expert of each of [X, slots], and how many slots each of [X, E] has: one each, then one by one to the
    expert with the most rows for each of its slots."""
    cases, experts = counts_XE.shape
    held_XP = np.tile(np.arange(slots), (cases, 1))
    replicas_XE = np.ones(counts_XE.shape, dtype=np.int64)
    for slot in range(experts, slots):
        held_XP[:, slot] = np.argmax(counts_XE / replicas_XE, axis=1)
        replicas_XE[np.arange(cases), held_XP[:, slot]] += 1
    return held_XP, replicas_XE


def _pack(weights_XN: Floats, packs: int) -> Ints:
    """[X, packs, N / packs]: the items of each pack in the order in which they came."""
    cases, items = weights_XN.shape
    room = items // packs
    if room == 1:
        return np.tile(np.arange(items), (cases, 1)).reshape(cases, packs, 1)
    out = np.zeros((cases, packs, room), dtype=np.int64)
    filled, total = np.zeros((cases, packs), dtype=np.int64), np.zeros((cases, packs))
    case = np.arange(cases)
    for item in np.argsort(-weights_XN, axis=1, kind="stable").T:
        pack = np.argmin(np.where(filled < room, total, np.inf), axis=1)
        out[case, pack, filled[case, pack]] = item
        filled[case, pack] += 1
        total[case, pack] += weights_XN[case, item]
    return out
