"""Numbers of each precision against arithmetic that others wrote, and against what the engine makes of the weights."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from expertmesh.config import ModelConfig
from expertmesh.config.precision import INT4, W8A8
from expertmesh.convert.formats import TARGETS, Form, format_of, target_of
from expertmesh.engine.storage import pack_int4, unpack_int4
from expertmesh.errors import InputError
from expertmesh.kernels.memory import Kept
from expertmesh.weights import Weight, describe
from tests.kernels.test_ops import NATIVE
from tests.support.files import FP8, TINY

MATRICES = st.tuples(
    st.integers(1, 40), st.integers(1, 300), st.integers(0, 1 << 31), st.sampled_from([1e-6, 1.0, 300.0])
)


def matrix(rows: int, columns: int, seed: int, size: float) -> Tensor:
    """Rows of very different sizes, one of them of zeros only."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * size
    x *= torch.rand(rows, 1, generator=generator).mul(8).exp()
    x[rows // 2] *= seed % 2
    return x


def form(target: str) -> Form:
    found = TARGETS[target].quantised
    assert found is not None
    return found


@given(MATRICES)
def test_int8_rows(given: tuple[int, int, int, float]) -> None:
    x = matrix(*given)
    values, scale, offset = form("w8a8").encode(x)
    assert values.dtype == torch.int8 and scale.shape == offset.shape == (len(x), 1) and not offset.any()
    # torch's quantisation of channels, which multiplies with the inverse of a scale rounded once more.
    theirs = torch.fake_quantize_per_channel_affine(
        x, scale[:, 0].clamp(min=1e-30), torch.zeros(len(x), dtype=torch.int32), 0, -127, 127
    )
    off = values * scale - theirs
    ties = ((x / scale.clamp(min=1e-30)).frac().abs() - 0.5).abs() < 1e-4
    assert (off.abs() <= scale * 1e-4 + ties * scale * 1.001).all()
    assert ((values * scale - x).abs() <= form("w8a8").bound(x)).all()


@given(MATRICES)
def test_int4_groups(given: tuple[int, int, int, float]) -> None:
    """Read as compressed-tensors documents it: eight numbers in 32 bits, the first in the lowest, each 8 higher."""
    x = matrix(*given)
    packed, scale = form("int4").encode(x)
    words = packed.numpy().view(np.uint32)
    values = (
        np.stack([(words >> np.uint32(4 * i)) & np.uint32(15) for i in range(8)], axis=-1).astype(np.int32)
        - 8
    )
    values = values.reshape(len(x), -1)
    assert not values[:, x.shape[1] :].any() and abs(values).max() <= 7
    numbers = torch.from_numpy(values[:, : x.shape[1]]) * scale.repeat_interleave(128, 1)[:, : x.shape[1]]
    assert ((numbers - x).abs() <= form("int4").bound(x)).all()


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 1 << 31))
def test_packing_is_undone(rows: int, columns: int, seed: int) -> None:
    values = torch.randint(
        -8, 8, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(unpack_int4(pack_int4(values))[:, :columns], values)


@pytest.mark.parametrize("shape", [(128, 128), (256, 384)])
@pytest.mark.parametrize("size", [1e-3, 50.0])
def test_fp8_blocks_are_those_of_transformers(shape: tuple[int, int], size: float) -> None:
    x = matrix(*shape, seed=3, size=size)
    values, scale = form("fp8").encode(x)
    quantizer: Any = SimpleNamespace(
        quantization_config=SimpleNamespace(weight_block_size=(128, 128), scale_fmt=None)
    )
    theirs = Fp8Quantize(quantizer)._quantize_one("w.weight", x)
    torch.testing.assert_close(scale, theirs["w.weight_scale_inv"], rtol=1e-6, atol=0)
    differ = values.view(torch.uint8) != theirs["w.weight"].view(torch.uint8)
    assert (
        differ.float().mean() < 1e-3
    )  # a number half way between two, where they take the inverse of the inverse
    read = Fp8Dequantize(quantizer).convert({"weight": [values], "weight_scale_inv": [scale]})["weight"]
    assert isinstance(read, Tensor) and ((read - x).abs() <= form("fp8").bound(x)).all()


@given(MATRICES)
def test_fp8_of_any_shape_is_undone_within_its_bound(given: tuple[int, int, int, float]) -> None:
    x = matrix(*given)
    values, scale = form("fp8").encode(x)
    wide = scale.repeat_interleave(128, 0)[: len(x)].repeat_interleave(128, 1)[:, : x.shape[1]]
    assert ((values.float() * wide - x).abs() <= form("fp8").bound(x)).all()
    again, same = form("fp8").encode(values.float() * wide)
    filled = (
        values.float().abs().amax() == 448
    )  # what a block of one scale is, of which the largest is the largest
    if filled and scale.numel() == 1:
        assert torch.equal(again.view(torch.uint8) & 0x7F, values.view(torch.uint8) & 0x7F)
        torch.testing.assert_close(same, scale, rtol=1e-6, atol=0)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120))
def test_bfloat16_is_within_its_bound(number: float) -> None:
    x = torch.tensor([[number]])
    plain = TARGETS["bf16"].form(Weight("a.weight", (1, 1), "bfloat16", "router"))
    (rounded,) = plain.encode(x)
    assert rounded.dtype == torch.bfloat16 and ((rounded.float() - x).abs() <= plain.bound(x)).all()


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
@given(MATRICES)
def test_numbers_are_those_that_the_engine_makes(given: tuple[int, int, int, float]) -> None:
    # Numbers of bfloat16 are often half way between two whole ones.
    x, kernels = matrix(*given).bfloat16().float(), NATIVE[0].kernels
    kept = Kept(torch.bfloat16, torch.device("cpu"))
    made: list[list[Any]] = [
        [kernels.matrix(tuple(x.shape), 1, f, kept) for f in (W8A8, INT4)] for _ in range(2)
    ]
    values, scale, _ = form("w8a8").encode(x)
    packed, scales = form("int4").encode(x)
    made[0][0][:].keep_int8(values, scale[:, 0])
    made[0][1][:].keep_int4(unpack_int4(packed)[:, : x.shape[1]], scales)
    for ours, engines in zip(*made, strict=True):
        engines[:].copy_(x)
        for part in ("data", "scale", "sums"):
            assert torch.equal(getattr(ours, part), getattr(engines, part)), part


def test_what_each_precision_quantises() -> None:
    """The rules of the published checkpoints: DeepSeek's FP8 has all matrices but router, embedding and head; ModelSlim
    leaves out the up-projection of the latents too."""

    def quantised(target: str) -> set[str]:
        names = [
            "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.kv_b_proj.weight",
            "model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.up_proj.weight",
            "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.3.down_proj.weight",
            "model.layers.1.mlp.shared_experts.gate_proj.weight", "model.layers.2.eh_proj.weight",
            "model.layers.2.self_attn.q_a_proj.weight", "model.layers.2.shared_head.head.weight",
            "model.layers.2.mlp.gate.e_score_correction_bias",
        ]  # fmt: skip
        weights = {w.name: w for w in _describe()}
        found = {n for n in names if TARGETS[target].form(weights[n]) is TARGETS[target].quantised}
        return {name.rsplit(".", 2)[1] for name in found}

    assert quantised("w8a8") == {"o_proj", "up_proj", "down_proj", "gate_proj", "q_a_proj"}
    assert quantised("fp8") == quantised("w8a8") | {"kv_b_proj"}
    assert quantised("int4") == {"down_proj"} and quantised("bf16") == set()


def _describe() -> list[Weight]:
    return describe(ModelConfig.from_dict(TINY | {"num_nextn_predict_layers": 1}))


def test_targets() -> None:
    bf16 = ModelConfig.from_dict(TINY | {"torch_dtype": "bfloat16"})
    with pytest.raises(InputError, match="--to 'int7' is not one of bf16, fp8, w8a8, int4"):
        target_of("int7", bf16)
    with pytest.raises(InputError, match="--to bf16: the checkpoint is in this precision already"):
        target_of("bf16", bf16)
    assert target_of("bf16", ModelConfig.from_dict(TINY)).name == "bf16"
    assert format_of(ModelConfig.from_dict(TINY | {"quantization_config": FP8})) == "fp8"
    for name, target in TARGETS.items():
        fields = target.config(TINY | {"quantization_config": FP8, "quantize": "x"}, bf16)
        assert format_of(ModelConfig.from_dict(fields)) == name and fields["torch_dtype"] == "bfloat16"
