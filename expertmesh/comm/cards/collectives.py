"""All that the runner of a rank with a card needs of the others: chosen here, once, by the exchange's name."""

from collections.abc import Callable

import torch
from torch import distributed as dist

from expertmesh.comm.base import ByteCount, MovingExchange
from expertmesh.comm.cards import ascend, deepep
from expertmesh.comm.cards.distributed import DistributedComm
from expertmesh.comm.cards.exchange import CardExchange
from expertmesh.comm.cards.native import StepShape
from expertmesh.comm.fibers import Turns
from expertmesh.comm.group import Clustered
from expertmesh.errors import InputError
from expertmesh.mesh.layout import Layout
from expertmesh.mesh.placement import Placement

CONNECT: dict[str, Callable[[DistributedComm, Placement, StepShape, str], MovingExchange]] = {
    "torch_npu": ascend.connect,
    "deep_ep": deepep.connect,
}


class CardCollectives(Clustered):
    """The collectives of one rank whose rows lie on a card: those of its TP group are `comm.group`'s, over the card's
    network; the exchange is ours or a native one. Implements `comm.base.Collectives`."""

    comm: DistributedComm
    exchange: MovingExchange


def card_collectives(
    layout: Layout,
    rank: int,
    device: torch.device,
    backend: str,
    *,
    store: dist.Store,
    timeout: float,
    shape: StepShape,
    turns: Turns | None = None,
    sent: ByteCount | None = None,
) -> CardCollectives:
    """All ranks call it, before they load weights: what does not fit is found out here. backend: "hccl", "nccl", or
    "gloo" where the device is a processor; store: what the ranks meet at; timeout: seconds that a rank may be late;
    shape: what steps will ask of the exchange; turns, sent: of this rank, where it has some already.

    InputError where an exchange, a backend or a limit does not fit; CommError where a rank does not come.
    """
    how = layout.how
    if device.type == "npu" and "fp8" in (how.dispatch, how.combine):
        raise InputError(
            f"exchange {how.name}: Ascend cards have no FP8; take {how.name.replace('fp8', 'int8')}"
        )
    comm = DistributedComm(layout.topology, rank, device, backend, store, timeout)
    comm.turns, comm.sent = turns or comm.turns, sent or comm.sent
    if how.native is None:
        return CardCollectives(comm, CardExchange(comm, layout.placement, how))
    try:
        return CardCollectives(comm, CONNECT[how.native](comm, layout.placement, shape, how.name))
    except InputError:
        comm.close()
        raise
