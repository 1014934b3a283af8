"""Calls of torch_npu's ops as our code makes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Recorder(TorchDispatchMode):
    """Keeps, of each op, a call of each kind: other types, other options."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "npu":
            kinds = [leaf.dtype if isinstance(leaf, Tensor) else None for leaf in tree_leaves((args, kwargs))]
            key = (func, *kinds, *kwargs)
            if key not in self.calls:
                copies = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
                self.calls[key] = (func, *copies)
        return func(*args, **kwargs)


@contextmanager
def recorded() -> Iterator[Recorder]:
    with Recorder() as recorder:
        yield recorder


def name_of(func: Any) -> str:
    return str(func.name()).removeprefix("npu::")


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest number; infinite where one is not a number."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    far = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    return float(far) if torch.isfinite(far) else float("inf")
