"""What every transport offers, one primitive: an exchange of byte strings inside a group of ranks, counted."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertmesh.comm.fibers import Turns
from expertmesh.mesh.placement import Placement
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import ANNOUNCEMENT

T = TypeVar("T")
# What an exchange is for: its bytes are counted under this name.
Purpose: TypeAlias = Literal["attention", "dispatch", "combine", "counts", "weights"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
CPU = torch.device("cpu")


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
    """A collective could not be completed, as a rule because another rank has died: not the cause itself. suspects:
    the ranks that did not come to it."""

    def __init__(self, problem: str, suspects: Sequence[int] = ()) -> None:
        super().__init__(problem)
        self.suspects = tuple(suspects)


class Transfer(Protocol):
    """An exchange that is under way."""

    def wait(self) -> list[Tensor]:
        """What each rank of the group sent to this one, in their order. CommError where it cannot be completed."""
        ...


@dataclass(frozen=True)
class Done:
    """A transfer with nothing to wait for. Implements `Transfer`."""

    came: list[Tensor]

    def wait(self) -> list[Tensor]:
        return self.came


class Comm(ABC):
    """One rank's end of a transport. device: where what comes lies; parts that go may also lie in a processor's memory.

    turns: which of this rank's fibers runs. Exchanges are matched across ranks by group, fiber and their order in
    that fiber, so that fibers of one rank never hear each other.
    """

    def __init__(self, topology: Topology, rank: int, device: torch.device = CPU) -> None:
        self.topology, self.rank, self.device = topology, rank, device
        self.sent = ByteCount(topology, rank)
        self.turns = Turns()

    def new(self, rank: int, size: int) -> Tensor:
        """Uninitialised memory for a part that goes to this rank: such that it need not be copied, where there is."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    @abstractmethod
    def start(
        self,
        purpose: Purpose,
        ranks: Sequence[int],
        parts: Sequence[Tensor],
        sizes: Sequence[int] | None = None,
    ) -> Transfer:
        """parts[i], bytes (uint8, one axis), go to ranks[i], while this rank does something else.

        All of `ranks`, this one among them, call it with the same `ranks`, in the same order of calls. They are the
        whole cluster, a node, a rail or a TP group. sizes: how many bytes will come from each, where that is known;
        otherwise their lengths travel too. Nobody writes into a part any more, nor into what comes: it may be memory
        that another rank reads.
        """

    def helped(self) -> AbstractContextManager[None]:
        """Inside, what travels does so while this rank computes."""
        return nullcontext()

    def waits(self) -> list[Any] | None:
        """Bytes that have come or gone so far, and the ranks that this one waits for; None where it waits for none."""
        return None

    def where(self) -> str | None:
        """What this rank waits for at the moment, for reports of other threads."""
        return None

    def exchange(
        self,
        purpose: Purpose,
        ranks: Sequence[int],
        parts: Sequence[Tensor],
        sizes: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Start, and wait."""
        return self.start(purpose, ranks, parts, sizes).wait()


class Group(Protocol):
    """The TP group in one step: ranks of one node that share the heads of attention and the step's rows. leads: this
    is the group's first rank, which gives the results. whole: it is all of the group."""

    @property
    def leads(self) -> bool: ...

    @property
    def whole(self) -> bool: ...

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

    slots_RK holds -1 where a row has fewer choices here. trail: the way back, for each piece that the rows travelled in
    one record per hop. counts: of the rows of all ranks, where these are still under way.
    """

    layer: int
    x_RD: Tensor
    slots_RK: Tensor
    weights_RK: Tensor
    trail: tuple[Any, ...] = ()
    counts: Any = None


class Collectives(Protocol):
    """All that the runner of one rank needs of a cluster."""

    @property
    def exchange(self) -> "Exchange": ...

    def run(self, programs: Sequence[Callable[[], T]]) -> list[T]:
        """What the programs return, each of which may use the collectives: one computes while rows of another
        travel. All ranks run as many."""
        ...

    def group(self, rows: int) -> Group:
        """This rank's TP group in a step in which the group has so many rows."""
        ...


class Exchange(Protocol):
    """Sends rows to the ranks that hold their experts, and results back. combine takes what dispatch returned."""

    def prepare(self, pieces: int, split: str, rows: int) -> None:
        """For the next step, the same on all ranks. pieces: into how many the rows of every rank are cut on their
        way; split: how replicas are chosen (`comm.replicas`); rows: that a rank has at most."""
        ...

    def dispatch(self, layer: int, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received: ...

    def combine(self, y_RD: Tensor, received: Received) -> Tensor:
        """y_RD: for each received row the weighted sum over my slots. Returns the sum over all ranks, [T, D]."""
        ...


class MovingExchange(Exchange, Protocol):
    """An exchange of several ranks, whose experts may move."""

    @property
    def comm(self) -> Comm: ...

    def put(self, placement: Placement) -> None:
        """Choose slots by this placement from now on."""
        ...
