"""What comes before attention (DeepSeek-V2, section 2.1; V3, section 2.1.1): from hidden states to queries of my heads
and latents in their pages, as two kernels, or three where the TP group's gather lies between.

Rows of weights that give rotary parts are de-interleaved (`kernels.places`): all first numbers of the pairs come
before all second ones. Letters: T rows, D hidden, X columns of a product, Q the queries' low rank, C the latents', H
heads, N and V the parts of a head without rotary position and of its value, P the rotary part, R half of it.

Norms are applied to products, not before them: scaling a row and multiplying it commute, so that one reading of the
rows serves the sum of squares, on vector units, and the product, on matrix units, which wait for nothing else.
"""

import triton
import triton.language as tl


@triton.jit
def mla_down(
    x_TD, norm_D, a_XD, bias_X, low_TX, T, eps, D: tl.constexpr, X: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """RMSNorm and both projections down: x [T, D] -> low [T, X], where X is Q, C and P side by side. bias: or None.

    A program has BLOCK_T rows and BLOCK_X columns.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    product = tl.zeros((BLOCK_T, BLOCK_X), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        rows = tl.load(
            x_TD + t[:, None] * D + d[None, :], mask=(t[:, None] < T) & (d[None, :] < D), other=0.0
        )
        weight = tl.load(
            a_XD + x[:, None] * D + d[None, :], mask=(x[:, None] < X) & (d[None, :] < D), other=0.0
        )
        norm = tl.load(norm_D + d, mask=d < D, other=0.0).to(tl.float32)
        wide = rows.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        scaled = (wide * norm[None, :]).to(weight.dtype)
        product = tl.dot(scaled, tl.trans(weight), product, input_precision="ieee")
    product = product * tl.rsqrt(squares / D + eps)[:, None]
    if bias_X is not None:
        product += tl.load(bias_X + x, mask=x < X, other=0.0).to(tl.float32)[None, :]
    low = product.to(low_TX.dtype.element_ty)
    tl.store(low_TX + t[:, None] * X + x[None, :], low, mask=(t[:, None] < T) & (x[None, :] < X))


@triton.jit
def mla_norm(
    q_TQ, q_norm_Q, q_eps, kv_TX, kv_norm_C, kv_eps, c_q_TQ, c_kv_TC, k_TP, Q: tl.constexpr, Q_STRIDE: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, KV_STRIDE: tl.constexpr,
    PAD_Q: tl.constexpr, PAD_C: tl.constexpr, PAD_P: tl.constexpr,
):  # fmt: skip
    """The norms of the two latents, for rows that are gathered before the second half: q [T, Q] and kv [T, C + P],
    whose rows are Q_ and KV_STRIDE apart -> c_q [T, Q], c_kv [T, C] and k [T, P]. A program has one row."""
    t = tl.program_id(0)
    q, c, p = tl.arange(0, PAD_Q)[None, :], tl.arange(0, PAD_C)[None, :], tl.arange(0, PAD_P)[None, :]
    row_Q = normed(tl.load(q_TQ + t * Q_STRIDE + q, mask=q < Q, other=0.0), q_norm_Q + q, q_eps, q < Q, Q)
    row_C = normed(tl.load(kv_TX + t * KV_STRIDE + c, mask=c < C, other=0.0), kv_norm_C + c, kv_eps, c < C, C)
    row_P = tl.load(kv_TX + t * KV_STRIDE + C + p, mask=p < P, other=0.0)
    tl.store(c_q_TQ + t * Q + q, row_Q, mask=q < Q)
    tl.store(c_kv_TC + t * C + c, row_C, mask=c < C)
    tl.store(k_TP + t * P + p, row_P, mask=p < P)


@triton.jit
def normed(row_X, norm_X, eps, mask, X: tl.constexpr):
    """RMSNorm of a row of X numbers, a tile [1, X]: a vector even so, since matrix units would wait for a scalar."""
    wide = row_X.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=1) / X + eps)[:, None]
    return (wide * tl.load(norm_X, mask=mask, other=0.0).to(tl.float32)).to(row_X.dtype)


@triton.jit
def mla_up(
    c_q_TQ, q_norm_Q, q_eps, c_kv_TC, kv_norm_C, kv_eps, k_TP, q_b_HXQ, kv_b_HXC, cos_TR, sin_TR, slots_T,
    query_THX, cache_SX, T, Q: tl.constexpr, Q_STRIDE: tl.constexpr, C: tl.constexpr, KV_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr, H: tl.constexpr, N: tl.constexpr, V: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    ABSORB: tl.constexpr, PAD_N: tl.constexpr, PAD_P: tl.constexpr, PAD_R: tl.constexpr, PAD_C: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Queries of my heads, and the latents into their pages. Rows of c_q, c_kv and k are Q_, KV_ and K_STRIDE apart.

    q_norm, kv_norm: where the latents are not normed yet, else None. q_b [H * (N + P), Q]; kv_b [H * (N + V), C].
    ABSORB: query [T, H, C + P] in the latents' own space, else [T, H, N + P]. Row t goes to slot slots[t] of cache
    [S, C + P].

    A program has BLOCK_T rows and one head. Of writing the rows' latents it takes the head's share.
    """
    h = tl.program_id(0)
    start = tl.program_id(1) * BLOCK_T
    t = start + tl.arange(0, BLOCK_T)
    n, p = tl.arange(0, PAD_N), tl.arange(0, PAD_P)
    head = q_b_HXQ + h * (N + P) * Q
    nope = tl.zeros((BLOCK_T, PAD_N), tl.float32)
    rope = tl.zeros((BLOCK_T, PAD_P), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    for at in range(0, Q, BLOCK_Q):
        q = at + tl.arange(0, BLOCK_Q)
        known = q[None, :] < Q
        rows = tl.load(c_q_TQ + t[:, None] * Q_STRIDE + q[None, :], mask=(t[:, None] < T) & known, other=0.0)
        w_nope = tl.load(head + n[:, None] * Q + q[None, :], mask=(n[:, None] < N) & known, other=0.0)
        w_rope = tl.load(head + (N + p)[:, None] * Q + q[None, :], mask=(p[:, None] < P) & known, other=0.0)
        if q_norm_Q is not None:
            wide = rows.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            norm = tl.load(q_norm_Q + q, mask=q < Q, other=0.0).to(tl.float32)
            rows = (wide * norm[None, :]).to(w_nope.dtype)
        nope = tl.dot(rows, tl.trans(w_nope), nope, input_precision="ieee")
        rope = tl.dot(rows, tl.trans(w_rope), rope, input_precision="ieee")
    if q_norm_Q is not None:
        scale = tl.rsqrt(squares / Q + q_eps)[:, None]
        nope, rope = nope * scale, rope * scale
    width: tl.constexpr = C if ABSORB else N
    query = query_THX + (t[:, None] * H + h) * (width + P)
    write_rotated(rope, cos_TR, sin_TR, query + width, t, T, R, PAD_P, PAD_R)
    if ABSORB:
        write_absorbed(nope, kv_b_HXC + h * (N + V) * C, query, t, T, N, C, PAD_N, BLOCK_C)
    else:
        plain = nope.to(query.dtype.element_ty)
        tl.store(query + n[None, :], plain, mask=(t[:, None] < T) & (n[None, :] < N))
    share: tl.constexpr = (BLOCK_T + H - 1) // H
    for row in range(start + h * share, tl.minimum(tl.minimum(start + (h + 1) * share, start + BLOCK_T), T)):
        write_latent(
            c_kv_TC + row * KV_STRIDE, kv_norm_C, kv_eps, k_TP + row * K_STRIDE, cos_TR + row * R, sin_TR + row * R,
            cache_SX + tl.load(slots_T + row) * (C + P), C, R, PAD_C, PAD_R,
        )  # fmt: skip


@triton.jit
def write_absorbed(
    nope, w_uk_NC, query, t, T, N: tl.constexpr, C: tl.constexpr, PAD_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The part of queries [T, N] without rotary position, in the space of the latents: times w_uk [N, C]."""
    n = tl.arange(0, PAD_N)
    plain = nope.to(w_uk_NC.dtype.element_ty)
    for at in range(0, C, BLOCK_C):
        c = at + tl.arange(0, BLOCK_C)
        mask = (n[:, None] < N) & (c[None, :] < C)
        w_uk = tl.load(w_uk_NC + n[:, None] * C + c[None, :], mask=mask, other=0.0)
        absorbed = tl.dot(plain, w_uk, input_precision="ieee").to(query.dtype.element_ty)
        tl.store(query + c[None, :], absorbed, mask=(t[:, None] < T) & (c[None, :] < C))


@triton.jit
def write_rotated(
    rope, cos_TR, sin_TR, query, t, T, R: tl.constexpr, PAD_P: tl.constexpr, PAD_R: tl.constexpr
):
    """The rotary part of queries [T, P], turned. Columns of a tile cannot be taken apart, but a product with ones in
    the right places, which is exact, can do it."""
    p, r = tl.arange(0, PAD_P), tl.arange(0, PAD_R)
    dtype = query.dtype.element_ty
    turning = rope.to(dtype)
    is_first = tl.where(p[:, None] == r[None, :], 1.0, 0.0).to(dtype)
    is_second = tl.where(p[:, None] == R + r[None, :], 1.0, 0.0).to(dtype)
    first = tl.dot(turning, is_first, input_precision="ieee")
    second = tl.dot(turning, is_second, input_precision="ieee")
    mask = (t[:, None] < T) & (r[None, :] < R)
    cos = tl.load(cos_TR + t[:, None] * R + r[None, :], mask=mask, other=0.0)
    sin = tl.load(sin_TR + t[:, None] * R + r[None, :], mask=mask, other=0.0)
    tl.store(query + r[None, :], (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(query + R + r[None, :], (second * cos + first * sin).to(dtype), mask=mask)


@triton.jit
def write_latent(
    c_kv_C, norm_C, eps, k_P, cos_R, sin_R, slot_X, C: tl.constexpr, R: tl.constexpr, PAD_C: tl.constexpr,
    PAD_R: tl.constexpr,
):  # fmt: skip
    """One row's latent and its rotated key, into their slot [C + 2 R] of the cache."""
    c, r = tl.arange(0, PAD_C)[None, :], tl.arange(0, PAD_R)[None, :]
    latent = tl.load(c_kv_C + c, mask=c < C, other=0.0)
    if norm_C is not None:
        latent = normed(latent, norm_C + c, eps, c < C, C)
    dtype = slot_X.dtype.element_ty
    tl.store(slot_X + c, latent, mask=c < C)
    first = tl.load(k_P + r, mask=r < R, other=0.0).to(tl.float32)
    second = tl.load(k_P + R + r, mask=r < R, other=0.0).to(tl.float32)
    cos = tl.load(cos_R + r, mask=r < R, other=0.0)
    sin = tl.load(sin_R + r, mask=r < R, other=0.0)
    tl.store(slot_X + C + r, (first * cos - second * sin).to(dtype), mask=r < R)
    tl.store(slot_X + C + R + r, (second * cos + first * sin).to(dtype), mask=r < R)
