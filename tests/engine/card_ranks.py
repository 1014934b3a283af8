"""The program of a rank whose card is a stand-in: what it computes and sends is on the processor."""

import sys
from typing import Any

import torch

from expertmesh.comm.base import Collectives
from expertmesh.device import Device
from expertmesh.engine import worker
from expertmesh.launch.channel import Channel
from expertmesh.mesh.layout import Layout
from tests.support.cards import GB, Library


class Card(Device):
    """The second of two has less memory than the first."""

    @property
    def is_card(self) -> bool:
        return True

    @property
    def library(self) -> Library:
        return Library([6 * GB, 5 * GB], 8 * GB)


def serve_rank(spec: dict[str, Any], channel: Channel) -> None:
    """Collectives are those of cards, over gloo."""
    sys.modules["triton"] = None  # type: ignore[assignment]
    find: Any = Card
    worker.find = find  # type: ignore[attr-defined,unused-ignore]
    made = worker.card_collectives

    def over_gloo(
        layout: Layout, rank: int, device: torch.device, backend: str, **others: Any
    ) -> Collectives:
        assert device == torch.device("cpu")
        return made(layout, rank, device, "gloo", **others)

    worker.card_collectives = over_gloo  # type: ignore[attr-defined,assignment,unused-ignore]
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign,assignment]
    worker.serve_rank(spec, channel)
