"""Ranks as processes, over torch.distributed (gloo on CPUs)."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore

from expertmesh.comm.base import ByteCount, CommError, Purpose
from expertmesh.mesh.topology import Topology

LOOPBACK = "127.0.0.1"
# gloo picks an interface by host name otherwise, and can take minutes with the wrong one.
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo"}


def host_store() -> TCPStore:
    """Where ranks of this machine find each other, hosted by who starts them: it outlives every rank."""
    return TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)


class ProcessComm:
    """One process's end. Implements `comm.base.Comm`. Every rank of the cluster creates it at the same time."""

    def __init__(self, topology: Topology, rank: int, port: int, timeout: float) -> None:
        """port: of the store where the ranks find each other, see `host_store`."""
        self.topology, self.rank = topology, rank
        self.sent = ByteCount(topology, rank)
        bound = timedelta(seconds=timeout)
        store = TCPStore(LOOPBACK, port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=topology.ranks, timeout=bound)
        self._groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {
            topology.all_ranks(): dist.group.WORLD
        }
        for ranks in (topology.node_ranks(rank), topology.rail_ranks(rank), topology.tp_ranks(rank)):
            if len(ranks) > 1 and ranks not in self._groups:
                group = dist.new_group(
                    list(ranks), timeout=bound, backend="gloo", use_local_synchronization=True
                )
                self._groups[ranks] = group

    def exchange(
        self,
        purpose: Purpose,
        ranks: Sequence[int],
        parts: Sequence[Tensor],
        sizes: Sequence[int] | None = None,
    ) -> list[Tensor]:
        going = [p.numel() for p in parts]
        self.sent.add(purpose, ranks, going, announced=sizes is None)
        if len(ranks) == 1:
            return list(parts)
        group = self._groups[tuple(ranks)]
        try:
            if sizes is None:
                lengths = torch.tensor(going)
                dist.all_to_all_single(coming := torch.empty_like(lengths), lengths, group=group)
                sizes = coming.tolist()
            received = torch.empty(sum(sizes), dtype=torch.uint8)
            data = torch.cat(list(parts))
            dist.all_to_all_single(received, data, list(sizes), going, group=group)
        except RuntimeError as error:
            raise CommError(f"{purpose} among ranks {ranks[0]} to {ranks[-1]}: {error}") from error
        return list(received.split(list(sizes)))

    def close(self) -> None:
        dist.destroy_process_group()
