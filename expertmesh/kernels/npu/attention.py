"""The ops of attention on torch_npu's fused ops, with the signatures of `kernels.table`.

A step's first rows decode: their queries are absorbed, and attend over the paged latents. The others are of prompts:
their queries are plain, and attend over keys and values expanded from the latents. What a fused op has no sizes or
types for is computed by torch's own ops, on the same cache and weights.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from expertmesh.kernels.eager import attend_expanded, attend_latents
from expertmesh.kernels.npu.cache import Pages
from expertmesh.kernels.npu.ops import Ops
from expertmesh.kernels.npu.products import Products
from expertmesh.kernels.npu.weights import LatentUp, Matrix
from expertmesh.kernels.reference import LATENT_EPS
from expertmesh.kernels.types import AttentionRows, Queries, Rotary

# What the op wants for a causal mask whatever the lengths are.
MASK = 2048


@dataclass(frozen=True)
class SplitQueries(Queries):
    """absorbed is without the rotary part, [A, H, C], which is apart, [A, H, P]."""

    rope: Tensor


@dataclass(frozen=True)
class Places:
    """Of rows: cosines and sines [T, P] of their positions, their slots [T], and how heads pair their numbers."""

    cos: Tensor
    sin: Tensor
    slots_T: Tensor
    interleaved: bool

    @classmethod
    def of(cls, rotary: Rotary, rows: AttentionRows, dtype: torch.dtype) -> "Places":
        return cls(*rotary.whole(dtype), rows.slots_T, rotary.interleaved)

    def __getitem__(self, rows: slice) -> "Places":
        return Places(self.cos[rows], self.sin[rows], self.slots_T[rows], self.interleaved)


class Attention:
    def __init__(self, ops: Ops, products: Products) -> None:
        self._ops, self._products = ops, products
        self._masks: dict[torch.device, Tensor] = {}

    def mla_down(
        self, x_TD: Tensor, norm_D: Tensor, eps: float, a: Matrix, bias_X: Tensor | None, q_norm: Tensor | None,
        kv_norm_C: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return self._down(self._products.rms_norm(x_TD, norm_D, eps), a, bias_X, q_norm, kv_norm_C)

    def _down(
        self, x_TD: Tensor, a: Matrix, bias_X: Tensor | None, q_norm: Tensor | None, kv_norm_C: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows that are normed."""
        p, q_lora = self._products, 0 if q_norm is None else q_norm.shape[0]
        x, (q_a, kv_a) = p.rows(x_TD, a), a.columns(q_lora)
        q_bias, kv_bias = (None, None) if bias_X is None else (bias_X[:q_lora], bias_X[q_lora:])
        low = p.product(x, kv_a, kv_bias)
        C = kv_norm_C.shape[0]
        c_q = x_TD if q_norm is None else p.rms_norm(p.product(x, q_a, q_bias), q_norm, LATENT_EPS)
        return c_q, p.rms_norm(low[:, :C].contiguous(), kv_norm_C, LATENT_EPS), low[:, C:]

    def mla_up(
        self, c_q: Tensor, c_kv_TC: Tensor, k_TP: Tensor, q_b: Matrix, kv_b: LatentUp, rotary: Rotary,
        rows: AttentionRows, cache: Pages, heads: int,
    ) -> SplitQueries:  # fmt: skip
        places = Places.of(rotary, rows, c_kv_TC.dtype)
        return self._up(c_q, c_kv_TC, k_TP, q_b, kv_b, places, cache, rows.decoding)

    def _up(
        self, c_q: Tensor, c_kv_TC: Tensor, k_TP: Tensor, q_b: Matrix, kv_b: LatentUp, places: Places, cache: Pages,
        decoding: int,
    ) -> SplitQueries:  # fmt: skip
        """The first `decoding` queries absorbed, the others plain."""
        H, N, _ = kv_b.keys.shape
        q_THX = self._products.linear(c_q, q_b).unflatten(-1, (H, -1))
        rope_THP = self._turned(q_THX[..., N:], places)
        if k_TP.shape[0]:
            self._ops.call(
                "npu_scatter_pa_kv_cache", c_kv_TC.unsqueeze(1).contiguous(),
                self._turned(k_TP.unsqueeze(1), places).contiguous(), cache.latents, cache.keys, places.slots_T,
                cache_mode="Norm",
            )  # fmt: skip
        absorbed = c_kv_TC.new_empty(decoding, H, c_kv_TC.shape[1])
        if decoding:
            nope = q_THX[:decoding, :, :N].contiguous()
            absorbed = self._ops.call(
                "npu_transpose_batchmatmul", nope, kv_b.keys, perm_x1=[1, 0, 2], perm_y=[1, 0, 2]
            )
        plain = torch.cat((q_THX[decoding:, :, :N], rope_THP[decoding:]), dim=-1)
        return SplitQueries(plain, absorbed, rope_THP[:decoding])

    def _turned(self, x_THP: Tensor, places: Places) -> Tensor:
        """Rotated, and in the order of halves."""
        T, H, P = x_THP.shape
        if T and places.interleaved and self._ops.allows("npu_interleave_rope", x_THP.dtype, P=P):
            cos, sin = (t.view(T, 1, 1, P) for t in (places.cos, places.sin))
            x = x_THP.contiguous().view(T, H, 1, P)
            return cast(Tensor, self._ops.call("npu_interleave_rope", x, cos, sin)).view(T, H, P)
        x = x_THP.float()
        if places.interleaved:
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        across = torch.cat((-second, first), dim=-1)
        return (x * places.cos[:, None] + across * places.sin[:, None]).to(x_THP.dtype)

    def mla_prologue(
        self, x_TD: Tensor, norm_D: Tensor, eps: float, a: Matrix, bias_X: Tensor | None, q_norm: Tensor | None,
        kv_norm_C: Tensor, q_b: Matrix, kv_b: LatentUp, rotary: Rotary, rows: AttentionRows, cache: Pages, heads: int,
    ) -> SplitQueries:  # fmt: skip
        """Rows that decode in one op, where it has the sizes of this model; it makes absorbed queries alone, so rows of
        prompts take the halves."""
        x_TD = self._products.rms_norm(x_TD, norm_D, eps)
        places, n = Places.of(rotary, rows, x_TD.dtype), rows.decoding
        fused = bias_X is None and rotary.interleaved and self._prologue_fits(x_TD, q_norm, q_b, kv_b, cache)
        if not fused or not n or q_norm is None:
            return self._up(*self._down(x_TD, a, bias_X, q_norm, kv_norm_C), q_b, kv_b, places, cache, n)
        absorbed, rope = self._prolog(x_TD[:n], a, q_norm, kv_norm_C, q_b, kv_b, places[:n], cache)
        if n == x_TD.shape[0]:
            return SplitQueries(x_TD.new_empty(0, heads, kv_b.keys.shape[1] + rotary.width), absorbed, rope)
        low = self._down(x_TD[n:], a, bias_X, q_norm, kv_norm_C)
        plain = self._up(*low, q_b, kv_b, places[n:], cache, 0).plain
        return SplitQueries(plain, absorbed, rope)

    def _prologue_fits(
        self, x_TD: Tensor, q_norm: Tensor | None, q_b: Matrix, kv_b: LatentUp, cache: Pages
    ) -> bool:
        if q_norm is None:
            return False
        (H, N, C), (_, G, _, P) = kv_b.keys.shape, cache.keys.shape
        sizes = {"M": x_TD.shape[1], "Q": q_norm.shape[0], "H": H, "N": N, "C": C, "P": P, "G": G}
        return self._ops.allows("npu_mla_prolog_v3", x_TD.dtype, **sizes)

    def _prolog(
        self, x_TD: Tensor, a: Matrix, q_norm: Tensor, kv_norm_C: Tensor, q_b: Matrix, kv_b: LatentUp, places: Places,
        cache: Pages,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, (q_a, kv_a) = self._products.rows(x_TD, a), a.columns(q_norm.shape[0])
        scales: dict[str, Tensor] = {}
        if x.scales is not None:
            scales["dequant_scale_x"] = x.scales.view(-1, 1)
            for name, weight in (("w_dq", q_a), ("w_uq_qr", q_b), ("w_dkv_kr", kv_a)):
                assert weight.scales is not None
                scales[f"dequant_scale_{name}"] = weight.scales.view(1, -1)
        absorbed, rope, *_ = self._ops.call(
            "npu_mla_prolog_v3", x.numbers, q_a.native, q_b.native, kv_b.keys, kv_a.native, q_norm, kv_norm_C,
            places.sin, places.cos, cache.latents, cache.keys, cache_index=places.slots_T, **scales,
            rmsnorm_epsilon_cq=LATENT_EPS, rmsnorm_epsilon_ckv=LATENT_EPS, cache_mode="PA_BSND",
            weight_quant_mode=2 if scales else 0,
        )  # fmt: skip
        return absorbed, rope

    def mla_attention(
        self,
        queries: SplitQueries,
        rows: AttentionRows,
        cache: Pages,
        kv_b: LatentUp,
        scale: float,
        value_dim: int,
    ) -> Tensor:
        parts = []
        if rows.decoding:
            parts.append(self._decode(queries, rows, cache, kv_b, scale))
        if rows.prefills:
            parts.append(self._prompts(queries.plain, rows, cache, kv_b, scale))
        if not parts:  # a rank without rows steps with the others
            return queries.plain.new_empty(0, kv_b.keys.shape[0] * value_dim)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(
        self, queries: SplitQueries, rows: AttentionRows, cache: Pages, kv_b: LatentUp, scale: float
    ) -> Tensor:
        (B, H, C), G, P = queries.absorbed.shape, cache.keys.shape[1], cache.keys.shape[3]
        op, dtype = "npu_fused_infer_attention_score_v2:latents", queries.absorbed.dtype
        if not self._ops.allows(op, dtype, T=B, H=H, C=C, P=P, G=G):
            pages = [t[rows.pages_BM].flatten(1, 3) for t in (cache.latents, cache.keys)]
            known = torch.cat(pages, dim=-1)
            later = torch.arange(known.shape[1], device=known.device) >= rows.lengths_B[:, None]
            query = torch.cat((queries.absorbed, queries.rope), dim=-1)
            return attend_latents(query, known, later[:, None], kv_b.values.transpose(1, 2), scale)
        latents, keys = cache.by_head()
        out_HBC, _ = self._ops.call(
            op, queries.absorbed, latents, latents, query_rope=queries.rope, key_rope=keys,
            block_table=rows.pages_int32, actual_seq_qlen=list(range(1, B + 1)), actual_seq_kvlen=rows.known,
            num_query_heads=H, num_key_value_heads=1, softmax_scale=scale, input_layout="TND_NTD", sparse_mode=0,
            block_size=G,
        )  # fmt: skip
        out_BHV = self._ops.call(
            "npu_transpose_batchmatmul", out_HBC, kv_b.values, perm_x1=[0, 1, 2], perm_y=[1, 0, 2]
        )
        return cast(Tensor, out_BHV).flatten(1)

    def _prompts(
        self, query_THX: Tensor, rows: AttentionRows, cache: Pages, kv_b: LatentUp, scale: float
    ) -> Tensor:
        """All prompts of a step at once: keys and values of one behind those of the other."""
        (T, H, X), V = query_THX.shape, kv_b.values.shape[2]
        latents, ropes = zip(*(cache.known(p.pages_M, p.length) for p in rows.prefills), strict=True)
        known_LC, rope_LP = torch.cat(latents), torch.cat(ropes)
        nope_LHN = torch_linear(known_LC, kv_b.keys.flatten(0, 1)).unflatten(-1, (H, -1))
        keys_LHX = torch.cat((nope_LHN, rope_LP[:, None].expand(-1, H, -1)), dim=-1)
        values_LHV = torch.matmul(known_LC, kv_b.values).transpose(0, 1).contiguous()
        op = "npu_fused_infer_attention_score_v2:expanded"
        if self._ops.allows(op, query_THX.dtype, T=T, H=H, D=X, V=V, B=len(rows.prefills)):
            out_THV, _ = self._ops.call(
                op, query_THX, keys_LHX, values_LHV, atten_mask=self._mask(query_THX.device),
                actual_seq_qlen=list(accumulate(p.count for p in rows.prefills)),
                actual_seq_kvlen=list(accumulate(p.length for p in rows.prefills)), num_query_heads=H,
                num_key_value_heads=H, softmax_scale=scale, input_layout="TND", sparse_mode=3,
            )  # fmt: skip
            return cast(Tensor, out_THV).flatten(1)
        counts, lengths = [p.count for p in rows.prefills], [p.length for p in rows.prefills]
        each = zip(query_THX.split(counts), keys_LHX.split(lengths), values_LHV.split(lengths), strict=True)
        return torch.cat(
            [attend_expanded(*some, p, scale) for p, some in zip(rows.prefills, each, strict=True)]
        )

    def _mask(self, device: torch.device) -> Tensor:
        """What comes after a row's own token, True above the diagonal."""
        if device not in self._masks:
            self._masks[device] = torch.ones(MASK, MASK, dtype=torch.bool, device=device).triu(1)
        return self._masks[device]
