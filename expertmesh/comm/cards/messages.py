"""Messages as `mesh.traffic` counts them, on a card: rows that a host never sees, in places that it works out.

The parts of all messages of one hop travel in two or three collectives: each matrix of the rows by itself, which is not
copied for it, and all that says which rows these are, the particulars. How many copies and slots go to and come from
each peer is known before (`counts`), so that nothing waits for a length, and offsets are computed here, in numpy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from expertmesh.comm.cards.distributed import DistributedComm, Flight
from expertmesh.mesh.placement import Ints
from expertmesh.mesh.traffic import padded

HEADER = 8  # bytes: copies and slots of a message


@dataclass(frozen=True)
class Particulars:
    """Slots of each copy (uint8, [C]), the slots and their weights ([E]): of the first copy, then of the second."""

    counts_C: Tensor
    slots_E: Tensor
    weights_E: Tensor


@dataclass(frozen=True)
class Places:
    """Where the particulars of messages to, or from, several peers lie in one buffer. copies, entries: of each peer."""

    copies: Ints
    entries: Ints
    sizes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        sizes = np.where(self.copies > 0, HEADER + _even(self.copies) + 2 * _even(4 * self.entries), 0)
        object.__setattr__(self, "sizes", sizes.tolist())

    def pack(self, found: Particulars) -> Tensor:
        """Their bytes."""
        device = found.slots_E.device
        headers = np.stack([self.copies, self.entries], axis=1)[self.copies > 0].astype(np.int32)
        words = torch.cat([
            torch.from_numpy(headers).to(device).flatten(),
            found.slots_E.to(torch.int32),
            found.weights_E.view(torch.int32),
        ])  # fmt: skip
        header_W, count_C, slot_E, weight_E = self._where(device)
        buffer = torch.zeros(sum(self.sizes), dtype=torch.uint8, device=device)
        buffer.view(torch.int32)[torch.cat([header_W, slot_E, weight_E])] = words
        buffer[count_C] = found.counts_C
        return buffer

    def unpack(self, buffer: Tensor) -> Particulars:
        _, count_C, slot_E, weight_E = self._where(buffer.device)
        words = buffer.view(torch.int32)
        return Particulars(buffer[count_C], words[slot_E].long(), words[weight_E].view(torch.float32))

    def _where(self, device: torch.device) -> Sequence[Tensor]:
        """Of headers in words of four bytes, of counts in bytes, of slots and of weights in words."""
        sizes = np.array(self.sizes, dtype=np.int64)
        begins = np.cumsum(sizes) - sizes
        counts = begins + HEADER
        slots = counts + _even(self.copies)
        weights = slots + _even(4 * self.entries)
        parts = [
            _spread(begins // 4, 2 * (self.copies > 0)),
            _spread(counts, self.copies),
            _spread(slots // 4, self.entries),
            _spread(weights // 4, self.entries),
        ]
        # One copy to the card.
        places = torch.from_numpy(np.concatenate(parts)).to(device)
        return list(places.split([len(part) for part in parts]))


@dataclass(frozen=True)
class Matrix:
    """Rows of bytes [C, width] on their way."""

    flight: Flight
    width: int
    coming: Sequence[int]

    @staticmethod
    def send(
        comm: DistributedComm, peers: Sequence[int], part: Tensor, sent: Sequence[int], coming: Sequence[int]
    ) -> "Matrix":
        """The first of `sent` rows go to the first peer, and so on. Each message begins at a multiple of 8 bytes, as
        do all rows of a real model: nothing is copied for it then."""
        width, flat = part.shape[1], part.flatten()
        if width % 8:
            flat = torch.cat([pad(one, (0, -len(one) % 8)) for one in flat.split([n * width for n in sent])])
        sizes = ([padded(n * width) for n in counts] for counts in (sent, coming))
        return Matrix(comm.scatter("rows", peers, flat, *sizes), width, coming)

    def arrive(self) -> Tensor:
        flat = self.flight.wait()
        if self.width % 8:
            sizes = [n * self.width for n in self.coming]
            parts = flat.split([padded(size) for size in sizes])
            flat = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return flat.view(sum(self.coming), self.width)


def _even(sizes: Ints) -> Ints:
    """`mesh.traffic.padded` of many."""
    return -(-sizes // 8) * 8


def _spread(begins: Ints, lengths: NDArray[np.integer]) -> Ints:
    """begins[0], the next, and so on, lengths[0] in all; then from begins[1]."""
    firsts = np.cumsum(lengths) - lengths
    return np.repeat(begins - firsts, lengths) + np.arange(lengths.sum())
