"""A call of a kernel that can be checked: its arguments, and what has to come out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels.triton.tiles import TARGETS


class Maker:
    """Makes tensors of arguments: on the CPU with contents that a seed gives, on "meta" with shapes alone, as compilers
    need of sizes that no test has memory for."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        if self.device.type == "meta":
            return self.empty(*shape, dtype=dtype)
        return (torch.randn(shape, generator=self._generator) * scale).to(dtype or self.dtype)

    def weight(self, *shape: int) -> Tensor:
        """Such that products of rows of unit size have unit size again."""
        return self.normal(*shape, scale=shape[-1] ** -0.5)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """To be written to. It is full of what no kernel may leave where it should write."""
        made = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return made.fill_(-7) if self.device.type != "meta" else made

    def shuffled(self, count: int, of: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """So many different numbers below `of`."""
        if self.device.type == "meta":
            return self.empty(count, dtype=dtype)
        return torch.randperm(of, generator=self._generator)[:count].to(dtype)

    def whole(self, values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """arguments: all but tiles and pads, by name. reference: from these to what each output has to be, in plain
    PyTorch. full: of a whole model, which compilers take and no test runs; for these targets.
    """

    kernel: str
    name: str
    arguments: Callable[[Maker], dict[str, Any]] = field(repr=False)
    reference: Callable[[Arguments], dict[str, Tensor]] = field(repr=False)
    full: bool = False
    targets: tuple[str, ...] = TARGETS

    def __str__(self) -> str:
        return f"{self.kernel}-{self.name}"
