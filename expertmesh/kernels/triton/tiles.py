"""Tile sizes of each kernel on each target: a data file, which `python -m tests.kernels.triton.tune` derives from what
the compilers say about registers and memory on the chip."""

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from expertmesh.errors import KernelFailure

CUDA = ("sm_80", "sm_90", "sm_100")
ASCEND = ("Ascend910B1", "Ascend910_9391")
# Small tiles, so that few rows fill several, where kernels run on a CPU.
CPU = "cpu"
TARGETS = (CPU, *CUDA, *ASCEND)
FILE = Path(__file__).with_suffix(".toml")


@cache
def table() -> Mapping[str, Mapping[str, Mapping[str, int]]]:
    """Kernel -> target -> parameter -> value."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def tiles(kernel: str, target: str) -> Mapping[str, int]:
    """KernelFailure where a target has none, as where it lacks a kernel's types."""
    targets = table()[kernel]
    if target not in targets:
        raise KernelFailure(
            kernel, target, f"it is for {', '.join(targets)} alone (kernels/triton/{FILE.name})"
        )
    return targets[target]


def target_of(device: torch.device) -> str:
    """The target whose tiles a device takes: the newest that is not newer than it."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return {8: "sm_80", 9: "sm_90"}.get(capability[0], "sm_100")
    if device.type == "npu":
        name: str = torch.npu.get_device_name(device)  # type: ignore[attr-defined]
        return "Ascend910_9391" if name.startswith("Ascend910_93") else "Ascend910B1"
    return CPU
