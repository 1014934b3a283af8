// The ops of a model on a CPU. A program is a row of ops, run by all threads of a team, one op after the other; that of a
// single op is a call like any other, that of a whole step needs nothing between its ops.
#include "attention.h"
#include "ceilings.h"
#include "experts.h"
#include "gate.h"
#include "prologue.h"
#include "simple.h"
#include <cstdlib>
#include <type_traits>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct Words {
    const i64* at;
    template <class T> void operator()(T& field) {
        static_assert(sizeof(T) == 8 || std::is_same_v<T, Matrix>);
        memcpy(&field, at, sizeof(T));
        at += sizeof(T) / 8;
    }
};

void read(Words w, Embed& o) { w(o.tokens), w(o.table), w(o.rows), w(o.width), w(o.out); }
void read(Words w, Add& o) { w(o.x), w(o.y), w(o.count), w(o.out); }
void read(Words w, RmsNorm& o) { w(o.x), w(o.weight), w(o.eps), w(o.rows), w(o.width), w(o.out); }
void read(Words w, Count& o) { w(o.chosen), w(o.count), w(o.counts); }
void read(Words w, Linear& o) { w(o.x), w(o.stride), w(o.rows), w(o.weight), w(o.bias), w(o.wide), w(o.out); }
void read(Words w, Swiglu& o) { w(o.x), w(o.rows), w(o.gate_up), w(o.down), w(o.out); }
void read(Words w, Experts& o) {
    w(o.x), w(o.rows), w(o.choices), w(o.slots), w(o.weights), w(o.gate_up), w(o.down), w(o.out);
}
void read(Words w, Router& o) {
    w(o.x), w(o.rows), w(o.width), w(o.weight), w(o.bias), w(o.experts), w(o.choices), w(o.groups), w(o.groups_taken);
    w(o.method), w(o.sigmoid_scores), w(o.normalise), w(o.factor), w(o.chosen), w(o.weights);
}
void take(Words& w, Down& o) {
    w(o.x), w(o.norm), w(o.eps), w(o.rows), w(o.a), w(o.bias), w(o.q_norm), w(o.kv_norm);
    w(o.q_lora), w(o.latent), w(o.rope), w(o.c_q), w(o.c_kv), w(o.k_rope);
}
void take(Words& w, Rotary& o) { w(o.positions), w(o.cos), w(o.sin), w(o.interleaved), w(o.width); }
void take(Words& w, Queries& o) { w(o.q_b), w(o.key_up), w(o.absorbed), w(o.out_absorbed), w(o.out_plain); }
void read(Words w, Down& o) { take(w, o); }
void read(Words w, Up& o) {
    w(o.c_q), w(o.c_kv), w(o.k_rope), w(o.rows), take(w, o.rotary), w(o.slots), w(o.cache), take(w, o.queries);
}
void read(Words w, Absorb& o) { w(o.plain), w(o.rows), w(o.wide), w(o.key_up), w(o.out); }
void read(Words w, Prologue& o) {
    take(w, o.down), take(w, o.rotary), w(o.slots), w(o.cache), take(w, o.queries);
}
void read(Words w, Decode& o) {
    w(o.queries), w(o.rows), w(o.pages), w(o.lengths), w(o.most_pages), w(o.where.cache), w(o.where.page);
    w(o.where.width), w(o.latent), w(o.scale), w(o.value_up), w(o.out);
}
void read(Words w, Prefill& o) {
    w(o.queries), w(o.rows), w(o.length), w(o.pages), w(o.where.cache), w(o.where.page), w(o.where.width), w(o.scale);
    w(o.key_up), w(o.value_up), w(o.out);
}

template <class Op> Op made(const i64* words, Space& space, int threads) {
    Op op{};
    read(Words{words}, op);
    op.lay(space, threads);
    return op;
}
template <class Op> i64 needs(const i64* words, int threads) {
    Space space{nullptr};
    made<Op>(words, space, threads);
    return space.used;
}
template <class Op> void run(const i64* words, char* block, const Team& team) {
    Space space{block};
    made<Op>(words, space, team.size).run(team);
}

struct Entry {
    const char* name;
    i64 (*needs)(const i64*, int);
    void (*run)(const i64*, char*, const Team&);
};
#define ENTRY(name, Op) {name, needs<Op>, run<Op>}
const Entry OPS[] = {
    ENTRY("embed", Embed), ENTRY("add", Add), ENTRY("rms_norm", RmsNorm), ENTRY("count", Count),
    ENTRY("linear", Linear), ENTRY("swiglu", Swiglu), ENTRY("experts", Experts), ENTRY("router", Router),
    ENTRY("down", Down), ENTRY("up", Up), ENTRY("prologue", Prologue), ENTRY("absorb", Absorb),
    ENTRY("decode", Decode), ENTRY("prefill", Prefill),
};

Matrix part_of(const i64* words, i64 part) {
    Matrix whole;
    Words{words}(whole);
    return whole.part(part);
}

// Workspace of a calling thread; it grows, and goes with the thread.
struct Workspace {
    char* block = nullptr;
    i64 size = 0;
    ~Workspace() { std::free(block); }
    char* of(i64 bytes) {
        if (bytes > size) {
            std::free(block);
            size = up(bytes, i64(2) << 20) * (i64(2) << 20);
            block = static_cast<char*>(std::aligned_alloc(size_t(2) << 20, size_t(size)));
            if (!block) size = 0;
        }
        return block;
    }
};
thread_local Workspace workspace;

}  // namespace

extern "C" {

// Which op has this name; -1 where there is none.
i64 op_named(const char* name) {
    for (i64 i = 0; i < i64(sizeof(OPS) / sizeof(*OPS)); ++i)
        if (!strcmp(OPS[i].name, name)) return i;
    return -1;
}

// Whether the system lets this process use what this library was compiled for.
i64 permitted() {
#if defined(__AMX_BF16__)
    const long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 1;
#endif
}

// A program: for each op its number, how many words it is given, and those. 0 where memory is short. threads: how many to
// ask for. OpenMP may give fewer (OMP_THREAD_LIMIT, OMP_DYNAMIC, a call out of a parallel region), for whom no op needs
// more memory.
i64 run_program(const i64* words, i64 count, i64 threads) {
    i64 bytes = 1;
    for (i64 i = 0; i < count; i += 2 + words[i + 1])
        bytes = std::max(bytes, OPS[words[i]].needs(words + i + 2, int(threads)));
    char* block = workspace.of(bytes);
    if (!block) return 0;
    Barrier barrier;
    auto work = [&](int me, int size) {
        Team team{me, size, &barrier};
        for (i64 i = 0; i < count; i += 2 + words[i + 1]) {
            OPS[words[i]].run(words + i + 2, block, team);
            team.sync();
        }
        leave();
    };
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel num_threads(int(threads))
        work(omp_get_thread_num(), omp_get_num_threads());
        return 1;
    }
#endif
    work(0, 1);
    return 1;
}

// Reads all of some memory, to know how long that takes. What comes out says nothing.
i64 read_memory(const char* from, i64 bytes, i64 threads) {
    uint32_t found = 0;
    i64 share = bytes / threads / 64 * 64;
#pragma omp parallel for num_threads(int(threads)) reduction(^ : found)
    for (i64 t = 0; t < threads; ++t) found ^= read_streams(from + share * t, share);
    return found;
}

// Rows [first, first + count) of a packed bfloat16 matrix of one part from rows of 2-byte numbers, `stride` numbers apart.
void pack_rows(const bf16* from, i64 stride, i64 first, i64 count, i64 columns, char* data, i64 threads) {
    i64 block_bytes = up(columns, 32) * TILE;
    // Whole blocks by all threads, what is left at both ends by one.
    i64 begin = std::min(up(first, LANES) * LANES, first + count), end = std::max((first + count) / LANES * LANES, begin);
    pack_bfloat16(from, stride, first, begin - first, columns, data);
    pack_bfloat16(from + (end - first) * stride, stride, end, first + count - end, columns, data);
#pragma omp parallel for num_threads(int(threads)) if (threads > 1 && (end - begin) * columns > 65536)
    for (i64 row = begin; row < end; row += LANES)
        pack_block(reinterpret_cast<const char*>(from + (row - first) * stride), stride * 2, LANES, columns * 2,
                   data + row / LANES * block_bytes);
}

// Rows [first, first + count) of part `part` of a matrix that is kept quantised, from float rows `stride` apart. Rows come
// in whole blocks, but for the last ones of a part; 0 where they do not.
i64 quantise_rows(const float* from, i64 stride, i64 first, i64 count, const i64* matrix, i64 part, i64 threads) {
    Matrix w = part_of(matrix, part);
    if (first % LANES || (count % LANES && first + count != w.rows)) return 0;
#pragma omp parallel for num_threads(int(threads)) if (threads > 1 && count * w.columns > 65536)
    for (i64 row = 0; row < count; row += LANES) {
        i64 block = (first + row) / LANES;
        quantise_block(from + row * stride, stride, std::min<i64>(LANES, count - row), w,
                       const_cast<char*>(w.data) + block * w.block_bytes(),
                       const_cast<float*>(w.scale) + block * w.groups() * LANES,
                       const_cast<int32_t*>(w.sums) + block * LANES);
    }
    return 1;
}

// The same of FP8 rows as a checkpoint has them, with one scale for each GROUP of their inputs.
void keep_fp8_rows(const char* from, i64 stride, i64 first, i64 count, const float* scales, const i64* matrix, i64 part) {
    Matrix w = part_of(matrix, part);
    for (i64 r = 0; r < count; ++r) {
        i64 block = (first + r) / LANES, lane = (first + r) % LANES;
        char* to = const_cast<char*>(w.data) + block * w.block_bytes() + lane * 4;
        const char* row = from + r * stride;
        // Of four inputs the even ones in the lower half, the odd ones in the upper half.
        for (i64 k = 0; k < w.columns; ++k) to[k / 64 * TILE + k % 64 / 4 * 64 + k % 2 * 2 + k % 4 / 2] = row[k];
        for (i64 g = 0; g < w.groups(); ++g)
            const_cast<float*>(w.scale)[(block * w.groups() + g) * LANES + lane] = scales[g];
    }
}

// The same of whole numbers: each row with a scale for all of its inputs (INT8), or for each GROUP of them. `count` rows of
// scales lie side by side. Numbers of four bits are from -8 to 7.
void keep_whole_rows(
    const int8_t* from, i64 stride, i64 first, i64 count, const float* scales, const i64* matrix, i64 part) {
    Matrix w = part_of(matrix, part);
    for (i64 r = 0; r < count; ++r) {
        i64 block = (first + r) / LANES, lane = (first + r) % LANES;
        char* to = const_cast<char*>(w.data) + block * w.block_bytes() + lane * 4;
        const int8_t* row = from + r * stride;
        int32_t sum = 0;
        for (i64 k = 0; k < w.columns; ++k) {
            sum += row[k];
            if (w.format != GROUPED_INT4) {
                to[k / 64 * TILE + k % 64 / 4 * 64 + k % 4] = char(row[k]);
                continue;
            }
            // As `quantise_block` has them: two inputs apart in the halves of a byte.
            i64 byte = k / 8 * 4 + k % 2 * 2 + k % 8 / 4;
            char& both = to[byte / 64 * TILE + byte % 64 / 4 * 64 + byte % 4];
            both = k % 4 < 2 ? char((both & 0xf0) | (row[k] & 15)) : char((both & 15) | (row[k] & 15) << 4);
        }
        for (i64 g = 0; g < w.groups(); ++g)
            const_cast<float*>(w.scale)[(block * w.groups() + g) * LANES + lane] = scales[r * w.groups() + g];
        if (w.format == INT8) const_cast<int32_t*>(w.sums)[block * LANES + lane] = sum;
    }
}

// All rows of a part as products see them, [rows][columns] float.
void widen_part(const i64* matrix, i64 part, float* to) {
    Matrix w = part_of(matrix, part);
    std::vector<char> wide(w.groups() * GROUP_BYTES);
    for (i64 row = 0; row < w.rows; ++row) {
        i64 block = row / LANES, lane = row % LANES;
        if (is_grouped(w.format) && lane == 0)
            for (i64 g = 0; g < w.groups(); ++g) widen_blocks(w, block, 1, g, wide.data() + g * GROUP_BYTES);
        const char* from = is_grouped(w.format) ? wide.data() : w.data + block * w.block_bytes();
        for (i64 k = 0; k < w.columns; ++k)
            if (w.format == INT8) {
                int8_t q = int8_t(from[k / 64 * TILE + k % 64 / 4 * 64 + lane * 4 + k % 4]);
                to[row * w.columns + k] = q * w.scale[block * LANES + lane];
            } else {
                bf16 v;
                memcpy(&v, from + k / 2 * 64 + lane * 4 + k % 2 * 2, 2);
                float scale = is_grouped(w.format) ? w.scale[(block * w.groups() + k / GROUP) * LANES + lane] : 1.0f;
                to[row * w.columns + k] = widen(v) * scale;
            }
    }
}

}  // extern "C"
