"""The order of an exchange, whatever memory its rows lie in: pieces through the hops of an algorithm and back.

The stages form a pipeline: a rank's rows go in pieces, and while one piece crosses to another node, the one before it
is handed on there. Results are summed and leave in the same pieces.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from expertmesh.comm.base import Comm, Received
from expertmesh.comm.replicas import Gathering, Replicas
from expertmesh.comm.rows import format_name
from expertmesh.mesh.placement import Placement
from expertmesh.mesh.traffic import Algorithm, Format, Hop


class Passed(Protocol):
    """Rows that are here on their way. trail: the hops behind them, the last one's `received` being how many of these
    rows came from each peer."""

    @property
    def trail(self) -> tuple[Any, ...]: ...


HeldT = TypeVar("HeldT", bound=Passed)
HeldT_co = TypeVar("HeldT_co", bound=Passed, covariant=True)


class Outward(Protocol[HeldT_co]):
    """Rows of one piece on one hop."""

    def arrive(self) -> HeldT_co:
        """Wait for what comes to this rank."""
        ...


class Homeward(Protocol):
    """Results of one piece on one hop."""

    def sum(self) -> Tensor:
        """Wait for the results of the copies that this rank has sent; add up those of the same row, peer after peer:
        the order of a sum is part of the result."""
        ...


class Tiers(ABC, Generic[HeldT]):
    """The exchange of one rank by an algorithm. Implements `comm.base.MovingExchange`; what is left open is how rows
    are packed where they lie.

    pieces: into how many the rows of every rank are cut, the same number on all ranks.
    """

    def __init__(self, comm: Comm, placement: Placement, how: Algorithm, pieces: int = 1) -> None:
        self.comm, self.how, self.pieces = comm, how, pieces
        self.replicas = Replicas(comm, placement)

    def prepare(self, pieces: int, split: str, rows: int) -> None:
        self.pieces, self.replicas.how, self.replicas.rows = pieces, split, rows

    def put(self, placement: Placement) -> None:
        """Choose slots by this placement from now on."""
        self.replicas.put(placement)

    @property
    def placement(self) -> Placement:
        return self.replicas.placement

    def dispatch(self, layer: int, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received:
        width, plain = x_TD.shape[1], format_name(x_TD.dtype)
        formats = self.how.formats("dispatch", plain, self.comm.topology)
        slots_TK, counts = self.choose(layer, experts_TK)
        held: Iterable[HeldT] = self.cut(x_TD, slots_TK, weights_TK, formats[0])
        for number, (hop, form) in enumerate(zip(self.how.hops, formats, strict=True)):
            under_way = [self.send(hop, form, piece, width) for piece in held]
            if number == 0:
                self.comm.turns.turn()
            # One by one, when the next hop asks for it: a piece goes on while the one behind it travels.
            held = (outward.arrive() for outward in under_way)
        pieces = list(held)
        arrived = self.settle(pieces, experts_TK.shape[1], formats[-1], x_TD.dtype)
        if counts is not None:
            counts.forward()
        return Received(layer, *arrived, tuple(piece.trail for piece in pieces), counts)

    def combine(self, y_RD: Tensor, received: Received) -> Tensor:
        formats = self.how.formats("combine", format_name(y_RD.dtype), self.comm.topology)
        trails = received.trail
        results: Iterable[Tensor] = y_RD.split([sum(trail[-1].received) for trail in trails])
        for number, (hop, form) in reversed(list(enumerate(zip(self.how.hops, formats, strict=True)))):
            under_way = [
                self.give_back(hop, form, trail[number], y_RD)
                for trail, y_RD in zip(trails, results, strict=True)
            ]
            if number == 0:
                self.comm.turns.turn()
            results = (homeward.sum() for homeward in under_way)
        out = torch.cat(list(results))
        if received.counts is not None:
            self.replicas.learn(received.layer, received.counts)
        return out

    def ends(self, count: int) -> list[int]:
        """Where pieces of so many rows begin and end."""
        return [count * number // self.pieces for number in range(self.pieces + 1)]

    @abstractmethod
    def choose(self, layer: int, experts_TK: Tensor) -> tuple[Any, Gathering | None]:
        """Slots of the cluster for my rows, and counts that are under way."""

    @abstractmethod
    def cut(self, x_TD: Tensor, slots_TK: Any, weights_TK: Tensor, form: Format) -> list[HeldT]:
        """My rows in pieces, in the format that they leave in."""

    @abstractmethod
    def send(self, hop: Hop, form: Format, held: HeldT, width: int) -> Outward[HeldT]:
        """Start one hop forwards: a copy of each row to every peer that stands for one of its slots."""

    @abstractmethod
    def settle(
        self, pieces: Sequence[HeldT], choices: int, form: Format, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of all pieces in the model's type, [R, D]; slots of this rank and weights as [R, K], -1 and 0 where a
        row has fewer choices here."""

    @abstractmethod
    def give_back(self, hop: Hop, form: Format, record: Any, y_RD: Tensor) -> Homeward:
        """Start the same hop backwards: every received copy's result to where it came from."""
