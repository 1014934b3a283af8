// Every op over ragged, odd and empty shapes, for the sanitizers that this is compiled with, or without any to compare the
// bits of programs that are compiled as the kernels are. All that an op is given is
// allocated to the byte and aligned as its numbers have to be, no more. Results and workspace begin as NaN, so that what
// is not written, or read before it is, comes out. One thread and several have to give the same bits.
#if defined(__AMX_TILE__) && defined(__SANITIZE_ADDRESS__)
#include <immintrin.h>
// Sanitizers do not see what tile instructions read and write.
static inline void touch(const void* base, long stride, long rows) {
    for (long r = 0; r < rows; ++r)
        for (int i = 0; i < 64; ++i) (void)static_cast<const volatile char*>(base)[r * stride + i];
}
#define TOUCH(tile, base, stride) touch(base, stride, tile < 6 ? configured : 16)
#undef _tile_loadd
#undef _tile_stored
#define _tile_loadd(tile, base, stride) \
    do { TOUCH(tile, base, stride); _tile_loadd_internal(tile, base, stride); } while (0)
#define _tile_stored(tile, base, stride) \
    do { TOUCH(tile, base, stride); _tile_stored_internal(tile, base, stride); } while (0)
#endif

#include "../../expertmesh/native/cpu/kernels.cpp"
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_set_death_callback(void (*)()) {}
#endif
#include <cstdio>
#include <deque>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

namespace {

enum Kind { BRAIN, SINGLE, CACHE, WHOLE };  // CACHE: bfloat16, not all of it written

struct Result {
    char* at;
    i64 bytes;
    Kind kind;

    // How many numbers are NaN; all with the same sign afterwards, which is nobody's business.
    i64 nans() const {
        if (kind == WHOLE) return 0;
        i64 found = kind == SINGLE ? replaced<float>() : replaced<bf16>();
        return kind == CACHE ? 0 : found;
    }

private:
    template <class T> i64 replaced() const {
        i64 found = 0;
        for (T* x = reinterpret_cast<T*>(at); x < reinterpret_cast<T*>(at + bytes); ++x)
            if (std::isnan(as_float(*x))) put(x, NAN), ++found;
        return found;
    }
};

// A few random ops and what they read and write.
class Program {
public:
    explicit Program(unsigned seed) : random(seed) {
        wild = random() % 8 == 0;
        for (i64 ops = 1 + random() % 3; ops > 0; --ops) add();
    }

    bool wild;  // numbers may be anything
    std::vector<i64> words;
    std::vector<std::string> names;
    std::vector<Result> results;

private:
    std::mt19937 random;
    std::deque<std::unique_ptr<char[], void (*)(void*)>> memory;

    i64 below(i64 n) { return i64(random() % uint64_t(n)); }
    i64 one_of(std::initializer_list<i64> some) { return some.begin()[below(i64(some.size()))]; }
    i64 rows() { return below(40) ? one_of({0, 1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 48, 70}) : 300; }
    i64 width() { return below(40) ? one_of({1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 100, 130}) : 1100; }
    i64 even() { return 2 * one_of({1, 2, 3, 8, 9, 16, 20}); }

    template <class T> T* array(i64 count, size_t aligned = 0) {
        i64 bytes = count * i64(sizeof(T)), odd = aligned ? 0 : i64(sizeof(T)) * below(3);
        char* at = static_cast<char*>(aligned ? std::aligned_alloc(aligned, size_t(bytes)) : std::malloc(size_t(bytes + odd)));
        memory.emplace_back(at, std::free);
        return reinterpret_cast<T*>(at + odd);
    }
    float number() {
        if (wild && below(16) == 0) {
            const float some[] = {0.0f, -0.0f, 1e-40f, 3e38f, -3e38f, INFINITY, -INFINITY, NAN};
            return some[below(8)];
        }
        return float(below(2001) - 1000) / 500.0f;
    }
    template <class T> T* numbers(i64 count) {
        T* at = array<T>(count);
        for (i64 i = 0; i < count; ++i) put(at + i, number());
        return at;
    }
    i64* indices(i64 count, i64 end, i64 begin = 0) {
        i64* at = array<i64>(count);
        for (i64 i = 0; i < count; ++i) at[i] = begin + below(end - begin);
        return at;
    }
    i64* distinct(i64 count) {
        i64* at = array<i64>(count);
        for (i64 i = 0; i < count; ++i) at[i] = i;
        std::shuffle(at, at + count, random);
        return at;
    }
    template <class T> T* zeros(i64 count) {
        T* at = array<T>(count, 64);
        memset(at, 0, size_t(count) * sizeof(T));
        return at;
    }
    template <class T> T* result(i64 count, Kind kind) {
        T* at = array<T>(count);
        results.push_back({reinterpret_cast<char*>(at), count * i64(sizeof(T)), kind});
        return at;
    }

    // ---- words
    void word(i64 value) { words.push_back(value); }
    void word(const void* at) { word(i64(at)); }
    void real(double value) { word(i64(0)), memcpy(&words.back(), &value, 8); }
    template <class... Each> void put_words(Each... each) { (word(each), ...); }

    void matrix(i64 format, i64 parts, i64 rows_, i64 columns) {
        Matrix m{nullptr, format, parts, rows_, columns, nullptr, nullptr};
        i64 blocks = parts * m.blocks();
        m.data = zeros<char>(blocks * m.block_bytes());
        m.scale = zeros<float>(format == BFLOAT16 ? 0 : blocks * m.groups() * LANES);
        m.sums = zeros<int32_t>(format == INT8 ? blocks * LANES : 0);
        size_t from = words.size();
        put_words(m.data, format, parts, rows_, columns, m.scale, m.sums);
        for (i64 p = 0; p < parts; ++p) {
            i64 stride = columns + below(3), cut = below(rows_ + 1);
            if (format != BFLOAT16 && format != FP8) cut = cut / LANES * LANES;
            fill(m, p, 0, cut, stride, &words[from]);
            fill(m, p, cut, rows_ - cut, stride, &words[from]);
            float* seen = array<float>(rows_ * columns);
            widen_part(&words[from], p, seen);
        }
    }
    // Some rows of a part, from rows that are `stride` apart and end with the last number.
    void fill(const Matrix& m, i64 part, i64 first, i64 count, i64 stride, const i64* described) {
        i64 size = count ? (count - 1) * stride + m.columns : 0;
        if (m.format == BFLOAT16)
            pack_rows(numbers<bf16>(size), stride, first, count, m.columns,
                      const_cast<char*>(m.data) + part * m.blocks() * m.block_bytes(), 1);
        else if (m.format == FP8) {
            char* kept = array<char>(size);
            for (i64 i = 0; i < size; ++i) kept[i] = char(below(256) & (wild ? 0xff : 0xbf));
            keep_fp8_rows(kept, stride, first, count, numbers<float>(m.groups()), described, part);
        } else if (below(2)) {
            int8_t* kept = array<int8_t>(size);
            for (i64 i = 0; i < size; ++i) kept[i] = int8_t(below(256));
            keep_whole_rows(kept, stride, first, count, numbers<float>(count * m.groups()), described, part);
        } else if (!quantise_rows(numbers<float>(size), stride, first, count, described, part, 1)) abort();
    }
    i64 format() { return below(2) ? i64(BFLOAT16) : 1 + below(4); }

    // Ends what `begin` began: how many words the op is given.
    size_t begin(const char* name) {
        names.push_back(name);
        put_words(op_named(name), i64(0));
        return words.size();
    }
    void end(size_t from) { words[from - 1] = i64(words.size() - from); }

    // ---- ops
    void add() {
        const char* some[] = {"embed", "add", "rms_norm", "count", "linear", "swiglu", "experts", "router", "down", "up",
                              "prologue", "absorb", "decode", "decode", "prefill", "prefill"};
        const std::string name = some[below(16)];
        i64 n = rows(), w = width();
        size_t from = begin(name.c_str());
        if (name == "embed") {
            i64 vocabulary = 1 + below(50);
            put_words(indices(n, vocabulary), numbers<bf16>(vocabulary * w), n, w, result<bf16>(n * w, BRAIN));
        } else if (name == "add") {
            put_words(numbers<bf16>(n * w), numbers<bf16>(n * w), n * w, result<bf16>(n * w, BRAIN));
        } else if (name == "rms_norm") {
            put_words(numbers<bf16>(n * w), numbers<bf16>(w)), real(1e-5);
            put_words(n, w, result<bf16>(n * w, BRAIN));
        } else if (name == "count") {
            put_words(indices(n, 7), n, result<i64>(7, WHOLE));
        } else if (name == "linear") {
            i64 stride = w + below(4), outputs = width(), wide = below(2);
            put_words(numbers<bf16>(n ? (n - 1) * stride + w : 0), stride, n), matrix(format(), 1, outputs, w);
            word(below(2) ? numbers<bf16>(outputs) : nullptr), word(wide);
            if (wide) word(result<float>(n * outputs, SINGLE));
            else word(result<bf16>(n * outputs, BRAIN));
        } else if (name == "swiglu") {
            i64 inner = width(), outputs = width();
            put_words(numbers<bf16>(n * w), n), matrix(format(), 2, inner, w), matrix(format(), 1, outputs, inner);
            word(result<bf16>(n * outputs, BRAIN));
        } else if (name == "experts") {
            i64 slots = 1 + below(6), choices = 1 + below(4), inner = width(), outputs = width();
            put_words(numbers<bf16>(n * w), n, choices, indices(n * choices, slots, -1), numbers<float>(n * choices));
            matrix(format(), 2 * slots, inner, w), matrix(format(), slots, outputs, inner);
            word(result<bf16>(n * outputs, BRAIN));
        } else if (name == "router") {
            i64 groups = 1 + below(6), experts = groups * (1 + below(12)), method = below(3), sigmoid = below(2);
            i64 taken = 1 + below(groups), choices = 1 + below(method == GREEDY ? experts : experts / groups * taken);
            put_words(numbers<bf16>(n * w), n, w, numbers<float>(experts * w));
            put_words(below(2) ? numbers<float>(experts) : nullptr, experts, choices, groups, taken, method, sigmoid, below(2));
            real(2.5), put_words(result<i64>(n * choices, WHOLE), result<float>(n * choices, SINGLE));
        } else if (name == "decode") {
            decode(std::min<i64>(n, 33));
        } else if (name == "prefill") {
            prefill(n);
        } else {
            latents(name, n, w);
        }
        end(from);
    }

    void down(i64 n, i64 w, i64 q_lora, i64 latent, i64 rope) {
        i64 low = q_lora + latent + rope;
        put_words(numbers<bf16>(n * w), numbers<bf16>(w)), real(1e-5), word(n), matrix(format(), 1, low, w);
        put_words(below(2) ? numbers<bf16>(low) : nullptr, q_lora ? numbers<bf16>(q_lora) : nullptr, numbers<bf16>(latent));
        put_words(q_lora, latent, rope);
    }
    void up_(i64 n, i64 heads, i64 nope, i64 rope, i64 latent, i64 low) {
        i64 known = 5 + below(20), absorbed = below(3) ? below(n + 1) : n, tokens = n + below(5);
        put_words(indices(n, known), numbers<float>(known * rope / 2), numbers<float>(known * rope / 2), below(2), rope);
        put_words(distinct(tokens), result<bf16>(tokens * (latent + rope), CACHE)), matrix(format(), heads, nope + rope, low);
        matrix(BFLOAT16, heads, latent, nope), word(absorbed);
        word(result<bf16>(absorbed * heads * (latent + rope), BRAIN));
        word(result<bf16>((n - absorbed) * heads * (nope + rope), BRAIN));
    }
    void latents(const std::string& name, i64 n, i64 w) {
        i64 heads = 1 + below(5), nope = width(), rope = even(), latent = width(), q_lora = below(3) ? width() : 0;
        if (name == "down") {
            down(n, w, q_lora, latent, rope);
            put_words(result<bf16>(n * (q_lora ? q_lora : w), BRAIN), result<bf16>(n * latent, BRAIN),
                      result<bf16>(n * rope, BRAIN));
        } else if (name == "prologue") {
            down(n, w, q_lora, latent, rope), put_words(i64(0), i64(0), i64(0));
            up_(n, heads, nope, rope, latent, q_lora ? q_lora : w);
        } else if (name == "up") {
            put_words(numbers<bf16>(n * w), numbers<bf16>(n * latent), numbers<bf16>(n * rope), n);
            up_(n, heads, nope, rope, latent, w);
        } else {
            put_words(numbers<bf16>(n * heads * (nope + rope)), n, nope + rope), matrix(BFLOAT16, heads, latent, nope);
            word(result<bf16>(n * heads * (latent + rope), BRAIN));
        }
    }
    i64 length() { return below(3) ? 1 + below(60) : one_of({255, 256, 257, 511, 530, 800}); }

    void decode(i64 n) {
        i64 heads = one_of({1, 2, 5, 16, 17, 33}), rope = even(), latent = width(), value = width(), page = 1 + below(40);
        i64 most = 1, total = 3;
        i64* lengths = array<i64>(n);
        for (i64 r = 0; r < n; ++r) {
            lengths[r] = length(), total += up(lengths[r], page);
            most = std::max(most, up(lengths[r], page));
        }
        i64* pages = indices(n * most, total);
        put_words(numbers<bf16>(n * heads * (latent + rope)), n, pages, lengths, most);
        put_words(numbers<bf16>(total * page * (latent + rope)), page, latent + rope, latent), real(0.1);
        matrix(BFLOAT16, heads, value, latent), word(result<bf16>(n * heads * value, BRAIN));
    }
    void prefill(i64 n) {
        i64 heads = 1 + below(5), rope = even(), latent = width(), value = width(), nope = width(), page = 1 + below(40);
        i64 known = n + (below(2) ? 0 : length()), count = up(known, page);
        put_words(numbers<bf16>(n * heads * (nope + rope)), n, known, indices(count, count + 2));
        put_words(numbers<bf16>((count + 2) * page * (latent + rope)), page, latent + rope), real(0.1);
        matrix(BFLOAT16, heads, latent, nope), matrix(BFLOAT16, heads, value, latent);
        word(result<bf16>(n * heads * value, BRAIN));
    }
};

// As run_program, in workspace of just what is needed.
std::vector<char> outcome(const Program& program, int threads) {
    const i64 *words = program.words.data(), count = i64(program.words.size());
    for (const Result& result : program.results) memset(result.at, 0xff, size_t(result.bytes));
    i64 bytes = 64;
    for (i64 i = 0; i < count; i += 2 + words[i + 1]) bytes = std::max(bytes, OPS[words[i]].needs(words + i + 2, threads));
    char* block = static_cast<char*>(std::aligned_alloc(64, size_t(bytes)));
    memset(block, 0xff, size_t(bytes));
    Barrier barrier;
    auto work = [&](int me) {
        Team team{me, threads, &barrier};
        for (i64 i = 0; i < count; i += 2 + words[i + 1]) {
            OPS[words[i]].run(words + i + 2, block, team);
            team.sync();
        }
        leave();
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
    work(0);
    for (std::thread& other : others) other.join();
    std::free(block);
    std::vector<char> out;
    for (const Result& result : program.results) {
        result.nans();
        out.insert(out.end(), result.at, result.at + result.bytes);
    }
    return out;
}

std::string running;
void say(const char* what) { fprintf(stderr, "program %s: %s\n", running.c_str(), what); }

}  // namespace

int main(int, char** given) {
    int first = atoi(given[1]), last = atoi(given[2]);  // seeds
    if (!permitted()) return puts("not permitted here"), 0;
    __sanitizer_set_death_callback([] { say("stopped by a sanitizer"); });
    for (i64 bytes : {0, 1, 255, 256, 5000}) read_memory(std::vector<char>(size_t(bytes)).data(), bytes, 3);
    for (int seed = first; seed < last; ++seed) {
        Program program{unsigned(seed)};
        running = std::to_string(seed) + ":";
        for (const std::string& name : program.names) running += " " + name;
        std::vector<char> alone = outcome(program, 1);
        for (const Result& result : program.results)
            if (result.nans() && !program.wild) return say("results are NaN"), 1;
        if (run_program(program.words.data(), i64(program.words.size()), 1) != 1) return 1;
        for (int threads : {2, 3, 7})
            if (outcome(program, threads) != alone) return say("other bits with more threads"), 1;
    }
    printf("%d programs\n", last - first);
}
