"""What every transport offers, one primitive: an exchange of byte strings inside a group of ranks, counted."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import ANNOUNCEMENT

# What an exchange is for: its bytes are counted under this name.
Purpose: TypeAlias = Literal["attention", "dispatch", "combine"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


@dataclass
class ByteCount:
    """Bytes and messages that one rank sent to each rank, by purpose. What a rank keeps is not counted."""

    topology: Topology
    rank: int
    bytes: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    messages: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def add(self, purpose: Purpose, ranks: Sequence[int], sizes: Sequence[int], announced: bool) -> None:
        """One exchange: sizes of the messages to `ranks`, and whether each was announced by a message of its own."""
        for table in (self.bytes, self.messages):
            table.setdefault(purpose, np.zeros(self.topology.ranks, dtype=np.int64))
        to, size = np.asarray(ranks), np.asarray(sizes, dtype=np.int64)
        others = to != self.rank
        self.bytes[purpose][to[others]] += size[others] + ANNOUNCEMENT * announced
        self.messages[purpose][to[others]] += (size[others] > 0).astype(np.int64) + announced

    def across(self, purpose: Purpose) -> int:
        """Bytes to other nodes."""
        return self._sum(self.bytes, purpose, inside=False)

    def in_node(self, purpose: Purpose) -> int:
        """Bytes to other ranks of the node."""
        return self._sum(self.bytes, purpose, inside=True)

    def _sum(self, table: dict[str, NDArray[np.int64]], purpose: Purpose, inside: bool) -> int:
        if purpose not in table:
            return 0
        ranks = np.arange(self.topology.ranks)
        same = ranks // self.topology.cards_per_node == self.topology.node_of(self.rank)
        return int(table[purpose][same == inside].sum())

    def clear(self) -> None:
        self.bytes.clear()
        self.messages.clear()


class CommError(RuntimeError):
    """A collective could not be completed, as a rule because another rank has died: not the cause itself."""


class Comm(Protocol):
    """One rank's end of a transport."""

    rank: int
    topology: Topology
    sent: ByteCount

    def exchange(
        self,
        purpose: Purpose,
        ranks: Sequence[int],
        parts: Sequence[Tensor],
        sizes: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """parts[i], bytes (uint8, one axis), go to ranks[i]; returns what each of `ranks` sent to this one.

        All of `ranks`, this one among them, call it with the same `ranks`, in the same order of calls. They are the
        whole cluster, a node, a rail or a TP group. sizes: how many bytes will come from each, where that is known;
        otherwise lengths are announced first. What comes may be memory that the sender still reads: nobody writes
        into it. CommError where it cannot be completed.
        """
        ...


class Group(Protocol):
    """The TP group in one step: ranks of one node that share the heads of attention and the step's rows. leads: this
    is the group's first rank, which gives the results."""

    @property
    def leads(self) -> bool: ...

    def all_gather(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Rows of the whole group, in rank order, from each rank's own."""
        ...

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """Sum over the group of every rank's rows; each rank gets its own share of them."""
        ...

    def gather_rows(self, mine: Tensor, wanted: Sequence[int]) -> Tensor:
        """The group's rows of these numbers, in this order, from each rank's own."""
        ...

    def gather_columns(self, part: Tensor) -> Tensor | None:
        """The last axis put together from each rank's part on the first rank; None on the others."""
        ...


@dataclass(frozen=True)
class Received:
    """Rows that came here for my slots, and what combine needs to send the results back.

    slots_RK holds -1 where a row has fewer choices here. trail: the way back, one record per hop.
    """

    layer: int
    x_RD: Tensor
    slots_RK: Tensor
    weights_RK: Tensor
    trail: tuple[object, ...] = ()


class Collectives(Protocol):
    """All that the runner of one rank needs of a cluster."""

    @property
    def exchange(self) -> "Exchange": ...

    def group(self, rows: int) -> Group:
        """This rank's TP group in a step in which the group has so many rows."""
        ...


class Exchange(Protocol):
    """Sends rows to the ranks that hold their experts, and results back. combine takes what dispatch returned."""

    def dispatch(self, layer: int, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received: ...

    def combine(self, y_RD: Tensor, received: Received) -> Tensor:
        """y_RD: for each received row the weighted sum over my slots. Returns the sum over all ranks, [T, D]."""
        ...
