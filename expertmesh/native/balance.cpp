// Experts over cards: how far replicas can level a load, and the search for placements that can be levelled.
//
// Loads are whole numbers and every choice is made in one order, so that all machines get the same result. Slots are
// numbered card after card; `experts` names the expert of each, or -1. A plain version of what a step needs is in
// mesh/split.py, and gives the same numbers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

using std::vector;
using Load = int64_t;

constexpr int EMPTY = -1;

struct Random {  // splitmix64
    uint64_t state;
    uint64_t next() {
        uint64_t z = state += 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    }
    int below(int n) { return int((next() >> 32) * uint64_t(n) >> 32); }
    double real() { return double((next() >> 11) + 1) * 0x1p-53; }  // (0, 1]
    double normal() { return std::sqrt(-2 * std::log(real())) * std::cos(6.283185307179586 * real()); }
};

struct Slots {
    int experts, cards;
    vector<int> first;         // of each card, and the end
    vector<int> card, expert;  // of each slot
    vector<vector<int>> at;    // slots of each expert

    Slots(int experts, int cards, const int32_t* room, const int32_t* expert_of)
        : experts(experts), cards(cards), first(1, 0), at(experts) {
        for (int c = 0; c < cards; c++) {
            card.insert(card.end(), room[c], c);
            first.push_back(first.back() + room[c]);
        }
        expert.assign(expert_of, expert_of + card.size());
        for (int p = 0; p < count(); p++)
            if (expert[p] != EMPTY) at[expert[p]].push_back(p);
    }
    int count() const { return int(card.size()); }
    int replicas(int e) const { return int(at[e].size()); }
};

// What of its expert's load each slot takes, and what each card has by that.
struct Flow {
    vector<Load> slot, card;
    vector<uint8_t> tight;  // cards that nothing can leave: they are why the level is not lower

    void share_evenly(const Slots& slots, const Load* load) {
        slot.assign(slots.count(), 0);
        card.assign(slots.cards, 0);
        for (int e = 0; e < slots.experts; e++) {
            Load left = load[e];
            int n = slots.replicas(e);
            for (int p : slots.at[e]) {
                Load part = left / n--;
                left -= part;
                slot[p] += part;
                card[slots.card[p]] += part;
            }
        }
    }
};

// Brings the highest card as low as the replicas allow: augmenting paths from cards above a level to cards below it.
// The level starts at the mean. Where no path is left, the cards reached hold only experts that have no replica
// elsewhere, so that their mean is a lower bound, and the next level (a Newton iteration on the cut).
class Leveller {
    vector<int> queue_, from_, into_;  // how a card was reached: out of which slot, into which
    vector<uint8_t> seen_;

public:
    Load run(const Slots& slots, Flow& flow, Load level, const vector<uint8_t>* settled = nullptr) {
        const int cards = slots.cards;
        from_.resize(cards);
        into_.resize(cards);
        seen_.resize(slots.experts);
        flow.tight.assign(cards, 0);
        while (true) {
            queue_.clear();
            std::fill(from_.begin(), from_.end(), -2);
            std::fill(seen_.begin(), seen_.end(), 0);
            for (int c = 0; c < cards; c++)
                if (flow.card[c] > level && !(settled && (*settled)[c])) {
                    queue_.push_back(c);
                    from_[c] = -1;
                }
            if (queue_.empty()) return level;
            int sink = search(slots, flow, level, settled);
            if (sink >= 0) {
                augment(slots, flow, level, sink);
                continue;
            }
            Load sum = 0, n = Load(queue_.size());
            for (int c : queue_) sum += flow.card[c];
            level = std::max(level + 1, (sum + n - 1) / n);
            std::fill(flow.tight.begin(), flow.tight.end(), 0);
            for (int c : queue_) flow.tight[c] = 1;
        }
    }

    // As `run`, and then the cards that are not tight among themselves, and so on: no card can be made higher without
    // making a lower one lower.
    void run_fairly(const Slots& slots, Flow& flow) {
        vector<uint8_t> settled(slots.cards, 0);
        while (true) {
            Load sum = 0, n = 0;
            for (int c = 0; c < slots.cards; c++)
                if (!settled[c]) sum += flow.card[c], n++;
            if (!n) return;
            run(slots, flow, (sum + n - 1) / n, &settled);
            bool any = false;
            for (int c = 0; c < slots.cards; c++)
                if (flow.tight[c]) settled[c] = any = true;
            if (!any) return;
        }
    }

private:
    int search(const Slots& slots, const Flow& flow, Load level, const vector<uint8_t>* settled) {
        for (size_t i = 0; i < queue_.size(); i++) {
            int c = queue_[i];
            for (int p = slots.first[c]; p < slots.first[c + 1]; p++) {
                int e = slots.expert[p];
                if (e == EMPTY || seen_[e] || slots.at[e].size() < 2 || flow.slot[p] <= 0) continue;
                seen_[e] = 1;
                for (int o : slots.at[e]) {
                    int d = slots.card[o];
                    if (from_[d] != -2 || (settled && (*settled)[d])) continue;
                    from_[d] = p;
                    into_[d] = o;
                    if (flow.card[d] < level) return d;
                    queue_.push_back(d);
                }
            }
        }
        return -1;
    }

    void augment(const Slots& slots, Flow& flow, Load level, int sink) {
        Load amount = level - flow.card[sink];
        int c = sink;
        for (; from_[c] >= 0; c = slots.card[from_[c]]) amount = std::min(amount, flow.slot[from_[c]]);
        amount = std::min(amount, flow.card[c] - level);
        flow.card[c] -= amount;
        flow.card[sink] += amount;
        for (c = sink; from_[c] >= 0; c = slots.card[from_[c]]) {
            flow.slot[from_[c]] -= amount;
            flow.slot[into_[c]] += amount;
        }
    }
};

Load mean_of(const Load* load, int experts, int cards) {
    return (std::accumulate(load, load + experts, Load(0)) + cards - 1) / cards;
}

int count_bits(uint64_t x) {  // the builtin is a call where the machine that compiles is not the one to run
    x -= (x >> 1) & 0x5555555555555555ull;
    x = (x & 0x3333333333333333ull) + ((x >> 2) & 0x3333333333333333ull);
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0Full;
    return int((x * 0x0101010101010101ull) >> 56);
}

// Copies of tokens to other nodes, from a sample of tokens. A token needs the nodes of its experts that have one node
// only; an expert with a replica on one of these, or on the token's own node, costs nothing; tokens come from all
// nodes alike, so costs are whole numbers of nodes.
class Copies {
    const int nodes_, chosen_;
    const int cards_per_node_;
    const double weight_;  // of one copy of one token from one node
    const int32_t* tokens_;
    vector<vector<int>> of_;  // tokens of each expert
    vector<int> cost_;        // of each token
    vector<uint64_t> hosts_;  // nodes of each expert
    vector<int> away_;        // of each expert: how many nodes are without it
    int64_t total_ = 0;
    vector<std::pair<int, int>> undo_;
    vector<std::pair<int, uint64_t>> undo_hosts_;

public:
    Copies(const Slots& slots, int nodes, int count, int chosen, const int32_t* tokens)
        : nodes_(nodes), chosen_(chosen), cards_per_node_(slots.cards / nodes), weight_(1.0 / std::max(count, 1) / nodes),
          tokens_(tokens), of_(slots.experts), cost_(count), hosts_(slots.experts), away_(slots.experts) {
        for (int e = 0; e < slots.experts; e++) host(e, hosts(slots, e));
        for (int t = 0; t < count; t++) {
            for (int k = 0; k < chosen; k++) of_[tokens[t * chosen + k]].push_back(t);
            total_ += cost_[t] = cost(t);
        }
    }
    double total() const { return double(total_) * weight_; }  // the mean of a token

    void changed(const Slots& slots, int e) {
        if (e == EMPTY) return;
        uint64_t now = hosts(slots, e);
        if (now == hosts_[e]) return;
        undo_hosts_.emplace_back(e, hosts_[e]);
        host(e, now);
        for (int t : of_[e]) {
            int now = cost(t);
            if (now == cost_[t]) continue;
            undo_.emplace_back(t, cost_[t]);
            total_ += now - cost_[t];
            cost_[t] = now;
        }
    }
    void keep() {
        undo_.clear();
        undo_hosts_.clear();
    }
    void undo() {
        for (; !undo_hosts_.empty(); undo_hosts_.pop_back()) host(undo_hosts_.back().first, undo_hosts_.back().second);
        for (; !undo_.empty(); undo_.pop_back()) {
            auto [t, before] = undo_.back();
            total_ += before - cost_[t];
            cost_[t] = before;
        }
    }

private:
    void host(int e, uint64_t nodes) {
        hosts_[e] = nodes;
        away_[e] = nodes_ - count_bits(nodes);
    }
    uint64_t hosts(const Slots& slots, int e) const {
        uint64_t mask = 0;
        for (int p : slots.at[e]) mask |= uint64_t(1) << (slots.card[p] / cards_per_node_);
        return mask;
    }
    int cost(int t) const { return chosen_ == 8 ? cost<8>(t) : cost<0>(t); }
    template <int chosen>  // loops of known length are twice as fast
    int cost(int t) const {
        const int n = chosen ? chosen : chosen_;
        const int32_t* experts = tokens_ + size_t(t) * n;
        uint64_t needed = 0;
        for (int k = 0; k < n; k++) {
            uint64_t h = hosts_[experts[k]];
            needed |= h & (h - 1) ? 0 : h;
        }
        int out = count_bits(needed) * (nodes_ - 1);
        for (int k = 0; k < n; k++) out += hosts_[experts[k]] & needed ? 0 : away_[experts[k]];
        return out;
    }
};

}  // namespace

extern "C" {

// What a placement is judged by; see mesh/balance.py for the meaning of the terms.
struct Goal {
    int32_t scenarios;        // rows of `loads`, [scenarios, experts]
    const Load* loads;
    const double* weights;    // of each scenario
    const double* shares;     // [experts], loads for even shares, and for the risk; the mean card has 1
    double even, slack;       // weight of uneven even shares, and what of it costs nothing
    double risk, doubt;       // weight of what single experts may bring a card over the mean; log-normal deviation
    int32_t nodes, tokens, chosen;
    const int32_t* sample;    // [tokens, chosen] experts
    double copies;            // weight of a copy to another node
    const uint8_t* old;       // [cards, experts], 1 where the old placement has the expert, or null
    double move;              // weight of a move
    int64_t budget;           // most moves
    double enough;            // stop where the even shares are at most this far above the mean; negative: never
};
}

namespace {

double above(double mean, double variance) {  // E[max(0, X - 1)] of a log-normal X
    if (mean <= 1e-9) return 0;
    double s = std::sqrt(std::log1p(variance / (mean * mean))) + 1e-12;
    double d = std::log(mean) / s + s / 2;
    auto phi = [](double x) { return 0.5 * std::erfc(-x * 0.7071067811865476); };
    return mean * phi(d) - phi(d - s);
}

// A local search: swap the experts of two slots, or give a slot of an expert that has several to another.
class Search {
    Slots& slots_;
    const Goal& goal_;
    Random random_;
    Leveller leveller_;
    Copies copies_;
    vector<uint8_t> on_;        // [cards, experts]
    vector<double> even_;       // of each card, with even shares
    vector<double> sum_, var_, risk_;  // of each card: its experts without replicas
    vector<Flow> flows_, saved_;
    vector<double> cost_, old_cost_;  // of each scenario
    vector<Load> mean_;
    vector<int> order_;
    double even_cost_ = 0, risk_cost_ = 0, flow_cost_ = 0;
    int64_t moves_ = 0;
    const double variance_;

    struct Move {
        int p, q;      // slots: p's expert goes to q
        bool replace;  // q's expert is dropped; else it goes to p
    };

public:
    Search(Slots& slots, const Goal& goal, uint64_t seed)
        : slots_(slots), goal_(goal), random_{seed},
          copies_(slots, std::max(goal.nodes, 1), goal.copies > 0 ? goal.tokens : 0, goal.chosen, goal.sample),
          on_(size_t(slots.cards) * slots.experts), even_(slots.cards), sum_(slots.cards), var_(slots.cards),
          risk_(slots.cards), flows_(goal.scenarios), saved_(goal.scenarios), cost_(goal.scenarios),
          old_cost_(goal.scenarios), mean_(goal.scenarios), order_(goal.scenarios),
          variance_(std::expm1(goal.doubt * goal.doubt)) {
        for (int p = 0; p < slots.count(); p++)
            if (slots.expert[p] != EMPTY) {
                on(slots.card[p], slots.expert[p]) = 1;
                moves_ += moved(slots.card[p], slots.expert[p]);
            }
        for (int e = 0; e < slots.experts; e++) add(e, 1);
        for (int c = 0; c < slots.cards; c++) even_cost_ += uneven(even_[c]);
        for (int s = 0; s < goal.scenarios; s++) {
            const Load* load = goal.loads + size_t(s) * slots.experts;
            flows_[s].share_evenly(slots, load);
            mean_[s] = std::max<Load>(1, mean_of(load, slots.experts, slots.cards));
            flow_cost_ += cost_[s] = level(s);
            order_[s] = s;
        }
    }

    // tries: moves looked at; heat: what a move may cost at first (of the goal), falling to the part `cold` of it.
    void run(int64_t tries, double heat, double cold) {
        double temperature = heat, cooling = std::pow(cold, 1024.0 / double(std::max<int64_t>(tries, 1024)));
        for (int64_t i = 0; i < tries; i++) {
            if (i % 1024 == 0) {
                if (i) temperature *= cooling;
                if (goal_.enough >= 0 && highest() <= 1 + goal_.enough) return;
            }
            Move move;
            int scenario = -1;
            if (propose(move, scenario)) attempt(move, scenario, -temperature * std::log(random_.real()));
        }
    }

    double highest() const { return *std::max_element(even_.begin(), even_.end()); }

private:
    uint8_t& on(int card, int e) { return on_[size_t(card) * slots_.experts + e]; }
    int moved(int card, int e) const { return goal_.old && !goal_.old[size_t(card) * slots_.experts + e]; }

    double uneven(double load) const {
        double d = load - 1;
        if (goal_.slack == 0) return goal_.even * d * d;
        return d > goal_.slack ? goal_.even * (d - goal_.slack) * (d - goal_.slack + 0.01) : 0;
    }
    double level(int s) {
        Load level = leveller_.run(slots_, flows_[s], mean_[s]);
        return goal_.weights[s] * (double(level) / double(mean_[s]) - 1);
    }
    double fixed_cost() const {
        return even_cost_ + goal_.risk * risk_cost_ + goal_.copies * copies_.total() + goal_.move * double(moves_);
    }

    // The expert's part of the cards' even shares and risks.
    void add(int e, double sign) {
        if (e == EMPTY || slots_.at[e].empty()) return;
        int n = slots_.replicas(e);
        for (int p : slots_.at[e]) even_[slots_.card[p]] += sign * goal_.shares[e] / n;
        if (n > 1 || goal_.risk == 0) return;
        int c = slots_.card[slots_.at[e][0]];
        sum_[c] += sign * goal_.shares[e];
        var_[c] = std::max(0.0, var_[c] + sign * variance_ * goal_.shares[e] * goal_.shares[e]);
        double now = above(sum_[c], var_[c]);
        risk_cost_ += now - risk_[c];
        risk_[c] = now;
    }

    bool propose(Move& move, int& scenario) {
        const int cards = slots_.cards;
        int a = random_.below(cards), b = random_.below(cards);
        if (goal_.scenarios && random_.below(4)) {  // out of the cards that are tight in a scenario
            double u = random_.real() * flow_cost_;
            for (scenario = 0; scenario < goal_.scenarios - 1 && (u -= cost_[scenario]) > 0;) scenario++;
            const auto& tight = flows_[scenario].tight;
            for (int i = 0; i < 16 && !tight[a]; i++) a = random_.below(cards);
            for (int i = 0; i < 16 && tight[b]; i++) b = random_.below(cards);
            if (!tight[a] || tight[b]) scenario = -1;
        } else if (random_.below(2) && even_[a] < even_[b]) {
            std::swap(a, b);
        }
        int n = slots_.first[a + 1] - slots_.first[a], m = slots_.first[b + 1] - slots_.first[b];
        if (a == b || !n || !m) return false;
        int p = slots_.first[a] + random_.below(n), q = slots_.first[b] + random_.below(m);
        int e = slots_.expert[p], f = slots_.expert[q];
        if (e == f || (e != EMPTY && on(b, e))) return false;
        bool replace = e != EMPTY && (f == EMPTY || slots_.replicas(f) > 1) && random_.below(goal_.scenarios || goal_.old ? 2 : 8) == 0;
        if (!replace && f != EMPTY && on(a, f)) return false;
        move = {p, q, replace};
        return true;
    }

    void apply(const Move& move) {  // its own inverse for a swap
        auto [p, q, replace] = move;
        int a = slots_.card[p], b = slots_.card[q], e = slots_.expert[p], f = slots_.expert[q];
        if (e != EMPTY) on(b, e) = 1, moves_ += moved(b, e);
        if (f != EMPTY) on(b, f) = 0, moves_ -= moved(b, f);
        slots_.expert[q] = e;
        if (replace) {
            slots_.at[e].push_back(q);
            if (f != EMPTY) drop(f, q);
            return;
        }
        if (e != EMPTY) on(a, e) = 0, moves_ -= moved(a, e), *find(e, p) = q;
        if (f != EMPTY) on(a, f) = 1, moves_ += moved(a, f), *find(f, q) = p;
        slots_.expert[p] = f;
    }
    void revert(const Move& move, int f) {
        if (!move.replace) return apply(move);
        int b = slots_.card[move.q], e = slots_.expert[move.q];
        on(b, e) = 0, moves_ -= moved(b, e);
        drop(e, move.q);
        if (f != EMPTY) on(b, f) = 1, moves_ += moved(b, f), slots_.at[f].push_back(move.q);
        slots_.expert[move.q] = f;
    }
    vector<int>::iterator find(int e, int p) { return std::find(slots_.at[e].begin(), slots_.at[e].end(), p); }
    void drop(int e, int p) { slots_.at[e].erase(find(e, p)); }

    void follow(Flow& flow, const Move& move, int f) {  // the loads of the slots that changed go with them
        auto [p, q, replace] = move;
        int a = slots_.card[p], b = slots_.card[q];
        Load in_p = flow.slot[p], in_q = flow.slot[q];
        if (!replace) {
            std::swap(flow.slot[p], flow.slot[q]);
            flow.card[a] += in_q - in_p;
            flow.card[b] += in_p - in_q;
        } else if (f != EMPTY) {
            flow.slot[q] = 0;
            flow.card[b] -= in_q;
            int best = slots_.at[f][0];
            for (int o : slots_.at[f])
                if (flow.card[slots_.card[o]] < flow.card[slots_.card[best]]) best = o;
            flow.slot[best] += in_q;
            flow.card[slots_.card[best]] += in_q;
        }
    }

    // Makes the move if it does not cost more than `allowed`. Cheap terms first; of the scenarios first the one for
    // which the move was thought of, and no further ones once it is too much.
    void attempt(const Move& move, int scenario, double allowed) {
        int e = slots_.expert[move.p], f = slots_.expert[move.q];
        double before = fixed_cost(), even_before = even_cost_;
        int64_t moves_before = moves_;
        const auto& cards = concerned(move);
        for (int c : cards) even_cost_ -= uneven(even_[c]);
        add(e, -1), add(f, -1);
        apply(move);
        add(e, 1), add(f, 1);
        for (int c : cards) even_cost_ += uneven(even_[c]);
        copies_.changed(slots_, e);
        copies_.changed(slots_, f);

        double delta = fixed_cost() - before;
        bool kept = !(moves_ > goal_.budget && moves_ > moves_before);
        int done = 0;
        if (kept && delta - flow_cost_ <= allowed) {  // else not even level scenarios would make up for it
            for (int i = goal_.scenarios - 1; i > 0; i--) std::swap(order_[i], order_[random_.below(i + 1)]);
            if (scenario >= 0) std::swap(order_[0], *std::find(order_.begin(), order_.end(), scenario));
            for (; done < goal_.scenarios && kept; done++) {
                int s = order_[done];
                saved_[s] = flows_[s];
                old_cost_[s] = cost_[s];
                follow(flows_[s], move, f);
                cost_[s] = level(s);
                delta += cost_[s] - old_cost_[s];
                kept = delta <= allowed;
            }
        }
        kept = kept && delta <= allowed;
        if (kept) {
            for (int i = 0; i < done; i++) flow_cost_ += cost_[order_[i]] - old_cost_[order_[i]];
            copies_.keep();
            return;
        }
        for (int i = 0; i < done; i++) {
            std::swap(flows_[order_[i]], saved_[order_[i]]);
            cost_[order_[i]] = old_cost_[order_[i]];
        }
        for (int c : cards) even_cost_ -= uneven(even_[c]);
        add(e, -1), add(f, -1);
        revert(move, f);
        add(e, 1), add(f, 1);
        for (int c : cards) even_cost_ += uneven(even_[c]);
        even_cost_ = even_before;
        copies_.undo();
    }

    // Cards whose even share a move changes: those with either expert.
    const vector<int>& concerned(const Move& move) {
        concerned_.assign({slots_.card[move.p], slots_.card[move.q]});
        for (int e : {slots_.expert[move.p], slots_.expert[move.q]})
            if (e != EMPTY)
                for (int p : slots_.at[e]) concerned_.push_back(slots_.card[p]);
        std::sort(concerned_.begin(), concerned_.end());
        concerned_.erase(std::unique(concerned_.begin(), concerned_.end()), concerned_.end());
        return concerned_;
    }
    vector<int> concerned_;
};

// The best by score of those whose group is allowed, into out, with their scores in best.
void top(const vector<double>& score, const vector<uint8_t>& allowed, int per_group, vector<double>& best, int32_t* out) {
    const int count = int(best.size());
    int have = 0;
    for (int g = 0; g < int(allowed.size()); g++) {
        if (!allowed[g]) continue;
        for (int e = g * per_group; e < (g + 1) * per_group; e++) {
            if (have == count && score[e] <= best[count - 1]) continue;
            int k = have < count ? have++ : count - 1;
            for (; k > 0 && best[k - 1] < score[e]; k--) best[k] = best[k - 1], out[k] = out[k - 1];
            best[k] = score[e];
            out[k] = e;
        }
    }
}

}  // namespace

extern "C" {

// Loads of the cards [rows, cards] as a split by loads [rows, experts] leaves them, each row by itself.
void level(int experts, int cards, const int32_t* room, const int32_t* expert_of, int rows, const Load* loads, Load* out) {
    Slots slots(experts, cards, room, expert_of);
    Leveller leveller;
    Flow flow;
    for (int i = 0; i < rows; i++) {
        flow.share_evenly(slots, loads + size_t(i) * experts);
        leveller.run_fairly(slots, flow);
        std::copy(flow.card.begin(), flow.card.end(), out + size_t(i) * cards);
    }
}

// A layer's placement, as the calls of every step below take it.
void* slots_new(int experts, int cards, const int32_t* room, const int32_t* expert_of) {
    return new Slots(experts, cards, room, expert_of);
}
void slots_free(void* slots) { delete static_cast<Slots*>(slots); }

// The slots that a rank's rows would go to if only copies to nodes counted [rows, chosen], and which of them were
// `open` [rows, chosen]: the row has no other reason to visit the node, so another replica would do as well. Replicas
// that cost nothing are taken in turns. counts [2, slots]: how many, bound ones and open ones.
void wish(const void* placement, int cards_per_node, int rank, int rows, int chosen, const int64_t* chosen_experts,
          int64_t* out, uint8_t* open, int32_t* counts) {
    const Slots& slots = *static_cast<const Slots*>(placement);
    const int home = rank / cards_per_node;
    auto node = [&](int64_t p) { return slots.card[p] / cards_per_node; };
    vector<int> visited(slots.cards / cards_per_node, -1);
    std::fill(counts, counts + 2 * slots.count(), 0);
    for (int t = 0; t < rows; t++) {
        const int64_t* wanted = chosen_experts + size_t(t) * chosen;
        int64_t* to = out + size_t(t) * chosen;
        uint8_t* is_open = open + size_t(t) * chosen;
        visited[home] = t;
        for (int k = 0; k < chosen; k++) {
            const auto& at = slots.at[wanted[k]];
            to[k] = at.size() == 1 ? at[0] : -1;
            is_open[k] = 0;
            if (to[k] >= 0) visited[node(to[k])] = t;
        }
        for (int pass = 0; pass < 2; pass++)  // first what costs nothing, then the others, which may help each other
            for (int k = 0; k < chosen; k++) {
                if (to[k] >= 0) continue;
                const auto& at = slots.at[wanted[k]];
                int n = int(at.size()), best = -1, best_value = pass ? -1 : 0;
                for (int i = 0; i < n; i++) {
                    int p = at[(i + t + rank) % n];
                    int value = slots.card[p] == rank ? 3 : node(p) == home ? 2 : visited[node(p)] == t ? 1 : 0;
                    if (value > best_value) best = p, best_value = value;
                }
                if (best < 0) continue;
                is_open[k] = best_value == 0;
                to[k] = best;
                visited[node(best)] = t;
            }
        for (int k = 0; k < chosen; k++) counts[is_open[k] * slots.count() + to[k]]++;
    }
}

// What has to change in the wishes of `rank` so that the cards are level, by the wishes of all, counts [cards, 2,
// slots]: shed [2, slots], how many bound and open rows leave a slot, and take [slots], how many come to it. The same
// plan on every rank. No more is moved than brings each card to 1 + tolerance of the mean, or as near as can be; open
// wishes go first, then those of other nodes than the slot's.
void settle(const void* placement, int cards_per_node, const int32_t* counts, double tolerance, int rank, int32_t* shed,
            int32_t* take) {
    const Slots& slots = *static_cast<const Slots*>(placement);
    const int size = slots.count();
    auto first_of_node = [&](int p) { return slots.card[p] / cards_per_node * cards_per_node; };
    auto wished = [&](int r, int kind, int p) { return Load(counts[(size_t(r) * 2 + kind) * size + p]); };
    Flow flow;
    flow.slot.assign(size, 0);
    flow.card.assign(slots.cards, 0);
    vector<int32_t> all(size, 0);  // wishes of all cards; so narrow that many are added at a time
    for (int row = 0; row < 2 * slots.cards; row++)
        for (int p = 0; p < size; p++) all[p] += counts[size_t(row) * size + p];
    Load total = 0;
    for (int p = 0; p < size; p++) flow.card[slots.card[p]] += flow.slot[p] = all[p], total += all[p];
    vector<Load> before = flow.slot;
    Leveller().run(slots, flow, Load(std::ceil(double(total) / slots.cards * (1 + tolerance))));

    std::fill(shed, shed + 2 * size, 0);
    std::fill(take, take + size, 0);
    vector<Load> homeless(slots.cards);
    for (int e = 0; e < slots.experts; e++) {
        const auto& at = slots.at[e];
        if (at.size() < 2) continue;
        std::fill(homeless.begin(), homeless.end(), 0);
        for (int p : at) {
            auto leave = [&](int kind, int first, int end) {
                for (int r = first; r < end && before[p] > flow.slot[p]; r++) {
                    Load part = std::min(before[p] - flow.slot[p], wished(r, kind, p));
                    before[p] -= part;
                    homeless[r] += part;
                    if (r == rank) shed[kind * size + p] = int32_t(part);
                }
            };
            const int first = first_of_node(p), end = first + cards_per_node;
            for (int kind : {1, 0}) {  // open ones of other nodes, of this; bound ones of other nodes, of this
                leave(kind, 0, first);
                leave(kind, end, slots.cards);
                leave(kind, first, end);
            }
        }
        for (bool anywhere : {false, true})  // into the own node first
            for (int p : at) {
                const int first = anywhere ? 0 : first_of_node(p), end = anywhere ? slots.cards : first + cards_per_node;
                for (int r = first; r < end && before[p] < flow.slot[p]; r++) {
                    Load part = std::min(flow.slot[p] - before[p], homeless[r]);
                    before[p] += part;
                    homeless[r] -= part;
                    if (r == rank) take[p] += int32_t(part);
                }
            }
    }
}

// Changes a rank's slots [rows, chosen] by such a plan: first rows that visit the other slot's node anyway.
void reassign(const void* placement, int cards_per_node, int rank, int rows, int chosen, const int64_t* chosen_experts,
              int64_t* out, const uint8_t* open, int32_t* shed, int32_t* take) {
    const Slots& slots = *static_cast<const Slots*>(placement);
    const int size = slots.count(), home = rank / cards_per_node;
    auto node = [&](int64_t p) { return slots.card[p] / cards_per_node; };
    vector<int> visited(slots.cards / cards_per_node, -1);
    for (int pass = 0; pass < 2; pass++)
        for (int t = 0; t < rows; t++) {
            int mark = pass * rows + t;
            int64_t* to = out + size_t(t) * chosen;
            visited[home] = mark;
            for (int k = 0; k < chosen; k++) visited[node(to[k])] = mark;
            for (int k = 0; k < chosen; k++) {
                const auto& at = slots.at[chosen_experts[size_t(t) * chosen + k]];
                int32_t& leaving = shed[open[size_t(t) * chosen + k] * size + to[k]];
                if (at.size() < 2 || leaving <= 0) continue;
                int best = -1;
                for (int p : at)
                    if (take[p] > 0 && (pass || visited[node(p)] == mark) && (best < 0 || take[p] > take[best])) best = p;
                if (best < 0) continue;
                leaving--;
                take[best]--;
                to[k] = best;
                visited[node(best)] = mark;
            }
        }
}

// Tokens [tokens, chosen] as a gate like DeepSeek-V3's would choose them that sends the experts these shares: the two
// best scores of a group decide which groups a token may use. Biases are fitted so that the shares come out.
void gate(int experts, int groups, int top_groups, int chosen, const double* shares, int tokens, int rounds, uint64_t seed,
          int32_t* out) {
    Random random{seed};
    const int per_group = experts / groups;
    vector<float> noise(size_t(tokens) * experts);
    for (auto& x : noise) x = float(random.normal());
    double sum = std::accumulate(shares, shares + experts, 0.0);
    vector<double> bias(experts), score(experts), drawn(experts), best(chosen);
    for (int e = 0; e < experts; e++) bias[e] = 0.5 * std::log(shares[e] / sum * experts + 0.02);
    vector<std::pair<double, int>> order(groups);
    vector<uint8_t> allowed(groups);
    for (int round = 0; round < rounds; round++) {
        std::fill(drawn.begin(), drawn.end(), 0);
        for (int t = 0; t < tokens; t++) {
            for (int e = 0; e < experts; e++) score[e] = bias[e] + double(noise[size_t(t) * experts + e]);
            for (int g = 0; g < groups; g++) {
                double first = -1e30, second = -1e30;
                for (int e = g * per_group; e < (g + 1) * per_group; e++) {
                    if (score[e] > first) second = first, first = score[e];
                    else if (score[e] > second) second = score[e];
                }
                order[g] = {per_group > 1 ? -(first + second) : -first, g};
            }
            std::sort(order.begin(), order.end());
            std::fill(allowed.begin(), allowed.end(), 0);
            for (int g = 0; g < top_groups; g++) allowed[order[g].second] = 1;
            top(score, allowed, per_group, best, out + size_t(t) * chosen);
            for (int k = 0; k < chosen; k++) drawn[out[size_t(t) * chosen + k]]++;
        }
        for (int e = 0; e < experts; e++) {
            double target = shares[e] / sum * tokens * chosen;
            bias[e] += 0.4 * std::log((target + 0.5) / (drawn[e] + 0.5));
        }
    }
}

// Exchanges whole cards between nodes, which leaves their loads as they are, for fewer copies to other nodes.
void arrange(int experts, int cards, const int32_t* room, int32_t* expert_of, int nodes, int tokens, int chosen,
             const int32_t* sample, int64_t tries, double heat, uint64_t seed) {
    Slots slots(experts, cards, room, expert_of);
    Copies copies(slots, nodes, tokens, chosen, sample);
    Random random{seed};
    const int per_node = cards / nodes;
    auto exchange = [&](int a, int b) {
        for (int p = slots.first[a], q = slots.first[b]; p < slots.first[a + 1]; p++, q++) {
            int e = slots.expert[p], f = slots.expert[q];
            if (e != EMPTY) *std::find(slots.at[e].begin(), slots.at[e].end(), p) = -2 - q;
            if (f != EMPTY) *std::find(slots.at[f].begin(), slots.at[f].end(), q) = p;
            if (e != EMPTY) *std::find(slots.at[e].begin(), slots.at[e].end(), -2 - q) = q;
            std::swap(slots.expert[p], slots.expert[q]);
        }
    };
    for (int64_t i = 0; i < tries; i++) {
        int a = random.below(cards), b = random.below(cards);
        if (a / per_node == b / per_node || room[a] != room[b]) continue;
        double before = copies.total(), warmth = heat * (1 - double(i) / double(tries));
        exchange(a, b);
        for (int c : {a, b})
            for (int p = slots.first[c]; p < slots.first[c + 1]; p++) copies.changed(slots, slots.expert[p]);
        if (copies.total() - before <= -warmth * std::log(random.real())) {
            copies.keep();
        } else {
            copies.undo();
            exchange(a, b);
        }
    }
    std::copy(slots.expert.begin(), slots.expert.end(), expert_of);
}

// Improves a placement of one layer in place.
void improve(int experts, int cards, const int32_t* room, int32_t* expert_of, const Goal* goal, int64_t tries, double heat,
             double cold, uint64_t seed) {
    Slots slots(experts, cards, room, expert_of);
    Search(slots, *goal, seed).run(tries, heat, cold);
    std::copy(slots.expert.begin(), slots.expert.end(), expert_of);
}
}
