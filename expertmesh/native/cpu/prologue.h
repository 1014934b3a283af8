// Everything of multi-head latent attention before attention itself (DeepSeek-V2, section 2.1): norm, projections down,
// their norms, projection up with the keys' own absorbed, rotary positions, and the write into the paged cache.
#pragma once
#include "product.h"

constexpr float LATENT_EPS = 1e-6f;  // of the latents' norms, whatever the model's epsilon is

// What positions do to a vector of `width` numbers: the first numbers of all pairs come before all second ones.
struct Rotary {
    const i64* positions;
    const float *cos, *sin;  // [positions][width / 2]
    i64 interleaved, width;

    template <class O> void rotate(i64 row, const float* x, O* out) const {
        i64 half = width / 2;
        const float *c = cos + positions[row] * half, *s = sin + positions[row] * half;
        i64 i = 0;
        for (; i + LANES <= half; i += LANES) {
            F16 first = load(x + i), second = load(x + half + i);
            if (interleaved) {
                F16 low = load(x + 2 * i), high = load(x + 2 * i + LANES);
                first = evens(low, high), second = odds(low, high);
            }
            store(out + i, first * load(c + i) - second * load(s + i));
            store(out + half + i, second * load(c + i) + first * load(s + i));
        }
        for (; i < half; ++i) {
            float first = interleaved ? x[2 * i] : x[i], second = interleaved ? x[2 * i + 1] : x[half + i];
            ::put(out + i, first * c[i] - second * s[i]);
            ::put(out + half + i, second * c[i] + first * s[i]);
        }
    }
};

// My rows to low rank: what comes before the gather of a TP group.
struct Down {
    const bf16 *x, *norm;
    double eps;
    i64 rows;
    Matrix a;  // [q_lora + latent + rope, width]
    const bf16 *bias, *q_norm, *kv_norm;  // q_norm is nothing where queries come from the normed row itself
    i64 q_lora, latent, rope;
    bf16 *c_q, *c_kv, *k_rope;

    struct Scratch { Rows x; float *low, *normed, *panels; } s;
    i64 wide() const { return q_lora + latent + rope; }
    void lay(Space& space, int threads) {
        s.x = Rows::in(space, a.format, rows, a.columns);
        s.low = space.take<float>(rows * wide());
        s.normed = space.take<float>(threads * a.columns);
        s.panels = space.take<float>(threads * PANEL);
    }

    // The projections of all rows, in s.low. own(row, numbers): what else is wanted of a normed row.
    template <class Own> void project(const Team& team, Own own) const {
        float* normed = s.normed + team.me * a.columns;
        auto [row, end] = team.share(rows);
        for (i64 r = row; r < end; ++r) {
            rms_norm(x + r * a.columns, norm, float(eps), a.columns, normed);
            s.x.put(r, normed);
            own(r, normed);
        }
        team.sync();
        auto [first, last] = team.share(a.blocks());
        for_products(s.x, a, first, last, s.panels + team.me * PANEL,
                     [&](i64 r, i64 output, i64 outputs, const float* y) {
            by_lanes(outputs, [&](i64 i, int lanes) {
                F16 v = load(y + i);
                if (bias) v += load(bias + output + i, lanes);
                store(s.low + r * wide() + output + i, v, lanes);
            });
        });
        team.sync();
    }

    void run(const Team& team) const {
        project(team, [&](i64 r, const float* normed) {
            if (!q_norm) convert(normed, a.columns, c_q + r * a.columns);
        });
        auto [row, end] = team.share(rows);
        for (; row < end; ++row) {
            const float* low = s.low + row * wide();
            if (q_norm) rms_norm(low, q_norm, LATENT_EPS, q_lora, c_q + row * q_lora);
            rms_norm(low + q_lora, kv_norm, LATENT_EPS, latent, c_kv + row * latent);
            convert(low + q_lora + latent, rope, k_rope + row * rope);
        }
    }
};

// Queries of my heads. The first `absorbed` rows get them in the space of the latents, [absorbed][heads][latent + rope],
// the others as they are, [rows - absorbed][heads][nope + rope].
struct Queries {
    Matrix q_b, key_up;  // a part for each head: [nope + rope, q_lora], [latent, nope]
    i64 absorbed;
    bf16 *out_absorbed, *out_plain;

    i64 heads() const { return q_b.parts; }
    i64 nope() const { return key_up.columns; }
    i64 latent() const { return key_up.rows; }

    struct Scratch { Rows low, nope; float* panels; i64 nope_bytes; } s;
    void lay(Space& space, int threads, i64 rows) {
        s.low = Rows::in(space, q_b.format, rows, q_b.columns);
        i64 before = space.used;
        s.nope = Rows::in(space, BFLOAT16, absorbed, nope());
        s.nope_bytes = space.used - before;
        space.take<char>((threads - 1) * s.nope_bytes);
        s.panels = space.take<float>(threads * PANEL);
    }

    void run(const Team& team, const Rotary& rotary) const {
        float* panel = s.panels + team.me * PANEL;
        Rows mine = s.nope;
        mine.tiles += team.me * s.nope_bytes;
        i64 rope = rotary.width, plain = nope() + rope, wide = latent() + rope;
        auto [head, end] = team.share(heads());
        for (; head < end; ++head) {
            bf16* absorbed_here = out_absorbed + head * wide;
            bf16* plain_here = out_plain + head * plain;
            for_whole(s.low, q_b.part(head), panel, [&](i64 r, const float* q) {
                bf16* rotated;
                if (r < absorbed) {
                    mine.put(r, q);
                    rotated = absorbed_here + r * heads() * wide + latent();
                } else {
                    bf16* to = plain_here + (r - absorbed) * heads() * plain;
                    convert(q, nope(), to);
                    rotated = to + nope();
                }
                rotary.rotate(r, q + nope(), rotated);
            });
            for_products(mine, key_up.part(head), 0, key_up.blocks(), panel,
                         [&](i64 r, i64 output, i64 outputs, const float* y) {
                bf16* to = absorbed_here + r * heads() * wide + output;
                convert(y, outputs, to);
            });
        }
    }

private:
    // use(row, outputs): all outputs of a part that is narrow enough for a panel.
    template <class Use> static void for_whole(const Rows& x, const Matrix& w, float* panel, Use use) {
        i64 ld = apart(w.blocks()), most = std::max<i64>(1, PANEL / (ld * LANES));
        for (i64 t = 0, all_tiles = up(x.count, LANES); t < all_tiles; t += most) {
            i64 stop = std::min(t + most, all_tiles);
            product(x, t, stop, w, 0, w.blocks(), panel, ld);
            for (i64 row = t * LANES, last = std::min(stop * LANES, x.count); row < last; ++row)
                use(row, panel + (row - t * LANES) * ld);
        }
    }
};

inline void write_cache(bf16* cache, const Rotary& rotary, i64 row, i64 slot, i64 latent, const bf16* c_kv,
                        const float* k_rope) {
    bf16* to = cache + slot * (latent + rotary.width);
    memcpy(to, c_kv, latent * sizeof(bf16));
    rotary.rotate(row, k_rope, to + latent);
}

// My heads' rows from low rank: what comes after the gather.
struct Up {
    const bf16 *c_q, *c_kv, *k_rope;
    i64 rows;
    Rotary rotary;
    const i64* slots;
    bf16* cache;
    Queries queries;

    struct Scratch { float* wide; } s;
    void lay(Space& space, int threads) {
        queries.lay(space, threads, rows);
        s.wide = space.take<float>(threads * rotary.width);
    }
    void run(const Team& team) const {
        i64 rope = rotary.width, latent = queries.latent(), low = queries.q_b.columns;
        float* wide = s.wide + team.me * rope;
        auto [row, end] = team.share(rows);
        for (; row < end; ++row) {
            queries.s.low.put(row, c_q + row * low);
            convert(k_rope + row * rope, rope, wide);
            write_cache(cache, rotary, row, slots[row], latent, c_kv + row * latent, wide);
        }
        team.sync();
        queries.run(team, rotary);
    }
};

// Both, where no gather comes between: nothing of low rank leaves the workspace.
struct Prologue {
    Down down;
    Rotary rotary;
    const i64* slots;
    bf16* cache;
    Queries queries;

    struct Scratch { float* normed; bf16* latent; } s;
    i64 widest() const { return std::max(down.q_lora, down.latent); }
    void lay(Space& space, int threads) {
        down.lay(space, threads);
        queries.lay(space, threads, down.rows);
        s.normed = space.take<float>(threads * widest());
        s.latent = space.take<bf16>(threads * down.latent);
    }
    void run(const Team& team) const {
        down.project(team, [&](i64 r, const float* normed) {
            if (!down.q_norm) queries.s.low.put(r, normed);
        });
        float* normed = s.normed + team.me * widest();
        bf16* latent = s.latent + team.me * down.latent;
        auto [row, end] = team.share(down.rows);
        for (; row < end; ++row) {
            const float* low = down.s.low + row * down.wide();
            if (down.q_norm) {
                rms_norm(low, down.q_norm, LATENT_EPS, down.q_lora, normed);
                queries.s.low.put(row, normed);
            }
            rms_norm(low + down.q_lora, down.kv_norm, LATENT_EPS, down.latent, latent);
            write_cache(cache, rotary, row, slots[row], down.latent, latent, low + down.q_lora + down.latent);
        }
        team.sync();
        queries.run(team, rotary);
    }
};

// Plain queries of a few rows into the space of the latents, as `Queries` does it for rows that decode.
// [rows][heads][wide] -> [rows][heads][latent + rope]
struct Absorb {
    const bf16* plain;
    i64 rows, wide;
    Matrix key_up;
    bf16* out;

    struct Scratch { char* own; i64 own_bytes; } s;
    struct Own { Rows nope; float* panel; };
    Own own(Space& space) const {
        Own o;
        o.nope = Rows::in(space, BFLOAT16, rows, key_up.columns);
        o.panel = space.take<float>(PANEL);
        return o;
    }
    void lay(Space& space, int threads) {
        Space measure{nullptr};
        own(measure);
        s.own_bytes = measure.used;
        s.own = space.take<char>(threads * s.own_bytes);
    }
    void run(const Team& team) const {
        Space space{s.own + team.me * s.own_bytes};
        Own o = own(space);
        i64 heads = key_up.parts, nope = key_up.columns, latent = key_up.rows, to = latent + wide - nope;
        auto [head, end] = team.share(heads);
        for (; head < end; ++head) {
            for (i64 r = 0; r < rows; ++r) {
                const bf16* q = plain + (r * heads + head) * wide;
                o.nope.put(r, q);
                memcpy(out + (r * heads + head) * to + latent, q + nope, (wide - nope) * sizeof(bf16));
            }
            for_products(o.nope, key_up.part(head), 0, key_up.blocks(), o.panel,
                         [&](i64 r, i64 output, i64 outputs, const float* y) {
                bf16* at = out + (r * heads + head) * to + output;
                convert(y, outputs, at);
            });
        }
    }
};
