"""Arrays over a wire, and back."""

import msgpack
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from expertmesh.engine.arrays import from_plain, to_plain


@given(
    arrays(np.int32, array_shapes(min_dims=1, max_dims=3, min_side=0)), st.sampled_from(["<i4", "<i8", "<f8"])
)
def test_what_comes_is_what_went(array: np.ndarray, kind: str) -> None:
    for each in (array, array.T):
        found = from_plain(msgpack.unpackb(msgpack.packb(to_plain(each, kind))))
        assert found.dtype == np.dtype(kind) and np.array_equal(found, each)
