"""Memory for weights of 8 bits as kernels in Triton read them: filled as a loader does it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.config.precision import FP8, INT4, PLAIN, W8A8
from expertmesh.convert.formats import TARGETS
from expertmesh.engine.storage import dequantise_blocks
from expertmesh.errors import InputError
from expertmesh.kernels.memory import Kept
from expertmesh.kernels.triton import tiles
from expertmesh.kernels.triton.weights import FORMATS, PRECISIONS, Quantised, matrix
from tests.support.attention import normal

KEPT = Kept(torch.bfloat16, torch.device("cpu"))
BLOCK = (128, 128)


def meaning(kept: Quantised) -> Tensor:
    """What products see, float32 [N, K]."""
    rows, columns = kept.shape
    wide = kept.scales.repeat_interleave(kept.rows, 0).repeat_interleave(kept.group, 1)[:rows, :columns]
    return kept.numbers.float() * wide


def blocks(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """FP8 numbers and scales as a checkpoint has them."""
    scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=torch.Generator().manual_seed(2)) + 0.1
    return normal(rows, columns, seed=1, scale=50.0).to(torch.float8_e4m3fn), scales


@given(part=st.integers(1, 300), rank=st.integers(0, 3), columns=st.integers(1, 300))
def test_fp8_is_kept_wherever_a_part_begins(part: int, rank: int, columns: int) -> None:
    """Bit by bit, with the scale of the block that each row is in."""
    numbers, scales = blocks(4 * part, columns)
    mine = range(rank * part, (rank + 1) * part)
    own, exact = matrix((part, columns), 1, FP8, KEPT), torch.empty(part, columns)
    assert isinstance(own, Quantised) and own.rows == (128 if part % 128 == 0 else 1)
    for target in (own, exact):
        dequantise_blocks(numbers[mine.start : mine.stop], scales, BLOCK, (mine, range(columns)), target)
    assert torch.equal(meaning(own), exact)
    assert own.nbytes == sum(FORMATS["fp8"].part_bytes(part, columns))


@pytest.mark.parametrize("width", [96, 128])
def test_gate_and_up_have_blocks_of_their_own(width: int) -> None:
    (gate, scales), (up, others) = blocks(width, 200), blocks(width, 200)
    both = matrix((3, 2 * width, 200), 2, FP8, KEPT)
    for rows, numbers, of in ((slice(0, width), gate, scales), (slice(width, None), up, 2 * others)):
        whole = (range(width), range(200))
        dequantise_blocks(numbers, of, BLOCK, whole, both[1, rows])
    exact = torch.empty(2, width, 200)
    for half, scale in zip(exact, (scales, 2 * others), strict=True):
        dequantise_blocks(gate, scale, BLOCK, (range(width), range(200)), half)
    assert isinstance(both, Quantised) and torch.equal(meaning(both[1]), exact.flatten(0, 1))
    moved = [part.numel() for part in both.slot_bytes(1)]
    assert 3 * sum(moved) == both.nbytes


def test_whole_numbers_are_those_of_a_converted_checkpoint() -> None:
    """Which quantises the same weights; rows come in any pieces, and one of them is zeros."""
    weight = normal(70, 90, seed=3)
    weight[5] = 0
    form = TARGETS["w8a8"].quantised
    assert form is not None
    numbers, scales, *_ = form.encode(weight)
    made, given = (matrix((2, 70, 90), 1, W8A8, KEPT) for _ in range(2))
    for rows in (slice(0, 33), slice(33, None)):
        made[1, rows].copy_(weight[rows])
        given[1, rows].keep_int8(numbers[rows], scales[rows].flatten())
    assert isinstance(made, Quantised) and isinstance(given, Quantised)
    assert torch.equal(made.numbers[1], given.numbers[1]) and torch.equal(meaning(made[1]), meaning(given[1]))
    assert made.nbytes == 2 * sum(FORMATS["w8a8"].part_bytes(70, 90))


def test_what_is_not_quantised_is_a_tensor() -> None:
    assert isinstance(matrix((4, 8), 1, PLAIN, KEPT), Tensor)
    for name, precision in PRECISIONS.items():
        assert precision.format("prologue", 128, cut=False) is PLAIN
        assert precision.format("linear", 128, cut=True).name == ("plain" if name == "none" else name)
        assert precision.format("linear", 64, cut=True).name == ("w8a8" if name == "w8a8" else "plain")


def test_what_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^int4 weights cannot be .* use quantise none, w8a8, fp8$"):
        matrix((4, 128), 1, INT4, KEPT)
    with pytest.raises(InputError, match="of another type"):
        matrix((4, 128), 1, FP8, KEPT)[:].copy_(torch.ones(4, 128))
    # A card whose whole numbers Triton does not multiply, nor FP8.
    without = {**tiles.table(), "gate_up_int8": {}, "gate_up_fp8": {}}
    monkeypatch.setattr(tiles, "table", lambda: without)
    with pytest.raises(InputError, match=r"^there are no w8a8 products for cpu; use quantise none$"):
        matrix((4, 128), 1, W8A8, KEPT)
    assert matrix((4, 128), 1, FP8, KEPT).dtype is torch.uint8
    assert replace(FORMATS["fp8"], group=0).scale_rows(256) == 1
