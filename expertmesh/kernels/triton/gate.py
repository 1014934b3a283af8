"""The gate (DeepSeek-V2, section 2.1.2; V3, section 2.1.2): scores of experts, groups of experts, the best of each.

Everything is float32: scores decide who computes a row.
"""

import triton
import triton.language as tl


@triton.jit
def router_scores(
    x_TD, weight_ED, logits_PTE, T, PARTS: tl.constexpr, E: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x [T, D] times weight [E, D], in float32: logits [PARTS, T, E], each part the sum over its share of D. Few rows
    alone would leave most of a card idle. `gate` adds the parts up, in order.

    PRECISION: how matrix units multiply float32. A program has BLOCK_T rows, BLOCK_E experts and a part.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.program_id(2)
    SHARE: tl.constexpr = (D + PARTS - 1) // PARTS
    end = tl.minimum((part + 1) * SHARE, D)
    sums = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(part * SHARE, end, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x = tl.load(x_TD + t[:, None] * D + d[None, :], mask=(t[:, None] < T) & (d[None, :] < end), other=0.0)
        w = tl.load(
            weight_ED + e[:, None] * D + d[None, :], mask=(e[:, None] < E) & (d[None, :] < end), other=0.0
        )
        sums = tl.dot(x.to(tl.float32), tl.trans(w), sums, input_precision=PRECISION)
    to = logits_PTE + (part * T + t[:, None]) * E + e[None, :]
    tl.store(to, sums, mask=(t[:, None] < T) & (e[None, :] < E))


@triton.jit
def gate(
    logits_PTE, bias_E, experts_TK, weights_TK, T, scale,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr,
    K: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    PAD_GROUPS: tl.constexpr, PAD_SIZE: tl.constexpr, PAD_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Experts of each row [T, K] and their weights, float32: the K with the highest scores in the KEPT best groups.

    logits [PARTS, T, E], E = GROUPS * SIZE, in parts that are added up. bias [E] or None; it counts for who is chosen
    alone. A group is worth the sum of its BEST highest scores, one or two of them. Other groups' experts have -inf:
    biased scores may be negative. Of equal ones the lowest id is chosen.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    N: tl.constexpr = PAD_GROUPS * PAD_SIZE
    n = tl.arange(0, N)
    g, s = n // PAD_SIZE, n % PAD_SIZE
    e, real = g * SIZE + s, (g < GROUPS) & (s < SIZE)
    # What lies in memory without gaps is read as such, and padded in registers.
    g, s = tl.arange(0, PAD_GROUPS)[:, None], tl.arange(0, PAD_SIZE)[None, :]
    at, within = g * SIZE + s, (g < GROUPS) & (s < SIZE)
    logits = tl.zeros((BLOCK_T, PAD_GROUPS, PAD_SIZE), tl.float32)
    for part in range(PARTS):
        rows = logits_PTE + (part * T + t[:, None, None]) * (GROUPS * SIZE)
        logits += tl.load(rows + at[None, :, :], mask=(t[:, None, None] < T) & within[None, :, :], other=0.0)
    logits = tl.reshape(logits, (BLOCK_T, N))
    scores = _scores(logits, real, SIGMOID)
    choice = scores
    if bias_E is not None:
        choice += tl.reshape(tl.load(bias_E + at, mask=within, other=0.0), (1, N))
    allowed = tl.broadcast_to(real[None, :], (BLOCK_T, N))
    if KEPT < GROUPS:
        grouped = tl.reshape(tl.where(allowed, choice, float("-inf")), (BLOCK_T, PAD_GROUPS, PAD_SIZE))
        kept = _best_groups(grouped, GROUPS, KEPT, BEST)
        kept = tl.broadcast_to(kept[:, :, None], (BLOCK_T, PAD_GROUPS, PAD_SIZE))
        allowed = allowed & (tl.reshape(kept, (BLOCK_T, N)) > 0)
    k = tl.arange(0, PAD_K)
    experts = tl.zeros((BLOCK_T, PAD_K), tl.int32)
    weights = tl.zeros((BLOCK_T, PAD_K), tl.float32)
    for i in tl.static_range(K):
        best = _first_of_highest(choice, allowed, e)
        chosen = e[None, :] == best[:, None]
        allowed = allowed & (e[None, :] != best[:, None])
        weight = tl.sum(tl.where(chosen & real[None, :], scores, 0.0), axis=1)
        experts = tl.where(k[None, :] == i, best[:, None], experts)
        weights = tl.where(k[None, :] == i, weight[:, None], weights)
    if NORMALISE:
        weights = weights / (tl.sum(weights, axis=1) + 1e-20)[:, None]
    to, mask = t[:, None] * K + k[None, :], (t[:, None] < T) & (k[None, :] < K)
    tl.store(experts_TK + to, experts.to(experts_TK.dtype.element_ty), mask=mask)
    tl.store(weights_TK + to, weights * scale, mask=mask)


@triton.jit
def _scores(logits_TN, real_N, SIGMOID: tl.constexpr):
    if SIGMOID:
        return tl.sigmoid(logits_TN)
    logits_TN = tl.where(real_N[None, :], logits_TN, float("-inf"))
    raised = tl.exp(logits_TN - tl.max(logits_TN, axis=1)[:, None])
    return raised / tl.sum(raised, axis=1)[:, None]


@triton.jit
def _first_of_highest(values_TN, allowed_TN, id_N):
    """The lowest id among those of the allowed that have the highest value, [T]. There is one even if all are NaN."""
    values = tl.where(allowed_TN & (values_TN == values_TN), values_TN, float("-inf"))
    highest = allowed_TN & (values == tl.max(values, axis=1)[:, None])
    return tl.min(tl.where(highest, id_N[None, :], 1 << 30), axis=1)


@triton.jit
def _best_groups(choice_TGS, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr):
    """[T, G] int32: 1 for the KEPT best groups."""
    g, s = tl.arange(0, choice_TGS.shape[1]), tl.arange(0, choice_TGS.shape[2])
    worth = tl.max(choice_TGS, axis=2)
    if BEST == 2:
        at = tl.min(tl.where(choice_TGS == worth[:, :, None], s[None, None, :], choice_TGS.shape[2]), axis=2)
        worth += tl.max(tl.where(s[None, None, :] == at[:, :, None], float("-inf"), choice_TGS), axis=2)
    left = tl.broadcast_to((g < GROUPS)[None, :], (choice_TGS.shape[0], choice_TGS.shape[1]))
    kept = tl.zeros((choice_TGS.shape[0], choice_TGS.shape[1]), tl.int32)
    for _ in tl.static_range(KEPT):
        best = _first_of_highest(worth, left, g)
        kept = tl.where(g[None, :] == best[:, None], 1, kept)
        left = left & (g[None, :] != best[:, None])
    return kept
