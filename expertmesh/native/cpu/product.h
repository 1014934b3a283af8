// Rows times a packed matrix: the one loop that nearly all time is spent in.
//
// A matrix is kept in blocks of 16 of its rows (outputs) and chunks of 64 bytes of each (32 bfloat16, 64 of one byte or
// 128 of four bits): [block][chunk][16 groups of 4 bytes][16 outputs][4 bytes]. A group of all outputs is one vector
// register, a chunk one tile register, and a block one stream of memory. Rows come in tiles of up to 16 of them:
// [tile][chunk][row][64 bytes]. What a row gives is summed in one order whatever other rows there are.
#pragma once
#include "vectors.h"
#include <vector>

// INT8: weights and rows are whole numbers, with a scale for each output and each row. The others are of weights alone,
// with a scale for each output and GROUP inputs; they are made bfloat16 a few at a time, in cache.
enum Format : i64 { BFLOAT16 = 0, INT8 = 1, GROUPED_INT8 = 2, GROUPED_INT4 = 3, FP8 = 4 };
constexpr i64 GROUP = 128;
constexpr i64 CHUNK = 64;         // bytes of a row in a chunk
constexpr i64 TILE = 16 * CHUNK;  // bytes of a chunk of a block
// Chunks that are gone through for many rows before the next ones, so that rows and blocks stay in cache. Sums go on
// exactly where they were: this changes no result.
constexpr i64 CHUNKS = 16, FEW_TILES = 6;

inline i64 per_chunk(i64 format) { return format == BFLOAT16 ? 32 : format == GROUPED_INT4 ? 128 : 64; }
inline bool is_grouped(i64 format) { return format >= GROUPED_INT8; }
inline i64 rows_format(i64 format) { return is_grouped(format) ? i64(BFLOAT16) : format; }

struct Matrix {
    const char* data;
    i64 format, parts, rows, columns;  // rows of each part; each begins with a block of its own
    const float* scale;                // of each output, padded as the blocks are; grouped: [block][group][16]
    const int32_t* sums;               // INT8: of the inputs of each output

    i64 blocks() const { return up(rows, LANES); }
    i64 chunks() const { return up(columns, per_chunk(format)); }
    i64 block_bytes() const { return chunks() * TILE; }
    i64 groups() const { return is_grouped(format) ? up(columns, GROUP) : 1; }
    Matrix part(i64 i) const {
        i64 first = i * blocks();
        return {data + first * block_bytes(), format, 1, rows, columns, scale + first * groups() * LANES, sums + first * LANES};
    }
};

// Rows that are to be multiplied, in the form that a matrix of this format takes.
struct Rows {
    char* tiles = nullptr;
    float* scale = nullptr;  // int8: of each row
    i64 format = BFLOAT16, count = 0, columns = 0;
    i64 step = 0, tile = 0;  // bytes from a chunk to the next, and of a tile

    Rows() = default;
    Rows(char* tiles, float* scale, i64 format, i64 count, i64 columns)
        : tiles(tiles), scale(scale), format(format), count(count), columns(columns),
          step(std::min<i64>(count, LANES) * CHUNK), tile(up(columns, per_chunk(format)) * step) {}

    i64 high() const { return step / CHUNK; }
    i64 chunks() const { return up(columns, per_chunk(format)); }
    i64 tile_bytes() const { return tile; }
    char* at(i64 row) const { return tiles + row / LANES * tile + row % LANES * CHUNK; }

    // For a matrix of this format.
    static Rows in(Space& space, i64 format, i64 count, i64 columns) {
        Rows rows(nullptr, nullptr, rows_format(format), count, columns);
        rows.tiles = space.take<char>(up(count, LANES) * rows.tile_bytes());
        rows.scale = space.take<float>(format == INT8 ? count : 0);
        return rows;
    }

    template <class T> void put(i64 row, const T* x) const {
        char* to = at(row);
        if (format == INT8) return quantise(row, x, to);
        i64 c = 0;
        for (; (c + 1) * 32 <= columns; ++c)
            for (int half = 0; half < 32; half += LANES)
                copy(reinterpret_cast<bf16*>(to + c * step) + half, x + c * 32 + half);
        if (c * 32 < columns) {
            bf16* last = reinterpret_cast<bf16*>(to + c * step);
            for (int i = 0; i < 32; ++i) last[i] = c * 32 + i < columns ? as_bf16(x[c * 32 + i]) : 0;
        }
    }

    // Sixteen numbers of a bfloat16 row, from a column that is a multiple of sixteen.
    void put_lanes(i64 row, i64 column, F16 x) const {
        store(reinterpret_cast<bf16*>(at(row) + column / 32 * step) + column % 32, x);
    }

private:
    static void copy(bf16* to, const bf16* x) { memcpy(to, x, 32); }
    static void copy(bf16* to, const float* x) { store(to, load(x)); }
    static bf16 as_bf16(bf16 x) { return x; }
    static bf16 as_bf16(float x) { return narrow(x); }

    // To whole numbers of -127 to 127 and the size of one of them; kept 128 higher, which products want.
    template <class T> void quantise(i64 row, const T* x, char* to) const {
        F16 most = {};
        by_lanes(columns, [&](i64 i, int lanes) { most = max(most, abs(load(x + i, lanes))); });
        float amax = largest(most);
        scale[row] = amax / 127.0f;
        F16 inverse = all(amax > 0 ? 127.0f / amax : 0.0f);
        for (i64 c = 0; c * 64 < columns; ++c)
            for (i64 i = 0; i < 64; i += LANES) {
                i64 first = c * 64 + i;
                int lanes = int(std::min<i64>(LANES, columns - first));
                F16 v = lanes > 0 ? load(x + first, lanes) * inverse : F16{};
                I16 q = __builtin_convertvector(v + (F16)((U16)all(0.5f) | ((U16)v & 0x80000000u)), I16);
                *reinterpret_cast<B16*>(to + c * step + i) = __builtin_convertvector(q + 128, B16);
            }
    }
};

// Four chunks further on in the stream of one of some blocks that are read side by side, `left` chunks before its end: the
// streams of these blocks end where those of the next ones begin.
INLINE const char* ahead(const char* w, i64 next, i64 left, int blocks) {
    return left > 4 ? w + 4 * TILE : w + 4 * TILE + (blocks - 1) * next;
}

// Sums of a tile of rows (x, `step` bytes from chunk to chunk) with NB blocks (w, `next` bytes from block to block), over
// some chunks. Goes on from what is in out, unless fresh. out: [rows][ld], float for bfloat16, int32 for int8.
namespace portable {
template <int R, int NB> INLINE void bfloat16(
    const char* x, i64 step, const char* w, i64 next, i64 chunks, float* out, i64 ld, bool fresh) {
    F16 sums[R][NB];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < NB; ++b) sums[r][b] = fresh ? F16{} : load(out + r * ld + b * LANES);
    for (i64 c = 0; c < chunks; ++c)
        for (int k = 0; k < 16; ++k) {
            F16 even[NB], odd[NB];
            for (int b = 0; b < NB; ++b) {
                U16 pair = *reinterpret_cast<const U16*>(w + b * next + c * TILE + k * 64);
                even[b] = (F16)(pair << 16);
                odd[b] = (F16)(pair & 0xffff0000u);
            }
            for (int r = 0; r < R; ++r) {
                const bf16* pair = reinterpret_cast<const bf16*>(x + c * step + r * CHUNK + k * 4);
                F16 first = all(widen(pair[0])), second = all(widen(pair[1]));
                for (int b = 0; b < NB; ++b) sums[r][b] = fused(first, even[b], fused(second, odd[b], sums[r][b]));
            }
        }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < NB; ++b) store(out + r * ld + b * LANES, sums[r][b]);
}

template <int R, int NB> INLINE void int8(
    const char* x, i64 step, const char* w, i64 next, i64 chunks, int32_t* out, i64 ld, bool fresh) {
    I16 sums[R][NB];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < NB; ++b)
            sums[r][b] = fresh ? I16{} : *reinterpret_cast<I16*>(out + r * ld + b * LANES);
    for (i64 c = 0; c < chunks; ++c)
        for (int k = 0; k < 16; ++k)
            for (int b = 0; b < NB; ++b) {
                I16 four = *reinterpret_cast<const I16*>(w + b * next + c * TILE + k * 64);
                for (int i = 0; i < 4; ++i) {
                    I16 one = (four << (24 - 8 * i)) >> 24;
                    for (int r = 0; r < R; ++r)
                        sums[r][b] += one * int32_t(uint8_t(x[c * step + r * CHUNK + k * 4 + i]));
                }
            }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < NB; ++b) *reinterpret_cast<I16*>(out + r * ld + b * LANES) = sums[r][b];
}
}  // namespace portable

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
namespace avx512 {
template <int R, int NB> INLINE void bfloat16(
    const char* x, i64 step, const char* w, i64 next, i64 chunks, float* out, i64 ld, bool fresh) {
    __m512 sums[R][NB];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < NB; ++b)
            sums[r][b] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(out + r * ld + b * LANES);
    for (i64 c = 0; c < chunks; ++c)
        for (int k = 0; k < 16; ++k) {
            __m512bh v[NB];
            for (int b = 0; b < NB; ++b) {
                const char* at = w + b * next + c * TILE + k * 64;
                v[b] = (__m512bh)_mm512_loadu_si512(at);
                _mm_prefetch(ahead(at, next, chunks - c, NB), _MM_HINT_T0);
            }
            for (int r = 0; r < R; ++r) {
                int32_t pair;
                memcpy(&pair, x + c * step + r * CHUNK + k * 4, 4);
                __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                for (int b = 0; b < NB; ++b) sums[r][b] = _mm512_dpbf16_ps(sums[r][b], v[b], both);
            }
        }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < NB; ++b) _mm512_storeu_ps(out + r * ld + b * LANES, sums[r][b]);
}

template <int R, int NB> INLINE void int8(
    const char* x, i64 step, const char* w, i64 next, i64 chunks, int32_t* out, i64 ld, bool fresh) {
    __m512i sums[R][NB];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < NB; ++b)
            sums[r][b] = fresh ? _mm512_setzero_si512() : _mm512_loadu_si512(out + r * ld + b * LANES);
    for (i64 c = 0; c < chunks; ++c)
        for (int k = 0; k < 16; ++k) {
            __m512i v[NB];
            for (int b = 0; b < NB; ++b) {
                const char* at = w + b * next + c * TILE + k * 64;
                v[b] = _mm512_loadu_si512(at);
                _mm_prefetch(ahead(at, next, chunks - c, NB), _MM_HINT_T0);
            }
            for (int r = 0; r < R; ++r) {
                int32_t four;
                memcpy(&four, x + c * step + r * CHUNK + k * 4, 4);
                __m512i each = _mm512_set1_epi32(four);
                for (int b = 0; b < NB; ++b) sums[r][b] = _mm512_dpbusd_epi32(sums[r][b], each, v[b]);
            }
        }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < NB; ++b) _mm512_storeu_si512(out + r * ld + b * LANES, sums[r][b]);
}
}  // namespace avx512
namespace vector = avx512;
constexpr int MOST_ROWS = 6, MOST_BLOCKS = 4;
#else
namespace vector = portable;
#if defined(__AVX512F__)
constexpr int MOST_ROWS = 6, MOST_BLOCKS = 2;
#else
constexpr int MOST_ROWS = 2, MOST_BLOCKS = 2;
#endif
#endif

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
// Tile registers: 0 to 3 sums, 4 and 5 rows, 6 and 7 blocks.
namespace amx {
struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
};
inline thread_local i64 configured = 0;

inline void configure(i64 high) {
    if (configured == high) return;
    Config config;
    for (int i = 0; i < 8; ++i) config.rows[i] = uint8_t(i < 6 ? high : 16);
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
    configured = high;
}
inline void release() {
    if (configured) _tile_release();
    configured = 0;
}

#define SUM(to, x, w)                                       \
    do {                                                    \
        if constexpr (format == INT8) _tile_dpbusd(to, x, w); \
        else _tile_dpbf16ps(to, x, w);                      \
    } while (0)

INLINE void fetch(const char* p, i64 lines) {
    for (i64 i = 0; i < lines; ++i) _mm_prefetch(p + i * 64, _MM_HINT_T0);
}

// One tile of rows with NB blocks.
template <i64 format, int NB> inline void one(
    const char* x, i64 step, const char* w, i64 next, i64 chunks, void* out, i64 ld, bool fresh) {
    float* sums = static_cast<float*>(out);
    i64 stride = ld * 4;
    _tile_zero(0);
    if constexpr (NB > 1) _tile_zero(1);
    if constexpr (NB > 2) _tile_zero(2);
    if constexpr (NB > 3) _tile_zero(3);
    if (!fresh) {
        _tile_loadd(0, sums, stride);
        if constexpr (NB > 1) _tile_loadd(1, sums + 16, stride);
        if constexpr (NB > 2) _tile_loadd(2, sums + 32, stride);
        if constexpr (NB > 3) _tile_loadd(3, sums + 48, stride);
    }
    for (i64 c = 0; c < chunks; ++c) {
        const char* at = w + c * TILE;
        _tile_loadd(4, x + c * step, CHUNK);
        for (int b = 0; b < NB; ++b) fetch(ahead(at + b * next, next, chunks - c, NB), 16);
        _tile_loadd(6, at, 64);
        SUM(0, 4, 6);
        if constexpr (NB > 1) { _tile_loadd(7, at + next, 64); SUM(1, 4, 7); }
        if constexpr (NB > 2) { _tile_loadd(6, at + 2 * next, 64); SUM(2, 4, 6); }
        if constexpr (NB > 3) { _tile_loadd(7, at + 3 * next, 64); SUM(3, 4, 7); }
    }
    _tile_stored(0, sums, stride);
    if constexpr (NB > 1) _tile_stored(1, sums + 16, stride);
    if constexpr (NB > 2) _tile_stored(2, sums + 32, stride);
    if constexpr (NB > 3) _tile_stored(3, sums + 48, stride);
}

enum class Fetch { NOTHING, AHEAD, NEXT, LATER };
constexpr i64 SOON = 2;  // chunks

// One tile of rows or two (`tile` bytes apart) with two blocks, over some chunks. What is fetched meanwhile of both blocks:
// what is ahead in their streams; the chunk that is next, but for the first two; or a few lines at each chunk from `later`
// on.
template <i64 format, int tiles, Fetch what> INLINE void two(
    const char* x, i64 tile, i64 step, const char* w, i64 next, i64 chunks, void* out, i64 ld, bool fresh,
    const char* later = nullptr, i64 lines = 0) {
    float* upper = static_cast<float*>(out);
    float* lower = upper + 16 * ld;
    i64 stride = ld * 4;
    if (fresh) {
        _tile_zero(0); _tile_zero(1);
        if constexpr (tiles > 1) { _tile_zero(2); _tile_zero(3); }
    } else {
        _tile_loadd(0, upper, stride); _tile_loadd(1, upper + 16, stride);
        if constexpr (tiles > 1) { _tile_loadd(2, lower, stride); _tile_loadd(3, lower + 16, stride); }
    }
    for (i64 c = 0; c < chunks; ++c) {
        const char* at = w + c * TILE;
        if constexpr (what == Fetch::AHEAD)
            for (int b = 0; b < 2; ++b) fetch(ahead(at + b * next, next, chunks - c, 2), 16);
        if constexpr (what == Fetch::NEXT)
            if (c + 1 >= SOON && c + 1 < chunks) { fetch(at + TILE, 16); fetch(at + next + TILE, 16); }
        if constexpr (what == Fetch::LATER) {
            fetch(later + c * lines * 64, lines);
            fetch(later + next + c * lines * 64, lines);
        }
        _tile_loadd(6, at, 64);
        _tile_loadd(4, x + c * step, CHUNK);
        SUM(0, 4, 6);
        _tile_loadd(7, at + next, 64);
        SUM(1, 4, 7);
        if constexpr (tiles > 1) {
            _tile_loadd(5, x + tile + c * step, CHUNK);
            SUM(2, 5, 6);
            SUM(3, 5, 7);
        }
    }
    _tile_stored(0, upper, stride); _tile_stored(1, upper + 16, stride);
    if constexpr (tiles > 1) { _tile_stored(2, lower, stride); _tile_stored(3, lower + 16, stride); }
}
#undef SUM

// More than two tiles of rows with two blocks, a few chunks at a time, which stay in the nearest cache with the rows and
// the sums. Memory has to be read all the time, but a core waits for so few lines at once that none can be spared for what
// is far off. So few rows fetch what they need next, and the last of them the first chunks of the next turn; where there
// are many, all of them together fetch the next turn.
template <i64 format, bool many> inline void turns(
    const char* x, i64 count, i64 tile, i64 step, const char* w, i64 next, i64 chunks, float* out, i64 ld, bool fresh) {
    constexpr i64 TURN = many ? 8 : 4;
    constexpr Fetch NONE = Fetch::NOTHING, LATER = Fetch::LATER, FIRST = many ? LATER : Fetch::NEXT, MIDST = many ? LATER : NONE;
    i64 lines = many ? up(16, up(count, 2)) : SOON * 16 / TURN;
    for (i64 c = 0; c < chunks; c += TURN) {
        i64 some = std::min(TURN, chunks - c);
        const char *at = w + c * TILE, *later = c + some < chunks ? at + some * TILE : w + 2 * next;
        for (i64 t = 0; t < count; t += 2) {
            const char* from = x + t * tile + c * step;
            float* to = out + t * LANES * ld;
            bool begin = fresh && c == 0, last = t + 2 >= count, single = t + 1 == count;
            if (some < TURN && single) two<format, 1, NONE>(from, tile, step, at, next, some, to, ld, begin);
            else if (some < TURN) two<format, 2, NONE>(from, tile, step, at, next, some, to, ld, begin);
            else if (t == 0) two<format, 2, FIRST>(from, tile, step, at, next, TURN, to, ld, begin, later, lines);
            else if (single) two<format, 1, LATER>(from, tile, step, at, next, TURN, to, ld, begin, later, lines);
            else if (last) two<format, 2, LATER>(from, tile, step, at, next, TURN, to, ld, begin, later, lines);
            else two<format, 2, MIDST>(from, tile, step, at, next, TURN, to, ld, begin, later, lines);
            if (many) later += TURN * lines * 64;
        }
    }
}

template <i64 format> inline void tiles(
    const Rows& x, i64 tile0, i64 tile1, const char* w, i64 next, i64 first, i64 chunks, i64 blocks, float* out, i64 ld,
    bool fresh) {
    i64 step = x.high() * CHUNK, tile = x.tile_bytes();
    // The compiler does not know what memory tile instructions read and write.
    asm volatile("" : : : "memory");
    configure(x.high());
    const char* rows = x.tiles + tile0 * tile + first * step;
    i64 b = 0, count = tile1 - tile0;
    if (count == 1)
        for (; b + 4 <= blocks; b += 4) one<format, 4>(rows, step, w + b * next, next, chunks, out + b * 16, ld, fresh);
    else
        for (; b + 2 <= blocks; b += 2) {
            const char* at = w + b * next;
            float* to = out + b * 16;
            if (count == 2) two<format, 2, Fetch::AHEAD>(rows, tile, step, at, next, chunks, to, ld, fresh);
            else if (count <= FEW_TILES) turns<format, false>(rows, count, tile, step, at, next, chunks, to, ld, fresh);
            else turns<format, true>(rows, count, tile, step, at, next, chunks, to, ld, fresh);
        }
    for (; b < blocks; ++b)
        for (i64 t = 0; t < count; ++t)
            one<format, 1>(rows + t * tile, step, w + b * next, next, chunks, out + t * LANES * ld + b * 16, ld, fresh);
    asm volatile("" : : : "memory");
}
}  // namespace amx
#endif

namespace vector_tiles {
template <i64 format, int NB, int R = MOST_ROWS> INLINE void few(
    int rows, const char* x, i64 step, const char* w, i64 next, i64 chunks, float* out, i64 ld, bool fresh) {
    if constexpr (R == 0) return;
    else if (rows != R) return few<format, NB, R - 1>(rows, x, step, w, next, chunks, out, ld, fresh);
    else if constexpr (format == INT8)
        vector::int8<R, NB>(x, step, w, next, chunks, reinterpret_cast<int32_t*>(out), ld, fresh);
    else vector::bfloat16<R, NB>(x, step, w, next, chunks, out, ld, fresh);
}

template <i64 format> inline void tiles(
    const Rows& x, i64 tile0, i64 tile1, const char* w, i64 next, i64 first, i64 chunks, i64 blocks, float* out, i64 ld,
    bool fresh) {
    i64 step = x.high() * CHUNK;
    for (i64 b = 0; b < blocks;) {
        bool wide = b + MOST_BLOCKS <= blocks;
        for (i64 row = tile0 * LANES, end = std::min(tile1 * LANES, x.count); row < end;) {
            int rows = int(std::min<i64>({MOST_ROWS, end - row, LANES - row % LANES}));
            const char* from = x.at(row) + first * step;
            float* to = out + (row - tile0 * LANES) * ld + b * LANES;
            if (wide) few<format, MOST_BLOCKS>(rows, from, step, w + b * next, next, chunks, to, ld, fresh);
            else few<format, 1>(rows, from, step, w + b * next, next, chunks, to, ld, fresh);
            row += rows;
        }
        b += wide ? MOST_BLOCKS : 1;
    }
}
}  // namespace vector_tiles

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
namespace fastest = amx;
inline void leave() { amx::release(); }
constexpr i64 ROWS_OF_A_READ = 192;  // that are computed in the time that a matrix takes to be read
#else
namespace fastest = vector_tiles;
inline void leave() {}
constexpr i64 ROWS_OF_A_READ = 16;
#endif

// Groups of inputs, as they are kept, to pairs of bfloat16 numbers of each output: exact, since none has more than eight
// binary digits. In a group of 4 bytes, or 8 halves of one, the first half of the bits holds the even inputs of FP8 and
// GROUPED_INT4 and the second the odd ones, so that both of a pair are treated by the same instructions.
#if defined(__AVX512BW__)
INLINE __m512i fp8_pair(__m512i high) {  // in the upper byte of each 16 bits
    __m512i rest = _mm512_and_si512(high, _mm512_set1_epi16(0x7f00));
    __m512i size = _mm512_add_epi16(_mm512_srli_epi16(rest, 4), _mm512_set1_epi16(120 << 7));
    // Exponent 0: multiples of 2^-9.
    const __m512i tiny = _mm512_castsi128_si512(_mm_setr_epi16(
        0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    __mmask32 is_tiny = _mm512_cmplt_epu16_mask(rest, _mm512_set1_epi16(0x0800));
    size = _mm512_mask_permutexvar_epi16(size, is_tiny, _mm512_srli_epi16(rest, 8), tiny);
    return _mm512_or_si512(size, _mm512_and_si512(high, _mm512_set1_epi16(int16_t(0x8000))));
}
template <i64 format> INLINE void widen_group(const char* from, char* to) {
    __m512i kept = _mm512_loadu_si512(from);
    if constexpr (format == GROUPED_INT4) {
        const __m512i numbers = _mm512_castsi256_si512(_mm256_setr_epi16(  // 0 to 7, -8 to -1
            0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, int16_t(0xc100), int16_t(0xc0e0),
            int16_t(0xc0c0), int16_t(0xc0a0), int16_t(0xc080), int16_t(0xc040), int16_t(0xc000), int16_t(0xbf80)));
        const __m512i low = _mm512_set1_epi16(15);
        for (int p = 0; p < 4; ++p) {
            __m512i index = _mm512_and_si512(_mm512_srl_epi16(kept, _mm_cvtsi32_si128(4 * p)), low);
            _mm512_storeu_si512(to + p * 64, _mm512_permutexvar_epi16(index, numbers));
        }
    } else if constexpr (format == FP8) {
        _mm512_storeu_si512(to, fp8_pair(_mm512_slli_epi16(kept, 8)));
        _mm512_storeu_si512(to + 64, fp8_pair(kept));
    } else {
        for (int p = 0; p < 2; ++p) {
            __m512i even = _mm512_srai_epi32(_mm512_sll_epi32(kept, _mm_cvtsi32_si128(24 - 16 * p)), 24);
            __m512i odd = _mm512_srai_epi32(_mm512_sll_epi32(kept, _mm_cvtsi32_si128(16 - 16 * p)), 24);
            __m512i a = _mm512_castps_si512(_mm512_cvtepi32_ps(even)), b = _mm512_castps_si512(_mm512_cvtepi32_ps(odd));
            _mm512_storeu_si512(to + p * 64, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b));
        }
    }
}
#else
INLINE U16 upper_half(F16 x) { return (U16)x >> 16; }
INLINE F16 fp8_number(U16 byte) {
    U16 rest = byte & 0x7f;
    F16 size = (I16)rest < 8 ? __builtin_convertvector((I16)rest, F16) * 0.001953125f : (F16)((rest << 20) + (120u << 23));
    return (F16)((U16)size | ((byte & 0x80) << 24));
}
template <i64 format> INLINE void widen_group(const char* from, char* to) {
    U16 kept = *reinterpret_cast<const U16*>(from);
    constexpr int pairs = format == GROUPED_INT4 ? 4 : 2;
    for (int p = 0; p < pairs; ++p) {
        U16 pair;
        if constexpr (format == GROUPED_INT4) {
            I16 even = (I16)(kept << (28 - 4 * p)) >> 28, odd = (I16)(kept << (12 - 4 * p)) >> 28;
            pair = upper_half(__builtin_convertvector(even, F16)) | upper_half(__builtin_convertvector(odd, F16)) << 16;
        } else if constexpr (format == FP8) {
            F16 even = fp8_number(kept >> (8 * p) & 0xff), odd = fp8_number(kept >> (16 + 8 * p) & 0xff);
            pair = upper_half(even) | upper_half(odd) << 16;
        } else {
            I16 even = (I16)(kept << (24 - 16 * p)) >> 24, odd = (I16)(kept << (16 - 16 * p)) >> 24;
            pair = upper_half(__builtin_convertvector(even, F16)) | upper_half(__builtin_convertvector(odd, F16)) << 16;
        }
        *reinterpret_cast<U16*>(to + p * 64) = pair;
    }
}
#endif

// A group of inputs of some blocks, as bfloat16 without their scales: [block][chunk of 32 inputs].
constexpr i64 GROUP_BYTES = GROUP / 32 * TILE;
template <i64 format> inline void widen_blocks(const Matrix& w, i64 block, i64 blocks, i64 group, char* to) {
    constexpr i64 kept = GROUP / (format == GROUPED_INT4 ? 128 : 64), grown = GROUP_BYTES / (kept * TILE);
    i64 chunks = std::min(kept, w.chunks() - group * kept);
    for (i64 b = 0; b < blocks; ++b) {
        const char* from = w.data + (block + b) * w.block_bytes() + group * kept * TILE;
        for (i64 k = 0; k < chunks * 16; ++k) {
            __builtin_prefetch(from + k * 64 + 4 * TILE);
            widen_group<format>(from + k * 64, to + b * GROUP_BYTES + k * 64 * grown);
        }
    }
}
inline void widen_blocks(const Matrix& w, i64 block, i64 blocks, i64 group, char* to) {
    if (w.format == GROUPED_INT8) widen_blocks<GROUPED_INT8>(w, block, blocks, group, to);
    else if (w.format == GROUPED_INT4) widen_blocks<GROUPED_INT4>(w, block, blocks, group, to);
    else widen_blocks<FP8>(w, block, blocks, group, to);
}

// How many blocks, and tiles of rows, are computed at a time.
constexpr i64 FEW_BLOCKS = 4, MANY_BLOCKS = 16, PANEL_TILES = 16;
// Numbers from a row of sums to the next: no power of two, or all rows would want the same few lines of the cache.
constexpr i64 apart(i64 blocks) { return (blocks + 1) * LANES; }
constexpr i64 PANEL = apart(MANY_BLOCKS) * PANEL_TILES * LANES;  // numbers

// Every group's sums are scaled and added to those of the groups before it.
inline void grouped_product(
    const Rows& x, i64 tile0, i64 tile1, const Matrix& w, i64 block, i64 blocks, float* out, i64 ld) {
    i64 rows = std::min(tile1 * LANES, x.count) - tile0 * LANES, chunks = x.chunks();
    i64 bytes = blocks * GROUP_BYTES, near = apart(blocks), floats = (tile1 - tile0) * LANES * near;
    thread_local std::vector<char> memory;
    if (i64(memory.size()) < bytes + floats * 4 + 64) memory.resize(bytes + floats * 4 + 64);
    char* wide = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) & 63);
    float* sums = reinterpret_cast<float*>(wide + bytes);
    for (i64 group = 0; group < w.groups(); ++group) {
        i64 first = group * GROUP / 32;
        widen_blocks(w, block, blocks, group, wide);
        fastest::tiles<BFLOAT16>(
            x, tile0, tile1, wide, GROUP_BYTES, first, std::min(GROUP / 32, chunks - first), blocks, sums, near, true);
        for (i64 b = 0; b < blocks; ++b) {
            F16 scale = load(w.scale + ((block + b) * w.groups() + group) * LANES);
            for (i64 r = 0; r < rows; ++r) {
                F16 sum = load(sums + r * near + b * LANES);
                float* at = out + r * ld + b * LANES;
                store(at, fused(sum, scale, group ? load(at) : F16{}));
            }
        }
    }
}

// Tiles [tile0, tile1) of the rows times blocks [block, block + blocks) of a part: out [rows up to a multiple of 16][ld].
inline void product(const Rows& x, i64 tile0, i64 tile1, const Matrix& w, i64 block, i64 blocks, float* out, i64 ld) {
    if (is_grouped(w.format)) return grouped_product(x, tile0, tile1, w, block, blocks, out, ld);
    i64 next = w.block_bytes(), all_chunks = w.chunks(), most = tile1 - tile0 > FEW_TILES ? CHUNKS : all_chunks;
    const char* data = w.data + block * next;
    for (i64 first = 0; first < all_chunks; first += most) {
        i64 chunks = std::min(most, all_chunks - first);
        const char* from = data + first * TILE;
        if (w.format == INT8)
            fastest::tiles<INT8>(x, tile0, tile1, from, next, first, chunks, blocks, out, ld, first == 0);
        else fastest::tiles<BFLOAT16>(x, tile0, tile1, from, next, first, chunks, blocks, out, ld, first == 0);
    }
    if (w.format != INT8) return;
    for (i64 row = tile0 * LANES, end = std::min(tile1 * LANES, x.count); row < end; ++row)
        for (i64 b = 0; b < blocks; ++b) {
            float* at = out + (row - tile0 * LANES) * ld + b * LANES;
            i64 output = (block + b) * LANES;
            I16 sum = *reinterpret_cast<I16*>(at) - 128 * *reinterpret_cast<const I16*>(w.sums + output);
            store(at, __builtin_convertvector(sum, F16) * x.scale[row] * load(w.scale + output));
        }
}

inline i64 blocks_at_a_time(i64 rows) { return rows > 2 * LANES ? MANY_BLOCKS : FEW_BLOCKS; }

// use(row, output, outputs, values): for each row, pieces of blocks [begin, end) of a part, of up to `width` blocks.
template <class Use> inline void for_products(
    const Rows& x, const Matrix& w, i64 begin, i64 end, float* panel, Use use) {
    if (!x.count) return;
    i64 width = blocks_at_a_time(x.count), all_tiles = up(x.count, LANES);
    for (i64 b = begin; b < end; b += width) {
        i64 blocks = std::min(width, end - b), ld = apart(blocks);
        i64 outputs = std::min(blocks * LANES, w.rows - b * LANES);
        for (i64 t = 0; t < all_tiles; t += PANEL_TILES) {
            i64 stop = std::min(t + PANEL_TILES, all_tiles);
            product(x, t, stop, w, b, blocks, panel, ld);
            for (i64 row = t * LANES, last = std::min(stop * LANES, x.count); row < last; ++row)
                use(row, b * LANES, outputs, panel + (row - t * LANES) * ld);
        }
    }
}
