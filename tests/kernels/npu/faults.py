"""Calls that are wrong: whether torch_npu's own shape functions pass them, and what our contracts say."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from expertmesh.errors import KernelFailure

BF16, I8, I32, I64, F32 = torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.float32


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


PROLOG: dict[str, Any] = {
    "token_x": empty(4, 7168), "weight_dq": empty(7168, 1536), "weight_uq_qr": empty(1536, 2 * 192),
    "weight_uk": empty(2, 128, 512), "weight_dkv_kr": empty(7168, 576), "rmsnorm_gamma_cq": empty(1536),
    "rmsnorm_gamma_ckv": empty(512), "rope_sin": empty(4, 64), "rope_cos": empty(4, 64),
    "kv_cache": empty(9, 128, 1, 512), "kr_cache": empty(9, 128, 1, 64), "cache_index": empty(4, dtype=I64),
    "cache_mode": "PA_BSND", "weight_quant_mode": 0,
}  # fmt: skip
GROUPED: dict[str, Any] = {
    "x": [empty(7, 64)], "weight": [empty(4, 64, 32)], "group_list": empty(4, dtype=I64), "split_item": 2,
    "group_type": 0, "group_list_type": 1, "output_dtype": BF16,
}  # fmt: skip
GATING: dict[str, Any] = {
    "x": empty(3, 256, dtype=F32), "k": 8, "bias": empty(256, dtype=F32), "k_group": 4, "group_count": 8,
    "group_select_mode": 1, "renorm": 0, "norm_type": 1,
}  # fmt: skip
LATENTS: dict[str, Any] = {
    "query": empty(3, 16, 512), "key": empty(9, 1, 128, 512), "value": empty(9, 1, 128, 512),
    "query_rope": empty(3, 16, 64), "key_rope": empty(9, 1, 128, 64), "block_table": empty(3, 2, dtype=I32),
    "actual_seq_qlen": [1, 2, 3], "actual_seq_kvlen": [5, 200, 256], "num_query_heads": 16, "num_key_value_heads": 1,
    "input_layout": "TND_NTD", "sparse_mode": 0, "block_size": 128,
}  # fmt: skip
EXPANDED: dict[str, Any] = {
    "query": empty(5, 16, 192), "key": empty(9, 16, 192), "value": empty(9, 16, 128),
    "atten_mask": empty(2048, 2048, dtype=torch.bool), "actual_seq_qlen": [2, 5], "actual_seq_kvlen": [2, 9],
    "num_query_heads": 16, "num_key_value_heads": 16, "input_layout": "TND", "sparse_mode": 3,
}  # fmt: skip
ROUTING: dict[str, Any] = {
    "x": empty(5, 64), "expert_idx": empty(5, 2, dtype=I32), "active_num": 10, "expert_num": 5, "drop_pad_mode": 0,
    "expert_tokens_num_type": 1, "expert_tokens_num_flag": True, "quant_mode": -1, "active_expert_range": [0, 4],
    "row_idx_type": 0,
}  # fmt: skip
FINALIZE: dict[str, Any] = {
    "expanded_permuted_rows": empty(10, 1, 64), "skip1": None, "skip2": None, "bias": None, "scales": empty(5, 2),
    "expanded_src_to_dst_row": empty(10, dtype=I32), "export_for_source_row": None, "drop_pad_mode": 3,
}  # fmt: skip
ROPE: dict[str, Any] = {"x": empty(3, 16, 1, 64), "cos": empty(3, 1, 1, 64), "sin": empty(3, 1, 1, 64)}
SCATTER: dict[str, Any] = {
    "key": empty(4, 1, 512), "value": empty(4, 1, 64), "key_cache": empty(9, 128, 1, 512),
    "value_cache": empty(9, 128, 1, 64), "slot_mapping": empty(4, dtype=I64), "cache_mode": "Norm",
}  # fmt: skip
QUANT: dict[str, Any] = {
    "x1": empty(5, 64, dtype=I8), "x2": empty(64, 32, dtype=I8), "scale": empty(32, dtype=F32),
    "pertoken_scale": empty(5, dtype=F32), "bias": None, "output_dtype": BF16,
}  # fmt: skip
FIA = "npu_fused_infer_attention_score_v2"
GOOD: dict[str, dict[str, Any]] = {
    "npu_mla_prolog_v3": PROLOG, "npu_grouped_matmul": GROUPED, "npu_moe_gating_top_k": GATING,
    f"{FIA}:latents": LATENTS, f"{FIA}:expanded": EXPANDED, "npu_moe_init_routing_v2": ROUTING,
    "npu_moe_finalize_routing": FINALIZE, "npu_interleave_rope": ROPE, "npu_scatter_pa_kv_cache": SCATTER,
    "npu_quant_matmul": QUANT,
}  # fmt: skip
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "a cache mode that is none": ("npu_mla_prolog_v3", {"cache_mode": "PA_BNSD"}),
    "inner sizes that differ": ("npu_grouped_matmul", {"weight": [empty(4, 48, 32)]}),
    "a bias that is too short": ("npu_moe_gating_top_k", {"bias": empty(255, dtype=F32)}),
    "no cache index": ("npu_mla_prolog_v3", {"cache_index": None}),
    "a page size of no kernel": (
        "npu_mla_prolog_v3",
        {"kv_cache": empty(9, 32, 1, 512), "kr_cache": empty(9, 32, 1, 64)},
    ),
    "a hidden size of no kernel": (
        "npu_mla_prolog_v3",
        {"token_x": empty(4, 4096), "weight_dq": empty(4096, 1536), "weight_dkv_kr": empty(4096, 576)},
    ),
    "heads that queries have not": ("npu_mla_prolog_v3", {"weight_uq_qr": empty(1536, 3 * 192)}),
    "rows without their scale": (
        "npu_mla_prolog_v3",
        {
            "token_x": empty(4, 7168, dtype=I8),
            "weight_dq": empty(7168, 1536, dtype=I8),
            "weight_dkv_kr": empty(7168, 576, dtype=I8),
            "weight_quant_mode": 2,
        },
    ),
    "groups without a count": ("npu_grouped_matmul", {"group_list": empty(3, dtype=I64)}),
    "counts of one group": (
        "npu_grouped_matmul",
        {"weight": [empty(1, 64, 32)], "group_list": empty(1, dtype=I64)},
    ),
    "int8 without scales": (
        "npu_grouped_matmul",
        {"x": [empty(7, 64, dtype=I8)], "weight": [empty(4, 64, 32, dtype=I8)]},
    ),
    "more experts than groups have": ("npu_moe_gating_top_k", {"k": 200}),
    "groups of two": ("npu_moe_gating_top_k", {"group_count": 128, "k_group": 64}),
    "int64 pages": (f"{FIA}:latents", {"block_table": empty(3, 2, dtype=I64)}),
    "a table that is too short": (f"{FIA}:latents", {"actual_seq_kvlen": [5, 200, 257]}),
    "another block size": (f"{FIA}:latents", {"block_size": 16}),
    "three heads": (
        f"{FIA}:latents",
        {"query": empty(3, 3, 512), "query_rope": empty(3, 3, 64), "num_query_heads": 3},
    ),
    "float32 queries": (f"{FIA}:latents", {"query": empty(3, 16, 512, dtype=F32)}),
    "keys with gaps": (f"{FIA}:expanded", {"key": empty(16, 9, 192).transpose(0, 1)}),
    "no mask": (f"{FIA}:expanded", {"atten_mask": None}),
    "fewer keys than lengths": (f"{FIA}:expanded", {"actual_seq_kvlen": [2, 8]}),
    "int64 experts": ("npu_moe_init_routing_v2", {"expert_idx": empty(5, 2, dtype=I64)}),
    "experts out of their number": ("npu_moe_init_routing_v2", {"active_expert_range": [0, 9]}),
    "places of other rows": ("npu_moe_finalize_routing", {"expanded_src_to_dst_row": empty(8, dtype=I32)}),
    "half of the cosines": ("npu_interleave_rope", {"cos": empty(3, 1, 1, 32)}),
    "parts of 32": (
        "npu_interleave_rope",
        {"x": empty(3, 16, 1, 32), "cos": empty(3, 1, 1, 32), "sin": empty(3, 1, 1, 32)},
    ),
    "a cache that would be FRACTAL_NZ": ("npu_scatter_pa_kv_cache", {"cache_mode": "PA_NZ"}),
    "inner sizes that differ, int8": ("npu_quant_matmul", {"x1": empty(5, 48, dtype=I8)}),
}


def said(op: str, arguments: dict[str, Any]) -> str:
    from expertmesh.kernels.npu.ops import Ops

    try:
        Ops().call(op, **arguments)
    except KernelFailure as error:
        return str(error)
    return ""


def silent(op: str, arguments: dict[str, Any]) -> bool:
    """Whether torch_npu's own function has nothing against it."""
    import torch_npu

    try:
        getattr(torch_npu, op.partition(":")[0])(**arguments)
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


def check() -> Iterator[dict[str, Any]]:
    import torch_npu  # noqa: F401

    for op, arguments in GOOD.items():
        yield {"good": op, "said": said(op, arguments), "silent": silent(op, arguments)}
    for fault, (op, changes) in BAD.items():
        arguments = {**GOOD[op], **changes}
        yield {"bad": fault, "op": op, "said": said(op, arguments), "silent": silent(op, arguments)}
