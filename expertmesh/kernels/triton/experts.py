"""Products of the rows of each expert with its weights: one launch over ragged groups of rows (DeepSeek-V3, section
2.1.2).

Rows are in the order of their experts: slot s has rows [offsets[s], offsets[s + 1]). PROGRAMS programs, as many as the
card has units, share out the tiles of all slots. Letters: P rows, S slots, D hidden, I inner, N and K of any product.

Numbers are bfloat16, or of 8 bits with float32 scales: of a row for every X_GROUP columns, of a matrix for every W_ROWS
x W_GROUP of it. Where there are none they are None, and the group a whole row. Whole rows are scaled at the end, other
groups block by block: then a block of the sum lies in one group. FP8 weights may be given as bytes: they are made the
type of the rows, for cards without FP8 and for rows that are not quantised.
"""

import triton
import triton.language as tl

from expertmesh.kernels.triton.quantise import float_of_e4m3, numbers_of, scale_of


@triton.jit
def gate_up(
    x_PD, x_scale, w_SID, w_scale, offsets, h_PI, h_scale, S, D: tl.constexpr, I: tl.constexpr,  # noqa: E741
    X_GROUP: tl.constexpr, W_ROWS: tl.constexpr, W_GROUP: tl.constexpr, LARGEST: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """SwiGLU of x [P, D] times w [S, 2, I, D], gate and up: h [P, I].

    x_scale [P, D / X_GROUP], w_scale [S, 2, I / W_ROWS, D / W_GROUP]. h_scale [P, I / BLOCK_I]: where h is of 8 bits,
    LARGEST being the largest of them. A tile knows all that such a scale needs.
    """
    COLUMNS: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    done = 0
    for slot in range(S):
        start, end = tl.load(offsets + slot), tl.load(offsets + slot + 1)
        tiles = (end - start + BLOCK_P - 1) // BLOCK_P * COLUMNS
        for tile in range((tl.program_id(0) + PROGRAMS - done % PROGRAMS) % PROGRAMS, tiles, PROGRAMS):
            row, column = start + tile // COLUMNS * BLOCK_P, tile % COLUMNS
            gate, up = _products(
                x_PD, x_scale, w_SID, w_scale, row, end, slot, column * BLOCK_I, I, D, 2, X_GROUP, W_ROWS, W_GROUP,
                BLOCK_P, BLOCK_I, BLOCK_D,
            )  # fmt: skip
            h = gate * tl.sigmoid(gate) * up
            if h_scale is not None:
                p = row + tl.arange(0, BLOCK_P)
                scale = scale_of(tl.max(tl.abs(h), axis=1), LARGEST)
                tl.store(h_scale + p * COLUMNS + column, scale, mask=p < end)
                h = numbers_of(h, scale[:, None], h_PI.dtype.element_ty)
            _store_tile(h_PI, h, row, end, column * BLOCK_I, I, BLOCK_P, BLOCK_I)
        done += tiles


@triton.jit
def down(
    h_PI, h_scale, w_SDI, w_scale, offsets, y_PD, S, D: tl.constexpr, I: tl.constexpr,  # noqa: E741
    X_GROUP: tl.constexpr, W_ROWS: tl.constexpr, W_GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """h [P, I] times w [S, D, I]: y [P, D]. h_scale [P, I / X_GROUP], w_scale [S, D / W_ROWS, I / W_GROUP]."""
    COLUMNS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    done = 0
    for slot in range(S):
        start, end = tl.load(offsets + slot), tl.load(offsets + slot + 1)
        tiles = (end - start + BLOCK_P - 1) // BLOCK_P * COLUMNS
        for tile in range((tl.program_id(0) + PROGRAMS - done % PROGRAMS) % PROGRAMS, tiles, PROGRAMS):
            row, column = start + tile // COLUMNS * BLOCK_P, tile % COLUMNS * BLOCK_D
            y, _ = _products(
                h_PI, h_scale, w_SDI, w_scale, row, end, slot, column, D, I, 1, X_GROUP, W_ROWS, W_GROUP,
                BLOCK_P, BLOCK_D, BLOCK_I,
            )  # fmt: skip
            _store_tile(y_PD, y, row, end, column, D, BLOCK_P, BLOCK_D)
        done += tiles


@triton.jit
def _products(
    x_PK, x_scale, w_SMNK, w_scale, row, end, slot, column, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
    X_GROUP: tl.constexpr, W_ROWS: tl.constexpr, W_GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows from `row` to `end` times columns from `column` on of the slot's M matrices [N, K], one or two, which share
    one reading of the rows: two times float32 [BLOCK_P, BLOCK_N]."""
    tl.static_assert(X_GROUP >= K or X_GROUP % BLOCK_K == 0)
    tl.static_assert(W_GROUP >= K or W_GROUP % BLOCK_K == 0)
    BY_BLOCK: tl.constexpr = X_GROUP < K or W_GROUP < K
    WHOLE: tl.constexpr = x_PK.dtype.element_ty == tl.int8
    EXACT: tl.constexpr = WHOLE and not BY_BLOCK
    p, n, k = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_K)[None, :]
    x_PK += tl.cast(row, tl.int64) * K
    w_SMNK += (tl.cast(slot, tl.int64) * (M * N) + column) * K
    first = tl.zeros((BLOCK_P, BLOCK_N), tl.int32 if EXACT else tl.float32)
    second = tl.zeros((BLOCK_P, BLOCK_N), tl.int32 if EXACT else tl.float32)
    for at in range(0, K, BLOCK_K):
        x = tl.load(x_PK + p * K + at + k, mask=(row + p < end) & (at + k < K), other=0.0)
        x_scales = _row_scales(x_scale, row, end, at, K, X_GROUP, BLOCK_P)
        w_scales = _matrix_scales(w_scale, slot * M, column, at, N, K, W_ROWS, W_GROUP, BLOCK_N)
        mask = (column + n < N) & (at + k < K)
        first = _add_product(first, x, x_scales, w_SMNK + n * K + at + k, w_scales, mask, BY_BLOCK)
        if M == 2:
            w_scales = _matrix_scales(w_scale, slot * M + 1, column, at, N, K, W_ROWS, W_GROUP, BLOCK_N)
            second = _add_product(
                second, x, x_scales, w_SMNK + (N + n) * K + at + k, w_scales, mask, BY_BLOCK
            )
    if not BY_BLOCK:
        x_scales = _row_scales(x_scale, row, end, 0, K, X_GROUP, BLOCK_P)
        first = first.to(tl.float32) * x_scales
        first *= _matrix_scales(w_scale, slot * M, column, 0, N, K, W_ROWS, W_GROUP, BLOCK_N)
        if M == 2:
            second = second.to(tl.float32) * x_scales
            second *= _matrix_scales(w_scale, slot * M + 1, column, 0, N, K, W_ROWS, W_GROUP, BLOCK_N)
    return first, second


@triton.jit
def _add_product(sums, x, x_scales, w_at, w_scales, mask, BY_BLOCK: tl.constexpr):
    """sums + x times the block of a matrix, transposed; scaled where scales change from block to block."""
    w = tl.load(w_at, mask=mask, other=0.0)
    if w.dtype == tl.uint8:
        w = float_of_e4m3(w).to(x.dtype)
    if BY_BLOCK:
        return sums + tl.dot(x, tl.trans(w), input_precision="ieee").to(tl.float32) * x_scales * w_scales
    else:  # noqa: RET505 (compilers would go on)
        return tl.dot(x, tl.trans(w), sums, input_precision="ieee", out_dtype=sums.dtype)


@triton.jit
def _row_scales(x_scale, row, end, k, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_P: tl.constexpr):
    """[BLOCK_P, 1], of the group that column k is in."""
    if x_scale is None:
        return 1.0
    else:  # noqa: RET505 (compilers would go on)
        p = row + tl.arange(0, BLOCK_P)
        at = x_scale + p * ((K + GROUP - 1) // GROUP) + k // GROUP
        return tl.load(at, mask=p < end, other=0.0)[:, None]


@triton.jit
def _matrix_scales(
    w_scale, matrix, column, k, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[1, BLOCK_N], of the group that column k is in; one number where a tile's columns share it."""
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    at = (matrix * ((N + ROWS - 1) // ROWS) + column // ROWS) * GROUPS + k // GROUP
    if w_scale is None:
        return 1.0
    elif ROWS > 1:  # noqa: RET505 (compilers would go on)
        tl.static_assert(ROWS % BLOCK_N == 0)
        return tl.load(w_scale + at)
    else:
        n = tl.arange(0, BLOCK_N)
        return tl.load(w_scale + at + n * GROUPS, mask=column + n < N, other=0.0)[None, :]


@triton.jit
def _store_tile(to, tile, row, end, column, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of a matrix whose rows have N numbers."""
    p, n = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_N)[None, :]
    to += tl.cast(row, tl.int64) * N + column
    tl.store(to + p * N + n, tile.to(to.dtype.element_ty), mask=(row + p < end) & (column + n < N))
