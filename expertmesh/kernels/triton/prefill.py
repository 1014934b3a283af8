"""Attention of the rows of a prompt (DeepSeek-V2, section 2.1.1): keys and values expanded from the paged latents once,
and causal flash attention over them.

Letters: L tokens of the sequence, T its rows in this step, G tokens of a page, H heads, C latent, P the rotary part, N
and V the parts of a head without rotary position and of its value.
"""

import triton
import triton.language as tl


@triton.jit
def mla_expand(
    cache_MGX, pages_M, kv_b_XC, up_LX, L, X, C: tl.constexpr, P: tl.constexpr, G: tl.constexpr,
    PAD_G: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Keys and values of my heads, X = H * (N + V) numbers of each token: cache [pages, G, C + P] -> up [L, X].

    A program has one page and BLOCK_X columns.
    """
    i = tl.program_id(0)
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    g = tl.arange(0, PAD_G)
    page = cache_MGX + tl.load(pages_M + i) * (G * (C + P))
    there = (i * G + g < L) & (g < G)
    up = tl.zeros((BLOCK_X, PAD_G), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = there[:, None] & (c[None, :] < C)
        latent = tl.load(page + g[:, None] * (C + P) + c[None, :], mask=mask, other=0.0)
        mask = (x[:, None] < X) & (c[None, :] < C)
        weight = tl.load(kv_b_XC + x[:, None] * C + c[None, :], mask=mask, other=0.0)
        # The weights first: matrix units want 64 rows, and a page may have fewer.
        up = tl.dot(weight, tl.trans(latent), up, input_precision="ieee")
    out = tl.trans(up.to(up_LX.dtype.element_ty))
    tl.store(
        up_LX + (i * G + g).to(tl.int64)[:, None] * X + x[None, :],
        out,
        mask=there[:, None] & (x[None, :] < X),
    )


@triton.jit
def mla_prefill(
    query_THX, up_LHX, cache_MGX, pages_M, out_THV, scale, T, L, H: tl.constexpr, N: tl.constexpr, V: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, G: tl.constexpr, PAD_N: tl.constexpr, PAD_V: tl.constexpr, PAD_P: tl.constexpr,
    PAD_G: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Causal attention of the sequence's last T tokens: query [T, H, N + P], up [L, H, N + V], rotary parts of the
    keys in cache [pages, G, C + P] -> out [T, H, V].

    A program has BLOCK_T rows of one head and takes the pages up to its last row one by one.
    """
    h = tl.program_id(0)
    start = tl.program_id(1) * BLOCK_T
    t = start + tl.arange(0, BLOCK_T)
    n, v, p, g = tl.arange(0, PAD_N), tl.arange(0, PAD_V), tl.arange(0, PAD_P), tl.arange(0, PAD_G)
    X: tl.constexpr = C + P
    query = query_THX + (t[:, None] * H + h) * (N + P)
    q_N = tl.load(query + n[None, :], mask=(t[:, None] < T) & (n[None, :] < N), other=0.0)
    q_P = tl.load(query + N + p[None, :], mask=(t[:, None] < T) & (p[None, :] < P), other=0.0)
    high = tl.full((BLOCK_T,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    out = tl.zeros((BLOCK_T, PAD_V), tl.float32)
    last = tl.minimum(L, L - T + start + BLOCK_T)
    for i in range((last + G - 1) // G):
        page = cache_MGX + tl.load(pages_M + i) * (G * X) + C
        token = i * G + g
        there = (token < L) & (g < G)
        rows = up_LHX + (token.to(tl.int64)[:, None] * H + h) * (N + V)
        k_N = tl.load(rows + n[None, :], mask=there[:, None] & (n[None, :] < N), other=0.0)
        values = tl.load(rows + N + v[None, :], mask=there[:, None] & (v[None, :] < V), other=0.0)
        k_P = tl.load(page + g[:, None] * X + p[None, :], mask=there[:, None] & (p[None, :] < P), other=0.0)
        scores = tl.dot(q_N, tl.trans(k_N), input_precision="ieee")
        scores = tl.dot(q_P, tl.trans(k_P), scores, input_precision="ieee")
        seen = there[None, :] & (token[None, :] <= L - T + t[:, None])
        scores = tl.where(seen, scores * scale, -1e30)
        higher = tl.maximum(high, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        kept = tl.exp(high - higher)
        total = total * kept + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(values.dtype), values, out * kept[:, None], input_precision="ieee")
        high = higher
    out = out / total[:, None]
    rows = out_THV + (t[:, None] * H + h) * V
    tl.store(rows + v[None, :], out.to(out_THV.dtype.element_ty), mask=(t[:, None] < T) & (v[None, :] < V))
