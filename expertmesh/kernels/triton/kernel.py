"""What a kernel is: a Triton function, how many programs it is launched as, and with which tiles."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import triton
from torch import Tensor

from expertmesh.errors import KernelFailure
from expertmesh.kernels.triton.tiles import target_of, tiles

# What a target's entry of tiles.toml may have besides tile sizes: options of the compiler.
OPTIONS = ("num_warps", "num_stages")
# Matrix units take no fewer rows or columns than this.
LEAST = 16


@dataclass(frozen=True)
class Kernel:
    """A Triton function that is launched with arguments by name.

    Its parameters are tensors and numbers; sizes of the model (tl.constexpr), by the letters of the project's legend;
    PAD_<size>, the power of two that holds such a size; and BLOCK_<size>, a tile from tiles.toml. Callers give the
    first two kinds.

    grid: from all of these to the number of programs in each direction. outputs: arguments that are written. products:
    whether it has matrix products. variant: of several kernels of one function that want different tiles, the end of
    the name.
    """

    function: Any
    grid: Callable[[Mapping[str, Any]], tuple[int, ...]]
    outputs: tuple[str, ...]
    products: bool = True
    variant: str = ""

    @property
    def name(self) -> str:
        return str(self.function.fn.__name__) + self.variant

    @cached_property
    def parameters(self) -> dict[str, bool]:
        """Names in order, and which are constants of the compiler."""
        import triton.language as tl

        found = inspect.signature(self.function.fn).parameters.values()
        return {p.name: p.annotation is tl.constexpr for p in found}

    def complete(
        self, arguments: Mapping[str, Any], target: str, chosen: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """All parameters in order, and after them the options of the compiler for this target. chosen: tiles and
        options that are tried, instead of those of the table."""
        chosen = tiles(self.name, target) if chosen is None else chosen
        pads = {
            name: max(LEAST, triton.next_power_of_2(arguments[name.removeprefix("PAD_")]))
            for name in self.parameters
            if name.startswith("PAD_")
        }
        every = {**arguments, **pads, **chosen}
        return {name: every[name] for name in (*self.parameters, *(o for o in OPTIONS if o in chosen))}

    def __call__(self, **arguments: Any) -> None:
        """Launches it on the device of its tensors. Nothing to do is nothing launched. KernelFailure where it cannot be
        compiled or started."""
        target = target_of(next(a.device for a in arguments.values() if isinstance(a, Tensor)))
        every = self.complete(arguments, target)
        grid = self.grid(every)
        if not all(grid):
            return
        try:
            self.function[grid](**every)
        except Exception as error:  # of Triton, of a backend, or of a driver: they have no type in common
            raise KernelFailure(self.name, target, f"{type(error).__name__}: {error}") from error
