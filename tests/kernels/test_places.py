"""Rows of weights in the order of halves: heads turn as they do with interleaved pairs."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.kernels import Rotary, reference
from expertmesh.kernels.places import Rows, de_interleaved
from tests.support.attention import normal


def kept(weight: torch.Tensor, rope: int, heads: int, cuts: list[int]) -> torch.Tensor:
    """As a loader fills it, piece by piece."""
    made = torch.full_like(weight, float("nan"))
    place = de_interleaved(made, rope, heads)
    bounds = [0, *sorted(cuts), weight.shape[0]]
    for start, stop in pairwise(bounds):
        place[start:stop].copy_(weight[start:stop].double())
    return made


@given(st.data(), st.integers(1, 4), st.integers(0, 5), st.sampled_from([2, 4, 6, 16]))
def test_heads_are_turned_as_interleaved_ones(data: st.DataObject, heads: int, plain: int, rope: int) -> None:
    height, (T, D) = heads * (plain + rope), (3, 5)
    cuts = data.draw(st.lists(st.integers(0, height), max_size=3))
    weight, x, angles = normal(height, D, seed=1), normal(T, D, seed=2), normal(9, rope // 2, seed=3)

    def queries(w: torch.Tensor, interleaved: bool) -> torch.Tensor:
        rotary = Rotary(torch.tensor([4, 0, 7]), angles.cos(), angles.sin(), interleaved)
        q = reference.linear(x, w).unflatten(-1, (heads, -1))
        return torch.cat((q[..., :plain], reference.rotate(q[..., plain:], rotary)), dim=-1)

    found = queries(kept(weight, rope, heads, cuts), interleaved=False)
    torch.testing.assert_close(found, queries(weight, interleaved=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_and_what_a_loader_asks(dtype: torch.dtype) -> None:
    bias = torch.arange(8.0)
    made = torch.empty(8, dtype=dtype)
    place = de_interleaved(made, 4)
    assert (place.shape, place.dtype, place.numel()) == ((8,), dtype, 8)
    assert (place.data_ptr(), place.element_size()) == (made.data_ptr(), dtype.itemsize)
    place.copy_(bias)
    assert made.tolist() == [0, 1, 2, 3, 4, 6, 5, 7]
    assert isinstance(place[2:5], Rows) and place[2:5].shape == (3,)
