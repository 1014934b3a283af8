// Ops that go once over their rows.
#pragma once
#include "product.h"

struct Embed {
    const i64* tokens;
    const bf16* table;
    i64 rows, width;
    bf16* out;

    void lay(Space&, int) {}
    void run(const Team& team) const {
        auto [begin, end] = team.share(rows);
        for (i64 t = begin; t < end; ++t) memcpy(out + t * width, table + tokens[t] * width, width * sizeof(bf16));
    }
};

struct Add {
    const bf16 *x, *y;
    i64 count;
    bf16* out;

    void lay(Space&, int) {}
    void run(const Team& team) const {
        auto [begin, end] = team.share(up(count, LANES));
        i64 first = begin * LANES, last = std::min(end * LANES, count);
        by_lanes(last - first, [&](i64 i, int lanes) {
            store(out + first + i, load(x + first + i, lanes) + load(y + first + i, lanes), lanes);
        });
    }
};

struct RmsNorm {
    const bf16 *x, *weight;
    double eps;
    i64 rows, width;
    bf16* out;

    void lay(Space&, int) {}
    void run(const Team& team) const {
        auto [begin, end] = team.share(rows);
        for (i64 t = begin; t < end; ++t) rms_norm(x + t * width, weight, float(eps), width, out + t * width);
    }
};

// How often each expert was chosen, added to what is there.
struct Count {
    const i64* chosen;
    i64 count;
    i64* counts;

    void lay(Space&, int) {}
    void run(const Team& team) const {
        if (team.me == 0)
            for (i64 i = 0; i < count; ++i) ++counts[chosen[i]];
    }
};

// Rows, `stride` apart, times a matrix of one part, plus a bias; out in bfloat16, or float where wide.
struct Linear {
    const bf16* x;
    i64 stride, rows;
    Matrix weight;
    const bf16* bias;
    i64 wide;
    void* out;

    struct Scratch { Rows x; float* panels; } s;
    void lay(Space& space, int threads) {
        s.x = Rows::in(space, weight.format, rows, weight.columns);
        s.panels = space.take<float>(threads * PANEL);
    }
    void run(const Team& team) const {
        auto [row, end] = team.share(rows);
        for (; row < end; ++row) s.x.put(row, x + row * stride);
        team.sync();
        auto [first, last] = team.share(weight.blocks());
        for_products(s.x, weight, first, last, s.panels + team.me * PANEL,
                     [&](i64 r, i64 output, i64 outputs, const float* y) {
            i64 at = r * weight.rows + output;
            by_lanes(outputs, [&](i64 i, int lanes) {
                F16 v = load(y + i);
                if (bias) v += load(bias + output + i, lanes);
                if (wide) store(static_cast<float*>(out) + at + i, v, lanes);
                else store(static_cast<bf16*>(out) + at + i, v, lanes);
            });
        });
    }
};
