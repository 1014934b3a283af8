"""What torch_npu's fused ops want of their arguments, as data.

Its own shape functions pass calls that a card would refuse, or compute something else with: a cache_mode that does not
exist, a grouped product whose inner sizes differ, a bias that is too short. Source: the documentation that torch_npu
2.13 ships (`_op_plugin_docs.py`); where it has none, as for npu_interleave_rope, what public engines call it with.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expertmesh.errors import KernelFailure

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
HALVES = (torch.float16, torch.bfloat16)
BFLOAT16 = (torch.bfloat16,)


@dataclass(frozen=True)
class Limit:
    """What one op takes on a card: types of numbers, and which sizes the letters of its contract may stand for."""

    floats: tuple[torch.dtype, ...] = FLOATS
    sizes: Mapping[str, Container[int]] = field(default_factory=dict)

    def allows(self, dtype: torch.dtype, sizes: Mapping[str, int]) -> bool:
        return dtype in self.floats and all(
            size in self.sizes[letter] for letter, size in sizes.items() if letter in self.sizes
        )


HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
LATENT, ROPE = (512,), (64,)
# Of the last axis of a product's matrices; and rows of a step.
INNER, ROWS = range(1, 65536), range((1 << 20) + 1)
# Ascend 910B and 910C. An op that is not in here has no limits.
PUBLISHED: Mapping[str, Limit] = {
    "npu_mla_prolog_v3": Limit(
        BFLOAT16,
        {
            "T": ROWS, "M": (7168, 7680, 6144), "Q": (1536,), "H": HEADS, "N": (128,), "C": LATENT, "P": ROPE,
            "G": (16, 128),
        },
    ),
    "npu_interleave_rope": Limit(HALVES, {"P": ROPE}),
    "npu_fused_infer_attention_score_v2:latents": Limit(
        HALVES, {"T": ROWS, "H": HEADS, "C": LATENT, "P": ROPE, "G": (16, 128), "B": range(1, 65537)}
    ),
    "npu_fused_infer_attention_score_v2:expanded": Limit(
        BFLOAT16, {"T": ROWS, "H": range(1, 257), "D": (192,), "V": (128,), "B": range(1, 4097)}
    ),
    "npu_moe_gating_top_k": Limit(sizes={"E": range(1, 2049)}),
    "npu_grouped_matmul": Limit(sizes={"S": range(1, 1025), "K": INNER, "N": INNER}),
    "npu_dequant_swiglu_quant": Limit(BFLOAT16),
    "npu_dequant_swiglu_quant:groups": Limit(BFLOAT16, {"J": range(128, 20993, 128)}),
    "npu_dynamic_quant": Limit(HALVES),
    "npu_quant_matmul": Limit(sizes={"K": INNER, "N": INNER}),
}  # fmt: skip

Values = Mapping[str, Any]
# The argument that is wrong, what it has to be, and whether it is.
Rule = tuple[str, str, Callable[[Values], bool]]


@dataclass(frozen=True)
class Contract:
    """Of one op, or of one way to call it.

    tensors: arguments in the order of the schema, each "sizes | types": letters are sizes that are the same wherever
    they stand, "float" is any type that the op's limit has, "=x" the type of x. whole: tensors without gaps. options:
    what else may only have some values. rules: over letters and options.
    """

    tensors: Mapping[str, str]
    whole: tuple[str, ...] = ()
    options: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()

    def check(self, op: str, limit: Limit, given: Mapping[str, Any]) -> None:
        """KernelFailure names the op, the argument, what was given and what is allowed."""
        sizes: dict[str, int] = {}
        for name, wanted in self.tensors.items():
            value = given.get(name)
            tensor = value[0] if isinstance(value, list) else value
            if tensor is None:
                continue
            shape, types = wanted.split(" | ")
            self._check_shape(op, name, tensor, shape.split(), sizes)
            self._check_type(op, name, tensor, types.split(), limit, given)
            if name in self.whole and not tensor.is_contiguous():
                raise _wrong(op, name, f"has strides {list(tensor.stride())}", "contiguous")
        for letter, size in sizes.items():
            if size not in limit.sizes.get(letter, (size,)):
                raise _wrong(op, f"size {letter}", f"is {size}", told(limit.sizes[letter]))
        for name, allowed in self.options.items():
            if name in given and given[name] not in allowed:
                raise _wrong(op, name, f"is {given[name]!r}", told(allowed))
        for name, wanted, holds in self.rules:
            if not holds({**given, **sizes}):
                raise _wrong(op, name, f"is {_shown(given.get(name))}", wanted)

    def _check_shape(
        self, op: str, name: str, tensor: Tensor, letters: list[str], sizes: dict[str, int]
    ) -> None:
        """Enters the sizes that are met for the first time."""
        fits = tensor.dim() == len(letters)
        for letter, size in zip(letters, tensor.shape, strict=False):
            known = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            fits = fits and known == size
        if not fits:
            wanted = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
            raise _wrong(op, name, f"is {list(tensor.shape)}", f"[{wanted}]")

    def _check_type(
        self, op: str, name: str, tensor: Tensor, types: list[str], limit: Limit, given: Mapping[str, Any]
    ) -> None:
        allowed: list[torch.dtype] = []
        for kind in types:
            if kind.startswith("="):
                other = given[kind[1:]]
                allowed.append((other[0] if isinstance(other, list) else other).dtype)
            else:
                allowed += limit.floats if kind == "float" else [getattr(torch, kind)]
        if tensor.dtype not in allowed:
            raise _wrong(op, name, f"is of {tensor.dtype}", told(allowed))


def _wrong(op: str, name: str, given: str, allowed: str) -> KernelFailure:
    return KernelFailure(op, "npu", f"{name} {given}, but must be {allowed}")


def _shown(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        value = value[0]
    return str(list(value.shape)) if isinstance(value, Tensor) else repr(value)


def told(allowed: Any) -> str:
    """Of the values in an error."""
    if isinstance(allowed, range):
        steps = f" in steps of {allowed.step}" if allowed.step > 1 else ""
        return f"{allowed.start} to {allowed[-1]}{steps}"
    return " or ".join(dict.fromkeys(str(value) for value in allowed))


def _rises(lengths: Any) -> bool:
    return all(a <= b for a, b in zip([0, *lengths], lengths, strict=False))


_QUANTISED_PROLOG = (
    "weight_quant_mode",
    "0 with plain rows, 2 with rows and weights of int8 and all their scales",
    lambda v: (
        v["weight_quant_mode"] == 2 * (v["token_x"].dtype == torch.int8)
        and v["weight_uq_qr"].dtype == v["token_x"].dtype
        and all(
            (v.get(f"dequant_scale_{of}") is not None) == (v["weight_quant_mode"] == 2)
            for of in ("x", "w_dq", "w_uq_qr", "w_dkv_kr")
        )
    ),
)
_TABLE = (
    "block_table",
    "wide enough for the longest sequence",
    lambda v: max(v["actual_seq_kvlen"]) <= v["W"] * v["G"],
)
_EVERY = ("actual_seq_kvlen", "one length for each sequence", lambda v: len(v["actual_seq_kvlen"]) == v["B"])
_ALL_ROWS = (
    "actual_seq_qlen",
    "sums of rows up to all of them",
    lambda v: _rises(v["actual_seq_qlen"]) and v["actual_seq_qlen"][-1] == v["T"],
)
_HEADS = ("num_query_heads", "the heads of query", lambda v: v["num_query_heads"] == v["H"])

CONTRACTS: Mapping[str, Contract] = {
    "npu_rms_norm": Contract({"self": "T M | float", "gamma": "M | =self"}),
    "npu_mla_prolog_v3": Contract(
        {
            "token_x": "T M | float int8", "weight_dq": "M Q | =token_x", "weight_uq_qr": "Q X | float int8",
            "weight_uk": "H N C | float", "weight_dkv_kr": "M Y | =token_x", "rmsnorm_gamma_cq": "Q | =weight_uk",
            "rmsnorm_gamma_ckv": "C | =weight_uk", "rope_sin": "T P | =weight_uk", "rope_cos": "T P | =weight_uk",
            "kv_cache": "B G 1 C | =weight_uk", "kr_cache": "B G 1 P | =weight_uk", "cache_index": "T | int64",
            "dequant_scale_x": "T 1 | float32", "dequant_scale_w_dq": "1 Q | float32",
            "dequant_scale_w_uq_qr": "1 X | float32", "dequant_scale_w_dkv_kr": "1 Y | float32",
        },
        whole=("token_x", "weight_uk", "kv_cache", "kr_cache", "rope_sin", "rope_cos"),
        options={"cache_mode": ("PA_BSND",), "weight_quant_mode": (0, 2)},
        rules=(
            ("weight_uq_qr", "[Q, H * (N + P)]", lambda v: v["X"] == v["H"] * (v["N"] + v["P"])),
            ("weight_dkv_kr", "[M, C + P]", lambda v: v["Y"] == v["C"] + v["P"]),
            ("cache_index", "there", lambda v: v.get("cache_index") is not None),
            _QUANTISED_PROLOG,
        ),
    ),
    "npu_interleave_rope": Contract(
        {"x": "T H 1 P | float", "cos": "T 1 1 P | =x", "sin": "T 1 1 P | =x"},
        whole=("x",),
        rules=(("x", "of even width", lambda v: v["P"] % 2 == 0),),
    ),
    "npu_scatter_pa_kv_cache": Contract(
        {
            "key": "T 1 C | float", "value": "T 1 P | =key", "key_cache": "B G 1 C | =key",
            "value_cache": "B G 1 P | =key", "slot_mapping": "T | int64",
        },
        whole=("key", "value", "key_cache", "value_cache"),
        options={"cache_mode": ("Norm", None)},
        # It has a default, which is another order.
        rules=(("cache_mode", "Norm, for pages in order", lambda v: "cache_mode" in v),),
    ),
    "npu_transpose_batchmatmul": Contract(
        {"input": "A B K | float", "weight": "H K N | =input"},
        options={"perm_x1": ([1, 0, 2], [0, 1, 2]), "perm_y": ([1, 0, 2],), "perm_x2": ([0, 1, 2],)},
        rules=(
            ("input", "as many matrices as weight", lambda v: v["H"] == v["B" if v["perm_x1"][0] else "A"]),
        ),
    ),
    "npu_fused_infer_attention_score_v2:latents": Contract(
        {
            "query": "T H C | float", "key": "Z 1 G C | =query", "value": "Z 1 G C | =query",
            "query_rope": "T H P | =query", "key_rope": "Z 1 G P | =query", "block_table": "B W | int32",
        },
        whole=("query", "key", "value", "query_rope", "key_rope"),
        options={
            "input_layout": ("TND", "TND_NTD"), "num_key_value_heads": (1,), "sparse_mode": (0,),
        },
        rules=(
            ("block_size", "the tokens of a page", lambda v: v["block_size"] == v["G"]),
            _HEADS, _EVERY, _TABLE, _ALL_ROWS,
        ),
    ),
    "npu_fused_infer_attention_score_v2:expanded": Contract(
        {
            "query": "T H D | float", "key": "L H D | =query", "value": "L H V | =query",
            "atten_mask": "2048 2048 | bool int8 uint8",
        },
        whole=("query", "key", "value", "atten_mask"),
        options={"input_layout": ("TND",), "sparse_mode": (3,), "block_table": (None,)},
        rules=(
            ("atten_mask", "there", lambda v: v.get("atten_mask") is not None),
            _HEADS, _ALL_ROWS,
            (
                "actual_seq_kvlen", "sums of lengths up to all keys, one for each sequence",
                lambda v: _rises(v["actual_seq_kvlen"]) and v["actual_seq_kvlen"][-1] == v["L"]
                and len(v["actual_seq_kvlen"]) == len(v["actual_seq_qlen"]),
            ),
        ),
    ),
    "npu_moe_gating_top_k": Contract(
        {"x": "T E | float", "bias": "E | =x"},
        options={"group_select_mode": (0, 1), "renorm": (0,), "norm_type": (0, 1)},
        rules=(
            ("group_count", "a divisor of the experts, more than two in a group",
             lambda v: v["E"] % v["group_count"] == 0 and v["E"] // v["group_count"] > 2),
            ("group_count", "so that groups, each rounded up to 32 experts, have at most 2048",
             lambda v: -(-v["E"] // v["group_count"] // 32) * 32 * v["group_count"] <= 2048),
            ("k_group", "1 to group_count", lambda v: 1 <= v["k_group"] <= v["group_count"]),
            ("k", "at most the experts of the chosen groups",
             lambda v: 1 <= v["k"] <= v["E"] // v["group_count"] * v["k_group"]),
        ),
    ),
    "npu_moe_init_routing_v2": Contract(
        {"x": "T M | float", "expert_idx": "T K | int32"},
        options={
            "quant_mode": (-1, 1), "expert_tokens_num_type": (1,), "expert_tokens_num_flag": (True,),
            "drop_pad_mode": (0,), "row_idx_type": (0,),
        },
        rules=(
            ("active_expert_range", "a range that is not empty, of at most expert_num",
             lambda v: 0 <= v["active_expert_range"][0] < v["active_expert_range"][1] <= v["expert_num"] <= 10240),
            ("active_num", "all choices", lambda v: v["active_num"] in (-1, 0, v["T"] * v["K"])),
        ),
    ),
    "npu_grouped_matmul": Contract(
        {
            "x": "R K | float int8", "weight": "S K N | =x", "scale": "S N | bfloat16 float32",
            "per_token_scale": "R | float32", "group_list": "S | int64",
        },
        options={"split_item": (2, 3), "group_type": (0,), "group_list_type": (0, 1), "bias": (None,)},
        rules=(
            ("group_list", "there, one number for each matrix", lambda v: v.get("group_list") is not None),
            ("group_list_type", "0 where there is one group", lambda v: v["S"] > 1 or v["group_list_type"] == 0),
            ("scale", "there with int8, and of the type that results have", lambda v: _scaled(v)),
        ),
    ),
    "npu_dequant_swiglu_quant": Contract(
        {"x": "T J | float"},
        options={"quant_mode": (1,), "activate_left": (True, False), "group_index": (None,)},
        rules=(("x", "of an even width", lambda v: v["J"] % 2 == 0),),
    ),
    "npu_dequant_swiglu_quant:groups": Contract(
        {"x": "T J | float", "group_index": "S | int64"},
        options={"quant_mode": (1,), "activate_left": (True, False)},
        rules=(("x", "of an even width", lambda v: v["J"] % 2 == 0),),
    ),
    "npu_swiglu": Contract(
        {"self": "T J | float"}, rules=(("self", "of an even width", lambda v: v["J"] % 2 == 0),)
    ),
    "npu_moe_finalize_routing": Contract(
        {
            "expanded_permuted_rows": "X 1 M | float", "scales": "T K | =expanded_permuted_rows",
            "expanded_src_to_dst_row": "X | int32",
        },
        options={"drop_pad_mode": (3,), "skip1": (None,), "skip2": (None,), "bias": (None,)},
        rules=(("expanded_src_to_dst_row", "one for each of scales", lambda v: v["X"] == v["T"] * v["K"]),),
    ),
    "npu_dynamic_quant": Contract({"input": "T K | float"}),
    "npu_quant_matmul": Contract(
        {
            "x1": "T K | int8", "x2": "K N | int8", "scale": "N | float32 bfloat16",
            "pertoken_scale": "T | float32", "bias": "N | int32 float32 bfloat16",
        },
        rules=(("output_dtype", "given", lambda v: v.get("output_dtype") is not None),),
    ),
}  # fmt: skip


def _scaled(v: Values) -> bool:
    quantised = v["x"][0].dtype == torch.int8
    both = [v.get(name) is not None for name in ("scale", "per_token_scale")]
    return all(both) and v["scale"][0].dtype == v["output_dtype"] if quantised else not any(both)
