"""The devices that a rank computes on: a processor, a CUDA card, an Ascend card.

All that is not the same on them is asked of a `Device` here. `torch.cuda` and `torch.npu` offer the same names, so that
what one card can another can, by the module that `Device.library` is.
"""

import importlib.util
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import psutil
import torch
from torch import Tensor

from expertmesh.errors import InputError

Kind: TypeAlias = Literal["cpu", "cuda", "npu"]
HOST = torch.device("cpu")
# In the order in which "auto" takes them.
KINDS: tuple[Kind, ...] = ("npu", "cuda", "cpu")
# By the type of a torch.device: how processes whose tensors lie there talk, in the words of torch.distributed.
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
# What a card keeps free besides weights and cache, for results of ops, graphs and the libraries' own memory: a share of
# all it has, and no less than so much.
RESERVED, LEAST_RESERVED = 0.1, 1 << 30
# Numbers of 8 bytes: kernels are compiled for tensors that begin at multiples of so much.
ALIGNED = 8


@dataclass(frozen=True)
class Room:
    """Memory of a device in bytes. dedicated: it is there for nothing but one rank; else others live in it too."""

    free: int
    total: int
    dedicated: bool

    @property
    def reserve(self) -> int:
        """What neither weights nor a cache whose size nobody has named may take."""
        return max(LEAST_RESERVED, int(RESERVED * self.total)) if self.dedicated else 0


@dataclass(frozen=True)
class Device:
    """kind: whose kernels compute; index: of the card, among those that this process sees; where: where tensors lie.
    Only tests have kernels of a card and tensors elsewhere: `find` makes devices that are what they say."""

    kind: Kind
    index: int = 0
    where: torch.device = HOST

    @property
    def is_card(self) -> bool:
        """Whether tensors lie on a card, of which each belongs to one process."""
        return self.where.type != "cpu"

    @property
    def library(self) -> Any:
        """Of a card: torch.cuda or torch.npu."""
        return getattr(torch, self.where.type)

    @property
    def backend(self) -> str:
        """Of torch.distributed."""
        return BACKENDS[self.where.type]

    @property
    def name(self) -> str:
        """What its maker calls it."""
        return (
            str(self.library.get_device_name(self.index))
            if self.is_card
            else torch.backends.cpu.get_cpu_capability()
        )

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.is_card else self.kind

    def room(self) -> Room:
        """Its memory. Of a card that takes some: what the libraries need to begin."""
        if not self.is_card:
            return Room(free_memory(), psutil.virtual_memory().total, dedicated=False)
        free, total = self.library.mem_get_info(self.index)
        return Room(free, total, dedicated=True)

    def take(self) -> None:
        """Make the card that of the calling thread: kernels that are not torch's own start on that."""
        if self.is_card:
            self.library.set_device(self.index)

    def wait(self) -> None:
        """Until all that was asked of it has been computed."""
        if self.is_card:
            self.library.synchronize(self.index)

    def clock(self) -> float:
        """Seconds of a clock, read when all that was asked of the device has been computed."""
        self.wait()
        return time.perf_counter()

    def put(self, lists: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """Whole numbers, int64 [length of each list], in one copy that nobody waits for."""
        flat: list[int] = []
        starts = []
        for each in lists:
            starts.append(len(flat))
            flat += each
            flat += [0] * (-len(each) % ALIGNED)
        numbers = torch.tensor(flat, dtype=torch.int64)
        if self.is_card:
            numbers = numbers.pin_memory().to(self.where, non_blocking=True)
        return tuple(numbers[at : at + len(each)] for at, each in zip(starts, lists, strict=True))

    def staging(self, size: int) -> "Staging":
        """So many whole numbers, 0 at first."""
        there = torch.zeros(size, dtype=torch.int64, device=self.where)
        return Staging(there, torch.zeros(size, dtype=torch.int64).pin_memory() if self.is_card else there)


@dataclass(frozen=True)
class Staging:
    """Numbers that stay where they are on the device, and what is written to bring others there: on a processor the
    same memory."""

    there: Tensor
    here: Tensor

    def send(self, count: int) -> None:
        """The first numbers come to the device in one copy. Nothing is written here before that has been done."""
        if self.here is not self.there:
            self.there[:count].copy_(self.here[:count], non_blocking=True)


def find(name: str, index: int = 0) -> Device:
    """The device of this name and number: "cpu", "cuda", "npu", or "auto" for the first kind that is there, of an
    Ascend card, a CUDA card and the processor. InputError says why it is not there."""
    if name == "auto":
        name = _first()
    if name not in KINDS:
        raise InputError(f"device {name!r} is not one of auto, cpu, cuda, npu")
    kind: Kind = name
    if kind == "cpu":
        return Device("cpu")
    if why := problem(kind):
        raise InputError(f"device {kind}: {why}")
    count = getattr(torch, kind).device_count()
    if index >= count:
        raise InputError(
            f"device {kind}: a rank of this machine is to have card {index}, and {_counted(count)}, numbered from 0; "
            "start no more ranks on a machine than it has cards, or say --device cpu"
        )
    return Device(kind, index, torch.device(kind, index))


def _first() -> Kind:
    """The first kind that is there. Who has installed torch_npu wants a card of Ascend, and hears why there is none."""
    for kind in KINDS:
        why = problem(kind)
        if not why:
            return kind
        if kind == "npu" and importlib.util.find_spec("torch_npu") is not None:
            logging.getLogger(__name__).warning("device auto: not npu, for %s", why)
    raise AssertionError("a processor is always there")


def found(kind: Kind) -> list[Device]:
    """All devices of a kind that this process sees."""
    if kind == "cpu":
        return [Device("cpu")]
    count = 0 if problem(kind) else getattr(torch, kind).device_count()
    return [Device(kind, index, torch.device(kind, index)) for index in range(count)]


def problem(kind: Kind) -> str:
    """Why there is no device of this kind; "" where there is one."""
    if kind == "cpu":
        return ""
    why = _without_cuda() if kind == "cuda" else _without_npu()
    if why:
        return why
    hides = "CUDA_VISIBLE_DEVICES" if kind == "cuda" else "ASCEND_RT_VISIBLE_DEVICES"
    library = getattr(torch, kind)
    there = library.is_available() and library.device_count() > 0
    return "" if there else f"no card is visible: there is none, its driver does not run, or {hides} hides it"


def _without_cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without CUDA; install a build of it with CUDA"
    return ""


def _without_npu() -> str:
    """Imports torch_npu where it is installed: that is what makes torch know such cards."""
    if importlib.util.find_spec("torch_npu") is None:
        wanted = torch.__version__.partition("+")[0]
        return f"torch_npu is not installed; pip install torch-npu=={wanted}"
    try:
        import torch_npu  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"torch_npu is installed and cannot be imported ({error}); CANN is needed, and its set_env.sh sourced"
    return ""


def _counted(count: int) -> str:
    return "1 card is visible" if count == 1 else f"{count} cards are visible"


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, of its cgroup, of its address space limit."""
    free = psutil.virtual_memory().available
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/memory"):
            try:
                bound = int(Path(root, limit).read_text()) - int(Path(root, used).read_text())
            except (OSError, ValueError):
                continue
            free = min(free, max(0, bound))
    if sys.platform != "win32":
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            free = min(free, max(0, soft - psutil.Process().memory_info().vms))
    return free
