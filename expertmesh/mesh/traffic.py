"""Which copies of a row go where, and how many bytes that is: the law of the exchange, for engine and planner.

An algorithm is a list of hops. In each, rows go to the ranks of a group by the slots that were chosen for them; a hop
that merges sends one copy of a row to a rank, whatever number of its slots were chosen. Combining goes the same way
back: what came in one copy returns as one row. Between processes each message has a frame's header too, of 23 bytes:
of these only the 8 of a length that is announced count here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from expertmesh.errors import InputError
from expertmesh.mesh.placement import Ints
from expertmesh.mesh.topology import Topology

ANNOUNCEMENT = (
    8  # bytes that tell a peer how long a message of unknown length will be, sent also where it is 0
)
MOST_CHOICES = 255  # experts of a token: a message says in one byte how many of a row's are at the receiver
Phase: TypeAlias = Literal["dispatch", "combine"]


@dataclass(frozen=True)
class Format:
    """How a row travels: bytes of a number, and how many numbers share a float32 scale (0: none has one)."""

    name: str
    itemsize: int
    scaled: int = 0

    def scales(self, width: int) -> int:
        """Scales of one row; the last block may be shorter."""
        return -(-width // self.scaled) if self.scaled else 0


BLOCK = 128
FORMATS = {
    "float32": Format("float32", 4),
    "bfloat16": Format("bfloat16", 2),
    "int8": Format("int8", 1, BLOCK),
    "fp8": Format("fp8", 1, BLOCK),
}


@dataclass(frozen=True)
class Hop:
    """One stage of an exchange. ranks: the group, in the order of `peers`; span: how many neighbouring ranks one peer
    stands for; merges: one copy of a row per peer, else one per chosen slot."""

    peers: Callable[[Topology, int], tuple[int, ...]]
    span: Callable[[Topology], int]
    merges: bool


@dataclass(frozen=True)
class Algorithm:
    """hops: from the rows' owner to the experts. dispatch, combine: formats on the first hop, the one that crosses
    nodes; None for the model's own; native: the package whose exchange it is, where it is not ours."""

    name: str
    hops: tuple[Hop, ...]
    dispatch: str | None = None
    combine: str | None = None
    native: str | None = None

    def peers(self, topology: Topology, rank: int) -> set[int]:
        """The ranks that this one talks with, those of its node among them."""
        return set(topology.node_ranks(rank)).union(*(hop.peers(topology, rank) for hop in self.hops)) - {
            rank
        }

    def formats(self, phase: Phase, plain: str, topology: Topology) -> list[Format]:
        """Of each hop. All rows are quantised alike, wherever their experts are, unless there is one node only. What
        was quantised to leave the node is handed on inside the next as it is; results are quantised once, when they
        leave the node that computed them."""
        quantised = self.dispatch if phase == "dispatch" else self.combine
        first = FORMATS[(quantised if topology.nodes > 1 else None) or plain]
        rest = first if phase == "dispatch" else FORMATS[plain]
        return [first, *[rest] * (len(self.hops) - 1)]


_ACROSS = Hop(Topology.rail_ranks, lambda t: t.cards_per_node, merges=True)
_INSIDE = Hop(Topology.node_ranks, lambda t: 1, merges=True)
_DIRECT = Hop(lambda t, _: t.all_ranks(), lambda t: 1, merges=False)

ALGORITHMS = {
    a.name: a
    for a in (
        Algorithm("flat", (_DIRECT,)),
        Algorithm("two_tier", (_ACROSS, _INSIDE)),
        Algorithm("two_tier_int8", (_ACROSS, _INSIDE), "int8"),
        Algorithm("two_tier_int8_both", (_ACROSS, _INSIDE), "int8", "int8"),
        Algorithm("two_tier_fp8", (_ACROSS, _INSIDE), "fp8"),
        Algorithm("two_tier_fp8_both", (_ACROSS, _INSIDE), "fp8", "fp8"),
    )
}
# Exchanges that makers of cards offer (`comm.cards`). Copies take these hops, but what is sent is not ours to count.
NATIVE = {
    a.name: a
    for a in (
        Algorithm("npu_distribute", (_ACROSS, _INSIDE), native="torch_npu"),
        Algorithm("npu_distribute_int8", (_ACROSS, _INSIDE), "int8", native="torch_npu"),
        Algorithm("deepep", (_ACROSS, _INSIDE), native="deep_ep"),
        Algorithm("deepep_fp8", (_ACROSS, _INSIDE), "fp8", native="deep_ep"),
    )
}


def algorithm(name: str, native: bool = False) -> Algorithm:
    """The algorithm of this name; native: it may be one of those too. InputError where there is none."""
    known = ALGORITHMS | NATIVE if native else ALGORITHMS
    if name not in known:
        raise InputError(f"exchange {name!r} is not one of {', '.join(known)}")
    return known[name]


def check_choices(experts_per_token: int) -> None:
    """InputError where rows with so many experts cannot be sent."""
    if experts_per_token > MOST_CHOICES:
        raise InputError(
            f"{experts_per_token} experts a token, but between ranks at most {MOST_CHOICES} are possible"
        )


def padded(size: int) -> int:
    """Parts of a message begin at multiples of 8 bytes, so that they can be read in place."""
    return -(-size // 8) * 8


def rows_bytes(rows: int, width: int, form: Format) -> int:
    """Bytes of this many rows: numbers, then scales."""
    return padded(rows * width * form.itemsize) + padded(rows * form.scales(width) * 4)


def message_bytes(rows: int, entries: int, width: int, form: Format) -> int:
    """Bytes of a dispatched message: a header, rows, how many slots each row has (1 byte), the slots (4 bytes) and
    their weights (4 bytes). A message without rows is not sent."""
    if not rows:
        return 0
    return 8 + rows_bytes(rows, width, form) + padded(rows) + 2 * padded(entries * 4)


@dataclass(frozen=True, eq=False)
class Traffic:
    """Bytes from each rank to each, [R, R], the diagonal (what stays on a rank) being 0; rows_R: rows computed by
    each rank, a row counting once for every chosen slot."""

    dispatch_RR: Ints
    combine_RR: Ints
    rows_R: Ints

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.dispatch_RR + other.dispatch_RR,
            self.combine_RR + other.combine_RR,
            self.rows_R + other.rows_R,
        )

    def across(self, phase: Phase, topology: Topology) -> int:
        """Bytes between nodes."""
        bytes_RR = self.dispatch_RR if phase == "dispatch" else self.combine_RR
        nodes = np.arange(topology.ranks) // topology.cards_per_node
        return int(bytes_RR[nodes[:, None] != nodes].sum())

    @property
    def imbalance(self) -> float:
        """Rows of the busiest rank over the mean."""
        mean = float(self.rows_R.mean())
        return float(self.rows_R.max()) / mean if mean else 1.0


def traffic(
    slots_by_rank: Sequence[Ints],
    topology: Topology,
    slots_per_rank: int,
    width: int,
    plain: str,
    how: Algorithm,
    pieces: int = 1,
) -> Traffic:
    """Bytes of one dispatch and combine. slots_by_rank: for each rank [T, K], the slots of the cluster chosen for its
    rows; width: numbers in a row; plain: the model's own format; pieces: into how many the rows of each rank are cut,
    each with messages of its own."""
    if pieces > 1:
        cut = [
            [s[len(s) * i // pieces : len(s) * (i + 1) // pieces] for s in slots_by_rank]
            for i in range(pieces)
        ]
        parts = [traffic(piece, topology, slots_per_rank, width, plain, how) for piece in cut]
        return reduce(Traffic.__add__, parts)
    ranks = topology.ranks
    dispatch, combine = np.zeros((2, ranks, ranks), dtype=np.int64)
    # What a rank holds at this stage: for each choice its row (numbered in the rank) and its slot.
    held = [(np.repeat(np.arange(len(s)), s.shape[1]), s.ravel()) for s in slots_by_rank]
    there = how.formats("dispatch", plain, topology)
    back = how.formats("combine", plain, topology)
    for hop, form, form_back in zip(how.hops, there, back, strict=True):
        coming: list[list[tuple[NDArray[np.int64], Ints]]] = [[] for _ in range(ranks)]
        for rank, (rows, slots) in enumerate(held):
            owners = slots // slots_per_rank
            for peer in hop.peers(topology, rank):
                first = peer - peer % hop.span(topology)
                mine = (owners >= first) & (owners < first + hop.span(topology))
                names = rows[mine] if hop.merges else np.flatnonzero(mine)
                copies, row_of = np.unique(names, return_inverse=True)
                dispatch[rank, peer] += ANNOUNCEMENT + message_bytes(
                    len(copies), int(mine.sum()), width, form
                )
                combine[peer, rank] += rows_bytes(len(copies), width, form_back)
                coming[peer].append((row_of, slots[mine]))
        held = [_joined(parts) for parts in coming]
    rows_R = np.array([len(rows) for rows, _ in held], dtype=np.int64)
    for counted in (dispatch, combine):
        np.fill_diagonal(counted, 0)
    return Traffic(dispatch, combine, rows_R)


def _joined(parts: Sequence[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    """Choices that came from several ranks, their rows numbered one after the other."""
    rows, first = [], 0
    for row_of, _ in parts:
        rows.append(row_of + first)
        first += int(row_of.max()) + 1 if row_of.size else 0
    return np.concatenate(rows), np.concatenate([slots for _, slots in parts])
