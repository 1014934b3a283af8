"""Ops of cards in PyTorch's own operators, against their references."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.kernels import grouped, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    rows=st.integers(0, 9), choices=st.integers(1, 4), slots=st.integers(1, 6), seed=st.integers(0, 99),
    mine=st.integers(0, 6),
)  # fmt: skip
def test_experts(dtype: torch.dtype, rows: int, choices: int, slots: int, seed: int, mine: int) -> None:
    """Also where a rank has few of the experts that rows choose, or none."""
    g = torch.Generator().manual_seed(seed)
    width, inner = 32, 16
    x = torch.randn(rows, width, generator=g).to(dtype)
    chosen = torch.randint(-1, slots, (rows, choices), generator=g).where(torch.tensor(mine > 0), -1)
    chosen[chosen >= mine] = -1
    weights = torch.rand(rows, choices, generator=g)
    gate_up = (torch.randn(slots, 2 * inner, width, generator=g) / 6).to(dtype)
    down = (torch.randn(slots, width, inner, generator=g) / 4).to(dtype)
    out = grouped.experts(x, chosen, weights, gate_up, down)
    expected = reference.experts(x, chosen, weights, gate_up, down)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(out.float(), expected.float(), rtol=tolerance, atol=tolerance)


@given(st.lists(st.lists(st.integers(-1, 6), min_size=3, max_size=3), max_size=8))
def test_counts_leave_out_choices_of_nobody(rows: list[list[int]]) -> None:
    chosen = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
    counts, expected = torch.arange(7), torch.arange(7)
    grouped.count(chosen, counts)
    reference.count(chosen[chosen >= 0], expected)
    assert torch.equal(counts, expected)
