"""Clusters of ranks over torch.distributed: threads of this process over torch's own group for tests, and processes
over gloo."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from expertmesh.comm.base import Received
from expertmesh.comm.cards.distributed import DistributedComm
from expertmesh.mesh.topology import Topology

T = TypeVar("T")
CPU = torch.device("cpu")


@contextmanager
def threaded_groups() -> Iterator[None]:
    """Inside, each thread is a rank of torch.distributed, with a backend named "threaded"."""
    threaded._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded.ProcessLocalGroup.reset()
    try:
        yield
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        threaded._uninstall_threaded_pg()


class CardWorld:
    """`LocalWorld`'s interface over `DistributedComm`: each thread is a rank whose card is the processor."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def run(self, program: Callable[[DistributedComm], T]) -> list[T]:
        results: list[T | BaseException | None] = [None] * self.topology.ranks
        store = dist.HashStore()

        def serve(rank: int) -> None:
            torch.set_num_threads(1)
            try:
                comm = DistributedComm(self.topology, rank, CPU, "threaded", store, 60.0)
                results[rank] = program(comm)
                comm.close()
            except BaseException as error:
                results[rank] = error
                threaded.ProcessLocalGroup.exception_handle(error)

        default = torch.get_num_threads()
        with threaded_groups():
            ranks = range(self.topology.ranks)
            threads = [
                threading.Thread(target=serve, args=(r,), name=f"rank {r}", daemon=True) for r in ranks
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        torch.set_num_threads(default)
        failed = [r for r in results if isinstance(r, BaseException)]
        if failed:
            raise min(failed, key=lambda error: isinstance(error, SystemExit))
        return results  # type: ignore[return-value]


def experts_of(received: Received, first_slot: int) -> Tensor:
    """Stand-ins for experts that no two slots of a cluster share: for each row the weighted sum over its slots."""
    y = torch.zeros_like(received.x_RD, dtype=torch.float32)
    for slots, weights in zip(received.slots_RK.unbind(1), received.weights_RK.unbind(1), strict=True):
        scale = 1 + (first_slot + slots[:, None]) / 7
        result = weights[:, None] * (received.x_RD.float() * scale + slots[:, None])
        y += torch.where(slots[:, None] >= 0, result, 0.0)
    return y.to(received.x_RD.dtype)
