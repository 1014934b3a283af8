"""Rows to the ranks that hold their experts and back, in one hop or in two tiers (see `mesh.traffic`).

Across nodes one copy of a row goes to each node that holds any of its experts, to the peer with the sender's place
there, which hands it on inside its node. Results come back the same way, summed at every stage: a node sends back one
row per token. No row is dropped and none is padded. In which order that happens is in `comm.tiers`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertmesh.comm.base import Transfer
from expertmesh.comm.replicas import Gathering
from expertmesh.comm.rows import (
    Ints,
    Rows,
    chosen,
    dequantise,
    joined,
    pack,
    pack_rows,
    quantise,
    unpack,
    unpack_rows,
)
from expertmesh.comm.tiers import Tiers
from expertmesh.mesh.traffic import Format, Hop, message_bytes, rows_bytes


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


class TieredExchange(Tiers[Held]):
    """With rows in the memory of a processor, packed by numpy."""

    def choose(self, layer: int, experts_TK: Tensor) -> tuple[Ints, Gathering | None]:
        return self.replicas.choose(layer, experts_TK.numpy())

    def cut(self, x_TD: Tensor, slots_TK: Ints, weights_TK: Tensor, form: Format) -> list[Held]:
        rows, weights, choices = quantise(x_TD, form), weights_TK.float().numpy(), slots_TK.shape[1]
        return [
            Held(
                chosen(rows, first, end),
                np.arange(end - first).repeat(choices),
                slots_TK[first:end].ravel(),
                weights[first:end].ravel(),
            )
            for first, end in pairwise(self.ends(len(slots_TK)))
        ]

    def send(self, hop: Hop, form: Format, held: Held, width: int) -> "_Outward":
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

    def settle(
        self, pieces: Sequence[Held], choices: int, form: Format, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        together = _chained(pieces)
        slots_RK, weights_RK = _table(together, choices, self.comm.rank * self.placement.slots_per_rank)
        return dequantise(together.rows, form, dtype), slots_RK, weights_RK

    def give_back(self, hop: Hop, form: Format, record: Record, y_RD: Tensor) -> "_Homeward":
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
    """Implements `comm.tiers.Outward`."""

    transfer: Transfer
    width: int
    form: Format
    trail: tuple[Record, ...]
    record: Record

    def arrive(self) -> Held:
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
    """Implements `comm.tiers.Homeward`."""

    transfer: Transfer
    width: int
    form: Format
    record: Record
    dtype: torch.dtype

    def sum(self) -> Tensor:
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
