"""Rows into the order of their experts and back (DeepSeek-V3, section 3.2).

A pair is a row and one of its K choices; pair p is of row p // K. P = R * K pairs; S slots; rows of width D.
"""

import triton
import triton.language as tl


@triton.jit
def expert_order(
    slots_P, order_P, place_P, offsets_N, P, N: tl.constexpr, PAD_N: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Sorts pairs by slot, in a stable way. Results are int32.

    slots_P: -1 where the expert is not mine. order_P: the pair at each place; place_P: the place of each pair, or -1;
    offsets [N], one more than there are slots: slot s has the places [offsets[s], offsets[s + 1]).

    A program has BLOCK_P pairs. It counts those of the others too, so that nobody waits for anybody. No program writes
    into a block of another's: a store whose mask has gaps reads and writes the whole block on Ascend.
    """
    own = tl.program_id(0) * BLOCK_P
    i, n = tl.arange(0, BLOCK_P), tl.arange(0, PAD_N)
    lower = tl.zeros((PAD_N,), tl.int32)
    earlier = tl.zeros((PAD_N,), tl.int32)
    for first in range(0, P, BLOCK_P):
        slots = tl.load(slots_P + first + i, mask=first + i < P, other=-1).to(tl.int32)
        below = (slots[:, None] >= 0) & (slots[:, None] < n[None, :])
        lower += tl.sum(below.to(tl.int32), axis=0)
        earlier += tl.where(first < own, tl.sum((slots[:, None] == n[None, :]).to(tl.int32), axis=0), 0)
    slots = tl.load(slots_P + own + i, mask=own + i < P, other=-1).to(tl.int32)
    before = (slots[:, None] == slots[None, :]) & (i[None, :] < i[:, None])
    at = tl.where(slots[:, None] == n[None, :], (lower + earlier)[None, :], 0)
    place = tl.sum(at, axis=1) + tl.sum(before.to(tl.int32), axis=1)
    tl.store(place_P + own + i, tl.where(slots >= 0, place, -1), mask=own + i < P)
    tl.store(order_P + place, own + i, mask=slots >= 0)
    # All programs write the same.
    tl.store(offsets_N + n, lower, mask=n < N)


@triton.jit
def permute(
    x_RD, order_P, end, y_PD, P, D: tl.constexpr, K: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row order_P[p] // K of x to place p of y, for all p below the number that `end` points to. Any type."""
    end = tl.minimum(tl.load(end), P)
    for p in range(tl.program_id(0), end, PROGRAMS):
        row = tl.cast(tl.load(order_P + p) // K, tl.int64)
        to = y_PD + tl.cast(p, tl.int64) * D
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            tl.store(to + d, tl.load(x_RD + row * D + d, mask=d < D), mask=d < D)


@triton.jit
def unpermute(
    y_PD, place_RK, weights_RK, out_RD, R, D: tl.constexpr, K: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of the results of each row's choices, weighted, in float32 and in the order of the choices. place_RK: where
    in y, -1 for what was not mine and counts as 0."""
    for r in range(tl.program_id(0), R, PROGRAMS):
        to = out_RD + tl.cast(r, tl.int64) * D
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            sums = tl.zeros((BLOCK_D,), tl.float32)
            for k in range(K):
                place = tl.cast(tl.load(place_RK + r * K + k), tl.int64)
                y = tl.load(y_PD + place * D + d, mask=(place >= 0) & (d < D), other=0.0).to(tl.float32)
                sums += tl.load(weights_RK + r * K + k).to(tl.float32) * y
            tl.store(to + d, sums.to(out_RD.dtype.element_ty), mask=d < D)
