// Feed-forward layers: one for all rows, or a row's choice of many.
#pragma once
#include "product.h"

// silu(gate) * up of blocks [begin, end), as rows for `down` from row `to` on; or as plain numbers where those still have
// to be measured before they are quantised.
inline void gate_and_up(
    const Rows& x, const Matrix& gate, const Matrix& up_, i64 begin, i64 end, float* panels, const Rows& inner,
    float* plain, i64 to = 0) {
    float *gates = panels, *ups = panels + PANEL;
    i64 width = blocks_at_a_time(x.count), all_tiles = up(x.count, LANES);
    for (i64 b = begin; b < end; b += width) {
        i64 blocks = std::min(width, end - b), ld = apart(blocks);
        for (i64 t = 0; t < all_tiles; t += PANEL_TILES) {
            i64 stop = std::min(t + PANEL_TILES, all_tiles);
            product(x, t, stop, gate, b, blocks, gates, ld);
            product(x, t, stop, up_, b, blocks, ups, ld);
            for (i64 row = t * LANES, last = std::min(stop * LANES, x.count); row < last; ++row)
                for (i64 i = 0; i < blocks * LANES; i += LANES) {
                    i64 at = (row - t * LANES) * ld + i, column = b * LANES + i;
                    F16 v = silu(load(gates + at)) * load(ups + at);
                    if (inner.format == BFLOAT16) {
                        inner.put_lanes(to + row, column, v);
                        if (b + i / LANES + 1 == gate.blocks() && column % 32 == 0)  // the chunk's other half
                            inner.put_lanes(to + row, column + LANES, F16{});
                    } else {
                        int lanes = int(std::min<i64>(LANES, inner.columns - column));
                        store(plain + (to + row) * inner.columns + column, v, lanes);
                    }
                }
        }
    }
}

// gate_up has two parts. [rows, columns of gate] -> [rows, rows of down]
struct Swiglu {
    const bf16* x;
    i64 rows;
    Matrix gate_up, down;
    bf16* out;

    struct Scratch { Rows x, inner; float *plain, *panels; } s;
    void lay(Space& space, int threads) {
        s.x = Rows::in(space, gate_up.format, rows, gate_up.columns);
        s.inner = Rows::in(space, down.format, rows, down.columns);
        s.plain = space.take<float>(down.format == INT8 ? rows * down.columns : 0);
        s.panels = space.take<float>(threads * 2 * PANEL);
    }
    void run(const Team& team) const {
        float* panels = s.panels + team.me * 2 * PANEL;
        auto [row, end] = team.share(rows);
        for (i64 r = row; r < end; ++r) s.x.put(r, x + r * gate_up.columns);
        team.sync();
        if (rows) {
            auto [first, last] = team.share(gate_up.blocks());
            gate_and_up(s.x, gate_up.part(0), gate_up.part(1), first, last, panels, s.inner, s.plain);
        }
        team.sync();
        if (down.format == INT8) {
            for (i64 r = row; r < end; ++r) s.inner.put(r, s.plain + r * down.columns);
            team.sync();
        }
        auto [first, last] = team.share(down.blocks());
        for_products(s.inner, down, first, last, panels, [&](i64 r, i64 output, i64 outputs, const float* y) {
            convert(y, outputs, out + r * down.rows + output);
        });
    }
};

// gate_up has two parts a slot, down one. Rows are brought together slot by slot, and each row's results are added up in
// the order of slots, whatever other rows there are.
struct Experts {
    const bf16* x;
    i64 rows, choices;
    const i64* slots;  // [rows][choices], -1 where the expert is not here
    const float* weights;
    Matrix gate_up, down;
    bf16* out;

    i64 pairs() const { return rows * choices; }
    i64 slot_count() const { return down.parts; }

    struct Scratch {
        Rows x;
        char *gathered, *inner;
        float *gathered_scale, *inner_scale, *plain, *sums, *panels;
        i64 *first, *order, *hits;  // of each slot its first pair; pairs by slot; slots with rows, and their number
    } s;
    // Rows of a slot that a thread brings together at a time, so that they are in its own cache.
    static constexpr i64 NEAR = PANEL_TILES * LANES;
    static i64 row_bytes(const Matrix& m) { return up(m.columns, per_chunk(rows_format(m.format))) * CHUNK; }
    i64 near_bytes() const { return std::min(NEAR, up(pairs(), LANES) * LANES) * row_bytes(gate_up); }
    void lay(Space& space, int threads) {
        s.x = Rows::in(space, gate_up.format, rows, gate_up.columns);
        s.gathered = space.take<char>(threads * near_bytes());
        s.gathered_scale = space.take<float>(threads * NEAR);
        // A tile that is not full keeps its rows close; so nothing takes more than twice its rows.
        s.inner = space.take<char>(2 * pairs() * row_bytes(down));
        s.inner_scale = space.take<float>(pairs());
        s.plain = space.take<float>(down.format == INT8 ? pairs() * down.columns : 0);
        s.sums = space.take<float>(rows * down.rows);
        s.panels = space.take<float>(threads * 2 * PANEL);
        s.first = space.take<i64>(slot_count() + 1);
        s.order = space.take<i64>(pairs());
        s.hits = space.take<i64>(slot_count() + 1);
    }

    // Rows of one slot among those of all.
    Rows inner(i64 slot) const {
        i64 before = s.first[slot], count = s.first[slot + 1] - before;
        char* tiles = s.inner + 2 * before * row_bytes(down);
        return {tiles, s.inner_scale + before, rows_format(down.format), count, down.columns};
    }

    void sort() const {
        std::fill(s.first, s.first + slot_count() + 1, 0);
        for (i64 p = 0; p < pairs(); ++p)
            if (slots[p] >= 0) ++s.first[slots[p] + 1];
        i64 hits = 0;
        for (i64 slot = 0; slot < slot_count(); ++slot) {
            if (s.first[slot + 1]) s.hits[++hits] = slot;
            s.first[slot + 1] += s.first[slot];
        }
        s.hits[0] = hits;
        for (i64 p = 0; p < pairs(); ++p)
            if (slots[p] >= 0) s.order[s.first[slots[p]]++] = p;
        for (i64 slot = slot_count(); slot > 0; --slot) s.first[slot] = s.first[slot - 1];
        s.first[0] = 0;
    }

    // Rows of pairs [begin, end), which are of one slot.
    Rows gather(const Team& team, i64 begin, i64 end) const {
        Rows to(s.gathered + team.me * near_bytes(), s.gathered_scale + team.me * NEAR, s.x.format, end - begin,
                gate_up.columns);
        i64 chunks = s.x.chunks(), step = to.high() * CHUNK, from_step = s.x.high() * CHUNK;
        for (i64 i = 0; i < to.count; ++i) {
            i64 row = s.order[begin + i] / choices;
            const char* from = s.x.at(row);
            char* at = to.at(i);
            for (i64 c = 0; c < chunks; ++c) memcpy(at + c * step, from + c * from_step, CHUNK);
            if (to.format == INT8) to.scale[i] = s.x.scale[row];
        }
        return to;
    }

    // Calls use(slot, begin, end) for my share of the blocks of all hit slots, by what they cost: their weights have to be
    // read, and every row has to be computed.
    template <class Use> void shared(const Team& team, i64 blocks, Use use) const {
        auto cost = [&](i64 slot) { return (s.first[slot + 1] - s.first[slot]) + ROWS_OF_A_READ; };
        i64 total = 0, before = 0;
        for (i64 h = 1; h <= s.hits[0]; ++h) total += cost(s.hits[h]);
        double low = double(total) * team.me / team.size, high = double(total) * (team.me + 1) / team.size;
        for (i64 h = 1; h <= s.hits[0]; ++h) {
            i64 slot = s.hits[h], c = cost(slot);
            auto place = [&](double at) {
                return i64(std::min(std::max((at - double(before)) / double(c), 0.0), 1.0) * double(blocks) + 0.5);
            };
            i64 begin = place(low), end = place(high);
            if (begin < end) use(slot, begin, end);
            before += c;
        }
    }

    void run(const Team& team) const {
        float* panels = s.panels + team.me * 2 * PANEL;
        auto [row, stop] = team.share(rows);
        for (; row < stop; ++row) s.x.put(row, x + row * gate_up.columns);
        if (team.me == team.size - 1) sort();
        team.sync();
        shared(team, gate_up.blocks(), [&](i64 slot, i64 begin, i64 end) {
            i64 first = s.first[slot], last = s.first[slot + 1];
            for (i64 i = first; i < last; i += NEAR)
                gate_and_up(gather(team, i, std::min(i + NEAR, last)), gate_up.part(2 * slot), gate_up.part(2 * slot + 1),
                            begin, end, panels, inner(slot), s.plain + first * down.columns, i - first);
        });
        team.sync();
        if (down.format == INT8) {
            auto [begin, end] = team.share(s.first[slot_count()]);
            i64 slot = 0;
            for (i64 i = begin; i < end; ++i) {
                while (s.first[slot + 1] <= i) ++slot;
                inner(slot).put(i - s.first[slot], s.plain + i * down.columns);
            }
            team.sync();
        }
        auto [first, last] = team.share(down.blocks());
        i64 begin = first * LANES, end = std::min(last * LANES, down.rows);
        if (begin >= end) return;
        for (i64 r = 0; r < rows; ++r) std::fill(s.sums + r * down.rows + begin, s.sums + r * down.rows + end, 0.0f);
        for (i64 h = 1; h <= s.hits[0]; ++h) {
            i64 slot = s.hits[h];
            for_products(inner(slot), down.part(slot), first, last, panels,
                         [&](i64 i, i64 output, i64 outputs, const float* y) {
                i64 pair = s.order[s.first[slot] + i];
                float* sum = s.sums + pair / choices * down.rows + output;
                F16 weight = all(weights[pair]);
                by_lanes(outputs, [&](i64 j, int lanes) {
                    store(sum + j, fused(weight, load(y + j), load(sum + j, lanes)), lanes);
                });
            });
        }
        for (i64 r = 0; r < rows; ++r)
            by_lanes(end - begin, [&](i64 i, int lanes) {
                i64 at = r * down.rows + begin + i;
                store(out + at, load(s.sums + at, lanes), lanes);
            });
    }
};
