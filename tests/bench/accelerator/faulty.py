"""A process that examines kernels of which some are wrong, raise, hang, kill it or do not repeat themselves."""

import os
import signal
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from expertmesh.bench.accelerator import links, tokens, worker
from expertmesh.kernels import Kernels
from expertmesh.kernels.table import reference_kernels
from expertmesh.launch.channel import Channel


def wrong(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return reference_kernels().rms_norm(x, weight, eps) * 1.5


def restless(x: Tensor, y: Tensor) -> Tensor:
    return x + y + 1e-6 * torch.rand(())


def failing(*_: Any) -> Tensor:
    raise RuntimeError("the driver says 507015 on node-17 in /home/somebody/secret/kernel.o")


def hanging(*_: Any) -> Tensor:
    time.sleep(600)
    raise AssertionError("too long for a test")


def deadly(*_: Any) -> Tensor:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError("a signal that is not caught")


def table(kind: str, dtype: str) -> Kernels:
    return replace(
        reference_kernels(), rms_norm=wrong, add=restless, embed=failing, count=hanging, logits=deadly
    )


def serve(spec: dict[str, Any], channel: Channel) -> None:
    worker.serve(spec, channel, table)


def untrue(spec: dict[str, Any], channel: Channel) -> None:
    """No token is good enough, and a collective carries nothing."""
    tokens.MARGIN = -1.0
    links.KINDS["all_gather"] = lambda own, came: None
    worker.serve(spec, channel)


def unusable(spec: dict[str, Any], channel: Channel) -> None:
    """A card that cannot even be asked for its name."""

    def none(kind: str, dtype: str) -> Kernels:
        raise RuntimeError("no such card")

    worker.serve(spec, channel, none)
