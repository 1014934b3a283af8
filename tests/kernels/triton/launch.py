"""What one launch of a kernel moves and computes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """bytes: of arguments, each once; flops: of products; loaded: bytes of all programs together, 0 where unknown."""

    name: str
    bytes: float
    flops: float = 0.0
    loaded: int = 0
    programs: int = 0


def size(values: Iterable[Any]) -> int:
    """Bytes of those that are tensors."""
    return sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor))
