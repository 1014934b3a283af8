"""The transport that is there without this project: collectives of torch.distributed over gloo."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from expertmesh.comm.base import Comm, CommError, Done, Purpose
from expertmesh.launch.interfaces import use_for_gloo

NAME = "all_to_all_single"


class GlooComm(Comm):
    """all_to_all_single over the whole cluster, lengths first where they are not known."""

    def __init__(self, comm: Comm, address: str, timeout: float) -> None:
        """comm: another transport of the same ranks, over which they agree on where to meet. Called by all of them.
        CommError where they do not meet."""
        super().__init__(comm.topology, comm.rank)
        use_for_gloo(address)
        store, leads = None, comm.rank == 0
        bound = timedelta(seconds=timeout)
        if leads:
            store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=bound)
        said = f"{address} {store.port if store else 0}".ljust(32).encode()
        ranks = comm.topology.all_ranks()
        came = comm.exchange(
            "attention", ranks, [torch.frombuffer(bytearray(said), dtype=torch.uint8)] * len(ranks)
        )
        host, port = bytes(came[0].tolist()).decode().split()
        with _of_others("the meeting"):
            store = store or dist.TCPStore(host, int(port), is_master=False, timeout=bound)
            dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=len(ranks), timeout=bound)

    def start(
        self,
        purpose: Purpose,
        ranks: Sequence[int],
        parts: Sequence[Tensor],
        sizes: Sequence[int] | None = None,
    ) -> Done:
        going = [p.numel() for p in parts]
        self.sent.add(purpose, ranks, going, announced=sizes is None)
        if sizes is None:
            lengths = torch.tensor(going)
            all_to_all(coming := torch.empty_like(lengths), lengths)
            sizes = coming.tolist()
        received = torch.empty(sum(sizes), dtype=torch.uint8)
        all_to_all(received, torch.cat(list(parts)), list(sizes), going)
        return Done(list(received.split(list(sizes))))

    def close(self) -> None:
        dist.destroy_process_group()


def all_to_all(
    received: Tensor, sent: Tensor, coming: list[int] | None = None, going: list[int] | None = None
) -> None:
    """all_to_all_single of the default group. CommError where it cannot be completed."""
    with _of_others(NAME):
        dist.all_to_all_single(received, sent, coming, going)


@contextmanager
def _of_others(what: str) -> Iterator[None]:
    """What torch raises where another rank has died is not this one's failure."""
    try:
        yield
    except RuntimeError as error:
        raise CommError(f"{what} of gloo failed: {str(error).splitlines()[0]}") from error
