"""Our exchange with rows on cards: the hops, bytes and sums of `comm.exchange`, in ops of torch on the device.

The host learns how many copies go and come, once a dispatch, and nothing else. Sums are in a fixed order, without
atomics, so that their bits are the same in every run, and those of every other transport.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from expertmesh.comm.cards.counts import Counts, Route, gather, peers_of, route
from expertmesh.comm.cards.distributed import DistributedComm, Flight
from expertmesh.comm.cards.messages import Matrix, Particulars, Places
from expertmesh.comm.cards.native import EvenSlots
from expertmesh.comm.replicas import Gathering
from expertmesh.comm.rows import quantised, restored
from expertmesh.comm.tiers import Tiers
from expertmesh.mesh.placement import Placement
from expertmesh.mesh.traffic import Algorithm, Format, Hop, message_bytes, rows_bytes


@dataclass(frozen=True)
class CardRecord:
    """What one hop did with one piece, for the way back. copied_C: the row of each copy that was sent; sent, received:
    copies to and from each peer; count: rows that were held before; most: copies that one of them had at most."""

    copied_C: Tensor
    sent: list[int]
    received: list[int]
    count: int
    most: int


@dataclass(frozen=True)
class CardHeld:
    """Rows that are here on their way, each part as bytes [T, width], and their entries as in `comm.exchange.Held`.
    counts: of this piece on all hops, `Counts` of one piece each; choices: of a row, at most."""

    rows: tuple[Tensor, ...]
    row_E: Tensor
    slot_E: Tensor
    weight_E: Tensor
    counts: tuple[Counts, ...]
    choices: int
    trail: tuple[CardRecord, ...] = ()


class CardExchange(Tiers[CardHeld]):
    """The exchange of one rank. Replicas that are chosen by counts of all ranks ("now", "last") are planned on the
    host: experts go there and slots come back, two waits more a layer. "even" is a look-up on the card."""

    comm: DistributedComm

    def __init__(self, comm: DistributedComm, placement: Placement, how: Algorithm, pieces: int = 1) -> None:
        super().__init__(comm, placement, how, pieces)
        self._even = EvenSlots(comm, placement)

    def put(self, placement: Placement) -> None:
        super().put(placement)
        self._even = EvenSlots(self.comm, placement)

    def choose(self, layer: int, experts_TK: Tensor) -> tuple[Tensor, Gathering | None]:
        if self.replicas.how == "even":
            return self._even.choose(layer, experts_TK), None
        slots_TK, counts = self.replicas.choose(layer, experts_TK.cpu().numpy())
        return torch.from_numpy(slots_TK).to(experts_TK.device), counts

    def cut(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor, form: Format) -> list[CardHeld]:
        rows, weights_TK = quantised(x_TD, form), weights_TK.float()
        choices, spans = slots_TK.shape[1], list(pairwise(self.ends(len(slots_TK))))
        row_E = [torch.arange((end - first) * choices, device=x_TD.device) // choices for first, end in spans]
        slot_E = [slots_TK[first:end].flatten() for first, end in spans]
        counts = gather(
            self.comm, self.how, self.placement.slots_per_rank, list(zip(row_E, slot_E, strict=True))
        )
        return [
            CardHeld(
                tuple(part[first:end] for part in rows),
                row_E[piece],
                slot_E[piece],
                weights_TK[first:end].flatten(),
                tuple(Counts(hop.sent[piece], hop.came[piece]) for hop in counts),
                choices,
            )
            for piece, (first, end) in enumerate(spans)
        ]

    def send(self, hop: Hop, form: Format, held: CardHeld, width: int) -> "_Outward":
        comm, counts = self.comm, held.counts[len(held.trail)]
        peers, size = hop.peers(comm.topology, comm.rank), self.placement.slots_per_rank
        way = route(peers_of(held.slot_E, hop, comm, size), held.row_E, len(peers), hop.merges)
        copied_C, found = _copies(way, held, int(counts.sent[:, 0].sum()))
        sent, came = counts.sent[:, 0].tolist(), counts.came[:, 0].tolist()
        matrices = [Matrix.send(comm, peers, part[copied_C], sent, came) for part in held.rows]
        going, coming = Places(*counts.sent.T), Places(*counts.came.T)
        flight = comm.scatter("particulars", peers, going.pack(found), going.sizes, coming.sizes)
        sizes = [message_bytes(copies, entries, width, form) for copies, entries in counts.sent.tolist()]
        comm.sent.add("dispatch", peers, sizes, announced=True)  # by its counts
        most = min(len(peers), held.choices) if hop.merges else held.choices
        record = CardRecord(copied_C, sent, came, len(held.rows[0]), most)
        return _Outward(matrices, flight, coming, replace(held, trail=(*held.trail, record)))

    def settle(
        self, pieces: Sequence[CardHeld], choices: int, form: Format, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = [torch.cat(parts) for parts in zip(*(piece.rows for piece in pieces), strict=True)]
        row_E, count = _chained(pieces), len(rows[0])
        place_E = _place(row_E, count)
        slots = torch.full((count, choices), -1, dtype=torch.int64, device=row_E.device)
        weights = torch.zeros(count, choices, dtype=torch.float32, device=row_E.device)
        first_slot = self.comm.rank * self.placement.slots_per_rank
        slots[row_E, place_E] = torch.cat([piece.slot_E for piece in pieces]) - first_slot
        weights[row_E, place_E] = torch.cat([piece.weight_E for piece in pieces])
        return restored(rows, form, dtype), slots, weights

    def give_back(self, hop: Hop, form: Format, record: CardRecord, y_RD: Tensor) -> "_Homeward":
        comm, width = self.comm, y_RD.shape[1]
        peers = hop.peers(comm.topology, comm.rank)
        matrices = [
            Matrix.send(comm, peers, part, record.received, record.sent) for part in quantised(y_RD, form)
        ]
        sizes = [rows_bytes(count, width, form) for count in record.received]
        comm.sent.add("combine", peers, sizes, announced=False)
        return _Homeward(matrices, form, record, y_RD.dtype)


@dataclass(frozen=True)
class _Outward:
    """Implements `comm.tiers.Outward`. coming: where particulars of what comes lie; held: what was sent."""

    matrices: list[Matrix]
    flight: Flight
    coming: Places
    held: CardHeld

    def arrive(self) -> CardHeld:
        rows = tuple(matrix.arrive() for matrix in self.matrices)
        found = self.coming.unpack(self.flight.wait())
        ends_C = found.counts_C.long().cumsum(0)
        every_E = torch.arange(len(found.slots_E), device=ends_C.device)
        row_E = torch.searchsorted(ends_C, every_E, right=True)
        return replace(self.held, rows=rows, row_E=row_E, slot_E=found.slots_E, weight_E=found.weights_E)


@dataclass(frozen=True)
class _Homeward:
    """Implements `comm.tiers.Homeward`."""

    matrices: list[Matrix]
    form: Format
    record: CardRecord
    dtype: torch.dtype

    def sum(self) -> Tensor:
        record, copied_C = self.record, self.record.copied_C
        results = restored([matrix.arrive() for matrix in self.matrices], self.form, torch.float32)
        # For each row its results in the order in which they were sent, then as many times a row of zeros.
        order = torch.argsort(copied_C, stable=True)
        rows_C = copied_C[order]
        table = torch.full((record.count, record.most), len(results), device=order.device)
        table[rows_C, _place(rows_C, record.count)] = order
        results = torch.cat([results, results.new_zeros(1, results.shape[1])])
        out = results.new_zeros(record.count, results.shape[1])
        for column in table.unbind(1):
            out += results[column]
        return out.to(self.dtype)


def _copies(way: Route, held: CardHeld, copies: int) -> tuple[Tensor, Particulars]:
    """The row of each copy, and what is to be said of them."""
    numbers = torch.arange(copies + 1, device=way.copy_E.device)
    starts = torch.searchsorted(way.copy_E, numbers)  # the copies' entries lie side by side
    copied_C = held.row_E[way.order_E][starts[:-1]]
    counts_C = starts.diff().to(torch.uint8)
    return copied_C, Particulars(counts_C, held.slot_E[way.order_E], held.weight_E[way.order_E])


def _place(row_E: Tensor, count: int) -> Tensor:
    """The place of each entry among those of its row. row_E ascends and is less than count."""
    firsts = torch.searchsorted(row_E, torch.arange(count, device=row_E.device))
    return torch.arange(len(row_E), device=row_E.device) - firsts[row_E]


def _chained(pieces: Sequence[CardHeld]) -> Tensor:
    """Rows of the entries of several pieces, numbered one after the other."""
    parts, first = [], 0
    for piece in pieces:
        parts.append(piece.row_E + first)
        first += len(piece.rows[0])
    return torch.cat(parts)
