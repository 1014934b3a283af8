// The router: scores of all experts for each row, and the choice among them.
#pragma once
#include "vectors.h"
#include <limits>

enum Method : i64 { GREEDY = 0, BEST_OF_GROUP = 1, TWO_BEST_OF_GROUP = 2 };

struct Router {
    const bf16* x;
    i64 rows, width;
    const float *weight, *bias;  // [experts][width], [experts] or nothing
    i64 experts, choices, groups, groups_taken, method, sigmoid_scores, normalise;
    double factor;
    i64* chosen;      // [rows][choices]
    float* weights;

    static constexpr i64 TOGETHER = 32;
    struct Scratch { float *wide, *logits, *own; } s;
    void lay(Space& space, int threads) {
        s.wide = space.take<float>(rows * width);
        s.logits = space.take<float>(rows * experts);
        s.own = space.take<float>(threads * room());
    }
    i64 room() const { return 2 * up(experts, LANES) * LANES + up(groups, LANES) * LANES; }

    template <int R, int E> INLINE void dot(i64 row, i64 expert) const {
        F16 sums[R][E] = {};
        by_lanes(width, [&](i64 i, int lanes) {
            F16 w[E];
            for (int e = 0; e < E; ++e) w[e] = load(weight + (expert + e) * width + i, lanes);
            for (int r = 0; r < R; ++r) {
                F16 v = load(s.wide + (row + r) * width + i, lanes);
                for (int e = 0; e < E; ++e) sums[r][e] = fused(v, w[e], sums[r][e]);
            }
        });
        for (int r = 0; r < R; ++r)
            for (int e = 0; e < E; ++e) s.logits[(row + r) * experts + expert + e] = sum(sums[r][e]);
    }
    void dots(i64 row, i64 stop, i64 expert, i64 end) const {
        bool four = expert + 4 == end;
        for (; row + 4 <= stop && four; row += 4) dot<4, 4>(row, expert);
        for (; row < stop; ++row)
            if (four) dot<1, 4>(row, expert);
            else for (i64 e = expert; e < end; ++e) dot<1, 1>(row, e);
    }

    void choose(i64 row, float* own) const {
        const float ruled_out = -std::numeric_limits<float>::infinity();
        i64 padded = up(experts, LANES) * LANES, group_size = experts / groups;
        float *scores = own, *choice = own + padded, *group = own + 2 * padded;
        const float* logits = s.logits + row * experts;
        if (sigmoid_scores)
            by_lanes(experts, [&](i64 i, int lanes) { store(scores + i, sigmoid(load(logits + i, lanes)), lanes); });
        else {
            F16 most = all(*std::max_element(logits, logits + experts)), total = {};
            by_lanes(experts, [&](i64 i, int lanes) {
                store(scores + i, exponential(load(logits + i, lanes) - most), lanes);
            });
            by_lanes(experts, [&](i64 i, int lanes) { total += load(scores + i, lanes); });
            F16 scale = all(1.0f / sum(total));
            by_lanes(experts, [&](i64 i, int lanes) { store(scores + i, load(scores + i, lanes) * scale, lanes); });
        }
        for (i64 e = 0; e < experts; ++e) choice[e] = scores[e] + (bias ? bias[e] : 0.0f);
        if (method != GREEDY && groups > 1) {
            for (i64 g = 0; g < groups; ++g) {
                float best = ruled_out, second = ruled_out;
                for (i64 e = g * group_size; e < (g + 1) * group_size; ++e)
                    if (choice[e] > best) second = best, best = choice[e];
                    else second = std::max(second, choice[e]);
                group[g] = method == TWO_BEST_OF_GROUP && group_size > 1 ? best + second : best;
            }
            for (i64 left = groups - groups_taken; left > 0; --left) {
                // Of equal ones the last is ruled out, so that the first stays.
                i64 worst = -1;
                for (i64 g = 0; g < groups; ++g)
                    if (group[g] != INFINITY && (worst < 0 || group[g] <= group[worst])) worst = g;
                if (worst < 0) break;
                group[worst] = INFINITY;
                std::fill(choice + worst * group_size, choice + (worst + 1) * group_size, ruled_out);
            }
        }
        i64* ids = chosen + row * choices;
        float* shares = weights + row * choices;
        float total = 0;
        for (i64 k = 0; k < choices; ++k) {
            i64 best = std::max_element(choice, choice + experts) - choice;
            ids[k] = best;
            shares[k] = scores[best];
            total += scores[best];
            choice[best] = ruled_out;
        }
        for (i64 k = 0; k < choices; ++k)
            shares[k] = (normalise ? shares[k] / (total + 1e-20f) : shares[k]) * float(factor);
    }

    void run(const Team& team) const {
        auto [row, stop] = team.share(rows);
        for (i64 r = row; r < stop; ++r)
            convert(x + r * width, width, s.wide + r * width);
        team.sync();
        // Every thread reads its own experts' weights, once for as many rows as stay in cache beside them.
        auto [begin, end] = team.share(experts);
        for (i64 first = 0; first < rows; first += TOGETHER)
            for (i64 e = begin; e < end; e += 4) dots(first, std::min(first + TOGETHER, rows), e, std::min(e + 4, end));
        team.sync();
        for (i64 r = row; r < stop; ++r) choose(r, s.own + team.me * room());
    }
};
