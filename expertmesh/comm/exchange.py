"""Rows to the ranks that hold their experts and back, in one hop or in two tiers (see `mesh.traffic`).

Across nodes one copy of a row goes to each node that holds any of its experts, to the peer with the sender's place
there, which hands it on inside its node. Results come back the same way, summed at every stage: a node sends back one
row per token. No row is dropped and none is padded.

The stages form a pipeline: a rank's rows go in pieces, and while one piece crosses to another node, the one before it
is handed on there. Results are summed and leave in the same pieces.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertmesh.comm.base import Comm, Received, Transfer
from expertmesh.comm.replicas import Replicas
from expertmesh.comm.rows import (
    Ints,
    Rows,
    chosen,
    dequantise,
    format_name,
    joined,
    pack,
    pack_rows,
    quantise,
    unpack,
    unpack_rows,
)
from expertmesh.mesh.placement import Placement
from expertmesh.mesh.traffic import Algorithm, Format, Hop, message_bytes, rows_bytes


@dataclass(frozen=True)
class Record:
    """What one hop did with one piece, for the way back. copied_C: the row of each copy that was sent, in the order of
    sending; sent and received: how many copies went to, and came from, each peer; count: rows that were held before."""

    copied_C: Ints
    sent: list[int]
    received: list[int]
    count: int


@dataclass(frozen=True)
class Held:
    """Rows that are here on their way, and their choices: entry e takes row row_E[e] to slot_E[e], a slot of the
    whole cluster. row_E ascends. trail: the hops behind them."""

    rows: Rows
    row_E: Ints
    slot_E: Ints
    weight_E: NDArray[np.float32]
    trail: tuple[Record, ...] = ()

    @property
    def count(self) -> int:
        return len(self.rows[0])


class TieredExchange:
    """The exchange of one rank by an algorithm. Implements `comm.base.Exchange`.

    pieces: into how many the rows of every rank are cut, the same number on all ranks.
    """

    def __init__(self, comm: Comm, placement: Placement, how: Algorithm, pieces: int = 1) -> None:
        self.comm, self.how, self.pieces = comm, how, pieces
        self.replicas = Replicas(comm, placement)

    def prepare(self, pieces: int, split: str, rows: int) -> None:
        self.pieces, self.replicas.how, self.replicas.rows = pieces, split, rows

    @property
    def placement(self) -> Placement:
        return self.replicas.placement

    def dispatch(self, layer: int, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received:
        choices, (width, plain) = experts_TK.shape[1], (x_TD.shape[1], format_name(x_TD.dtype))
        formats = self.how.formats("dispatch", plain, self.comm.topology)
        slots_TK, counts = self.replicas.choose(layer, experts_TK.numpy())
        held: Iterable[Held] = self._cut(quantise(x_TD, formats[0]), slots_TK, weights_TK.float().numpy())
        for number, (hop, form) in enumerate(zip(self.how.hops, formats, strict=True)):
            under_way = [self._send(hop, form, piece, width) for piece in held]
            if number == 0:
                self.comm.turns.turn()
            # One by one, when the next hop asks for it: a piece goes on while the one behind it travels.
            held = (outward.arrive() for outward in under_way)
        pieces = list(held)
        together = _chained(pieces)
        x_RD = dequantise(together.rows, formats[-1], x_TD.dtype)
        slots_RK, weights_RK = _table(together, choices, self.comm.rank * self.placement.slots_per_rank)
        if counts is not None:
            counts.forward()
        return Received(layer, x_RD, slots_RK, weights_RK, tuple(piece.trail for piece in pieces), counts)

    def combine(self, y_RD: Tensor, received: Received) -> Tensor:
        formats = self.how.formats("combine", format_name(y_RD.dtype), self.comm.topology)
        trails = received.trail
        results: Iterable[Tensor] = y_RD.split([sum(trail[-1].received) for trail in trails])
        for number, (hop, form) in reversed(list(enumerate(zip(self.how.hops, formats, strict=True)))):
            under_way = [
                self._return(hop, form, trail[number], y_RD)
                for trail, y_RD in zip(trails, results, strict=True)
            ]
            if number == 0:
                self.comm.turns.turn()
            results = (homeward.sum() for homeward in under_way)
        out = torch.cat(list(results))
        if received.counts is not None:
            self.replicas.learn(received.layer, received.counts)
        return out

    def _cut(self, rows: Rows, slots_TK: Ints, weights_TK: NDArray[np.float32]) -> list[Held]:
        """My rows in pieces."""
        count, choices = slots_TK.shape
        ends = [count * number // self.pieces for number in range(self.pieces + 1)]
        return [
            Held(
                chosen(rows, first, end),
                np.arange(end - first).repeat(choices),
                slots_TK[first:end].ravel(),
                weights_TK[first:end].ravel(),
            )
            for first, end in pairwise(ends)
        ]

    def _send(self, hop: Hop, form: Format, held: Held, width: int) -> "_Outward":
        """Start one hop forwards: a copy of each row to every peer that stands for one of its slots."""
        topology, size = self.comm.topology, self.placement.slots_per_rank
        peers = hop.peers(topology, self.comm.rank)
        peer_E = held.slot_E // (hop.span(topology) * size) - peers[0] // hop.span(topology)
        # Entries by peer, then by row: those of one copy lie side by side.
        order = peer_E.argsort(kind="stable")
        peer_E, row_E = peer_E[order], held.row_E[order]
        begins = np.ones(len(row_E), dtype=bool)
        if hop.merges:
            begins[1:] = (peer_E[1:] != peer_E[:-1]) | (row_E[1:] != row_E[:-1])
        starts = np.flatnonzero(begins)
        copied_C, counts_C = row_E[starts], np.diff(starts, append=len(row_E))
        sent = np.bincount(peer_E[starts], minlength=len(peers)).tolist()
        entries = np.bincount(peer_E, minlength=len(peers)).tolist()
        slots, weights = held.slot_E[order], held.weight_E[order]
        parts, c, e = [], 0, 0
        for peer, copies, count in zip(peers, sent, entries, strict=True):
            part = self.comm.new(peer, message_bytes(copies, count, width, form))
            own, choices = slice(c, c := c + copies), slice(e, e := e + count)
            pack(part.numpy(), held.rows, copied_C[own], counts_C[own], slots[choices], weights[choices])
            parts.append(part)
        transfer = self.comm.start("dispatch", peers, parts)
        return _Outward(transfer, width, form, held.trail, Record(copied_C, sent, [], held.count))

    def _return(self, hop: Hop, form: Format, record: Record, y_RD: Tensor) -> "_Homeward":
        """Start the same hop backwards: every received copy's result to where it came from."""
        peers = hop.peers(self.comm.topology, self.comm.rank)
        width, rows = y_RD.shape[1], quantise(y_RD, form)
        parts, first = [], 0
        for peer, count in zip(peers, record.received, strict=True):
            part = self.comm.new(peer, rows_bytes(count, width, form))
            pack_rows(part.numpy(), chosen(rows, first, first := first + count))
            parts.append(part)
        sizes = [rows_bytes(count, width, form) for count in record.sent]
        transfer = self.comm.start("combine", peers, parts, sizes)
        return _Homeward(transfer, width, form, record, y_RD.dtype)


@dataclass(frozen=True)
class _Outward:
    """Rows of one piece on one hop."""

    transfer: Transfer
    width: int
    form: Format
    trail: tuple[Record, ...]
    record: Record

    def arrive(self) -> Held:
        """Wait for what comes to this rank."""
        messages = [unpack(buffer.numpy(), self.width, self.form) for buffer in self.transfer.wait()]
        record = replace(self.record, received=[m.count for m in messages])
        counts = np.concatenate([m.counts_R for m in messages])
        return Held(
            joined([m.rows for m in messages]),
            np.arange(len(counts)).repeat(counts),
            np.concatenate([m.slots_E for m in messages]).astype(np.int64),
            np.concatenate([m.weights_E for m in messages]),
            (*self.trail, record),
        )


@dataclass(frozen=True)
class _Homeward:
    """Results of one piece on one hop."""

    transfer: Transfer
    width: int
    form: Format
    record: Record
    dtype: torch.dtype

    def sum(self) -> Tensor:
        """Wait for the results of the copies that this rank has sent; add up those of the same row, peer after peer:
        the order of a sum is part of the result."""
        buffers = zip(self.transfer.wait(), self.record.sent, strict=True)
        rows = joined([unpack_rows(b.numpy(), count, self.width, self.form) for b, count in buffers])
        out = torch.zeros(self.record.count, self.width, dtype=torch.float32)
        out.index_add_(0, torch.from_numpy(self.record.copied_C), dequantise(rows, self.form, torch.float32))
        return out.to(self.dtype)


def _chained(pieces: Sequence[Held]) -> Held:
    """Several pieces, one after the other."""
    if len(pieces) == 1:
        return pieces[0]
    firsts = accumulate((piece.count for piece in pieces), initial=0)
    return Held(
        joined([piece.rows for piece in pieces]),
        np.concatenate([piece.row_E + first for piece, first in zip(pieces, firsts, strict=False)]),
        np.concatenate([piece.slot_E for piece in pieces]),
        np.concatenate([piece.weight_E for piece in pieces]),
    )


def _table(held: Held, choices: int, first_slot: int) -> tuple[Tensor, Tensor]:
    """Slots of this rank and weights as [R, K], -1 and 0 where a row has fewer entries."""
    counts = np.bincount(held.row_E, minlength=held.count)
    place = np.arange(len(held.row_E)) - (counts.cumsum() - counts)[held.row_E]
    slots = np.full((held.count, choices), -1, dtype=np.int64)
    weights = np.zeros((held.count, choices), dtype=np.float32)
    slots[held.row_E, place] = held.slot_E - first_slot
    weights[held.row_E, place] = held.weight_E
    return torch.from_numpy(slots), torch.from_numpy(weights)
