"""Arrays as plain data, so that what an engine tells of itself fits into a message of numbers, texts and bytes."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

# {"type": numpy's name of it, little-endian; "shape": lengths of the axes; "data": bytes in C order}
PlainArray: TypeAlias = dict[str, Any]


def to_plain(array: NDArray[Any], kind: str) -> PlainArray:
    """kind: the type that it travels in, as `<f4`, `<i4`, `<i8`."""
    return {"type": kind, "shape": list(array.shape), "data": np.ascontiguousarray(array, kind).tobytes()}


def from_plain(plain: PlainArray) -> NDArray[Any]:
    """Read-only."""
    return np.frombuffer(plain["data"], plain["type"]).reshape(plain["shape"])
