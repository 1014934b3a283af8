"""Ranks that exchange over torch.distributed: HCCL between Ascend cards, NCCL between CUDA ones, gloo without a card.

Everything is one collective, an all-to-all of bytes with uneven shares. Backends have gathers and reductions of their
own; they want equal shares, and add up in an order and a type of their own, so that bits would differ with the size of
a group, and from those of other transports.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from expertmesh.comm.base import Comm, CommError, Done, Purpose, Transfer
from expertmesh.errors import InputError
from expertmesh.mesh.topology import Topology

GRACE = 2.0  # seconds in which ranks say that they have met a failure as well


class DistributedComm(Comm):
    """One rank's end. `start` takes parts from anywhere and brings them to `device`.

    A collective is matched by its group and its order there; fibers take turns at the same places on all ranks, so
    that this order is the same. With HCCL and NCCL nothing here waits on the host, but where a length is not known:
    what is computed after a transfer's `wait` is queued behind it on the card.
    """

    def __init__(
        self,
        topology: Topology,
        rank: int,
        device: torch.device,
        backend: str,
        store: dist.Store,
        timeout: float,
    ) -> None:
        """All ranks call it; store: what they meet at; timeout: seconds that a rank may be late at a collective.
        InputError where torch has no such backend here, CommError where a rank does not come."""
        super().__init__(topology, rank, device)
        self._store, self._timeout = store, timedelta(seconds=timeout)
        self._where: str | None = None
        if not dist.is_backend_available(backend):
            raise InputError(
                f"torch.distributed has no {backend} here, which ranks on {device.type} talk over"
            )
        try:
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=topology.ranks, timeout=self._timeout
            )
            self._groups = {ranks: self.new_group(ranks) for ranks in _groups(topology)}
        except RuntimeError as error:
            raise CommError(f"rank {rank} could not join the others over {backend}: {error}") from error

    def new_group(self, ranks: Sequence[int], options: Any = None) -> "dist.ProcessGroup":
        """A communicator for this group alone. All ranks call it, in the same order, also those that are not in it.
        options: the backend's own."""
        group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=self._timeout, pg_options=options)
        return group

    def where(self) -> str | None:
        return self._where

    def start(
        self,
        purpose: Purpose,
        ranks: Sequence[int],
        parts: Sequence[Tensor],
        sizes: Sequence[int] | None = None,
    ) -> Transfer:
        lengths = [part.numel() for part in parts]
        self.sent.add(purpose, ranks, lengths, announced=sizes is None)
        if len(ranks) == 1:
            return Done([part.to(self.device) for part in parts])
        coming = self._lengths(ranks, lengths) if sizes is None else list(sizes)
        together = torch.cat([part.to(self.device) for part in parts])
        return _Parts(self.scatter(purpose, ranks, together, lengths, coming), coming)

    def scatter(
        self, what: str, ranks: Sequence[int], rows: Tensor, sent: Sequence[int], coming: Sequence[int]
    ) -> "Flight":
        """sent[i] of the first axis of `rows` go to ranks[i], coming[i] come from there. Not counted: who calls it
        knows what of it is a message."""
        if len(ranks) == 1:
            return Flight(self, what, tuple(ranks), None, rows, rows)
        into = rows.new_empty((sum(coming), *rows.shape[1:]))
        try:
            group = self._groups[tuple(ranks)]
            work = dist.all_to_all_single(into, rows, list(coming), list(sent), group=group, async_op=True)
        except RuntimeError as error:
            raise self._failed(what, ranks, error) from error
        return Flight(self, what, tuple(ranks), work, rows, into)

    def finish(self, flight: "Flight") -> Tensor:
        """Wait until it has come, on the card where there is one."""
        if flight.work is not None:
            self._where = f"{flight.what} of ranks {', '.join(map(str, flight.ranks))}"
            try:
                flight.work.wait()
            except RuntimeError as error:
                raise self._failed(flight.what, flight.ranks, error) from error
            self._where = None
        return flight.into

    def close(self) -> None:
        """Leave all groups."""
        dist.destroy_process_group()

    def _lengths(self, ranks: Sequence[int], lengths: Sequence[int]) -> list[int]:
        mine = torch.tensor(lengths, dtype=torch.int64, device=self.device)
        ones = [1] * len(ranks)
        found: list[int] = self.scatter("lengths", ranks, mine, ones, ones).wait().tolist()
        return found

    def _failed(self, what: str, ranks: Sequence[int], error: RuntimeError) -> CommError:
        gone = self._gone(ranks)
        named = f"; rank {', '.join(map(str, gone))} did not come to it" if gone else ""
        return CommError(f"{what} of ranks {', '.join(map(str, ranks))} failed: {error}{named}", gone)

    def _gone(self, ranks: Sequence[int]) -> list[int]:
        """Ranks that do not tell in a while that they have met a failure, as this one does: they have died, hang, or
        have not come so far. None where even the store is gone."""
        try:
            self._store.set(f"failed/{self.rank}", "yes")
        except RuntimeError:
            return []
        return [rank for rank in ranks if rank != self.rank and not self._has_failed(rank)]

    def _has_failed(self, rank: int) -> bool:
        try:
            self._store.wait([f"failed/{rank}"], timedelta(seconds=GRACE))
        except RuntimeError:
            return False
        return True


@dataclass(frozen=True)
class Flight:
    """Rows on their way to several ranks, and those that come from there. rows are held until they have left."""

    comm: DistributedComm
    what: str
    ranks: tuple[int, ...]
    work: "dist.Work | None"
    rows: Tensor
    into: Tensor

    def wait(self) -> Tensor:
        """What has come, sender after sender. CommError where it cannot be completed."""
        return self.comm.finish(self)


@dataclass(frozen=True)
class _Parts:
    """A flight of bytes. Implements `comm.base.Transfer`."""

    flight: Flight
    sizes: Sequence[int]

    def wait(self) -> list[Tensor]:
        return list(self.flight.wait().split(list(self.sizes)))


def _groups(topology: Topology) -> Iterator[tuple[int, ...]]:
    """Every group that ranks talk in, in an order that all agree on: the cluster, nodes, rails, TP groups."""
    every = range(topology.ranks)
    found = [topology.all_ranks()]
    for group_of in (topology.node_ranks, topology.rail_ranks, topology.tp_ranks):
        found += [group_of(rank) for rank in every]
    return (ranks for ranks in dict.fromkeys(found) if len(ranks) > 1)
