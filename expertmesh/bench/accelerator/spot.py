"""Where things run: one card, or the CPU, with what measuring needs of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from expertmesh.device import free_memory
from expertmesh.errors import InputError

Kind = Literal["cpu", "cuda", "npu"]
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
# Files of a driver that is there, whatever torch knows of it, and what is missing then.
NODES = {"npu": "davinci[0-9]*", "cuda": "nvidia[0-9]*"}
INSTALL = {
    "npu": "CANN and the torch_npu of this torch's version (pip install torch-npu), for kernels triton-ascend",
    "cuda": "a torch that is built for CUDA, for kernels triton",
}
DRIVERS = {"npu": "an Ascend card", "cuda": "an NVIDIA card"}


class NotApplicable(Exception):
    """There is no such thing here; the message says why."""


class Wrong(Exception):
    """It ran, and gave what it must not give; the message says what."""


@dataclass(frozen=True)
class Spot:
    """kind: whose kernels compute; where: the device that tensors lie on."""

    kind: Kind
    index: int
    where: torch.device

    @cached_property
    def backend(self) -> Any:
        """torch.cpu, torch.cuda or torch.npu, which have the same functions."""
        return getattr(torch, self.where.type)

    @property
    def card(self) -> bool:
        """Whether tensors lie on a card: it has streams, events and a memory of its own."""
        return self.where.type != "cpu"

    def enter(self) -> None:
        """Make it this thread's."""
        if self.card:
            self.backend.set_device(self.index)

    def synchronise(self) -> None:
        if self.card:
            self.backend.synchronize()

    def event(self) -> Any:
        return self.backend.Event(enable_timing=True)

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and bytes in all."""
        if not self.card:
            free = free_memory()
            return free, free
        free, total = self.backend.mem_get_info()
        return int(free), int(total)

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """The launches of a call as a graph: what runs it again, and what the call returned, which that fills."""
        graph = self.backend.NPUGraph() if self.kind == "npu" else self.backend.CUDAGraph()
        scope = self.backend.graph(graph)
        with scope:
            out = call()
        return graph.replay, out


def spot(kind: Kind, index: int = 0) -> Spot:
    return Spot(kind, index, torch.device(kind, index) if kind != "cpu" else torch.device("cpu"))


def count(kind: str) -> int:
    """Cards of this kind that torch can use."""
    backend = getattr(torch, kind, None)
    return int(backend.device_count()) if backend is not None and backend.is_available() else 0


def find(name: str, devices: Path = Path("/dev")) -> Kind:
    """The kind that is asked for; "auto" takes npu, then cuda. devices: where drivers have their files. InputError
    where there is none, with what to install."""
    if name == "cpu":
        return "cpu"
    wanted: tuple[Kind, ...] = ("npu", "cuda") if name == "auto" else ("npu",) if name == "npu" else ("cuda",)
    for kind in wanted:
        if count(kind):
            return kind
    driven = [kind for kind in wanted if any(devices.glob(NODES[kind]))]
    what = " or ".join(DRIVERS[kind] for kind in driven or wanted)
    found = f"there is {what}, but torch cannot use it" if driven else f"no card was found ({what})"
    needs = "; ".join(f"{kind} needs {INSTALL[kind]}" for kind in driven or wanted)
    raise InputError(f"{found}: {needs}; --device cpu shows here what is examined")
