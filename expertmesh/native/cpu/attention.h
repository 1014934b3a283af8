// Attention over the paged latents: over the latents themselves for rows whose queries are absorbed, over keys and values
// expanded from them for long prompts.
#pragma once
#include "pack.h"
#include <limits>

constexpr i64 SPAN = 256;  // tokens that are attended over at a time; fixed, so that sums do not depend on the batch
constexpr float NOWHERE = -std::numeric_limits<float>::infinity();

struct Pages {
    const bf16* cache;
    i64 page, width;  // tokens of a page, numbers of a token

    // use(t, numbers): `count` tokens of a sequence from its token `begin` on.
    template <class Use> INLINE void each(const i64* pages, i64 begin, i64 count, Use use) const {
        i64 at = begin / page, in_page = begin % page;
        for (i64 t = 0; t < count; ++at, in_page = 0)
            for (const bf16* token = cache + (pages[at] * page + in_page) * width; in_page < page && t < count; ++t, ++in_page)
                use(t, token), token += width;
    }
};

struct Softmax {
    // Of scores [tokens][16 heads]: weights as rows of heads, and the heads' largest scores and sums.
    static void of_heads(float* scores, i64 tokens, float scale, Rows& weights, F16& most, F16& total) {
        most = all(NOWHERE);
        for (i64 t = 0; t < tokens; ++t) most = max(most, load(scores + t * LANES));
        total = F16{};
        F16 factor = all(scale);
        alignas(64) uint32_t square[16 * 16];
        for (i64 c = 0; c * 32 < tokens; ++c) {
            for (i64 k = 0; k < 16; ++k) {
                U16 pair = {};
                for (int i = 0; i < 2; ++i) {
                    i64 t = c * 32 + 2 * k + i;
                    if (t >= tokens) continue;
                    F16 weight = exponential((load(scores + t * LANES) - most) * factor);
                    total += weight;
                    pair |= __builtin_convertvector(narrow(weight), U16) << (16 * i);
                }
                *reinterpret_cast<U16*>(square + k * 16) = pair;
            }
            turn(reinterpret_cast<char*>(square), 64, weights.tiles + c * TILE);
        }
        most *= factor;
    }
};

// Rows with absorbed queries, each with its own pages and length: decoding, and short runs of several tokens of one
// sequence. [rows][heads][latent + rope] -> [rows][heads * value]
struct Decode {
    const bf16* queries;
    i64 rows;
    const i64 *pages, *lengths;
    i64 most_pages;
    Pages where;
    i64 latent;
    double scale;
    Matrix value_up;  // a part for each head: [value, latent]
    bf16* out;

    i64 heads() const { return value_up.parts; }
    i64 groups() const { return up(heads(), LANES); }
    i64 blocks() const { return up(latent, LANES); }

    // What was found for 16 heads of one row in some spans.
    i64 found_floats() const { return LANES * blocks() * LANES + 2 * LANES; }

    struct Scratch {
        i64* first;  // of each row its first span
        float* found;
        Rows latents;  // of head 0; those of the others follow
        i64 latents_bytes;
        char* own;
        i64 own_bytes;
    } s;
    struct Own { char *query, *values; Rows tokens, weights; float *panel, *found, *first; };
    Own own(Space& space) const {
        Own o;
        o.query = space.take<char>(up(where.width, 32) * TILE);
        o.tokens = Rows::in(space, BFLOAT16, SPAN, where.width);
        o.weights = Rows::in(space, BFLOAT16, LANES, SPAN);
        o.values = space.take<char>(blocks() * SPAN / 32 * TILE);
        o.panel = space.take<float>(PANEL);
        o.found = space.take<float>(found_floats());
        o.first = space.take<float>(found_floats());
        return o;
    }
    bool by_row(int threads) const { return rows * groups() >= 4 * threads; }
    void lay(Space& space, int threads) {
        s.first = space.take<i64>(rows + 1);
        i64 before = space.used;
        s.latents = Rows::in(space, BFLOAT16, rows, latent);
        s.latents_bytes = space.used - before;
        space.take<char>((heads() - 1) * s.latents_bytes);
        i64 spans = 0;
        for (i64 r = 0; r < rows; ++r) spans += up(lengths[r], SPAN);
        s.found = space.take<float>((by_row(threads) ? 0 : spans) * groups() * found_floats());
        Space measure{nullptr};
        own(measure);
        s.own_bytes = measure.used;
        s.own = space.take<char>(threads * s.own_bytes);
    }

    void query(const Own& o, i64 row, i64 group) const {
        i64 head = group * LANES, bytes = where.width * i64(sizeof(bf16));
        pack_block(reinterpret_cast<const char*>(queries + (row * heads() + head) * where.width), bytes,
                   std::min<i64>(LANES, heads() - head), bytes, o.query);
    }

    // Attention over one span of a row's tokens, of the heads whose queries are packed.
    void look(Own& o, i64 row, i64 span, float* found) const {
        const i64* table = pages + row * most_pages;
        i64 begin = span * SPAN, tokens = std::min(SPAN, lengths[row] - begin);
        where.each(table, begin, tokens, [&](i64 t, const bf16* token) { o.tokens.put(t, token); });
        // Full tiles, of which the last may hold old numbers: their scores are not looked at.
        Matrix query{o.query, BFLOAT16, 1, LANES, where.width, nullptr, nullptr};
        product(o.tokens, 0, up(tokens, LANES), query, 0, 1, o.panel, LANES);
        F16 most, total;
        Softmax::of_heads(o.panel, tokens, float(scale), o.weights, most, total);
        i64 chunks = up(tokens, 32);
        const bf16* coming[SPAN];
        i64 later = std::max<i64>(0, std::min(SPAN, lengths[row] - begin - SPAN));
        where.each(table, begin + SPAN, later, [&](i64 t, const bf16* token) { coming[t] = token; });
        pack_values(o.tokens, tokens, o.values, coming, later);
        Rows weights{o.weights.tiles, nullptr, BFLOAT16, LANES, chunks * 32};
        Matrix values{o.values, BFLOAT16, 1, blocks() * LANES, chunks * 32, nullptr, nullptr};
        product(weights, 0, 1, values, 0, blocks(), found, blocks() * LANES);
        store(found + LANES * blocks() * LANES, most);
        store(found + LANES * blocks() * LANES + LANES, total);
    }

    // Tokens as a matrix that weights multiply; meanwhile the tokens that come next are fetched.
    void pack_values(const Rows& tokens, i64 count, char* to, const bf16* const* coming, i64 later) const {
        i64 chunks = up(count, 32);
        alignas(64) const bf16 zeros[32] = {};
        for (i64 c = 0; c < chunks; ++c)
            for (i64 k = 0; k < 16; ++k) {
                i64 t = c * 32 + 2 * k;
                const char *even = tokens.at(t), *odd = tokens.at(t + 1);
                for (i64 i = t; i < std::min(t + 2, later); ++i)
                    for (i64 at = 0; at < where.width; at += 32) __builtin_prefetch(coming[i] + at, 0, 2);
                for (i64 b = 0; b < blocks(); b += 2) {
                    i64 at = b / 2 * TILE;
                    interleave(t < count ? reinterpret_cast<const bf16*>(even + at) : zeros,
                               t + 1 < count ? reinterpret_cast<const bf16*>(odd + at) : zeros, blocks() - b,
                               to + (b * chunks + c) * TILE + k * 64, chunks * TILE);
                }
            }
    }

    // Adds what was found in a later span to what was found before.
    void merge(float* before, const float* later) const {
        i64 width = blocks() * LANES;
        float *m = before + LANES * width, *l = m + LANES;
        const float *m2 = later + LANES * width, *l2 = m2 + LANES;
        F16 most = max(load(m), load(m2));
        F16 keep = exponential(load(m) - most), take = exponential(load(m2) - most);
        store(l, load(l) * keep + load(l2) * take);
        store(m, most);
        for (int h = 0; h < LANES; ++h)
            for (i64 i = 0; i < width; i += LANES) {
                float* at = before + h * width + i;
                store(at, fused(load(at), all(keep[h]), load(later + h * width + i) * take[h]));
            }
    }

    void finish(i64 row, i64 group, float* found) const {
        i64 width = blocks() * LANES;
        F16 total = load(found + LANES * width + LANES);
        for (i64 h = group * LANES, i = 0; i < LANES && h < heads(); ++h, ++i) {
            float* at = found + i * width;
            for (i64 j = 0; j < width; j += LANES) store(at + j, load(at + j) * (1.0f / total[i]));
            Rows to = s.latents;
            to.tiles += h * s.latents_bytes;
            to.put(row, at);
        }
    }

    void run(const Team& team) const {
        Space space{s.own + team.me * s.own_bytes};
        Own o = own(space);
        if (by_row(team.size)) {
            auto [item, end] = team.share(rows * groups());
            for (; item < end; ++item) {
                i64 row = item / groups(), group = item % groups();
                query(o, row, group);
                look(o, row, 0, o.first);
                for (i64 span = 1; span < up(lengths[row], SPAN); ++span) {
                    look(o, row, span, o.found);
                    merge(o.first, o.found);
                }
                finish(row, group, o.first);
            }
        } else {
            if (team.me == 0) {
                s.first[0] = 0;
                for (i64 r = 0; r < rows; ++r) s.first[r + 1] = s.first[r] + up(lengths[r], SPAN);
            }
            team.sync();
            auto [item, end] = team.share(s.first[rows] * groups());
            for (i64 row = 0; item < end; ++item) {
                while (s.first[row + 1] * groups() <= item) ++row;
                i64 spans = s.first[row + 1] - s.first[row], at = item - s.first[row] * groups();
                query(o, row, at / spans);
                look(o, row, at % spans, s.found + item * found_floats());
            }
            team.sync();
            auto [pair, stop] = team.share(rows * groups());
            for (; pair < stop; ++pair) {
                i64 row = pair / groups(), group = pair % groups(), spans = s.first[row + 1] - s.first[row];
                float* first = s.found + (s.first[row] * groups() + group * spans) * found_floats();
                for (i64 span = 1; span < spans; ++span) merge(first, first + span * found_floats());
                finish(row, group, first);
            }
        }
        team.sync();
        auto [head, end] = team.share(heads());
        for (; head < end; ++head) {
            Rows from = s.latents;
            from.tiles += head * s.latents_bytes;
            i64 value = value_up.rows;
            for_products(from, value_up.part(head), 0, value_up.blocks(), o.panel,
                         [&](i64 r, i64 output, i64 outputs, const float* y) {
                bf16* to = out + (r * heads() + head) * value + output;
                convert(y, outputs, to);
            });
        }
    }
};

// One sequence with several rows, its last `rows` of `length` known tokens: keys and values of its heads are expanded from
// the latents (DeepSeek-V2, section 2.1.1), in groups of heads that fit into `AT_A_TIME` bytes.
// [rows][heads][nope + rope] -> [rows][heads * value]
struct Prefill {
    const bf16* queries;
    i64 rows, length;
    const i64* pages;
    Pages where;
    double scale;
    Matrix key_up, value_up;  // a part for each head: [latent, nope], [value, latent]
    bf16* out;

    static constexpr i64 QUERIES = 64, SCORES = apart(SPAN / LANES), AT_A_TIME = i64(64) << 20;

    i64 heads() const { return value_up.parts; }
    i64 nope() const { return key_up.columns; }
    i64 latent() const { return key_up.rows; }
    i64 rope() const { return where.width - latent(); }
    i64 wide() const { return nope() + rope(); }
    i64 spans() const { return up(length, SPAN); }
    i64 key_bytes() const { return SPAN / LANES * up(wide(), 32) * TILE; }  // of a span
    i64 value_bytes() const { return value_up.blocks() * SPAN / 32 * TILE; }
    i64 group() const {
        i64 head_bytes = std::max<i64>(1, spans()) * (key_bytes() + value_bytes());
        return std::max<i64>(1, std::min(heads(), AT_A_TIME / head_bytes));
    }
    i64 value_width() const { return value_up.blocks() * LANES; }

    struct Scratch { Rows latents; char *keys, *values, *own; i64 own_bytes; } s;
    struct Own {
        bf16* wide;    // [SPAN][nope + rope] or [SPAN][value], or the keys' projection of a head
        char* key_up;  // packed the other way round
        Rows queries;
        char* weights;
        float *panel, *sums, *most, *total;
    };
    Own own(Space& space) const {
        Own o;
        o.wide = space.take<bf16>(std::max({SPAN * wide(), SPAN * value_width(), nope() * up(latent(), LANES) * LANES}));
        o.key_up = space.take<char>(up(nope(), LANES) * up(latent(), 32) * TILE);
        o.queries = Rows::in(space, BFLOAT16, QUERIES, wide());
        o.weights = space.take<char>(QUERIES * SPAN * 2);
        o.panel = space.take<float>(PANEL);
        o.sums = space.take<float>(QUERIES * value_width());
        o.most = space.take<float>(QUERIES);
        o.total = space.take<float>(QUERIES);
        return o;
    }
    void lay(Space& space, int threads) {
        s.latents = Rows::in(space, BFLOAT16, length, latent());
        s.keys = space.take<char>(group() * spans() * key_bytes());
        s.values = space.take<char>(group() * spans() * value_bytes());
        Space measure{nullptr};
        own(measure);
        s.own_bytes = measure.used;
        s.own = space.take<char>(threads * s.own_bytes);
    }

    // The projection of a head's keys, from [latent, nope] packed to [nope, latent] packed.
    Matrix turned(const Own& o, i64 head) const {
        Matrix from = key_up.part(head);
        i64 width = from.blocks() * LANES;
        for (i64 b = 0; b < from.blocks(); ++b)
            for (i64 n = 0; n < nope(); n += 2) {
                U16 both = *reinterpret_cast<const U16*>(from.data + b * from.block_bytes() + n / 2 * 64);
                *reinterpret_cast<H16*>(o.wide + n * width + b * LANES) = __builtin_convertvector(both & 0xffff, H16);
                if (n + 1 < nope())
                    *reinterpret_cast<H16*>(o.wide + (n + 1) * width + b * LANES) = __builtin_convertvector(both >> 16, H16);
            }
        Matrix to{o.key_up, BFLOAT16, 1, nope(), latent(), nullptr, nullptr};
        for (i64 b = 0; b < to.blocks(); ++b)
            pack_block(reinterpret_cast<const char*>(o.wide + b * LANES * width), width * 2,
                       std::min<i64>(LANES, nope() - b * LANES), latent() * 2, o.key_up + b * to.block_bytes());
        return to;
    }

    template <class Use> void expand(const Own& o, i64 span, const Matrix& by, Use use) const {
        i64 tile = span * SPAN / LANES, tokens = std::min(SPAN, length - span * SPAN);
        Rows some = s.latents;
        for (i64 b = 0; b < by.blocks(); b += MANY_BLOCKS) {
            i64 blocks = std::min(MANY_BLOCKS, by.blocks() - b), ld = apart(blocks);
            product(some, tile, tile + up(tokens, LANES), by, b, blocks, o.panel, ld);
            for (i64 t = 0; t < tokens; ++t)
                use(t, b * LANES, std::min(blocks * LANES, by.rows - b * LANES), o.panel + t * ld);
        }
    }

    void expand_keys(const Own& o, i64 span, const Matrix& by, char* to) const {
        i64 tokens = std::min(SPAN, length - span * SPAN);
        expand(o, span, by, [&](i64 t, i64 output, i64 outputs, const float* y) {
            bf16* at = o.wide + t * wide() + output;
            convert(y, outputs, at);
        });
        where.each(pages, span * SPAN, tokens, [&](i64 t, const bf16* token) {
            memcpy(o.wide + t * wide() + nope(), token + latent(), rope() * 2);
        });
        for (i64 b = 0; b * LANES < tokens; ++b)
            pack_block(reinterpret_cast<const char*>(o.wide + b * LANES * wide()), wide() * 2,
                       std::min<i64>(LANES, tokens - b * LANES), wide() * 2, to + b * up(wide(), 32) * TILE);
    }

    void expand_values(const Own& o, i64 span, const Matrix& by, char* to) const {
        expand(o, span, by, [&](i64 t, i64 output, i64 outputs, const float* y) {
            for (i64 i = 0; i < outputs; i += LANES) store(o.wide + t * value_width() + output + i, load(y + i));
        });
        i64 tokens = std::min(SPAN, length - span * SPAN);
        const bf16* row[SPAN];
        for (i64 t = 0; t < tokens; ++t) row[t] = o.wide + t * value_width();
        pack_columns(row, tokens, value_up.blocks(), to);
    }

    void attend(Own& o, i64 head, i64 begin, const char* keys, const char* values) const {
        i64 count = std::min(QUERIES, rows - begin), known = length - rows + begin;  // tokens before the first of them
        Rows q = o.queries;
        q = Rows(q.tiles, nullptr, BFLOAT16, count, wide());
        for (i64 r = 0; r < count; ++r) q.put(r, queries + ((begin + r) * heads() + head) * wide());
        i64 width = value_width();
        std::fill(o.sums, o.sums + count * width, 0.0f);
        std::fill(o.most, o.most + count, NOWHERE);
        std::fill(o.total, o.total + count, 0.0f);
        for (i64 span = 0; span * SPAN < known + count; ++span) {
            i64 tokens = std::min(SPAN, length - span * SPAN), chunks = up(tokens, 32);
            Matrix k{keys + span * key_bytes(), BFLOAT16, 1, tokens, wide(), nullptr, nullptr};
            product(q, 0, up(count, LANES), k, 0, up(tokens, LANES), o.panel, SCORES);
            Rows weights{o.weights, nullptr, BFLOAT16, count, chunks * 32};
            for (i64 r = 0; r < count; ++r) {
                i64 visible = std::min(tokens, known + r + 1 - span * SPAN);
                weigh(o, r, visible, weights);
            }
            Matrix v{values + span * value_bytes(), BFLOAT16, 1, width, chunks * 32, nullptr, nullptr};
            for_products(weights, v, 0, v.blocks(), o.panel, [&](i64 r, i64 output, i64 outputs, const float* y) {
                float* at = o.sums + r * width + output;
                for (i64 i = 0; i < outputs; i += LANES) store(at + i, load(at + i) + load(y + i));
            });
        }
        for (i64 r = 0; r < count; ++r) {
            F16 scale_ = all(1.0f / o.total[r]);
            bf16* to = out + ((begin + r) * heads() + head) * value_up.rows;
            by_lanes(value_up.rows, [&](i64 i, int lanes) {
                store(to + i, load(o.sums + r * width + i) * scale_, lanes);
            });
        }
    }

    // Scores of a row to weights; what was summed up before is made to fit them.
    void weigh(Own& o, i64 r, i64 visible, const Rows& weights) const {
        float* scores = o.panel + r * SCORES;
        i64 columns = weights.columns;
        if (visible <= 0) {
            for (i64 i = 0; i < columns; i += LANES) weights.put_lanes(r, i, F16{});
            return;
        }
        for (i64 i = visible; i < up(visible, LANES) * LANES; ++i) scores[i] = NOWHERE;
        F16 best = all(NOWHERE);
        for (i64 i = 0; i < visible; i += LANES) best = max(best, load(scores + i));
        float most = std::max(o.most[r], largest(best) * float(scale));
        F16 keep = exponential(all(o.most[r] - most)), sums = {};
        for (i64 i = 0; i < columns; i += LANES) {
            F16 weight = {};
            if (i < visible) weight = exponential(fused(load(scores + i), all(float(scale)), all(-most)));
            sums += weight;
            weights.put_lanes(r, i, weight);
        }
        o.most[r] = most;
        o.total[r] = o.total[r] * keep[0] + sum(sums);
        float* at = o.sums + r * value_width();
        for (i64 i = 0; i < value_width(); i += LANES) store(at + i, load(at + i) * keep);
    }

    void run(const Team& team) const {
        Space space{s.own + team.me * s.own_bytes};
        Own o = own(space);
        auto [t, last] = team.share(length);
        if (t < last)
            where.each(pages, t, last - t, [&](i64 i, const bf16* token) { s.latents.put(t + i, token); });
        for (i64 first = 0; first < heads(); first += group()) {
            i64 some = std::min(group(), heads() - first);
            team.sync();
            auto [item, end] = team.share(some * spans());
            Matrix keys_by{};
            for (i64 made = -1; item < end; ++item) {
                i64 head = item / spans(), span = item % spans();
                if (made != head) keys_by = turned(o, first + head);
                made = head;
                expand_keys(o, span, keys_by, s.keys + item * key_bytes());
                expand_values(o, span, value_up.part(first + head), s.values + item * value_bytes());
            }
            team.sync();
            i64 pieces = up(rows, QUERIES);
            auto [piece, stop] = team.share(some * pieces);
            for (; piece < stop; ++piece) {
                i64 head = piece / pieces;
                attend(o, first + head, piece % pieces * QUERIES, s.keys + head * spans() * key_bytes(),
                       s.values + head * spans() * value_bytes());
            }
        }
    }
};
