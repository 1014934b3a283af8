"""Rows to the ranks that hold their experts and back, in one hop or in two tiers (see `mesh.traffic`).

Across nodes one copy of a row goes to each node that holds any of its experts, to the peer with the sender's place
there, which hands it on inside its node. Results come back the same way, summed at every stage: a node sends back one
row per token. No row is dropped and none is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmesh.comm.base import Comm, Received
from expertmesh.comm.rows import (
    Message,
    Rows,
    dequantise,
    format_name,
    pack,
    pack_rows,
    quantise,
    unpack,
    unpack_rows,
)
from expertmesh.mesh.placement import Placement
from expertmesh.mesh.traffic import Algorithm, Format, Hop, rows_bytes


@dataclass(frozen=True)
class Held:
    """Rows that are here on their way, and their choices: entry e takes row row_E[e] to slot_E[e], a slot of the
    whole cluster. row_E ascends."""

    rows: Rows
    row_E: Tensor
    slot_E: Tensor
    weight_E: Tensor

    @property
    def count(self) -> int:
        return self.rows[0].shape[0]


@dataclass(frozen=True)
class Record:
    """What one hop did, for the way back. copied_C: the row of each copy that was sent, in the order of sending;
    sent and received: how many copies went to, and came from, each peer; count: rows that were held before."""

    copied_C: Tensor
    sent: list[int]
    received: list[int]
    count: int


class TieredExchange:
    """The exchange of one rank by an algorithm. Implements `comm.base.Exchange`."""

    def __init__(self, comm: Comm, placement: Placement, how: Algorithm) -> None:
        self.comm, self.how = comm, how
        self.placement = placement
        self._slot_of = {
            layer: torch.from_numpy(placement.choices(layer, comm.topology)[comm.rank])
            for layer in placement.layers
        }

    def dispatch(self, layer: int, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received:
        (rows, choices), (width, plain) = experts_TK.shape, (x_TD.shape[1], format_name(x_TD.dtype))
        formats = self.how.formats("dispatch", plain, self.comm.topology)
        held = Held(
            quantise(x_TD, formats[0]),
            torch.arange(rows).repeat_interleave(choices),
            self._slot_of[layer][experts_TK].flatten(),
            weights_TK.float().flatten(),
        )
        trail = []
        for hop, form in zip(self.how.hops, formats, strict=True):
            held, record = self._send(hop, form, held, width)
            trail.append(record)
        x_RD = dequantise(held.rows, formats[-1], x_TD.dtype)
        slots_RK, weights_RK = _table(held, choices, self.comm.rank * self.placement.slots_per_rank)
        return Received(layer, x_RD, slots_RK, weights_RK, tuple(trail))

    def combine(self, y_RD: Tensor, received: Received) -> Tensor:
        formats = self.how.formats("combine", format_name(y_RD.dtype), self.comm.topology)
        stages = zip(self.how.hops, formats, received.trail, strict=True)
        for hop, form, record in reversed(list(stages)):
            assert isinstance(record, Record)
            y_RD = self._return(hop, form, record, y_RD)
        return y_RD

    def _send(self, hop: Hop, form: Format, held: Held, width: int) -> tuple[Held, Record]:
        """One hop forwards: a copy of each row to every peer that stands for one of its slots."""
        topology, size = self.comm.topology, self.placement.slots_per_rank
        peers = hop.peers(topology, self.comm.rank)
        span = hop.span(topology) * size
        first = peers[0] // hop.span(topology)
        peer_E = held.slot_E // span - first
        # Entries by peer, then by row: those of one copy lie side by side.
        order = peer_E.argsort(stable=True)
        peer_E, row_E = peer_E[order], held.row_E[order]
        begins = torch.ones_like(row_E, dtype=torch.bool)
        if hop.merges:
            begins[1:] = (peer_E[1:] != peer_E[:-1]) | (row_E[1:] != row_E[:-1])
        copied_C, copy_peer = row_E[begins], peer_E[begins]
        counts_C = torch.bincount(begins.cumsum(0) - 1, minlength=copied_C.shape[0])
        sent = torch.bincount(copy_peer, minlength=len(peers)).tolist()
        entries = torch.bincount(peer_E, minlength=len(peers)).tolist()
        parts = [
            pack(held.rows, *part, form)
            for part in zip(
                copied_C.split(sent),
                counts_C.split(sent),
                held.slot_E[order].split(entries),
                held.weight_E[order].split(entries),
                strict=True,
            )
        ]
        messages = [unpack(b, width, form) for b in self.comm.exchange("dispatch", peers, parts)]
        return _joined(messages), Record(copied_C, sent, [m.count for m in messages], held.count)

    def _return(self, hop: Hop, form: Format, record: Record, y_RD: Tensor) -> Tensor:
        """The same hop backwards: every received copy's result to where it came from, summed there by row."""
        peers = hop.peers(self.comm.topology, self.comm.rank)
        width, rows = y_RD.shape[1], quantise(y_RD, form)
        index = torch.arange(y_RD.shape[0])
        parts = [pack_rows(rows, part, form) for part in index.split(record.received)]
        sizes = [rows_bytes(count, width, form) for count in record.sent]
        buffers = self.comm.exchange("combine", peers, parts, sizes)
        came = [unpack_rows(b, n, width, form) for b, n in zip(buffers, record.sent, strict=True)]
        out = torch.zeros(record.count, width, dtype=torch.float32)
        # Peer after peer: the order of a sum is part of the result.
        for rows_P, copied in zip(came, record.copied_C.split(record.sent), strict=True):
            out.index_add_(0, copied, dequantise(rows_P, form, torch.float32))
        return out.to(y_RD.dtype)


def _joined(messages: Sequence[Message]) -> Held:
    """Rows of several messages, one after the other."""
    counts = torch.cat([m.counts_R for m in messages]).long()
    rows = tuple(_cat(part) for part in zip(*(m.rows for m in messages), strict=True))
    return Held(
        rows,
        torch.arange(counts.shape[0]).repeat_interleave(counts),
        torch.cat([m.slots_E for m in messages]).long(),
        torch.cat([m.weights_E for m in messages]),
    )


def _cat(parts: Sequence[Tensor]) -> Tensor:
    filled = [p for p in parts if p.shape[0]] or list(parts[:1])
    return filled[0] if len(filled) == 1 else torch.cat(filled)


def _table(held: Held, choices: int, first_slot: int) -> tuple[Tensor, Tensor]:
    """Slots of this rank and weights as [R, K], -1 and 0 where a row has fewer entries."""
    counts = torch.bincount(held.row_E, minlength=held.count)
    first = counts.cumsum(0) - counts
    place = torch.arange(held.row_E.shape[0]) - first[held.row_E]
    slots = torch.full((held.count, choices), -1, dtype=torch.int64)
    weights = torch.zeros(held.count, choices, dtype=torch.float32)
    slots[held.row_E, place] = held.slot_E - first_slot
    weights[held.row_E, place] = held.weight_E
    return slots, weights
