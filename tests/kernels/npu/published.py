"""torch_npu's fused ops on CPU tensors, each written from its published documentation and from nothing of ours.

What a document says is undefined, as rows behind all groups, is NaN or nonsense here: who reads it, sees it. What it
says must be is asserted. `registered()` makes them the CPU's kernels of the real ops, with their real schemas.

Documents: `_op_plugin_docs.py` of torch_npu 2.13; of npu_interleave_rope, of the masks of groups in
npu_moe_gating_top_k, and of drop_pad_mode 3 in npu_moe_finalize_routing those of CANN's aclnnInterleaveRope,
aclnnMoeGatingTopK and aclnnMoeFinalizeRoutingV2.
"""

from collections.abc import Sequence
from math import inf, nan

import torch
from torch import Tensor
from torch.nn.functional import silu


def npu_rms_norm(self: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """y = self / sqrt(mean(self^2) + epsilon) * gamma, and the reciprocal of the root."""
    assert self.dtype == gamma.dtype
    x = self.float()
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return (x * rstd).to(self.dtype) * gamma, rstd


def npu_interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, N, S, D]: pairs that lie side by side come apart, all first numbers before all second ones; then
    x * cos + rotate_half(x) * sin."""
    assert x.dim() == cos.dim() == 4 and cos.shape == sin.shape and x.dtype == cos.dtype == sin.dtype
    assert cos.shape[0] == x.shape[0] and cos.shape[1:3] == (1, 1) and cos.shape[3] == x.shape[3]
    return _rope(x, cos, sin)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    apart = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1).float()
    first, second = apart.chunk(2, dim=-1)
    return (apart * cos.float() + torch.cat((-second, first), dim=-1) * sin.float()).to(x.dtype)


def npu_mla_prolog_v3(
    token_x: Tensor, weight_dq: Tensor, weight_uq_qr: Tensor, weight_uk: Tensor, weight_dkv_kr: Tensor,
    rmsnorm_gamma_cq: Tensor, rmsnorm_gamma_ckv: Tensor, rope_sin: Tensor, rope_cos: Tensor, kv_cache: Tensor,
    kr_cache: Tensor, *, cache_index: Tensor | None = None, dequant_scale_x: Tensor | None = None,
    dequant_scale_w_dq: Tensor | None = None, dequant_scale_w_uq_qr: Tensor | None = None,
    dequant_scale_w_dkv_kr: Tensor | None = None, quant_scale_ckv: Tensor | None = None,
    quant_scale_ckr: Tensor | None = None, smooth_scales_cq: Tensor | None = None, actual_seq_len: Tensor | None = None,
    k_nope_clip_alpha: Tensor | None = None, rmsnorm_epsilon_cq: float = 1e-5, rmsnorm_epsilon_ckv: float = 1e-5,
    cache_mode: str = "PA_BSND", query_norm_flag: bool = False, weight_quant_mode: int = 0,
    kv_cache_quant_mode: int = 0, query_quant_mode: int = 0, ckvkr_repo_mode: int = 0, quant_scale_repo_mode: int = 0,
    tile_size: int = 128, qc_qr_scale: float = 1.0, kc_scale: float = 1.0, token_x_dtype: int | None = None,
    weight_dq_dtype: int | None = None, weight_uq_qr_dtype: int | None = None, weight_dkv_kr_dtype: int | None = None,
    kv_cache_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Five ways: queries down, normed, and up by weight_uk; their rotary part; latents, normed, into kv_cache; keys,
    rotated, into kr_cache; quantised queries, which is not done here. weight_quant_mode 2: token_x and the three
    products are int8, normed c_q is quantised for each row."""
    assert cache_mode == "PA_BSND" and cache_index is not None and cache_index.dtype == torch.int64
    assert not (kv_cache_quant_mode or query_quant_mode or ckvkr_repo_mode) and qc_qr_scale == kc_scale == 1.0
    assert weight_quant_mode in (0, 2) and (weight_quant_mode == 2) == (token_x.dtype == torch.int8)
    (H, D, C), Dr, T, dtype = weight_uk.shape, rope_sin.shape[1], token_x.shape[0], weight_uk.dtype
    assert weight_uq_qr.shape[1] == H * (D + Dr) and weight_dkv_kr.shape[1] == C + Dr
    assert kv_cache.shape[2:] == (1, C) and kr_cache.shape[2:] == (1, Dr)

    def product(x: Tensor, scale: Tensor | None, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
        if weight_quant_mode == 0:
            return x @ weight
        assert scale is not None and scale.shape == (T, 1) and weight_scale is not None
        assert weight_scale.shape == (1, weight.shape[1])
        return (_whole(x, weight) * scale * weight_scale).to(dtype)

    c_q = product(token_x, dequant_scale_x, weight_dq, dequant_scale_w_dq)
    c_q = npu_rms_norm(c_q, rmsnorm_gamma_cq, rmsnorm_epsilon_cq)[0]
    scale = None
    if weight_quant_mode == 2:
        c_q, scale = npu_dynamic_quant(c_q)
        scale = scale[:, None]
    query = product(c_q, scale, weight_uq_qr, dequant_scale_w_uq_qr).view(T, H, D + Dr)
    absorbed = torch.einsum("thd,hdc->thc", query[..., :D], weight_uk).contiguous()
    rotated = _rope(query[..., D:], rope_cos[:, None], rope_sin[:, None])
    kv = product(token_x, dequant_scale_x, weight_dkv_kr, dequant_scale_w_dkv_kr)
    latents = npu_rms_norm(kv[:, :C], rmsnorm_gamma_ckv, rmsnorm_epsilon_ckv)[0]
    kv_cache.view(-1, C)[cache_index] = latents
    kr_cache.view(-1, Dr)[cache_index] = _rope(kv[:, C:], rope_cos, rope_sin)
    nothing = absorbed.new_zeros(1, dtype=torch.float32)
    return absorbed, rotated, nothing, nothing.to(weight_uq_qr.dtype), nothing.clone()


def npu_scatter_pa_kv_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *,
    compress_lens: Tensor | None = None, compress_seq_offsets: Tensor | None = None, seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:  # fmt: skip
    """Second scene: key [rows, heads, size] into key_cache [blocks, block, heads, size], and value likewise."""
    assert cache_mode in (None, "Norm"), "without it the caches are FRACTAL_NZ"
    assert key.dim() == value.dim() == 3 and key.shape[:2] == value.shape[:2]
    assert all(t.is_contiguous() for t in (key, value, key_cache, value_cache))
    assert len({t.dtype for t in (key, value, key_cache, value_cache)}) == 1
    for new, cache in ((key, key_cache), (value, value_cache)):
        cache.view(-1, *cache.shape[2:])[slot_mapping] = new


def npu_transpose_batchmatmul(
    input: Tensor, weight: Tensor, *, bias: Tensor | None = None, scale: Tensor | None = None,
    perm_x1: Sequence[int] | None = None, perm_x2: Sequence[int] | None = None, perm_y: Sequence[int] | None = None,
    batch_split_factor: int | None = 1,
) -> Tensor:  # fmt: skip
    """input permuted to [B, M, K] times weight [B, K, N], permuted by perm_y."""
    assert bias is scale is None and list(perm_x2 or (0, 1, 2)) == [0, 1, 2] and batch_split_factor == 1
    first = input.permute(*(perm_x1 or (0, 1, 2)))
    assert first.shape[0] == weight.shape[0] and first.shape[2] == weight.shape[1]
    return torch.bmm(first, weight).permute(*(perm_y or (1, 0, 2))).contiguous()


def npu_fused_infer_attention_score_v2(
    query: Tensor, key: Tensor, value: Tensor, *, query_rope: Tensor | None = None, key_rope: Tensor | None = None,
    atten_mask: Tensor | None = None, actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None, block_table: Tensor | None = None, num_query_heads: int = 1,
    num_key_value_heads: int = 0, softmax_scale: float = 1.0, input_layout: str = "BSH", sparse_mode: int = 0,
    block_size: int = 0, **unused: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Layouts TND and TND_NTD: actual_seq_qlen are sums over sequences. With block_table keys are paged, [blocks,
    heads, block, D], and actual_seq_kvlen lengths; without, sums. sparse_mode 3 wants the mask of 2048 and is causal
    from the lower right."""
    assert input_layout in ("TND", "TND_NTD") and actual_seq_qlen is not None and actual_seq_kvlen is not None
    assert (
        query.is_contiguous() and query.shape[1] == num_query_heads and query.shape[0] == actual_seq_qlen[-1]
    )
    assert len(actual_seq_qlen) == len(actual_seq_kvlen) and query.numel()
    assert (sparse_mode, atten_mask is not None) in ((0, False), (3, True))
    if atten_mask is not None:
        assert torch.equal(atten_mask.bool(), torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    heads = num_key_value_heads or num_query_heads
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    ends = [0, *actual_seq_qlen]
    sums = [0, *actual_seq_kvlen]
    for i, known in enumerate(actual_seq_kvlen):
        q = query[ends[i] : ends[i + 1]]
        if block_table is None:
            span = slice(sums[i], sums[i + 1])
            k, v = key[span], value[span]
            k_rope = None if key_rope is None else key_rope[span]
        else:
            assert block_table.dtype == torch.int32 and key.shape[2] == block_size and key.shape[1] == heads
            used = block_table[i, : -(-known // block_size)].long()
            k, v = _paged(key, used, known), _paged(value, used, known)
            k_rope = None if key_rope is None else _paged(key_rope, used, known)
        if query_rope is not None and k_rope is not None:
            q = torch.cat((q, query_rope[ends[i] : ends[i + 1]]), dim=-1)
            k = torch.cat((k, k_rope), dim=-1)
        each = num_query_heads // heads
        k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * softmax_scale
        if sparse_mode == 3:
            rows, columns = scores.shape[1:]
            assert rows <= columns
            scores.masked_fill_(torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1), -inf)
        weights = scores.softmax(-1)
        out[ends[i] : ends[i + 1]] = torch.einsum("hqk,khd->qhd", weights, v.float()).to(out.dtype)
    out = out.transpose(0, 1).contiguous() if input_layout == "TND_NTD" else out
    return out, out.new_empty(0, dtype=torch.float32)


def _paged(cache: Tensor, used: Tensor, known: int) -> Tensor:
    """[known, heads, D]."""
    return cache[used].transpose(1, 2).flatten(0, 1)[:known]


def npu_moe_gating_top_k(
    x: Tensor, k: int, *, bias: Tensor | None = None, input_ids: Tensor | None = None, tid2eid: Tensor | None = None,
    k_group: int = 1, group_count: int = 1, group_select_mode: int = 0, renorm: int = 0, norm_type: int = 0,
    out_flag: bool = False, routed_scaling_factor: float = 1.0, eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Scores by norm_type (0 softmax, 1 sigmoid), bias added to choose by; groups judged by their best (0) or their two
    best (1), k_group of them kept; the k best. Weights are scores without the bias, those of sigmoids divided by their
    sum and eps, all times the factor."""
    assert renorm == 0 and input_ids is tid2eid is None and (bias is None or bias.dtype == x.dtype)
    scores = x.float().sigmoid() if norm_type else x.float().softmax(-1)
    judged = scores if bias is None else scores + bias.float()
    grouped = judged.unflatten(-1, (group_count, -1))
    assert grouped.shape[2] > 2 and 1 <= k <= grouped.shape[2] * k_group
    best = grouped.topk(2, -1).values.sum(-1) if group_select_mode else grouped.amax(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(k_group, -1).indices, True)
    experts = grouped.masked_fill(~kept[..., None], -inf).flatten(-2).topk(k, -1).indices
    weights = scores.gather(-1, experts)
    if norm_type:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return (weights * routed_scaling_factor).to(x.dtype), experts.int(), torch.zeros_like(scores)


def npu_moe_init_routing_v2(
    x: Tensor, expert_idx: Tensor, *, scale: Tensor | None = None, offset: Tensor | None = None, active_num: int = -1,
    expert_capacity: int = -1, expert_num: int = -1, drop_pad_mode: int = 0, expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False, quant_mode: int = -1, active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0, x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows of choices in [start, end) sorted by expert, as they are (-1) or quantised for each row (1); with
    row_idx_type 0 where each choice is, -1 if out of range; how many each expert has. What is behind the last one is
    undefined."""
    assert scale is offset is None and expert_tokens_num_flag and expert_tokens_num_type == 1
    assert row_idx_type == drop_pad_mode == 0 and quant_mode in (-1, 1) and expert_idx.dtype == torch.int32
    assert int(expert_idx.min()) >= 0 and int(expert_idx.max()) < expert_num
    (start, end), choices, flat = active_expert_range, expert_idx.shape[1], expert_idx.flatten().long()
    assert 0 <= start < end <= expert_num and active_num in (-1, 0, flat.numel())
    mine = (flat >= start) & (flat < end)
    order = torch.where(mine, flat, expert_num).argsort(stable=True)[: int(mine.sum())]
    place = torch.full_like(flat, -1)
    place[order] = torch.arange(len(order))
    counts = torch.bincount(flat[order] - start, minlength=end - start)
    rows = x[order // choices]
    scales = torch.full((flat.numel(),), nan)
    if quant_mode == 1:
        rows, scales[: len(order)] = npu_dynamic_quant(rows)
    expanded = torch.full((flat.numel(), x.shape[1]), 99 if quant_mode == 1 else nan, dtype=rows.dtype)
    expanded[: len(order)] = rows
    return expanded, place.int(), counts, scales


def npu_grouped_matmul(
    x: list[Tensor], weight: list[Tensor], *, bias: list[Tensor] | None = None, scale: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None, group_list: Tensor | None = None, split_item: int | None = 0,
    group_type: int | None = None, group_list_type: int | None = 0, act_type: int | None = 0,
    output_dtype: int | None = None, **unused: object,
) -> list[Tensor]:  # fmt: skip
    """One x [M, K], one weight [G, K, N], one result: group_list are sums (0) or counts (1) of rows. Int8 has a scale
    for each output, of the type of the results, and one for each row. Rows of no group are not written."""
    (rows,), (matrices,) = x, weight
    assert (
        group_type == 0 and split_item in (2, 3) and bias is None and act_type == 0 and group_list is not None
    )
    assert matrices.dim() == 3 and rows.dtype == matrices.dtype and len(group_list) == len(matrices)
    assert group_list_type == 0 or len(group_list) > 1, "of one group there are no counts"
    assert rows.shape[1] == matrices.shape[1]
    ends = (group_list if group_list_type == 0 else group_list.cumsum(0)).tolist()
    quantised = rows.dtype == torch.int8
    dtype = torch.bfloat16 if quantised else rows.dtype
    out = torch.full((rows.shape[0], matrices.shape[2]), nan, dtype=dtype)
    first = 0
    for i, end in enumerate(ends):
        some = rows[first:end]
        if quantised:
            assert scale is not None and scale[0].dtype == dtype and per_token_scale is not None
            exact = _whole(some, matrices[i]) * scale[0][i].float() * per_token_scale[0][first:end, None]
            out[first:end] = exact.to(dtype)
        else:
            out[first:end] = some @ matrices[i]
        first = end
    return [out]


def _whole(x: Tensor, weight: Tensor) -> Tensor:
    """Of whole numbers, exact below 2^53."""
    assert x.dtype == weight.dtype == torch.int8
    return (x.double() @ weight.double()).float()


def npu_swiglu(self: Tensor, dim: int = -1) -> Tensor:
    """A * sigmoid(A) * B of the two halves."""
    first, second = self.float().chunk(2, dim)
    return (silu(first) * second).to(self.dtype)


def npu_dequant_swiglu_quant(
    x: Tensor, *, weight_scale: Tensor | None = None, activation_scale: Tensor | None = None,
    bias: Tensor | None = None, quant_scale: Tensor | None = None, quant_offset: Tensor | None = None,
    group_index: Tensor | None = None, activate_left: bool = False, quant_mode: int = 0, dst_type: int | None = None,
    round_mode: int | None = None, activate_dim: int | None = None, swiglu_mode: int = 0, clamp_limit: float = 7.0,
    glu_alpha: float = 1.702, glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """SwiGLU of one half (activate_left: the first), quantised for each row. group_index are counts: what is behind
    their sum is garbage."""
    assert (
        x.dtype == torch.bfloat16
        and weight_scale is activation_scale is bias is quant_scale is quant_offset is None
    )
    assert quant_mode == 1 and swiglu_mode == 0
    first, second = x.float().chunk(2, -1)
    y = silu(first) * second if activate_left else silu(second) * first
    end = x.shape[0] if group_index is None else int(group_index.sum())
    numbers, scales = torch.full(y.shape, 77, dtype=torch.int8), torch.full(y.shape[:1], nan)
    numbers[:end], scales[:end] = npu_dynamic_quant(y[:end].bfloat16())
    return numbers, scales


def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor, skip1: Tensor | None, skip2: Tensor | None, bias: Tensor | None,
    scales: Tensor | None, expanded_src_to_dst_row: Tensor, export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0, k: int | None = 1,
) -> Tensor:  # fmt: skip
    """Mode 3: rows [experts, capacity, H], whose places come row by row of scales [T, K], -1 for those to be passed
    over. Weighted and summed."""
    assert drop_pad_mode == 3 and skip1 is skip2 is bias is None and scales is not None
    assert scales.dtype == expanded_permuted_rows.dtype and expanded_src_to_dst_row.dtype == torch.int32
    rows, place = expanded_permuted_rows.flatten(0, 1), expanded_src_to_dst_row.view(scales.shape).long()
    assert int(place.max()) < len(rows)
    picked = rows[place.clamp_min(0)].float() * scales.float()[..., None]
    return picked.masked_fill((place < 0)[..., None], 0.0).sum(1).to(rows.dtype)


def npu_dynamic_quant(
    input: Tensor, *, smooth_scales: Tensor | None = None, group_index: Tensor | None = None,
    dst_type: int | None = None, quant_mode: str = "pertoken", dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """scale = max(abs(row)) / 127, y = round(x / scale)."""
    assert smooth_scales is group_index is dst_type is None and quant_mode == "pertoken"
    assert input.dtype in (torch.float16, torch.bfloat16)
    x = input.float()
    scale = x.abs().amax(-1) / 127
    return (x / scale.clamp_min(1e-30)[..., None]).round().to(torch.int8), scale


def npu_quant_matmul(
    x1: Tensor, x2: Tensor, scale: Tensor, *, offset: Tensor | None = None, pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None, output_dtype: int | None = None, **unused: object,
) -> Tensor:  # fmt: skip
    """x1 [M, K] times x2 [K, N], times a scale for each output and one for each row, plus bias."""
    assert x1.numel() and x2.numel() and scale.shape == x2.shape[1:] and offset is None
    assert pertoken_scale is not None and pertoken_scale.shape == x1.shape[:1]
    y = _whole(x1, x2) * scale.float() * pertoken_scale[:, None]
    return (y if bias is None else y + bias.float()).to(torch.bfloat16)


OPS = (
    npu_rms_norm, npu_interleave_rope, npu_mla_prolog_v3, npu_scatter_pa_kv_cache, npu_transpose_batchmatmul,
    npu_fused_infer_attention_score_v2, npu_moe_gating_top_k, npu_moe_init_routing_v2, npu_grouped_matmul, npu_swiglu,
    npu_dequant_swiglu_quant, npu_moe_finalize_routing, npu_dynamic_quant, npu_quant_matmul,
)  # fmt: skip


def registered() -> torch.library.Library:
    """In force as long as it is kept. torch_npu has been imported."""
    library = torch.library.Library("npu", "IMPL")
    for op in OPS:
        library.impl(op.__name__, op, "CPU")
    return library
