"""Every op in plain PyTorch, as close to the papers as it can be written: the oracle of all faster versions.

Signatures and shapes are documented in `table`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, silu
from torch.nn.functional import linear as torch_linear

from expertmesh.config.precision import PLAIN, Format
from expertmesh.errors import InputError
from expertmesh.kernels.memory import Kept
from expertmesh.kernels.types import AttentionRows, Queries, Rotary, Routing

# The norms of the two latents have this epsilon in DeepSeek's code whatever rms_norm_eps says.
LATENT_EPS = 1e-6


def matrix(shape: tuple[int, ...], split: int, format: Format, kept: Kept) -> Tensor:
    """A plain tensor."""
    if format is not PLAIN:
        raise InputError(
            f"{format.name} weights need the CPU's own kernels, which compute in bfloat16; or say quantise none"
        )
    return kept.empty(*shape)


def latent_up(heads: int, nope: int, value: int, latent: int, kept: Kept) -> Tensor:
    return kept.empty(heads * (nope + value), latent)


def embed(tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
    return embedding(tokens_T, weight_VD)


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def count(experts_TK: Tensor, counts_E: Tensor) -> None:
    counts_E += torch.bincount(experts_TK.flatten(), minlength=counts_E.shape[0])


def linear(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch_linear(x_TD, weight, bias)


def logits(x_TD: Tensor, weight: Tensor) -> Tensor:
    return torch_linear(x_TD, weight).float()


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, computed in float32, rounded before it is scaled."""
    x = x_TD.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return weight_D * x.to(x_TD.dtype)


def swiglu(x_TD: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """A whole SwiGLU feed-forward layer; gate_up [2 * I, D], down [D, I]."""
    gate, up = linear(x_TD, gate_up).chunk(2, dim=-1)
    return linear(silu(gate) * up, down)


def mla_down(
    x_TD: Tensor, norm_D: Tensor, eps: float, a_XD: Tensor, bias_X: Tensor | None, q_norm: Tensor | None,
    kv_norm_C: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x_TD = rms_norm(x_TD, norm_D, eps)
    q_lora = 0 if q_norm is None else q_norm.numel()
    latent = kv_norm_C.numel()
    low = linear(x_TD, a_XD, bias_X)
    c_q, c_kv, k_R = low.split([q_lora, latent, low.shape[-1] - q_lora - latent], dim=-1)
    c_q = x_TD if q_norm is None else rms_norm(c_q, q_norm, LATENT_EPS)
    return c_q, rms_norm(c_kv, kv_norm_C, LATENT_EPS), k_R


def rotate(x_THP: Tensor, rotary: Rotary) -> Tensor:
    """Rotary position embedding (Su et al. 2021). The result has all first numbers of the pairs before all second
    ones: queries and keys agree on it, and nobody else sees it."""
    x = x_THP.float()
    first, second = (x[..., 0::2], x[..., 1::2]) if rotary.interleaved else x.chunk(2, dim=-1)
    cos, sin = rotary.cos, rotary.sin
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THP.dtype)


def mla_up(
    c_q: Tensor, c_kv_TC: Tensor, k_TP: Tensor, q_b: Tensor, kv_b: Tensor, rotary: Rotary, rows: AttentionRows,
    cache: Tensor, heads: int,
) -> Queries:  # fmt: skip
    rope = k_TP.shape[-1]
    q = linear(c_q, q_b).unflatten(-1, (heads, -1))
    q = torch.cat((q[..., :-rope], rotate(q[..., -rope:], rotary)), dim=-1)
    k_TP = rotate(k_TP.unsqueeze(1), rotary).squeeze(1)
    cache.view(-1, cache.shape[-1])[rows.slots_T] = torch.cat((c_kv_TC, k_TP), dim=-1)
    return Queries(q, q[:0])


def of_halves(
    down: Callable[..., tuple[Tensor, Tensor, Tensor]], up: Callable[..., Queries]
) -> Callable[..., Queries]:
    """The prologue whose two halves these are."""

    def mla_prologue(
        x_TD: Tensor, norm_D: Tensor, eps: float, a_XD: Tensor, bias_X: Tensor | None, q_norm: Tensor | None,
        kv_norm_C: Tensor, *rest: Any,
    ) -> Queries:  # fmt: skip
        return up(*down(x_TD, norm_D, eps, a_XD, bias_X, q_norm, kv_norm_C), *rest)

    return mla_prologue


mla_prologue = of_halves(mla_down, mla_up)


def mla_attention(
    queries: Queries, rows: AttentionRows, cache: Tensor, kv_b: Tensor, scale: float, value_dim: int
) -> Tensor:
    """Expanded keys and values, one sequence after the other (DeepSeek-V2, section 2.1.1)."""
    plain, latent = queries.plain, kv_b.shape[-1]
    heads, nope = plain.shape[1], plain.shape[2] - (cache.shape[-1] - latent)
    out = plain.new_zeros(plain.shape[0], heads, value_dim)
    decodes = [(i, 1, int(rows.lengths_B[i]), rows.pages_BM[i]) for i in range(rows.decoding)]
    for first, count, length, pages in decodes + [
        (p.first, p.count, p.length, p.pages_M) for p in rows.prefills
    ]:
        known = cache[pages].flatten(0, 1)[:length].float()
        up = linear(known[:, :latent], kv_b.float()).view(length, heads, nope + value_dim)
        keys = torch.cat((up[..., :nope], known[:, None, latent:].expand(-1, heads, -1)), dim=-1)
        query = plain[first : first + count].float()
        scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
        later = torch.ones(count, length, dtype=torch.bool, device=cache.device).triu(length - count + 1)
        weights = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
        out[first : first + count] = torch.einsum("hqk,khd->qhd", weights, up[..., nope:]).to(out.dtype)
    return out.flatten(1)


def route(logits_TE: Tensor, bias_E: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    scores_TE = logits_TE.sigmoid() if routing.scoring == "sigmoid" else logits_TE.softmax(dim=-1)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if routing.method != "greedy" and routing.groups > 1:
        grouped = choice_TE.unflatten(-1, (routing.groups, -1))
        # V3 judges a group by its two best experts, V2 by the best one.
        best = min(2, grouped.shape[-1]) if routing.method == "noaux_tc" else 1
        group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)
        chosen = group_scores.topk(routing.groups_per_token, dim=-1).indices
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, chosen, False)
        # Not 0: biased scores may be negative, and a masked expert must lose against those too.
        choice_TE = grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(-2)
    experts_TK = choice_TE.topk(routing.experts_per_token, dim=-1).indices
    weights_TK = scores_TE.gather(-1, experts_TK)
    if routing.normalise:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return experts_TK, weights_TK * routing.scale


def router(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    return route(torch_linear(x_TD.float(), weight_ED), bias_E, routing)


def experts(
    x_RD: Tensor, slots_RK: Tensor, weights_RK: Tensor, gate_up_SID: Tensor, down_SDI: Tensor
) -> Tensor:
    out = torch.zeros_like(x_RD, dtype=torch.float32)
    for slot in range(gate_up_SID.shape[0]):
        row, choice = (slots_RK == slot).nonzero(as_tuple=True)
        y = swiglu(x_RD[row], gate_up_SID[slot], down_SDI[slot])
        out.index_add_(0, row, y.float() * weights_RK[row, choice, None].float())
    return out.to(x_RD.dtype)
