"""Every step's rows over the replicas of their experts, by the counts of that step.

A flow problem: an expert's rows may go to any rank that has a replica of it, and the largest load of a rank is to be as
small as it can be. Augmenting paths bring ranks above a level down by way of experts that ranks share; where none is
left, the ranks reached hold only experts with no replica elsewhere, so their mean is a lower bound, and the next level
(a Newton iteration on the cut). All in whole numbers and in one order, so that every rank comes to the same plan.

Which rows move is up to each rank: it first wishes for the replicas that cost no copy to a further node, then all know
how many wishes each slot has, and only as many rows as the levels need are sent elsewhere.

`native/balance.cpp` does it fast. What is here gives the same numbers, for machines without a compiler and for tests.
"""

import ctypes
import math
import weakref
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertmesh import native
from expertmesh.mesh.loads import Floats
from expertmesh.mesh.placement import EMPTY, Ints
from expertmesh.mesh.topology import Topology

Small = NDArray[np.int32]
SCALE = 1_000_000  # load of the mean rank in whole numbers


@dataclass(frozen=True, eq=False)
class Split:
    """Of one layer. slots_RS: the expert in each slot of each rank, -1 where it is empty."""

    slots_RS: Ints
    experts: int
    topology: Topology
    plain: bool = False  # without the compiled library
    _native: int | None = field(init=False, repr=False)  # what the library knows it by

    def __post_init__(self) -> None:
        ranks, size = self.slots_RS.shape
        handle = None
        if not self.plain and native.available("balance"):
            library = native.library("balance")
            library.slots_new.restype = ctypes.c_void_p
            room, flat = np.full(ranks, size, np.int32), np.ascontiguousarray(self.slots_RS, np.int32)
            handle = library.slots_new(self.experts, ranks, native.pointer(room), native.pointer(flat))
            weakref.finalize(self, library.slots_free, ctypes.c_void_p(handle))
        object.__setattr__(self, "_native", handle)

    @cached_property
    def replicated(self) -> bool:
        """Whether there is anything to choose."""
        held = self.slots_RS[self.slots_RS != EMPTY]
        return bool(held.size > np.unique(held).size)

    def wish(self, experts_TK: Ints, rank: int) -> "Wish":
        """Where the rank's rows would go if only copies to nodes counted."""
        rows, chosen = experts_TK.shape
        size = self.slots_RS.size
        out = np.empty((rows, chosen), np.int64)
        free, counts = np.empty((rows, chosen), np.uint8), np.empty((2, size), np.int32)
        if self._native is None:
            _Plain(self).wish(experts_TK, rank, out, free, counts)
        else:
            experts = np.ascontiguousarray(experts_TK, np.int64)
            arrays: list[NDArray[Any]] = [experts, out, free, counts]
            self._call("wish", rank, rows, chosen, *map(native.pointer, arrays))
        return Wish(experts_TK, out, free, counts)

    def settle(self, counts_R2P: Small, rank: int, tolerance: float = 0.0) -> tuple[Small, Small]:
        """What has to change in the wishes of `rank` so that the ranks are level, by the wishes of all [R, 2, P]: how
        many bound and open rows leave a slot [2, P], and how many come to it [P]. The same plan on every rank.

        No more is moved than brings each rank to 1 + tolerance of the mean, or as near as can be; open wishes first,
        then those of other nodes than the slot's.
        """
        size = self.slots_RS.size
        shed, take = np.zeros((2, size), np.int32), np.zeros(size, np.int32)
        if self._native is None:
            _Plain(self).settle(counts_R2P, rank, tolerance, shed, take)
        else:
            counts = np.ascontiguousarray(counts_R2P, np.int32)
            tolerance_ = native.real(tolerance)
            self._call("settle", native.pointer(counts), tolerance_, rank, *map(native.pointer, (shed, take)))
        return shed, take

    def assign(self, wish: "Wish", rank: int, shed: Small, take: Small) -> Ints:
        """Slots [T, K] for the rank's rows: the wish, changed by the plan; rows first that visit the other slot's
        node anyway."""
        out, shed, take = wish.slots_TK.copy(), shed.copy(), take.copy()
        if self._native is None:
            _Plain(self).assign(wish, rank, out, shed, take)
        else:
            experts = np.ascontiguousarray(wish.experts_TK, np.int64)
            arrays: list[NDArray[Any]] = [experts, out, wish.open_TK, shed, take]
            self._call("reassign", rank, *out.shape, *map(native.pointer, arrays))
        return out

    def _call(self, name: str, *args: Any) -> None:
        call = getattr(native.library("balance"), name)
        call(ctypes.c_void_p(self._native), self.topology.cards_per_node, *args)


@dataclass(frozen=True, eq=False)
class Wish:
    """Slots [T, K] of a rank's rows before they are levelled. open_TK: 1 where the row has no other reason to visit
    the node, so that another replica would do as well; counts_2P: rows of each slot, bound and open ones."""

    experts_TK: Ints
    slots_TK: Ints
    open_TK: NDArray[np.uint8]
    counts_2P: Small


def level(slots_RS: Ints, loads_NE: Floats, plain: bool = False) -> Floats:
    """Loads of the ranks [N, R], each row of loads split over the replicas so that no rank could have less without
    one that has no more getting more."""
    ranks, experts = len(slots_RS), loads_NE.shape[1]
    loads = whole(loads_NE, ranks)
    out = np.empty((len(loads), ranks), np.int64)
    if not plain and native.available("balance"):
        room = np.full(ranks, slots_RS.shape[1], np.int32)
        flat = np.ascontiguousarray(slots_RS.reshape(-1), np.int32)
        native.library("balance").level(
            experts, ranks, native.pointer(room), native.pointer(flat), len(loads), native.pointer(loads),
            native.pointer(out),
        )  # fmt: skip
    else:
        flow = _Plain(Split(slots_RS, experts, Topology(1, ranks), plain=True))
        for row, load in zip(out, loads, strict=True):
            row[:] = flow.fair(load.tolist())
    loads_NR: Floats = out / SCALE * (loads_NE.sum(1, keepdims=True) / ranks)
    return loads_NR


def whole(loads_NE: Floats, ranks: int) -> Ints:
    """Loads in whole numbers, the mean of a rank being SCALE."""
    total = loads_NE.sum(1, keepdims=True)
    return np.ascontiguousarray(np.rint(loads_NE / np.where(total > 0, total, 1) * (ranks * SCALE)), np.int64)


class _Plain:
    """The same in Python, step by step as in native/balance.cpp."""

    def __init__(self, split: Split) -> None:
        self.ranks, self.size = map(int, split.slots_RS.shape)
        self.cards = split.topology.cards_per_node
        self.expert_of = [int(e) for e in split.slots_RS.reshape(-1)]
        self.at: list[list[int]] = [[] for _ in range(split.experts)]
        for slot, expert in enumerate(self.expert_of):
            if expert != EMPTY:
                self.at[expert].append(slot)
        self.slot = [0] * len(self.expert_of)
        self.load = [0] * self.ranks

    def wish(self, experts_TK: Ints, rank: int, out: Ints, free: NDArray[np.uint8], counts: Small) -> None:
        home = rank // self.cards
        counts[:] = 0
        for t, experts in enumerate(experts_TK.tolist()):
            ats = [self.at[e] for e in experts]
            to = [at[0] if len(at) == 1 else -1 for at in ats]
            is_open = [0] * len(to)
            visited = {home} | {self._node(p) for p in to if p >= 0}
            for last in (False, True):
                for k, at in enumerate(ats):
                    if to[k] >= 0:
                        continue
                    best, best_value = -1, -1 if last else 0
                    for i in range(len(at)):
                        p = at[(i + t + rank) % len(at)]
                        node = self._node(p)
                        own = p // self.size == rank
                        value = 3 if own else 2 if node == home else 1 if node in visited else 0
                        if value > best_value:
                            best, best_value = p, value
                    if best >= 0:
                        to[k], is_open[k] = best, int(best_value == 0)
                        visited.add(self._node(best))
            out[t], free[t] = to, is_open
            for p, kind in zip(to, is_open, strict=True):
                counts[kind, p] += 1

    def settle(self, counts_R2P: Small, rank: int, tolerance: float, shed: Small, take: Small) -> None:
        wished: list[list[list[int]]] = counts_R2P.tolist()
        before = counts_R2P.sum((0, 1)).tolist()
        self.slot = list(before)
        self.load = [sum(before[r * self.size : (r + 1) * self.size]) for r in range(self.ranks)]
        self._run(math.ceil(sum(self.load) / self.ranks * (1 + tolerance)), set())
        for at in self.at:
            homeless = [0] * self.ranks
            for p in at:
                for kind, near in ((1, False), (1, True), (0, False), (0, True)):
                    for r in range(self.ranks):
                        if (r // self.cards == self._node(p)) == near and before[p] > self.slot[p]:
                            part = min(before[p] - self.slot[p], wished[r][kind][p])
                            before[p] -= part
                            homeless[r] += part
                            shed[kind, p] += part if r == rank else 0
            for anywhere in (False, True):
                for p in at:
                    for r in range(self.ranks):
                        if (anywhere or r // self.cards == self._node(p)) and before[p] < self.slot[p]:
                            part = min(self.slot[p] - before[p], homeless[r])
                            before[p] += part
                            homeless[r] -= part
                            take[p] += part if r == rank else 0

    def assign(self, wish: Wish, rank: int, out: Ints, shed: Small, take: Small) -> None:
        for anywhere in (False, True):
            for t, experts in enumerate(wish.experts_TK.tolist()):
                visited = {rank // self.cards} | {self._node(p) for p in out[t].tolist()}
                for k, expert in enumerate(experts):
                    kind, at = int(wish.open_TK[t, k]), self.at[expert]
                    if len(at) < 2 or shed[kind, out[t, k]] <= 0:
                        continue
                    ready = [p for p in at if take[p] > 0 and (anywhere or self._node(p) in visited)]
                    if ready:
                        best = max(ready, key=lambda p: (int(take[p]), -p))
                        shed[kind, out[t, k]] -= 1
                        take[best] -= 1
                        out[t, k] = best
                        visited.add(self._node(best))

    def fair(self, load: list[int]) -> list[int]:
        self.slot, self.load = [0] * len(self.slot), [0] * self.ranks
        for at, rows in zip(self.at, load, strict=True):
            self._give(at, rows)
        settled: set[int] = set()
        while len(settled) < self.ranks:
            open_ = [r for r in range(self.ranks) if r not in settled]
            tight = self._run(-(-sum(self.load[r] for r in open_) // len(open_)), settled)
            if not tight:
                break
            settled |= tight
        return self.load

    def _node(self, slot: int) -> int:
        return slot // (self.size * self.cards)

    def _give(self, to: list[int], rows: int) -> None:
        for i, p in enumerate(to):
            part = rows // (len(to) - i)
            rows -= part
            self.slot[p] += part
            self.load[p // self.size] += part

    def _run(self, level: int, settled: set[int]) -> set[int]:
        """Ranks that nothing can leave, once no other is above the level."""
        tight: set[int] = set()
        while True:
            queue = [r for r in range(self.ranks) if self.load[r] > level and r not in settled]
            if not queue:
                return tight
            reached: dict[int, tuple[int, int] | None] = dict.fromkeys(queue)
            sink = self._search(queue, reached, level, settled)
            if sink is not None:
                self._augment(reached, level, sink)
                continue
            level = max(level + 1, -(-sum(self.load[r] for r in queue) // len(queue)))
            tight = set(queue)

    def _search(
        self, queue: list[int], reached: dict[int, tuple[int, int] | None], level: int, settled: set[int]
    ) -> int | None:
        seen: set[int] = set()
        for rank in queue:  # grows meanwhile
            for p in range(rank * self.size, (rank + 1) * self.size):
                expert = self.expert_of[p]
                if expert == EMPTY or expert in seen or len(self.at[expert]) < 2 or self.slot[p] <= 0:
                    continue
                seen.add(expert)
                for o in self.at[expert]:
                    other = o // self.size
                    if other not in reached and other not in settled:
                        reached[other] = (p, o)
                        if self.load[other] < level:
                            return other
                        queue.append(other)
        return None

    def _augment(self, reached: dict[int, tuple[int, int] | None], level: int, sink: int) -> None:
        amount, path, rank = level - self.load[sink], [], sink
        while (step := reached[rank]) is not None:
            path.append(step)
            amount = min(amount, self.slot[step[0]])
            rank = step[0] // self.size
        amount = min(amount, self.load[rank] - level)
        self.load[rank] -= amount
        self.load[sink] += amount
        for p, o in path:
            self.slot[p] -= amount
            self.slot[o] += amount
