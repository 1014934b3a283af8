"""Links between the cards of a machine: collectives of torch.distributed, timed, and what they carry looked at."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from expertmesh.bench.accelerator.outcome import Wrong
from expertmesh.device import Device
from expertmesh.launch.interfaces import use_for_gloo

RUN = 10  # exchanges in a measurement
ROUNDS = 3  # measurements, of which the best is taken


def meet(device: Device, place: Path, rank: int, ranks: int, timeout: float) -> None:
    """Makes the default group. place: a file that all of them see."""
    use_for_gloo("127.0.0.1")
    store = dist.FileStore(str(place), ranks)
    bound = timedelta(seconds=timeout)
    dist.init_process_group(device.backend, store=store, rank=rank, world_size=ranks, timeout=bound)


def _all_to_all(own: Tensor, came: Tensor) -> None:
    dist.all_to_all_single(came, own)


def _all_gather(own: Tensor, came: Tensor) -> None:
    dist.all_gather_into_tensor(came, own[: len(came) // dist.get_world_size()])


def _neighbours(own: Tensor, came: Tensor) -> None:
    """To the next rank, from the one before."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    part = len(came) // ranks
    before = (rank - 1) % ranks
    ops = [
        dist.P2POp(dist.isend, own[:part], (rank + 1) % ranks),
        dist.P2POp(dist.irecv, came[before * part : (before + 1) * part], before),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


KINDS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "all_to_all": _all_to_all,
    "all_gather": _all_gather,
    "neighbours": _neighbours,
}


def measure(device: Device, kind: str, size: int) -> float:
    """Seconds of one exchange of parts of so many bytes. Wrong where a part came damaged."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = torch.full((ranks * size,), rank + 1, dtype=torch.uint8, device=device.where)
    came = torch.zeros_like(own)
    exchange = KINDS[kind]
    exchange(own, came)
    device.wait()
    wanted = came.view(ranks, size).float().mean(1).round().long().tolist()
    senders = [(rank - 1) % ranks] if kind == "neighbours" else range(ranks)
    if any(
        wanted[sender] != sender + 1 or came.view(ranks, size)[sender].unique().numel() != 1
        for sender in senders
    ):
        raise Wrong(f"{kind} of {size} bytes: parts came damaged or from other ranks")
    best = float("inf")
    for _ in range(ROUNDS):
        dist.barrier()
        device.wait()
        start = time.perf_counter()
        for _ in range(RUN):
            exchange(own, came)
        device.wait()
        best = min(best, (time.perf_counter() - start) / RUN)
    return best


def sent(kind: str, ranks: int, size: int) -> int:
    """Bytes that a rank sends to others."""
    return size * (1 if kind == "neighbours" else ranks - 1)
