"""8-bit numbers with a scale for a row or for a block of it, symmetric around 0: as rows travel, and as products take
them."""

import triton
import triton.language as tl

# Added and taken away again, this leaves a float32 without its fraction, rounded to even: no two backends share a
# function that does it.
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23


@triton.jit
def scale_of(highest, LARGEST: tl.constexpr):
    """The scale with which the highest absolute value becomes LARGEST. Of zeros it is 1: anything but 0."""
    return tl.where(highest > 0, highest / LARGEST, 1.0)


@triton.jit
def numbers_of(x, scale, dtype: tl.constexpr):
    """x / scale, both float32, in a type of 8 bits."""
    scaled = x / scale
    if dtype == tl.int8:
        scaled = (scaled + _ROUND) - _ROUND
    return scaled.to(dtype)


@triton.jit
def float_of_e4m3(bits):
    """The float32 value of FP8 numbers (E4M3, finite) that are given as bytes, for cards without the type."""
    bits = bits.to(tl.int32)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    # The exponent 0 means the power of 1 without the leading one.
    leading = tl.where(exponent > 0, mantissa + 8, mantissa).to(tl.float32)
    power = ((tl.maximum(exponent, 1) + 117) << 23).to(tl.float32, bitcast=True)
    return tl.where(bits & 128 != 0, -leading, leading) * power


@triton.jit
def quantise(
    x_RD, order_P, end, y_PD, scale_PG, P, D: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
    LARGEST: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows as 8-bit numbers with float32 scales: [P, D / GROUP], or [P] where WHOLE rows have one. GROUP divides
    BLOCK_D.

    order_P: None, or into expert order too, as `permute.permute` does it, of pairs of a row and one of its K choices.
    """
    if order_P is not None:
        P = tl.minimum(tl.load(end), P)
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    BLOCK_G: tl.constexpr = BLOCK_D // GROUP
    i, g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
    for p in range(tl.program_id(0), P, PROGRAMS):
        row = tl.cast(p, tl.int64)
        to = y_PD + row * D
        if order_P is not None:
            row = tl.cast(tl.load(order_P + p) // K, tl.int64)
        whole = 1.0
        if WHOLE:
            highest = tl.zeros((BLOCK_D,), tl.float32)
            for first in range(0, D, BLOCK_D):
                x = tl.load(x_RD + row * D + first + i, mask=first + i < D, other=0.0)
                highest = tl.maximum(highest, tl.abs(x.to(tl.float32)))
            whole = scale_of(tl.max(highest, axis=0), LARGEST)
            tl.store(scale_PG + p, whole)
        for first in range(0, D, BLOCK_D):
            x = tl.load(x_RD + row * D + first + i, mask=first + i < D, other=0.0).to(tl.float32)
            if WHOLE:
                numbers = numbers_of(x, whole, y_PD.dtype.element_ty)
            else:
                grouped = tl.reshape(x, (BLOCK_G, GROUP))
                scale = scale_of(tl.max(tl.abs(grouped), axis=1), LARGEST)
                numbers = numbers_of(grouped, scale[:, None], y_PD.dtype.element_ty)
                numbers = tl.reshape(numbers, (BLOCK_D,))
                at = first // GROUP + g
                tl.store(scale_PG + p * GROUPS + at, scale, mask=at < GROUPS)
            tl.store(to + first + i, numbers, mask=first + i < D)


@triton.jit
def dequantise(
    x_TD,
    scale_TG,
    y_TD,
    T,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What `quantise` made of rows with a scale for each GROUP of columns, in the type of y. GROUP divides BLOCK_D."""
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    BLOCK_G: tl.constexpr = BLOCK_D // GROUP
    i, g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
    for t in range(tl.program_id(0), T, PROGRAMS):
        row = tl.cast(t, tl.int64) * D
        for first in range(0, D, BLOCK_D):
            at = first // GROUP + g
            scale = tl.load(scale_TG + t * GROUPS + at, mask=at < GROUPS, other=0.0)
            x = tl.load(x_TD + row + first + i, mask=first + i < D, other=0.0).to(tl.float32)
            scaled = tl.reshape(tl.reshape(x, (BLOCK_G, GROUP)) * scale[:, None], (BLOCK_D,))
            tl.store(y_TD + row + first + i, scaled.to(y_TD.dtype.element_ty), mask=first + i < D)
