"""Versions of the ops that get their speed from PyTorch's own library kernels, on any device.

Signatures and shapes are documented in `table`, semantics in `reference`.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear
from torch.nn.functional import pad, scaled_dot_product_attention, silu
from torch.nn.functional import rms_norm as torch_rms_norm

from expertmesh.kernels.reference import LATENT_EPS, of_halves
from expertmesh.kernels.types import AttentionRows, Prefill, Queries, Rotary

# Below this size the weights of all experts are cheap to read, hit or not, next to the calls that reading only the hit
# ones would take.
SMALL_EXPERTS_BYTES = 8 << 20


# From two rows to this many, a CPU is a third faster with the weights as the first factor of a bfloat16 product.
FEW_ROWS = 64


def linear(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _weights_first(x_TD):
        return torch_linear(x_TD, weight, bias)
    y = torch.mm(weight, x_TD.t()).t()
    return y if bias is None else y + bias


def logits(x_TD: Tensor, weight: Tensor) -> Tensor:
    return linear(x_TD, weight).float()


def _weights_first(x_TD: Tensor) -> bool:
    return x_TD.dtype == torch.bfloat16 and x_TD.device.type == "cpu" and 2 <= x_TD.shape[0] <= FEW_ROWS


def swiglu(x_TD: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = linear(x_TD, gate_up).chunk(2, dim=-1)
    return linear(silu(gate).mul_(up), down)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return torch_rms_norm(x_TD, weight_D.shape, weight_D, eps)


def mla_down(
    x_TD: Tensor, norm_D: Tensor, eps: float, a_XD: Tensor, bias_X: Tensor | None, q_norm: Tensor | None,
    kv_norm_C: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x_TD = rms_norm(x_TD, norm_D, eps)
    q_lora = 0 if q_norm is None else q_norm.shape[0]
    latent = kv_norm_C.shape[0]
    low = linear(x_TD, a_XD, bias_X)
    c_q = x_TD if q_norm is None else rms_norm(low[:, :q_lora], q_norm, LATENT_EPS)
    return c_q, rms_norm(low[:, q_lora : q_lora + latent], kv_norm_C, LATENT_EPS), low[:, q_lora + latent :]


def mla_attention(
    queries: Queries, rows: AttentionRows, cache: Tensor, kv_b: Tensor, scale: float, value_dim: int
) -> Tensor:
    """Absorbed for rows that decode, so that the latents are attended over as they are; expanded for the many of a
    prompt, which the cost of expanding the latents once is spread over."""
    plain, latent = queries.plain, kv_b.shape[-1]
    heads, nope = plain.shape[1], plain.shape[2] - (cache.shape[-1] - latent)
    q_THN, q_THP = plain[..., :nope], plain[..., nope:]
    up = kv_b.view(heads, nope + value_dim, -1)
    w_uk, w_uv = up[:, :nope], up[:, nope:]
    parts = []
    if rows.decoding:
        n = rows.decoding
        query = absorb(q_THN[:n], q_THP[:n], w_uk)
        known = cache[rows.pages_BM].flatten(1, 2)
        later = torch.arange(known.shape[1], device=cache.device) >= rows.lengths_B[:, None]
        parts.append(attend_latents(query, known, later[:, None], w_uv, scale))
    for prefill in rows.prefills:
        known = cache[prefill.pages_M].flatten(0, 1)[: prefill.length]
        p, tail = prefill.without_tail(), prefill.only_tail()
        if p.count:
            span = slice(p.first, p.first + p.count)
            parts.append(_attend_expanded(q_THN[span], q_THP[span], known[: p.length], p, kv_b, scale))
        if tail.count:
            # [q, H, X] -> [1, q * H, X]: all heads of all rows attend over the same latents.
            span = slice(tail.first, tail.first + tail.count)
            query = absorb(q_THN[span], q_THP[span], w_uk)
            later = _later(tail, cache.device).repeat_interleave(heads, 0)
            parts.append(
                attend_latents(query.view(1, -1, query.shape[-1]), known[None], later[None], w_uv, scale)
            )
    if not parts:  # a rank without rows steps with the others
        return q_THN.new_empty(0, heads * value_dim)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def absorb(q_THN: Tensor, q_THP: Tensor, w_uk: Tensor) -> Tensor:
    """Query in the latents' own space, [T, H, C + P]."""
    latent_q = torch.bmm(q_THN.transpose(0, 1), w_uk).transpose(0, 1)
    return torch.cat((latent_q, q_THP), dim=-1)


def attend_latents(query: Tensor, known: Tensor, later: Tensor, w_uv: Tensor, scale: float) -> Tensor:
    """query [B, q * H, C + P] over known [B, M, C + P], later [B, 1 or q * H, M] masked. Returns [B * q, H * V]."""
    heads, _, latent = w_uv.shape
    scores = torch.bmm(query.flatten(1, -2), known.transpose(1, 2)).float() * scale
    weights = scores.masked_fill_(later, float("-inf")).softmax(dim=-1).to(known.dtype)
    out = torch.bmm(weights, known[..., :latent]).view(-1, heads, latent)
    # The weights first: as the second factor they would have to be transposed, which costs several times as much.
    return torch.bmm(w_uv, out.permute(1, 2, 0)).permute(2, 0, 1).flatten(1)


def _attend_expanded(
    q_THN: Tensor, q_THP: Tensor, known: Tensor, prefill: Prefill, kv_b: Tensor, scale: float
) -> Tensor:
    heads, nope, latent = q_THN.shape[1], q_THN.shape[2], kv_b.shape[-1]
    up = linear(known[:, :latent], kv_b).view(prefill.length, heads, -1)
    keys = torch.cat((up[..., :nope], known[:, None, latent:].expand(-1, heads, -1)), dim=-1)
    return attend_expanded(torch.cat((q_THN, q_THP), dim=-1), keys, up[..., nope:], prefill, scale)


def attend_expanded(
    query_THX: Tensor, keys_LHX: Tensor, values_LHV: Tensor, prefill: Prefill, scale: float
) -> Tensor:
    """Causal attention of the rows of a prompt. Returns [T, H * V]."""
    # The fused kernels want heads of one size.
    width, value_dim = max(keys_LHX.shape[-1], values_LHV.shape[-1]), values_LHV.shape[-1]
    q, k, v = (
        pad(t, (0, width - t.shape[-1])).transpose(0, 1).unsqueeze(0)
        for t in (query_THX, keys_LHX, values_LHV)
    )
    whole = prefill.count == prefill.length
    mask = None if whole else ~_later(prefill, query_THX.device)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, scale=scale)
    return out[0, ..., :value_dim].transpose(0, 1).flatten(1)


def _later(prefill: Prefill, device: torch.device) -> Tensor:
    """[count, length]: which known tokens come after a row's own."""
    ones = torch.ones(prefill.count, prefill.length, dtype=torch.bool, device=device)
    return ones.triu(prefill.length - prefill.count + 1)


def experts(
    x_RD: Tensor, slots_RK: Tensor, weights_RK: Tensor, gate_up_SID: Tensor, down_SDI: Tensor
) -> Tensor:
    """Pairs of a row and a slot, sorted by slot; one matrix product per hit slot, or one batched product over many
    slots where that wastes little."""
    choices = slots_RK.shape[1]
    flat = slots_RK.flatten()
    slots = gate_up_SID.shape[0]
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat + 1, minlength=slots + 1).tolist()
    skipped, counts = counts[0], counts[1:]  # -1, not mine, sorts first
    mine = order[skipped:]
    y_PD = x_RD.new_zeros(flat.shape[0], x_RD.shape[1])
    if mine.shape[0]:
        rows = mine // choices
        if _padding_pays(counts):
            y = _experts_batched(x_RD, rows, flat[mine], counts, gate_up_SID, down_SDI)
        else:
            y = _experts_one_by_one(x_RD[rows], counts, gate_up_SID, down_SDI)
        y_PD[mine] = y
    weights = weights_RK.to(x_RD.dtype).unsqueeze(1)
    return torch.bmm(weights, y_PD.view(-1, choices, x_RD.shape[1])).squeeze(1)


def _padding_pays(counts: list[int]) -> bool:
    """Whether giving every slot as many rows as the fullest costs less than a call for each."""
    padded, pairs = sum(c > 0 for c in counts) * max(counts), sum(counts)
    return padded <= 2048 or padded <= 2 * pairs


def _runs(counts: list[int], gate_up_SID: Tensor, down_SDI: Tensor) -> list[range]:
    """Neighbouring slots whose weights are read by one call: all of them, or only those that are hit."""
    size = (gate_up_SID.numel() + down_SDI.numel()) * gate_up_SID.element_size()
    hit = [slot for slot, count in enumerate(counts) if count]
    if size <= SMALL_EXPERTS_BYTES or len(hit) * 4 >= 3 * len(counts):
        return [range(len(counts))]
    ends = [i + 1 for i, slot in enumerate(hit) if slot + 1 not in hit[i + 1 : i + 2]]
    return [range(hit[a], hit[b - 1] + 1) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def _experts_batched(
    x_RD: Tensor, rows: Tensor, slots: Tensor, counts: list[int], gate_up_SID: Tensor, down_SDI: Tensor
) -> Tensor:
    """One product over each run of slots, each slot padded to the rows of the fullest: exact, since padding is not
    read back."""
    runs = _runs(counts, gate_up_SID, down_SDI)
    starts = torch.tensor([0, *counts[:-1]], device=x_RD.device).cumsum(0)
    place = torch.arange(rows.shape[0], device=x_RD.device) - starts[slots]
    taken = {slot: i for i, slot in enumerate(slot for run in runs for slot in run)}
    at = torch.tensor([taken.get(slot, 0) for slot in range(len(counts))], device=x_RD.device)[slots]
    most, width = max(counts), x_RD.shape[1]
    # The weights first, as in `linear`: what comes out is gathered anyway, so that its order costs nothing.
    x = x_RD.new_zeros(len(taken), width, most)
    x[at, :, place] = x_RD[rows]
    gate, up = _over_runs(gate_up_SID, x, runs).chunk(2, dim=1)
    return _over_runs(down_SDI, silu(gate).mul_(up), runs)[at, :, place]


def _over_runs(weights_SXD: Tensor, x_SDM: Tensor, runs: list[range]) -> Tensor:
    """Each slot's weights times its columns, [slots of the runs, X, M]."""
    if len(runs) == 1:
        return torch.bmm(weights_SXD[runs[0].start : runs[0].stop], x_SDM)
    out = x_SDM.new_empty(x_SDM.shape[0], weights_SXD.shape[1], x_SDM.shape[2])
    first = 0
    for run in runs:
        part = slice(first, first + len(run))
        torch.bmm(weights_SXD[run.start : run.stop], x_SDM[part], out=out[part])
        first += len(run)
    return out


def _experts_one_by_one(x_PD: Tensor, counts: list[int], gate_up_SID: Tensor, down_SDI: Tensor) -> Tensor:
    hit = [(slot, x) for slot, x in enumerate(x_PD.split(counts)) if counts[slot]]
    gate, up = torch.cat([linear(x, gate_up_SID[slot]) for slot, x in hit]).chunk(2, dim=-1)
    inner = silu(gate).mul_(up).split([x.shape[0] for _, x in hit])
    return torch.cat([linear(x, down_SDI[slot]) for x, (slot, _) in zip(inner, hit, strict=True)])


def mla_up(
    c_q: Tensor, c_kv_TC: Tensor, k_TP: Tensor, q_b: Tensor, kv_b: Tensor, rotary: Rotary, rows: AttentionRows,
    cache: Tensor, heads: int,
) -> Queries:  # fmt: skip
    """Query heads and the key that they share are rotated together."""
    rope = k_TP.shape[-1]
    q = linear(c_q, q_b).unflatten(-1, (heads, -1))
    both = torch.cat((q[..., -rope:], k_TP.unsqueeze(1)), dim=1).float()
    first, second = (both[..., 0::2], both[..., 1::2]) if rotary.interleaved else both.chunk(2, dim=-1)
    cos, sin = rotary.cos, rotary.sin
    both = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(q.dtype)
    latents = torch.cat((c_kv_TC, both[:, -1]), dim=-1)
    cache.view(-1, cache.shape[-1]).index_copy_(0, rows.slots_T, latents)
    q[..., -rope:] = both[:, :-1]
    return Queries(q, q[:0])


mla_prologue = of_halves(mla_down, mla_up)
