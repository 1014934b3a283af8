"""How many copies and slots go where, for all hops and pieces of a dispatch, before any row leaves.

A rank knows of its own rows what they will be on every hop, so it tells the peers of the first hop what comes to them,
and what they will hand on to each card of their node; these add that up and tell the cards. All of it happens on the
cards, in messages of fixed size, and then comes to the host at once: the only time in a dispatch that a host waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertmesh.comm.cards.distributed import DistributedComm
from expertmesh.mesh.placement import Ints
from expertmesh.mesh.traffic import Algorithm, Hop

WORD = 4  # bytes of a count


@dataclass(frozen=True)
class Counts:
    """Of one hop, for each piece, [pieces, peers, 2]: copies, and slots that these are for."""

    sent: Ints
    came: Ints


@dataclass(frozen=True)
class Route:
    """Entries of some rows on one hop, on the card: order_E sorts them by peer, then by row; copy_E is the number of
    the copy that each, sorted, belongs to; counts_P2 of each peer: copies, and entries."""

    order_E: Tensor
    copy_E: Tensor
    counts_P2: Tensor


def route(peer_E: Tensor, row_E: Tensor, peers: int, merges: bool) -> Route:
    """row_E ascends; entries of one row that go to one peer share a copy where the hop merges."""
    order = torch.argsort(peer_E, stable=True)
    peer, row = peer_E[order], row_E[order]
    begins = torch.ones_like(peer, dtype=torch.bool)
    if merges:
        begins[1:] = (peer[1:] != peer[:-1]) | (row[1:] != row[:-1])
    # Compared, not scattered: the same on every card, and without atomics.
    goes = peer[:, None] == torch.arange(peers, device=peer.device)
    counts = torch.stack([(goes & begins[:, None]).sum(0), goes.sum(0)], dim=1)
    return Route(order, begins.cumsum(0) - 1, counts)


def gather(
    comm: DistributedComm, how: Algorithm, size: int, entries: Sequence[tuple[Tensor, Tensor]]
) -> list[Counts]:
    """Of each hop. size: slots of a rank; entries: for each of my pieces the row of each entry, and its slot."""
    topology, rank, pieces = comm.topology, comm.rank, len(entries)
    peers = [hop.peers(topology, rank) for hop in how.hops]
    first, later = how.hops[0], how.hops[1:]
    mine_NPX = torch.stack([_of_piece(comm, first, later, size, *piece) for piece in entries])
    across_PNX = _exchanged(comm, peers[0], mine_NPX.transpose(0, 1))
    tables = [mine_NPX[:, :, 0], across_PNX[:, :, 0].transpose(0, 1)]
    if later:
        comm.sent.add(
            "counts", peers[0], [2 * WORD * len(peers[1]) * pieces] * len(peers[0]), announced=False
        )
        on_NQ2 = across_PNX[:, :, 1:].sum(0)
        tables += [on_NQ2, _exchanged(comm, peers[1], on_NQ2.transpose(0, 1)).transpose(0, 1)]
    flat: Ints = torch.cat([table.flatten() for table in tables]).cpu().numpy().astype(np.int64)
    parts = np.split(flat, np.cumsum([table.numel() for table in tables])[:-1])
    shaped = [part.reshape(table.shape) for part, table in zip(parts, tables, strict=True)]
    return [Counts(sent, came) for sent, came in zip(shaped[::2], shaped[1::2], strict=True)]


def peers_of(slot_E: Tensor, hop: Hop, comm: DistributedComm, size: int) -> Tensor:
    """Which of the hop's peers stands for each slot."""
    span = hop.span(comm.topology)
    first = hop.peers(comm.topology, comm.rank)[0] // span
    return torch.div(slot_E, span * size, rounding_mode="floor") - first


def _of_piece(
    comm: DistributedComm, hop: Hop, later: Sequence[Hop], size: int, row_E: Tensor, slot_E: Tensor
) -> Tensor:
    """[peers, 1 + cards, 2]: what each peer gets, and what it hands on to each card of its node."""
    peers = len(hop.peers(comm.topology, comm.rank))
    tables = [route(peers_of(slot_E, hop, comm, size), row_E, peers, hop.merges).counts_P2[:, None]]
    for onward in later:
        owner_E = torch.div(slot_E, size, rounding_mode="floor")
        every = route(owner_E, row_E, comm.topology.ranks, onward.merges).counts_P2
        tables.append(every.view(peers, -1, 2))
    return torch.cat(tables, dim=1).int()


def _exchanged(comm: DistributedComm, peers: Sequence[int], table_P: Tensor) -> Tensor:
    """Row i of the table goes to the i-th peer."""
    ones = [1] * len(peers)
    return comm.scatter("counts", peers, table_P.contiguous(), ones, ones).wait()
