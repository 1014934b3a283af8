"""What each precision is on disk: the tensors that one of the model is written as, and the files that tell of them.

The numbers of `w8a8` and `int4` are those that the engine itself makes of the same weights (`native/cpu/pack.h`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from expertmesh.config import ModelConfig
from expertmesh.engine.checkpoint import INDEX
from expertmesh.engine.storage import WORD, pack_int4
from expertmesh.errors import InputError
from expertmesh.weights import Weight

BLOCK, GROUP = 128, 128
FP8, FP8_MOST = torch.float8_e4m3fn, 448.0
Fields: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Written:
    """One tensor of a file. constant: what it is where that is no matter of the weights; of others rows come as the
    rows of the weight do."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    constant: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Form:
    """How one kind of weight is written. tensors: without its numbers, by its name and shape; encode: some rows of it,
    which begin with a block, as rows of each of these that is not constant; bound: how far a number may be from what it
    was, of each of some rows."""

    tensors: Callable[[Weight], list[Written]]
    encode: Callable[[Tensor], list[Tensor]]
    bound: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """A precision. kinds: of matrices that are quantised (`Weight.matrix_kind`, and "latent_up" of attention); index:
    the file that names the shards, whose own names begin alike; fields: what config.json has of it; type: of the
    quantised tensors in ModelSlim's description, if there is to be one."""

    name: str
    quantised: Form | None = None
    kinds: frozenset[str] = frozenset()
    index: str = INDEX
    fields: Callable[[ModelConfig], Fields] = lambda _: {}
    type: str | None = None

    def form(self, weight: Weight) -> Form:
        kind = "latent_up" if weight.name.endswith("kv_b_proj.weight") else weight.matrix_kind
        if self.quantised is not None and kind in self.kinds:
            return self.quantised
        return EXACT if weight.name.endswith("e_score_correction_bias") else BF16

    @property
    def prefix(self) -> str:
        return self.index.removesuffix(".safetensors.index.json")

    def config(self, given: Mapping[str, Any], model: ModelConfig) -> Fields:
        """config.json of the result."""
        out = {name: value for name, value in given.items() if name not in QUANTISATION}
        for name in ("dtype", "torch_dtype"):
            if name in out:
                out[name] = "bfloat16"
        return out | self.fields(model)


# Fields of config.json that say how weights are kept, here and in Ascend deployments.
QUANTISATION = ("quantization_config", "quantize", "mla_quantize", "moe_quantize", "mtp_quantize")


def _plain(dtype: torch.dtype) -> Form:
    def bound(x: Tensor) -> Tensor:
        # Half of the last of eight binary digits; of the smallest numbers, half of the least step.
        return torch.zeros_like(x) if dtype == torch.float32 else x.abs() * 2.0**-8 + 2.0**-134

    return Form(lambda w: [Written(w.name, dtype, w.shape)], lambda x: [x.to(dtype)], bound)


def _whole(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """Whole numbers of -most to most and the size of one of them, of each row; x [..., K], sizes [..., 1]."""
    amax = x.abs().amax(-1, keepdim=True)
    # A number over a tensor would be its reciprocal times the number, which rounds once more.
    inverse = torch.where(amax > 0, torch.full_like(amax, most) / amax, 0.0)
    scaled = (x * inverse).numpy()
    np.rint(scaled, out=scaled)  # torch's own wakes all threads for any size
    return torch.from_numpy(scaled).to(torch.int8), amax / most


def _grouped(x: Tensor, group: int) -> Tensor:
    """[N, K] -> [N, groups, group], the last one filled up with 0."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % group))
    return padded.view(x.shape[0], -1, group)


# ---- w8a8: ModelSlim's W8A8_DYNAMIC


def _int8_tensors(w: Weight) -> list[Written]:
    rows = (w.shape[0], 1)
    return [
        Written(w.name, torch.int8, w.shape),
        Written(f"{w.name}_scale", torch.float32, rows),
        Written(f"{w.name}_offset", torch.float32, rows),
    ]


def _int8(x: Tensor) -> list[Tensor]:
    values, scale = _whole(x, 127.0)
    return [values, scale, torch.zeros_like(scale)]


def _int8_bound(x: Tensor) -> Tensor:
    return (x.abs().amax(1, keepdim=True) * (HALF / 127)).expand_as(x)


# ---- int4: compressed-tensors' pack-quantized


def _int4_tensors(w: Weight) -> list[Written]:
    rows, columns = w.shape
    return [
        Written(f"{w.name}_packed", torch.int32, (rows, -(-columns // WORD))),
        Written(f"{w.name}_scale", torch.float32, (rows, -(-columns // GROUP))),
        Written(f"{w.name}_shape", torch.int64, (2,), constant=w.shape),
    ]


def _int4(x: Tensor) -> list[Tensor]:
    values, scale = _whole(_grouped(x, GROUP), 7.0)
    return [pack_int4(values.flatten(1)[:, : x.shape[1]]), scale.squeeze(-1)]


def _int4_bound(x: Tensor) -> Tensor:
    groups = _grouped(x, GROUP)
    bound = groups.abs().amax(-1, keepdim=True) * (HALF / 7)
    return bound.expand_as(groups).flatten(1)[:, : x.shape[1]]


# ---- fp8: the official blocks


def _blocks(x: Tensor) -> Tensor:
    """[N, K] -> [block rows, 128, block columns, 128], filled up with 0."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK, 0, -x.shape[0] % BLOCK))
    return padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)


def _fp8_tensors(w: Weight) -> list[Written]:
    blocks = (-(-w.shape[0] // BLOCK), -(-w.shape[1] // BLOCK))
    return [Written(w.name, FP8, w.shape), Written(f"{w.name}_scale_inv", torch.float32, blocks)]


def fp8_blocks(x: Tensor) -> list[Tensor]:
    """FP8 numbers of rows [N, K], and the scale of each block, [ceil(N / 128), ceil(K / 128)]."""
    blocks = _blocks(x)
    amax = blocks.abs().amax((1, 3), keepdim=True)
    scale = torch.where(amax > 0, (amax / FP8_MOST).clamp(min=2.0**-126), 1.0)
    values = (blocks / scale).clamp(-FP8_MOST, FP8_MOST).flatten(2).flatten(0, 1)
    return [values[: x.shape[0], : x.shape[1]].to(FP8), scale.squeeze(3).squeeze(1)]


def _fp8_bound(x: Tensor) -> Tensor:
    """Half of the last of four binary digits; of the smallest numbers, half of the least step, 2^-9 of the scale."""
    blocks = _blocks(x)
    least = blocks.abs().amax((1, 3), keepdim=True) / FP8_MOST * (HALF * 2.0**-9)
    least = least.expand_as(blocks).flatten(2).flatten(0, 1)[: x.shape[0], : x.shape[1]]
    return torch.maximum(x.abs() * (HALF * 2.0**-3), least)


# Of a step, with what float32 arithmetic may add.
HALF = 0.5 + 2.0**-12
EXACT, BF16 = _plain(torch.float32), _plain(torch.bfloat16)


def _fp8_fields(_: ModelConfig) -> Fields:
    quantization = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK],
    }  # fmt: skip
    return {"quantization_config": quantization}


def _w8a8_fields(model: ModelConfig) -> Fields:
    # No quantization_config: readers would take it in place of the description.
    mtp = {"mtp_quantize": "w8a8_dynamic"} if model.num_nextn_predict_layers else {}
    return {"quantize": "w8a8_dynamic"} | mtp


def _int4_fields(_: ModelConfig) -> Fields:
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False,
        "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    ignore = [
        "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        r"re:.*mlp\.gate$", "re:.*eh_proj.*", "re:.*shared_head.*",
    ]  # fmt: skip
    quantization = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ignore, "kv_cache_scheme": None,
    }  # fmt: skip
    return {"quantization_config": quantization}


TARGETS = {
    target.name: target
    for target in (
        Target("bf16"),
        Target(
            "fp8", Form(_fp8_tensors, fp8_blocks, _fp8_bound),
            frozenset({"linear", "prologue", "experts", "latent_up"}), fields=_fp8_fields,
        ),
        Target(
            "w8a8", Form(_int8_tensors, _int8, _int8_bound), frozenset({"linear", "prologue", "experts"}),
            "quant_model_weight_w8a8_dynamic.safetensors.index.json", _w8a8_fields, "W8A8_DYNAMIC",
        ),
        Target("int4", Form(_int4_tensors, _int4, _int4_bound), frozenset({"experts"}), fields=_int4_fields),
    )
}  # fmt: skip


def target_of(name: str, model: ModelConfig) -> Target:
    """InputError where there is none of this name, or the model is in it already."""
    if name not in TARGETS:
        raise InputError(f"--to {name!r} is not one of {', '.join(TARGETS)}")
    if format_of(model) == name:
        raise InputError(f"--to {name}: the checkpoint is in this precision already")
    return TARGETS[name]


def format_of(model: ModelConfig) -> str:
    """What a checkpoint is in, by the names of targets."""
    if model.fp8_block is not None:
        return "fp8"
    if model.int8_rows:
        return "w8a8"
    if model.int4_group is not None:
        return "int4"
    return {"bfloat16": "bf16"}.get(model.dtype, model.dtype)
