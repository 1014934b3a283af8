"""The ops of attention made of kernels of accelerators, with the signatures of `kernels.table`.

Weights are plain tensors. Their rows that give rotary parts have been de-interleaved when they were loaded
(`kernels.places`), and `rotary.interleaved` is False: Ascend's compiler has no loads with a stride of two, and nobody
but queries and keys sees the order.
"""

from typing import Any

import torch
from torch import Tensor

from expertmesh.errors import InputError
from expertmesh.kernels.reference import LATENT_EPS
from expertmesh.kernels.triton.table import KERNELS, tiled
from expertmesh.kernels.types import AttentionRows, Prefill, Queries, Rotary

# Tokens of one split of decoding, and how many splits a sequence has at most; those of longer ones are longer. Both are
# a matter of the sequence alone: its result has the same bits whatever else is in the batch.
SPAN, MOST = 512, 32


def _low(x_TD: Tensor, norm_D: Tensor, eps: float, a_XD: Tensor, bias_X: Tensor | None) -> Tensor:
    (T, D), X = x_TD.shape, a_XD.shape[0]
    low_TX = x_TD.new_empty(T, X)
    KERNELS["mla_down"](
        x_TD=x_TD, norm_D=norm_D, a_XD=a_XD, bias_X=bias_X, low_TX=low_TX, T=T, eps=eps, D=D, X=X
    )
    return low_TX


def mla_down(
    x_TD: Tensor, norm_D: Tensor, eps: float, a_XD: Tensor, bias_X: Tensor | None, q_norm: Tensor | None,
    kv_norm_C: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Two kernels: a norm needs all columns of a row, which different programs have computed."""
    x_TD = x_TD.contiguous()
    low = _low(x_TD, norm_D, eps, a_XD, bias_X)
    q, kv, q_norm_Q, q_eps = _parts(x_TD, low, norm_D, eps, q_norm)
    (T, Q), C = q.shape, kv_norm_C.shape[0]
    P = kv.shape[1] - C
    c_q, c_kv, k_TP = low.new_empty(T, Q), low.new_empty(T, C), low.new_empty(T, P)
    KERNELS["mla_norm"](
        q_TQ=q, q_norm_Q=q_norm_Q, q_eps=q_eps, kv_TX=kv, kv_norm_C=kv_norm_C, kv_eps=LATENT_EPS, c_q_TQ=c_q,
        c_kv_TC=c_kv, k_TP=k_TP, Q=Q, Q_STRIDE=q.stride(0), C=C, P=P, KV_STRIDE=kv.stride(0),
    )  # fmt: skip
    return c_q, c_kv, k_TP


def _parts(
    x_TD: Tensor, low_TX: Tensor, norm_D: Tensor, eps: float, q_norm: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """(what queries are made of, not normed; latent and key; the queries' norm and epsilon). Without a low rank
    queries are made of the input itself."""
    if q_norm is None:
        return x_TD, low_TX, norm_D, eps
    Q = q_norm.shape[0]
    return low_TX[:, :Q], low_TX[:, Q:], q_norm, LATENT_EPS


def mla_up(
    c_q: Tensor, c_kv_TC: Tensor, k_TP: Tensor, q_b: Tensor, kv_b: Tensor, rotary: Rotary, rows: AttentionRows,
    cache: Tensor, heads: int,
) -> Queries:  # fmt: skip
    latents = {"c_q_TQ": c_q, "c_kv_TC": c_kv_TC, "k_TP": k_TP}
    norms = {"q_norm_Q": None, "q_eps": 0.0, "kv_norm_C": None, "kv_eps": 0.0}
    return _up(latents, norms, q_b, kv_b, rotary, rows, cache, heads)


def mla_prologue(
    x_TD: Tensor, norm_D: Tensor, eps: float, a_XD: Tensor, bias_X: Tensor | None, q_norm: Tensor | None,
    kv_norm_C: Tensor, q_b: Tensor, kv_b: Tensor, rotary: Rotary, rows: AttentionRows, cache: Tensor, heads: int,
) -> Queries:  # fmt: skip
    """Two kernels: the second applies the norms of the latents to what it makes of them."""
    x_TD = x_TD.contiguous()
    low = _low(x_TD, norm_D, eps, a_XD, bias_X)
    q, kv, q_norm_Q, q_eps = _parts(x_TD, low, norm_D, eps, q_norm)
    C = kv_norm_C.shape[0]
    latents = {"c_q_TQ": q, "c_kv_TC": kv[:, :C], "k_TP": kv[:, C:]}
    norms = {"q_norm_Q": q_norm_Q, "q_eps": q_eps, "kv_norm_C": kv_norm_C, "kv_eps": LATENT_EPS}
    return _up(latents, norms, q_b, kv_b, rotary, rows, cache, heads)


def _up(
    latents: dict[str, Tensor], norms: dict[str, Any], q_b: Tensor, kv_b: Tensor, rotary: Rotary, rows: AttentionRows,
    cache: Tensor, heads: int,
) -> Queries:  # fmt: skip
    """Absorbed queries for rows that decode, plain ones for the others, which the same kernel makes in a second
    launch where a step has both."""
    if rotary.interleaved:
        raise InputError(
            "kernels of accelerators want de-interleaved rotary rows (kernels.places.de_interleaved)"
        )
    c_q, c_kv, k_TP = latents.values()
    (T, Q), C, P = c_q.shape, c_kv.shape[1], k_TP.shape[1]
    N, V = q_b.shape[0] // heads - P, kv_b.shape[0] // heads - (q_b.shape[0] // heads - P)
    made = []
    for part, absorb in ((slice(0, rows.decoding), True), (slice(rows.decoding, T), False)):
        mine = {name: rows_TX[part] for name, rows_TX in latents.items()}
        query = c_q.new_empty(mine["c_q_TQ"].shape[0], heads, (C if absorb else N) + P)
        KERNELS["mla_up"](
            **mine, **norms, q_b_HXQ=q_b, kv_b_HXC=kv_b, cos_TR=rotary.cos.squeeze(1)[part],
            sin_TR=rotary.sin.squeeze(1)[part], slots_T=rows.slots_T[part], query_THX=query,
            cache_SX=cache.view(-1, C + P), T=query.shape[0], Q=Q, Q_STRIDE=c_q.stride(0), C=C,
            KV_STRIDE=c_kv.stride(0), K_STRIDE=k_TP.stride(0), H=heads, N=N, V=V, P=P, R=P // 2, ABSORB=absorb,
        )  # fmt: skip
        made.append(query)
    return Queries(plain=made[1], absorbed=made[0])


def mla_attention(
    queries: Queries, rows: AttentionRows, cache: Tensor, kv_b: Tensor, scale: float, value_dim: int
) -> Tensor:
    """Over the latents for rows that decode, over keys and values expanded from them for rows of prompts."""
    absorbed, plain = queries.absorbed, queries.plain
    decoding, heads = absorbed.shape[0], absorbed.shape[1]
    out = absorbed.new_empty(decoding + plain.shape[0], heads, value_dim)
    _decode(absorbed, rows, cache, kv_b, scale, out[:decoding])
    for prefill in rows.prefills:
        first = prefill.first - decoding
        span = slice(prefill.first, prefill.first + prefill.count)
        _prefill(plain[first : first + prefill.count], prefill, cache, kv_b, scale, out[span])
    return out.flatten(1)


def _decode(
    query_BHX: Tensor, rows: AttentionRows, cache: Tensor, kv_b: Tensor, scale: float, out_BHV: Tensor
) -> None:
    (B, H, X), G, C, V = query_BHX.shape, cache.shape[1], kv_b.shape[1], out_BHV.shape[2]
    if not B:
        return
    M, N = rows.pages_BM.shape[1], kv_b.shape[0] // H - V
    span = max(1, SPAN // G)
    S = min(MOST, tiled(M, span))
    part = cache.new_empty(B, H, S, C, dtype=torch.float32)
    lse = cache.new_empty(B, H, S, dtype=torch.float32)
    KERNELS["mla_decode"](
        query_BHX=query_BHX, cache_MGX=cache, pages_BM=rows.pages_BM.contiguous(), lengths_B=rows.lengths_B,
        part_BHSC=part, lse_BHS=lse, scale=scale, M=M, S=S, C=C, P=X - C, H=H, G=G, SPAN=span, MOST=MOST,
    )  # fmt: skip
    KERNELS["mla_merge"](
        part_BHSC=part, lse_BHS=lse, kv_b_HXC=kv_b, out_BHV=out_BHV, B=B, S=S, C=C, H=H, N=N, V=V
    )


def _prefill(
    query_THX: Tensor, prefill: Prefill, cache: Tensor, kv_b: Tensor, scale: float, out_THV: Tensor
) -> None:
    (T, H, _), G, (X, C) = query_THX.shape, cache.shape[1], kv_b.shape
    L, P, V = prefill.length, cache.shape[2] - C, out_THV.shape[2]
    up_LX = cache.new_empty(L, X)
    KERNELS["mla_expand"](
        cache_MGX=cache, pages_M=prefill.pages_M, kv_b_XC=kv_b, up_LX=up_LX, L=L, X=X, C=C, P=P, G=G
    )
    KERNELS["mla_prefill"](
        query_THX=query_THX, up_LHX=up_LX, cache_MGX=cache, pages_M=prefill.pages_M, out_THV=out_THV, scale=scale,
        T=T, L=L, H=H, N=X // H - V, V=V, P=P, C=C, G=G,
    )  # fmt: skip
