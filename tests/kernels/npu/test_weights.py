"""Memory that a loader fills row by row, in the order of torch_npu's products."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.config.precision import INT8, PLAIN, W8A8
from expertmesh.errors import InputError
from expertmesh.kernels.memory import Kept
from expertmesh.kernels.npu.weights import LatentUp, Matrix
from expertmesh.kernels.packed import slot_bytes
from tests.support.attention import normal

KEPT = Kept(torch.bfloat16, torch.device("cpu"))


def means(matrix: Matrix) -> Tensor:
    """[..., N, K] as products see it."""
    data = matrix.data.float()
    return (data if matrix.scales is None else data * matrix.scales.float().unsqueeze(-2)).transpose(-1, -2)


@given(st.data(), st.integers(1, 20), st.integers(1, 9))
def test_rows_come_in_any_pieces(data: st.DataObject, rows: int, columns: int) -> None:
    values = normal(rows, columns, seed=rows, dtype=torch.bfloat16)
    whole, parts = (Matrix.new((rows, columns), W8A8, KEPT) for _ in range(2))
    whole.copy_(values)
    at = data.draw(st.integers(0, rows))
    parts[at:].copy_(values[at:])
    parts[:at].copy_(values[:at])
    assert torch.equal(whole.data, parts.data) and torch.equal(means(whole), means(parts))
    plain = Matrix.new((rows, columns), PLAIN, KEPT)
    plain[:at].copy_(values[:at])
    plain[at:][: rows - at].copy_(values[at:].float())
    assert torch.equal(means(plain), values.float())


@pytest.mark.parametrize("shape", [(5, 40), (3, 6, 40)])
def test_int8_is_within_half_a_step_of_each_row(shape: tuple[int, ...]) -> None:
    values, matrix = normal(*shape, seed=1), Matrix.new(shape, W8A8, KEPT)
    for slot in range(shape[0]) if len(shape) > 2 else [slice(None)]:
        matrix[slot].copy_(values[slot])
    assert matrix.scales is not None
    # Scales of experts are bfloat16: the largest number of a row may be off by as much.
    step = matrix.scales.float().unsqueeze(-1)
    assert bool(((means(matrix) - values).abs() <= step * (0.5 + 127 * 2**-8)).all())


def test_int8_of_a_checkpoint_is_kept_as_it_is() -> None:
    values = torch.randint(-127, 128, (6, 8), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scales = normal(6, seed=2).abs()
    matrix, plain = Matrix.new((6, 8), W8A8, KEPT), Matrix.new((6, 8), PLAIN, KEPT)
    matrix[2:].keep_int8(values[2:], scales[2:])
    matrix[:2].keep_int8(values[:2], scales[:2, None])
    assert torch.equal(matrix.data.t(), values) and torch.equal(
        means(matrix), values.float() * scales[:, None]
    )
    plain.keep_int8(values, scales)
    assert torch.equal(means(plain), (values.float() * scales[:, None]).bfloat16().float())


def test_columns_are_matrices_of_their_own() -> None:
    values, matrix = normal(9, 8, seed=3), Matrix.new((9, 8), W8A8, KEPT)
    matrix.copy_(values)
    before = means(matrix)
    first, second = matrix.columns(4)
    assert torch.equal(torch.cat((means(first), means(second))), before)
    assert matrix.columns(4) == (first, second) and matrix.data.numel() == 0


@given(st.integers(0, 3 * 11), st.integers(0, 3 * 11))
def test_the_up_projection_comes_in_any_pieces(one: int, two: int) -> None:
    heads, nope, value, latent = 3, 5, 6, 4
    values, up = (
        normal(heads * (nope + value), latent, seed=4, dtype=torch.bfloat16),
        LatentUp(3, 5, 6, 4, KEPT),
    )
    for first, last in zip((0, *sorted((one, two))), (*sorted((one, two)), len(values)), strict=True):
        up[first:last].copy_(values[first:last])
    both = torch.cat((up.keys, up.values.transpose(1, 2)), dim=1)
    assert torch.equal(both, values.view(heads, nope + value, latent))


def test_the_bytes_of_a_slot_are_all_that_it_is() -> None:
    shape, matrix = (3, 4, 6), Matrix.new((3, 4, 6), W8A8, KEPT)
    for slot in range(3):
        matrix[slot].copy_(normal(4, 6, seed=slot))
    for to, of in zip(slot_bytes(matrix, 2), slot_bytes(matrix, 0), strict=True):
        to.copy_(of)
    assert torch.equal(means(matrix)[2], means(matrix)[0]) and not torch.equal(
        means(matrix)[1], means(matrix)[0]
    )
    assert sum(t.numel() for t in slot_bytes(matrix, 1)) * shape[0] == matrix.nbytes


def test_a_format_that_no_product_has_is_told() -> None:
    with pytest.raises(
        InputError, match=r"^int8 weights cannot be computed with on Ascend; use quantise none or w8a8$"
    ):
        Matrix.new((4, 4), INT8, KEPT)
