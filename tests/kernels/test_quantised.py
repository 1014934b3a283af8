"""Weights that are kept quantised: what is kept is near what was given, and products are those of what is kept."""

from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.config.precision import FP8, INT4, INT8, PLAIN, W8A8, Format, Precision
from expertmesh.errors import InputError
from expertmesh.kernels.memory import Kept
from expertmesh.kernels.packed import Packed
from tests.kernels.test_invariance import same_alone
from tests.kernels.test_ops import NATIVE, ORACLE, ROWS, Kind, close
from tests.support.attention import normal

BF16 = torch.bfloat16
each_kind = pytest.mark.parametrize("kind", NATIVE, ids=repr)
each_format = pytest.mark.parametrize("format", [W8A8, INT8, INT4, FP8], ids=lambda f: f.name)
KEPT = Kept(BF16, torch.device("cpu"))


def kept(kind: Kind, weight: Tensor, format: Format, split: int = 1) -> Packed:
    made: Any = kind.kernels.matrix(tuple(weight.shape), split, format, KEPT)
    flat = weight.view(-1, weight.shape[-1])
    for slot in range(weight.shape[0]) if weight.dim() == 3 else (None,):
        rows, target = (flat, made[:]) if slot is None else (weight[slot], made[slot])
        if format is not FP8:
            target.copy_(rows)
            continue
        for start in range(0, rows.shape[0], 128):
            some, to = rows[start : start + 128], target[start : start + 128]
            to.keep_fp8(*in_fp8(some))
    return made


def in_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """A block row and the scales of its blocks."""
    pieces = rows.float().split(128, dim=1)
    scales = torch.stack([p.abs().max().clamp(min=1e-6) / 448 for p in pieces])
    values = torch.cat([p / s for p, s in zip(pieces, scales, strict=True)], dim=1)
    return values.to(torch.float8_e4m3fn), scales


@each_kind
@each_format
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (48, 300), (33, 129)])
def test_what_is_kept_is_near_what_was_given(shape: tuple[int, int], format: Format, kind: Kind) -> None:
    weight = normal(*shape, seed=1, dtype=BF16)
    weight[0, 0] = 5.0
    found = kept(kind, weight, format).unpacked()
    assert found.shape == shape
    if format is FP8:
        values, scales = in_fp8(weight)
        exact = values.float() * scales.repeat_interleave(128)[: shape[1]]
        torch.testing.assert_close(found, exact, rtol=0, atol=0)
        return
    steps = {W8A8: 127, INT8: 127, INT4: 7}[format]
    groups = [weight] if format is W8A8 else weight.split(128, dim=1)
    for group, mine in zip(groups, found.split([g.shape[1] for g in groups], dim=1), strict=True):
        step = group.float().abs().amax(1, keepdim=True) / steps
        assert ((group.float() - mine).abs() <= step * 0.501).all()


@each_kind
def test_every_fp8_number(kind: Kind) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    every = every[every.float().isfinite()].view(1, -1)
    made: Any = kind.kernels.matrix((1, every.shape[1]), 1, FP8, KEPT)
    made[:].keep_fp8(every, torch.ones(2))
    assert torch.equal(made.unpacked(), every.float())


def quantised_rows(x: Tensor) -> Tensor:
    """What W8A8 makes of rows."""
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (x.float() / scale).round() * scale


@each_kind
@each_format
@pytest.mark.parametrize("rows", [*ROWS, 100])
@pytest.mark.parametrize("shape", [(1, 1), (48, 300), (96, 1100)])
def test_linear(rows: int, shape: tuple[int, int], format: Format, kind: Kind) -> None:
    x = normal(rows, shape[1], seed=1, dtype=BF16)
    weight = kept(kind, normal(*shape, seed=2, dtype=BF16, scale=shape[1] ** -0.5), format)
    seen = quantised_rows(x) if format is W8A8 else x.float()
    close(kind.kernels.linear(x, weight), (seen @ weight.unpacked().t()).bfloat16(), BF16)


@each_kind
@each_format
@pytest.mark.parametrize("rows", ROWS)
def test_feed_forward_layers(rows: int, format: Format, kind: Kind) -> None:
    x, slots, hidden, inner = normal(rows, 192, seed=1, dtype=BF16), 6, 192, 96
    gate_up = normal(slots, 2 * inner, hidden, seed=2, dtype=BF16, scale=hidden**-0.5)
    down = normal(slots, hidden, inner, seed=3, dtype=BF16, scale=inner**-0.5)
    chosen = torch.randint(-1, slots, (rows, 3), generator=torch.Generator().manual_seed(4))
    weights = torch.rand(rows, 3, generator=torch.Generator().manual_seed(5))
    many = kept(kind, gate_up, format, 2), kept(kind, down, format)
    seen = [w.unpacked() for w in many]
    found = kind.kernels.experts(x, chosen, weights, *many)
    close(found, ORACLE.experts(x.float(), chosen, weights, *seen).bfloat16(), BF16)
    one = kept(kind, gate_up[0], format, 2), kept(kind, down[0], format)
    found = kind.kernels.swiglu(x, *one)
    close(found, ORACLE.swiglu(x.float(), *(w.unpacked() for w in one)).bfloat16(), BF16)


@each_kind
@each_format
def test_a_row_does_not_depend_on_others(format: Format, kind: Kind) -> None:
    x = normal(70, 200, seed=1, dtype=BF16)
    weight = kept(kind, normal(90, 200, seed=2, dtype=BF16, scale=0.1), format)
    same_alone(lambda rows: kind.kernels.linear(x[rows], weight))
    gate_up = kept(kind, normal(6, 2 * 48, 200, seed=4, scale=0.1, dtype=BF16), format, 2)
    down = kept(kind, normal(6, 200, 48, seed=5, scale=0.1, dtype=BF16), format)
    slots = torch.randint(-1, 6, (70, 4), generator=torch.Generator().manual_seed(2))
    weights = torch.rand(70, 4, generator=torch.Generator().manual_seed(3))
    same_alone(lambda rows: kind.kernels.experts(x[rows], slots[rows], weights[rows], gate_up, down))


@pytest.mark.parametrize("kind", NATIVE[:1], ids=repr)
def test_what_cannot_be_kept(kind: Kind) -> None:
    matrix: Any = kind.kernels.matrix((48, 64), 1, INT8, KEPT)
    with pytest.raises(InputError, match="not of whole blocks of 16"):
        matrix[5:9].copy_(torch.ones(4, 64))
    matrix = kind.kernels.matrix((48, 64), 1, FP8, KEPT)
    with pytest.raises(InputError, match="of another type"):
        matrix[:].copy_(torch.ones(48, 64))
    with pytest.raises(InputError, match="need the CPU's own kernels"):
        ORACLE.matrix((48, 64), 1, INT8, KEPT)
    with pytest.raises(InputError, match="quantise 'int7' is not one of none, w8a8"):
        Precision.of("int7")


def test_an_fp8_shard_that_begins_in_a_block_is_expanded() -> None:
    fp8 = Precision.of("fp8")
    assert fp8.format("linear", 96, cut=True) is PLAIN and fp8.format("linear", 96, cut=False) is FP8
    assert fp8.format("head", 128, cut=False) is PLAIN and fp8.format("experts", 256, cut=True) is FP8
