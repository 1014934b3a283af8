"""What a model is, from its config.json."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from expertmesh.errors import InputError

# What ModelSlim, the tool of Ascend deployments, writes beside a checkpoint: the type of every tensor.
DESCRIPTIONS = "quant_model_description*.json"
# architectures entry of config.json -> the family whose defaults apply
ARCHITECTURES = {"DeepseekV2ForCausalLM": "deepseek_v2", "DeepseekV3ForCausalLM": "deepseek_v3"}


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (Peng et al. 2023) with DeepSeek's two mscale fields."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def mscale_for(self, weight: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

    @property
    def rotary_scale(self) -> float:
        """Factor on the cosines and sines."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.mscale_for(self.mscale) / self.mscale_for(self.mscale_all_dim)
        return self.mscale_for(1.0)

    @property
    def softmax_scale(self) -> float:
        """Factor on the attention scores."""
        return self.mscale_for(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


@dataclass(frozen=True)
class ModelConfig:
    """One model of the DeepSeek V2/V3 family, in the names of the official config.json.

    Routing is told by fields, not by the family: scoring_func and topk_method. Weights of the chosen experts are
    normalised where norm_topk_prob says so and the scores are sigmoids; softmax scores are only scaled, as in
    DeepSeek's own inference code.

    How the checkpoint keeps matrices, at most one of: fp8_block: FP8 with a scale for each block of this size;
    int8_rows: whole numbers of 8 bits with a scale for each row, in ModelSlim's layout, where the file beside it says
    so; int4_group: whole numbers of 4 bits with a scale for so many of a row, where there are such.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"]
    scoring_func: Literal["softmax", "sigmoid"]
    norm_topk_prob: bool
    routed_scaling_factor: float
    first_k_dense_replace: int
    moe_layer_freq: int
    num_nextn_predict_layers: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_interleave: bool
    yarn: Yarn | None
    attention_bias: bool
    tie_word_embeddings: bool
    dtype: str
    fp8_block: tuple[int, int] | None
    int8_rows: bool
    int4_group: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers that the cache keeps for one token of one layer: the latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        return float(self.qk_head_dim**-0.5) * (self.yarn.softmax_scale if self.yarn else 1.0)

    @property
    def kept(self) -> str:
        """How this checkpoint's numbers are kept as they are (`config.precision`)."""
        if self.fp8_block == (128, 128):
            return "fp8"
        return "w8a8" if self.int8_rows else "experts_int4" if self.int4_group == 128 else "none"

    def is_moe(self, layer: int) -> bool:
        return (
            self.n_routed_experts > 0
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers of the main model that have routed experts."""
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe(i))

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read config.json of a folder in the Hugging Face layout. InputError where it cannot be used."""
        try:
            exists = folder.exists()
        except OSError as error:  # a name that no folder can have
            raise InputError(f"{folder}: {error.strerror}") from None
        if not exists:
            raise InputError(
                f"{folder}: no such folder; name a folder that holds config.json and *.safetensors"
            )
        path = folder / "config.json"
        if not path.is_file():
            raise InputError(
                f"{folder}: there is no config.json in it, so this is not a model in the Hugging Face layout"
            )
        data = read_object(path)
        # It says more than config.json, where something else may have been left.
        if any(folder.glob(DESCRIPTIONS)):
            data["quantization_config"] = {"quant_method": "ascend"}
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config.json") -> "ModelConfig":
        """From the fields of config.json, the official ones or those that transformers 5 writes."""
        names = data.get("architectures")
        architecture = names[0] if isinstance(names, list) and names else "(none)"
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise InputError(
                f"{where}: architecture {architecture} is not supported; supported are {', '.join(ARCHITECTURES)}"
            )
        values = _plain_fields(data, _defaults(ARCHITECTURES[architecture]), where)
        values["architecture"] = architecture
        values["q_lora_rank"] = values["q_lora_rank"] or None  # 0 in DeepSeek's own inference configurations
        rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise InputError(f"{where}: rope_scaling is {rope!r}, not an object")
        theta = _number(data, "rope_theta", 10000.0, where)
        values["rope_theta"] = _number(rope, "rope_theta", theta, where)
        values["yarn"] = _yarn(rope, values["max_position_embeddings"], where)
        values["dtype"] = str(data.get("dtype") or data.get("torch_dtype") or "bfloat16").removeprefix(
            "torch."
        )
        values |= _quantisation(data, where)
        eos = data.get("eos_token_id")
        values["eos_token_ids"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        if not all(fits(int, token) for token in values["eos_token_ids"]):
            raise InputError(f"{where}: eos_token_id is {eos!r}, neither a token id nor a list of them")
        if values["topk_method"] == "gready":  # the spelling of DeepSeek-V2's own default
            values["topk_method"] = "greedy"
        config = cls(**values)
        config._check(data, where)
        return config

    def _check(self, data: Mapping[str, Any], where: str) -> None:
        wrong = [f"{name} is 0" for name in _AT_LEAST_ONE if getattr(self, name) < 1]
        if wrong:
            raise InputError(f"{where}: {'; '.join(wrong)}")
        if data.get("hidden_act", "silu") != "silu":
            wrong.append(f"hidden_act {data['hidden_act']!r} is not supported, only 'silu'")
        if self.scoring_func not in ("softmax", "sigmoid"):
            wrong.append(f"scoring_func {self.scoring_func!r} is not one of softmax, sigmoid")
        if self.topk_method not in ("greedy", "group_limited_greedy", "noaux_tc"):
            wrong.append(
                f"topk_method {self.topk_method!r} is not one of greedy, group_limited_greedy, noaux_tc"
            )
        if self.n_routed_experts and self.moe_layers:
            if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
                wrong.append(
                    f"num_experts_per_tok {self.num_experts_per_tok} of {self.n_routed_experts} experts"
                )
            if self.n_group < 1 or self.n_routed_experts % self.n_group:
                wrong.append(
                    f"n_group {self.n_group} does not divide n_routed_experts {self.n_routed_experts}"
                )
            elif not 1 <= self.topk_group <= self.n_group:
                wrong.append(f"topk_group {self.topk_group} of {self.n_group} groups")
            elif self.n_routed_experts // self.n_group * self.topk_group < self.num_experts_per_tok:
                wrong.append(f"{self.topk_group} groups hold fewer than {self.num_experts_per_tok} experts")
        if self.qk_rope_head_dim % 2:
            wrong.append(f"qk_rope_head_dim {self.qk_rope_head_dim} is odd")
        if self.rope_theta <= 1:
            wrong.append(f"rope_theta is {self.rope_theta}, but must be above 1")
        if wrong:
            raise InputError(f"{where}: {'; '.join(wrong)}")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. InputError where it holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds a {type(data).__name__}, not an object")
    return data


# Fields that are not taken from the file as they are.
_DERIVED = {
    "architecture",
    "rope_theta",
    "yarn",
    "dtype",
    "fp8_block",
    "int8_rows",
    "int4_group",
    "eos_token_ids",
}
_AT_LEAST_ONE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "max_position_embeddings", "moe_layer_freq",
)  # fmt: skip
_KINDS: dict[Any, str] = {int: "a count", int | None: "a count", float: "a number", bool: "true or false"}


def _defaults(family: str) -> dict[str, Any]:
    """Of the fields that a file may leave out, or set to null."""
    sigmoid = family == "deepseek_v3"
    return {
        "n_routed_experts": 0,
        "n_shared_experts": 0,
        "num_experts_per_tok": 0,
        "moe_intermediate_size": 0,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc" if sigmoid else "greedy",
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "norm_topk_prob": sigmoid,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "rms_norm_eps": 1e-6,
        "rope_interleave": True,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
    }


def _plain_fields(data: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    values, missing, wrong = {}, [], []
    for field in fields(ModelConfig):
        if field.name in _DERIVED:
            continue
        value = data.get(field.name)
        if value is None:
            value = defaults.get(field.name)
            if field.name not in defaults:
                missing.append(field.name)
        elif field.type in _KINDS and not fits(field.type, value):
            wrong.append(f"{field.name} is {value!r}, not {_KINDS[field.type]}")
        values[field.name] = value
    if missing:
        raise InputError(f"{where}: fields are missing: {', '.join(missing)}")
    if wrong:
        raise InputError(f"{where}: {'; '.join(wrong)}")
    return values


def fits(kind: Any, value: Any) -> bool:
    """Whether a value of a JSON file is a count, a finite number, a truth value."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and abs(value) < 1e30
    return isinstance(value, int) and 0 <= value < 1 << 31


def _number(data: Mapping[str, Any], name: str, default: Any, where: str) -> Any:
    """A number of an object, the default where it is absent or null."""
    value = data.get(name)
    if value is None:
        return default
    if not fits(float, value):
        raise InputError(f"{where}: {name} is {value!r}, not a number")
    return float(value)


def _yarn(rope: Mapping[str, Any], max_position: int, where: str) -> Yarn | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "yarn":
        raise InputError(f"{where}: rope type {kind!r} is not supported, only 'default' and 'yarn'")
    original = rope.get("original_max_position_embeddings")
    if not original or not fits(int, original):
        raise InputError(f"{where}: YaRN needs original_max_position_embeddings, a count of at least 1")
    factor = _number(rope, "factor", max_position / original, where)
    fast, slow = (_number(rope, "beta_fast", 32.0, where), _number(rope, "beta_slow", 1.0, where))
    if min(factor, fast, slow) <= 0:
        raise InputError(f"{where}: YaRN needs factor, beta_fast and beta_slow above 0")
    return Yarn(
        factor=factor,
        original_max_position=original,
        beta_fast=fast,
        beta_slow=slow,
        mscale=_number(rope, "mscale", None, where),
        mscale_all_dim=_number(rope, "mscale_all_dim", None, where),
        attention_factor=_number(rope, "attention_factor", None, where),
        truncate=bool(rope.get("truncate", True)),
    )


def _quantisation(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """How matrices are kept: fp8_block, int8_rows and int4_group."""
    quantization = data.get("quantization_config")
    given = quantization if isinstance(quantization, Mapping) else {}
    method = given.get("quant_method")
    found: dict[str, Any] = {"fp8_block": None, "int8_rows": False, "int4_group": None}
    if method in ("ascend", "modelslim") or (not quantization and data.get("quantize") == "w8a8_dynamic"):
        return found | {"int8_rows": True}
    if method == "compressed-tensors":
        return found | {"int4_group": _int4_group(given, where)}
    return found | {"fp8_block": _fp8_block(quantization, where)}


def _int4_group(given: Mapping[str, Any], where: str) -> int:
    """Of compressed-tensors' format pack-quantized, with one group of matrices, symmetric and of 4 bits."""
    groups = given.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, Mapping) and len(groups) == 1 else {}
    weights = group.get("weights") if isinstance(group, Mapping) else None
    wanted = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}
    size = weights.get("group_size") if isinstance(weights, Mapping) else None
    fitting = isinstance(weights, Mapping) and all(weights.get(n) == value for n, value in wanted.items())
    if given.get("format") != "pack-quantized" or not fitting or not fits(int, size) or not size:
        raise InputError(
            f"{where}: of compressed-tensors only 'pack-quantized' is supported, with one config group of symmetric "
            "4-bit whole numbers in groups"
        )
    return int(size)


def _fp8_block(quantization: Any, where: str) -> tuple[int, int] | None:
    if not quantization:
        return None
    given = quantization if isinstance(quantization, Mapping) else {}
    method, block = given.get("quant_method"), given.get("weight_block_size")
    if method != "fp8" or not block:
        raise InputError(
            f"{where}: quantisation {method!r} is not supported, only 'fp8' with weight_block_size, 'ascend' and "
            "'compressed-tensors'"
        )
    if not isinstance(block, list) or len(block) != 2 or not all(fits(int, n) and n for n in block):
        raise InputError(f"{where}: weight_block_size is {block!r}, not two sizes of at least 1")
    return (block[0], block[1])
