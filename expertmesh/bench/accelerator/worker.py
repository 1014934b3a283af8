"""A process that examines: it is asked one thing after another, and may crash or hang over any of them."""

import faulthandler
import os
import platform
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from expertmesh.bench.accelerator import links
from expertmesh.bench.accelerator.cases import Case
from expertmesh.bench.accelerator.checks import CHECKS, check_op
from expertmesh.bench.accelerator.outcome import NotApplicable, Wrong
from expertmesh.bench.accelerator.sizes import Batch, Shape, Sizes
from expertmesh.bench.accelerator.speeds import SPEEDS
from expertmesh.bench.accelerator.ticks import OWN, PLAIN
from expertmesh.bench.accelerator.tokens import check_converted, check_tokens
from expertmesh.device import Device, find
from expertmesh.errors import InputError
from expertmesh.kernels import Kernels, kernels_for
from expertmesh.launch.channel import Channel, ChannelClosed

PROGRAM = "expertmesh.bench.accelerator.worker:serve"
PRELOAD = ("torch", "numpy", "greenlet", "expertmesh.bench.accelerator.worker")
PACKAGES = ("expertmesh", "torch", "torch-npu", "triton", "triton-ascend", "deep-ep")

New = Callable[[str, str], Kernels]


def serve(spec: dict[str, Any], channel: Channel, new: New = kernels_for) -> None:
    """spec: kind, rank and ranks, sizes, and the file for what libraries write. Answers {"done": ...},
    {"raised": text}, {"failed": what is wrong} or {"none": why there is no such thing here}."""
    _listen_to_libraries(Path(spec["log"]))
    if spec["kind"] == "cpu":
        torch.set_num_threads(1)  # as a rank of the engine has that is a process
    worker = Worker(Sizes.of(spec["sizes"]), spec, new)
    with suppress(ChannelClosed):  # the examination is over
        while True:
            channel.send(_answer(worker, channel.receive()))


def _listen_to_libraries(log: Path) -> None:
    """What drivers print is no part of the report's output. A crash, and who asks by SIGUSR1, find the stack there."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)


def _answer(worker: "Worker", message: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"done": getattr(worker, message.pop("do"))(**message)}
    except NotApplicable as error:
        return {"none": str(error)}
    except Wrong as error:
        return {"failed": str(error)}
    except Exception as error:  # of a kernel, a driver, a library: each is a line of the report
        return {"raised": f"{type(error).__name__}: {error}"}


class Worker:
    """What can be asked."""

    def __init__(self, sizes: Sizes, spec: dict[str, Any], new: New) -> None:
        self.sizes, self.spec, self.new = sizes, spec, new

    @cached_property
    def device(self) -> Device:
        """Its first use is part of what is asked: that may fail too."""
        device = find(self.spec["kind"], self.spec["rank"])
        device.take()
        return device

    def _kernels(self, dtype: str) -> Kernels:
        return self.new(self.device.kind, dtype)

    def identify(self) -> dict[str, Any]:
        here = self.device
        torch.ones(8, device=here.where).sum().item()
        kernels = self._kernels("bfloat16")
        return {
            "name": _name(here),
            "memory_bytes": here.room().total,
            "kernels": kernels.origin,
            "lacking": kernels.lacking,
            "software": software(here),
        }

    def op(self, op: str, shape: dict[str, Any], batch: dict[str, Any], precision: str) -> dict[str, Any]:
        dtype = "float32" if precision == "float32" else "bfloat16"
        rows = Batch(batch["name"], tuple(map(tuple, batch["sequences"])))
        return check_op(
            Case(op, Shape(**shape), rows, precision), self._kernels(dtype), self.device, self.sizes
        )

    def speed(self, name: str) -> dict[str, Any]:
        with torch.inference_mode():
            return SPEEDS[name](self._kernels("bfloat16"), self.device, self.sizes)

    def check(self, name: str) -> dict[str, Any]:
        with torch.inference_mode():
            return CHECKS[name](self._kernels("bfloat16"), self.device)

    def tokens(self, cards: int, exchange: str, weights: str) -> dict[str, Any]:
        options, tokens = {"device": self.spec["kind"], "exchange": exchange}, self.sizes.tokens
        try:
            if weights == PLAIN:
                return check_tokens(options, cards, tokens)
            return check_converted(options, weights, cards, tokens)
        except InputError as error:
            if (exchange, weights) == (OWN, PLAIN):
                raise
            raise NotApplicable(str(error)) from None  # no such package or product, or a limit of it

    def meet(self, place: str) -> None:
        links.meet(self.device, Path(place), self.spec["rank"], self.spec["ranks"], self.sizes.limit)

    def link(self, kind: str, size: int) -> float:
        return links.measure(self.device, kind, size)


def _name(here: Device) -> str:
    if here.is_card:
        return here.name
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def software(here: Device) -> dict[str, str]:
    """Versions of all that has a part in it."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if here.kind == "npu" and here.is_card:
        found |= _cann()
    if here.kind == "cuda" and here.is_card:
        with suppress(OSError, IndexError):
            text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
            found["driver"] = text.split("Module", 1)[1].split()[0]
    return found


def _cann(driver: Path = Path("/usr/local/Ascend/driver/version.info")) -> dict[str, str]:
    """Of CANN and of the card's driver, as far as they say so."""
    found: dict[str, str] = {}
    with suppress(Exception):  # its place differs from version to version
        from torch_npu.npu.utils import get_cann_version

        found["cann"] = str(get_cann_version())
    with suppress(OSError):
        for line in driver.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition("=")
            if name.strip().lower() == "version":
                found["driver"] = value.strip()
    return found
