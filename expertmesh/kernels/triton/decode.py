"""Attention of one row a sequence over its paged latents (DeepSeek-V2, section 2.1.2, absorbed): flash decoding, the
pages of a sequence split over programs, and the merge of their parts with the values' projection up.

Letters: B sequences, M entries of a page table, S splits, G tokens of a page, H heads, C latent, P the rotary part, N
and V the parts of a head without rotary position and of its value.
"""

import triton
import triton.language as tl


@triton.jit
def mla_decode(
    query_BHX, cache_MGX, pages_BM, lengths_B, part_BHSC, lse_BHS, scale, M, S, C: tl.constexpr, P: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, SPAN: tl.constexpr, MOST: tl.constexpr,
    PAD_C: tl.constexpr, PAD_P: tl.constexpr, PAD_G: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Online softmax over the latents of one split: part [B, H, S, C], and the logarithm of the sum of what its weights
    were divided by, lse [B, H, S], which is -inf where a split has no token.

    query [B, H, C + P]; cache [pages, G, C + P]; pages [B, M]. A split has SPAN pages, or so many that there
    are no more than MOST. A program has BLOCK_H heads of one sequence and one split of its pages, one by one.
    """
    b, split = tl.program_id(0), tl.program_id(2)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    c, p, g = tl.arange(0, PAD_C), tl.arange(0, PAD_P), tl.arange(0, PAD_G)
    X: tl.constexpr = C + P
    query = query_BHX + (b * H + h)[:, None] * X
    q_C = tl.load(query + c[None, :], mask=(h[:, None] < H) & (c[None, :] < C), other=0.0)
    q_P = tl.load(query + C + p[None, :], mask=(h[:, None] < H) & (p[None, :] < P), other=0.0)
    length = tl.load(lengths_B + b).to(tl.int32)
    pages = (length + G - 1) // G
    each = tl.maximum(SPAN, (pages + MOST - 1) // MOST)
    high = tl.full((BLOCK_H,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    out = tl.zeros((BLOCK_H, PAD_C), tl.float32)
    for i in range(split * each, tl.minimum(pages, (split + 1) * each)):
        page = cache_MGX + tl.load(pages_BM + b * M + i) * (G * X)
        there = (i * G + g < length) & (g < G)
        known = there[:, None]
        k_C = tl.load(page + g[:, None] * X + c[None, :], mask=known & (c[None, :] < C), other=0.0)
        k_P = tl.load(page + g[:, None] * X + C + p[None, :], mask=known & (p[None, :] < P), other=0.0)
        scores = tl.dot(q_C, tl.trans(k_C), input_precision="ieee")
        scores = tl.dot(q_P, tl.trans(k_P), scores, input_precision="ieee")
        scores = tl.where(there[None, :], scores * scale, -1e30)
        higher = tl.maximum(high, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        kept = tl.exp(high - higher)
        total = total * kept + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(k_C.dtype), k_C, out * kept[:, None], input_precision="ieee")
        high = higher
    at = (b * H + h) * S + split
    lse = tl.where(total > 0, high + tl.log(tl.maximum(total, 1e-30)), float("-inf"))
    tl.store(lse_BHS + at, lse, mask=h < H)
    out = out / tl.maximum(total, 1e-30)[:, None]
    tl.store(part_BHSC + at[:, None] * C + c[None, :], out, mask=(h[:, None] < H) & (c[None, :] < C))


@triton.jit
def mla_merge(
    part_BHSC, lse_BHS, kv_b_HXC, out_BHV, B, S, C: tl.constexpr, H: tl.constexpr, N: tl.constexpr, V: tl.constexpr,
    PAD_V: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The splits of each sequence made one, and projected up: kv_b [H * (N + V), C] -> out [B, H, V].

    A program has BLOCK_B sequences and one head.
    """
    h = tl.program_id(0)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    v = tl.arange(0, PAD_V)
    at = (b * H + h) * S
    high = tl.full((BLOCK_B,), -1e30, tl.float32)
    for s in range(S):
        high = tl.maximum(high, tl.load(lse_BHS + at + s, mask=b < B, other=float("-inf")))
    total = tl.zeros((BLOCK_B,), tl.float32)
    for s in range(S):
        total += tl.exp(tl.load(lse_BHS + at + s, mask=b < B, other=float("-inf")) - high)
    up = tl.zeros((BLOCK_B, PAD_V), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        latent = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        for s in range(S):
            weight = tl.exp(tl.load(lse_BHS + at + s, mask=b < B, other=float("-inf")) - high)
            mask = (b[:, None] < B) & (c[None, :] < C)
            part = tl.load(part_BHSC + (at + s)[:, None] * C + c[None, :], mask=mask, other=0.0)
            latent += weight[:, None] * part
        mask = (v[:, None] < V) & (c[None, :] < C)
        w_uv = tl.load(kv_b_HXC + (h * (N + V) + N + v)[:, None] * C + c[None, :], mask=mask, other=0.0)
        latent = (latent / tl.maximum(total, 1e-30)[:, None]).to(w_uv.dtype)
        up = tl.dot(latent, tl.trans(w_uv), up, input_precision="ieee")
    out = up.to(out_BHV.dtype.element_ty)
    tl.store(out_BHV + (b[:, None] * H + h) * V + v[None, :], out, mask=(b[:, None] < B) & (v[None, :] < V))
