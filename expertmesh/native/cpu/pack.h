// Matrices into the order that products read them in.
#pragma once
#include "product.h"

// Rows [first, first + count) of a bfloat16 matrix, `stride` apart, become rows of the packed one (of one part).
inline void pack_bfloat16(const bf16* from, i64 stride, i64 first, i64 count, i64 columns, char* data) {
    i64 chunks = up(columns, 32);
    for (i64 r = 0; r < count; ++r) {
        i64 row = first + r;
        char* block = data + row / LANES * chunks * TILE + row % LANES * 4;
        const bf16* source = from + r * stride;
        for (i64 k = 0; k + 1 < columns; k += 2) memcpy(block + k / 2 * 64, source + k, 4);
        if (columns % 2) memcpy(block + columns / 2 * 64, source + columns - 1, 2);
    }
}

#if defined(__AVX512F__)
// Sixteen rows of sixteen groups of four bytes, turned over.
INLINE void turn(const char* from, i64 stride, char* to) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * stride);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // r[4 * q + j]: rows 4q to 4q + 3, groups j, 4 + j, 8 + j, 12 + j.
    for (int j = 0; j < 4; ++j) {
        __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        __m512i c = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        _mm512_storeu_si512(to + j * 64, _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_storeu_si512(to + (4 + j) * 64, _mm512_shuffle_i32x4(c, d, 0x88));
        _mm512_storeu_si512(to + (8 + j) * 64, _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_storeu_si512(to + (12 + j) * 64, _mm512_shuffle_i32x4(c, d, 0xdd));
    }
}
#else
INLINE void turn(const char* from, i64 stride, char* to) {
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k) memcpy(to + k * 64 + i * 4, from + i * stride + k * 4, 4);
}
#endif

// A whole block of up to 16 rows, what is missing set to 0.
inline void pack_block(const char* from, i64 stride, i64 rows, i64 bytes, char* to) {
    for (i64 c = 0; c * CHUNK < bytes; ++c) {
        i64 width = std::min(CHUNK, bytes - c * CHUNK);
        if (rows == LANES && width == CHUNK) {
            turn(from + c * CHUNK, stride, to + c * TILE);
            continue;
        }
        alignas(64) char square[TILE] = {};
        for (i64 r = 0; r < rows; ++r) memcpy(square + r * CHUNK, from + r * stride + c * CHUNK, width);
        turn(square, CHUNK, to + c * TILE);
    }
}

// Pairs of two rows' numbers, of 16 columns or, where there are more blocks, of 32: `next` bytes apart.
INLINE void interleave(const bf16* even, const bf16* odd, i64 blocks, char* to, i64 next) {
#if defined(__AVX512BW__)
    if (blocks > 1) {
        alignas(64) static const uint16_t ORDER[2][32] = {
            {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
            {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30,
             62, 31, 63}};
        __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, _mm512_load_si512(ORDER[0]), b));
        _mm512_storeu_si512(to + next, _mm512_permutex2var_epi16(a, _mm512_load_si512(ORDER[1]), b));
        return;
    }
#endif
    for (i64 i = 0; i < std::min<i64>(blocks, 2); ++i) {
        H16 first, second;
        memcpy(&first, even + i * LANES, 32);
        memcpy(&second, odd + i * LANES, 32);
        *reinterpret_cast<U16*>(to + i * next) =
            __builtin_convertvector(first, U16) | (__builtin_convertvector(second, U16) << 16);
    }
}

// Columns [0, 16 * blocks) of some rows of bfloat16 as outputs, and the rows as their inputs, in chunks of 32: what turns
// values into a matrix that weights multiply.
inline void pack_columns(const bf16* const* row, i64 rows, i64 blocks, char* to) {
    i64 chunks = up(rows, 32);
    alignas(64) const bf16 zeros[32] = {};
    for (i64 c = 0; c < chunks; ++c)
        for (i64 k = 0; k < 16; ++k) {
            i64 i = c * 32 + 2 * k;
            for (i64 b = 0; b < blocks; b += 2)
                interleave(i < rows ? row[i] + b * LANES : zeros, i + 1 < rows ? row[i + 1] + b * LANES : zeros, blocks - b,
                           to + (b * chunks + c) * TILE + k * 64, chunks * TILE);
        }
}

// Numbers of one output to whole ones of -most to most, and a scale for each `group` of them, `step` apart.
inline void quantise(const float* x, i64 columns, i64 group, float most, int8_t* out, float* scale, i64 step) {
    for (i64 g = 0; g * group < columns; ++g) {
        i64 begin = g * group, end = std::min(begin + group, columns);
        float amax = 0;
        for (i64 i = begin; i < end; ++i) amax = std::max(amax, std::fabs(x[i]));
        scale[g * step] = amax / most;
        float inverse = amax > 0 ? most / amax : 0.0f;
        for (i64 i = begin; i < end; ++i) out[i] = int8_t(std::lrintf(x[i] * inverse));
    }
}

// Up to 16 rows of numbers, which begin a block, into it: for every format but BFLOAT16 and FP8. scale: the block's.
inline void quantise_block(
    const float* from, i64 stride, i64 rows, const Matrix& w, char* block, float* scale, int32_t* sums) {
    i64 columns = w.columns, wide = w.chunks() * per_chunk(w.format);
    std::vector<int8_t> numbers(LANES * wide);
    for (i64 r = 0; r < rows; ++r) {
        bool grouped = is_grouped(w.format);
        int8_t* row = numbers.data() + r * wide;
        quantise(from + r * stride, columns, grouped ? GROUP : columns, w.format == GROUPED_INT4 ? 7.0f : 127.0f, row,
                 scale + r, LANES);
        if (w.format == INT8) {
            int32_t sum = 0;
            for (i64 i = 0; i < columns; ++i) sum += row[i];
            sums[r] = sum;
        }
    }
    if (w.format != GROUPED_INT4)
        return pack_block(reinterpret_cast<const char*>(numbers.data()), wide, LANES, wide, block);
    // Of eight inputs the even ones in the lower half of the bits, the odd ones in the upper half.
    std::vector<char> nibbles(LANES * wide / 2);
    for (i64 i = 0; i < LANES * wide; i += 8)
        for (int half = 0; half < 2; ++half)
            for (int j = 0; j < 2; ++j) {
                const int8_t* two = numbers.data() + i + 4 * j + half;
                nibbles[i / 2 + 2 * half + j] = char((two[0] & 15) | (two[2] & 15) << 4);
            }
    pack_block(nibbles.data(), wide / 2, LANES, wide / 2, block);
}
