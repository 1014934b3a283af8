"""A placement of one layer: a start by greedy rules, and the local search that improves it (native/balance.cpp)."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh import native
from expertmesh.mesh.loads import Floats
from expertmesh.mesh.placement import EMPTY, Ints
from expertmesh.mesh.split import whole

ARRANGEMENTS = 3_000  # exchanges of cards between nodes that are tried
WARMTH = 0.002  # what one may cost at first, in copies of a token to other nodes


@dataclass(frozen=True, eq=False)
class Goal:
    """What is minimised: the sum of these terms, each a load over the mean card's, so that 0.01 is one per cent.

    scenarios_NE, weights_N: loads that may come, and how much the highest card of each counts, as the per-step split
    leaves it. shares_E: loads for the two terms on even shares: `even` times the cards' excess over `slack` (squares of
    all differences where slack is 0), `risk` times what experts without replicas may bring their card over the mean, if
    loads are log-normal with deviation `doubt`. copies: of a copy of one of the tokens_TK to another node. move: of a
    slot whose expert its card did not have in old_RS; budget: how many such there may be. enough: stop where no card
    is further above the mean, with even shares.
    """

    shares_E: Floats
    scenarios_NE: Floats | None = None
    weights_N: Floats | None = None
    even: float = 0.0
    slack: float = 0.0
    risk: float = 0.0
    doubt: float = 0.0
    nodes: int = 1
    tokens_TK: Ints | None = None
    copies: float = 0.0
    old_RS: Ints | None = None
    move: float = 0.0
    budget: int | None = None
    enough: float | None = None


class _Goal(ctypes.Structure):
    _fields_ = [
        ("scenarios", ctypes.c_int32),
        ("loads", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("shares", ctypes.c_void_p),
        ("even", ctypes.c_double),
        ("slack", ctypes.c_double),
        ("risk", ctypes.c_double),
        ("doubt", ctypes.c_double),
        ("nodes", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("chosen", ctypes.c_int32),
        ("sample", ctypes.c_void_p),
        ("copies", ctypes.c_double),
        ("old", ctypes.c_void_p),
        ("move", ctypes.c_double),
        ("budget", ctypes.c_int64),
        ("enough", ctypes.c_double),
    ]


def improve(
    slots_RS: Ints, room_R: Ints, goal: Goal, tries: int, heat: float, seed: int, cold: float = 1e-3
) -> Ints:
    """Slots like slots_RS, better by the goal. room_R: how many slots of each rank may be used, the first ones. heat:
    what a change may cost at first, as the mean of an exponential; at the end of the tries it is `cold` times that."""
    ranks, experts = len(room_R), len(goal.shares_E)
    used = np.arange(slots_RS.shape[1]) < room_R[:, None]
    flat = np.ascontiguousarray(slots_RS[used], dtype=np.int32)
    loads = whole(np.empty((0, experts)) if goal.scenarios_NE is None else goal.scenarios_NE, ranks)
    weights = np.ascontiguousarray(np.empty(0) if goal.weights_N is None else goal.weights_N, np.float64)
    shares = np.ascontiguousarray(goal.shares_E / goal.shares_E.sum() * ranks)
    tokens = np.ascontiguousarray(np.empty((0, 1)) if goal.tokens_TK is None else goal.tokens_TK, np.int32)
    old = None if goal.old_RS is None else np.ascontiguousarray(held(goal.old_RS, experts), np.uint8)
    native.library("balance").improve(
        experts,
        ranks,
        native.pointer(room := np.ascontiguousarray(room_R, np.int32)),
        native.pointer(flat),
        ctypes.byref(
            _Goal(
                len(loads),
                native.pointer(loads),
                native.pointer(weights),
                native.pointer(shares),
                goal.even,
                goal.slack,
                goal.risk,
                goal.doubt,
                goal.nodes,
                *tokens.shape,
                native.pointer(tokens),
                0.0 if goal.tokens_TK is None else goal.copies,
                None if old is None else native.pointer(old),
                goal.move,
                np.iinfo(np.int64).max if goal.budget is None else goal.budget,
                -1.0 if goal.enough is None else goal.enough,
            )
        ),
        ctypes.c_int64(tries),
        ctypes.c_double(heat),
        ctypes.c_double(cold),
        ctypes.c_uint64(seed),
    )
    del room
    out = np.full_like(slots_RS, EMPTY)
    out[used] = flat
    return out


def arrange(slots_RS: Ints, room_R: Ints, nodes: int, tokens_TK: Ints, seed: int) -> Ints:
    """The same cards in other nodes, so that tokens are sent to fewer of them."""
    used = np.arange(slots_RS.shape[1]) < room_R[:, None]
    flat = np.ascontiguousarray(slots_RS[used], dtype=np.int32)
    tokens, room = np.ascontiguousarray(tokens_TK, np.int32), np.ascontiguousarray(room_R, np.int32)
    native.library("balance").arrange(
        int(slots_RS.max()) + 1, len(room), native.pointer(room), native.pointer(flat), nodes, *tokens.shape,
        native.pointer(tokens),
        ctypes.c_int64(ARRANGEMENTS), ctypes.c_double(WARMTH), ctypes.c_uint64(seed),
    )  # fmt: skip
    out = np.full_like(slots_RS, EMPTY)
    out[used] = flat
    return out


def held(slots_RS: Ints, experts: int) -> NDArray[np.bool_]:
    """[R, E]: whether a rank has an expert."""
    out = np.zeros((len(slots_RS), experts + 1), dtype=bool)
    out[np.arange(len(slots_RS))[:, None], slots_RS] = True
    return out[:, :experts]  # the last column is that of empty slots


def taken(new_RS: Ints, old_RS: Ints, experts: int) -> Ints:
    """[R]: how many experts a rank has now that it did not have."""
    count_R: Ints = (held(new_RS, experts) & ~held(old_RS, experts)).sum(1)
    return count_R


def even(slots_RS: Ints, loads_E: Floats) -> Floats:
    """Loads of the ranks [R] where the replicas of an expert share its load evenly."""
    has_RE = held(slots_RS, len(loads_E))
    loads_R: Floats = np.where(has_RE, loads_E / has_RE.sum(0), 0.0).sum(1)  # not by BLAS, see `total_LE`
    return loads_R


def replicate(shares_E: Floats, slots: int, most: int) -> Ints:
    """Replicas of each expert [E]: one more each time for the expert with the largest share; `most` of any one."""
    counts = np.ones(len(shares_E), dtype=np.int64)
    for _ in range(min(slots, most * len(shares_E)) - len(shares_E)):
        counts[np.argmax(np.where(counts < most, shares_E / counts, -1.0))] += 1
    return counts


def pack(
    shares_E: Floats, counts_E: Ints, room_R: Ints, taken: Sequence[Sequence[int]] | None = None
) -> Ints:
    """Slots [R, S]: the largest share first, each to the rank with the least load that has a free slot and not the
    expert. taken: what ranks have already. A rank that is full gives an expert away where no other way is left."""
    ranks = len(room_R)
    lists = [list(t) for t in taken] if taken else [[] for _ in range(ranks)]
    share = shares_E / counts_E
    loads = np.array([share[own].sum() if own else 0.0 for own in lists])
    free = room_R - np.array([len(own) for own in lists])
    have = np.zeros((ranks, len(shares_E)), dtype=bool)
    for rank, own in enumerate(lists):
        have[rank, own] = True
    for expert in np.argsort(-share, kind="stable").tolist():
        for _ in range(int(counts_E[expert] - have[:, expert].sum())):
            ready = np.flatnonzero((free > 0) & ~have[:, expert])
            if ready.size:
                rank = int(ready[np.argmin(loads[ready])])
            else:
                rank = _make_room(expert, lists, free, have, loads, share)
            lists[rank].append(expert)
            have[rank, expert] = True
            loads[rank] += share[expert]
            free[rank] -= 1
    out = np.full((ranks, int(room_R.max())), EMPTY, dtype=np.int64)
    for rank, own in enumerate(lists):
        out[rank, : len(own)] = own
    return out


def _make_room(
    expert: int, lists: list[list[int]], free: Ints, have: NDArray[np.bool_], loads: Floats, share: Floats
) -> int:
    """A rank without the expert, one of whose experts has gone to a rank with a free slot that has this one already."""
    for rank in np.flatnonzero(~have[:, expert]).tolist():
        for other in np.flatnonzero(free > 0).tolist():
            for given in lists[rank]:
                if not have[other, given]:
                    lists[rank].remove(given)
                    lists[other].append(given)
                    have[rank, given], have[other, given] = False, True
                    loads[rank] -= share[given]
                    loads[other] += share[given]
                    free[rank] += 1
                    free[other] -= 1
                    return rank
    raise AssertionError("fewer free slots than replicas")  # `replicate` gives no more than there are
