"""The expert layer's launches, one kernel for each operation against the fused kernels (`costs`).

DeepSeek-V3 in bfloat16, 256 experts over 32 cards, so many rows of each card, as many for every expert: a card's 8
experts have 8 of its rows' choices from all cards together. Without the exchange. Single operations are those of
`kernels.reference`, of the products of all experts one launch each. Bytes of the fused kernels are those of their
arguments (`moe_examples`). The router's products are of float32, and are timed as if they were of bfloat16, in both.
"""

from collections.abc import Iterator

from tests.kernels.triton.example import Maker
from tests.kernels.triton.gate_examples import V3, logits_of, router
from tests.kernels.triton.launch import Launch, size
from tests.kernels.triton.moe_examples import FORMS, Sizes, down, gate_up, order, permute, unpermute

EXPERTS, HIDDEN, INNER, SLOTS = 256, 7168, 2048, 8
CHOICES, GROUPS = V3.experts_per_token, V3.groups
ROUTER_PARTS = 16
PLAIN, FLOAT, WHOLE = 2, 4, 8  # bytes of a number


def routing(rows: int) -> list[Launch]:
    """Scores of all experts to chosen ones and their weights."""
    scores, chosen = rows * EXPERTS * FLOAT, rows * CHOICES
    groups, weights = rows * GROUPS * FLOAT, chosen * FLOAT
    read = rows * HIDDEN * PLAIN + EXPERTS * HIDDEN * FLOAT
    return [
        Launch("scores", read + scores, 2.0 * rows * HIDDEN * EXPERTS),
        Launch("sigmoid", 2 * scores),
        Launch("bias", 2 * scores),
        Launch("two best of each group", scores + 2 * groups),
        Launch("their sums", 3 * groups),
        Launch("best groups", groups + rows * V3.groups_per_token * WHOLE),
        Launch("mask of groups", rows * V3.groups_per_token * WHOLE + rows * EXPERTS),
        Launch("masked scores", 2 * scores + rows * EXPERTS),
        Launch("best experts", scores + chosen * WHOLE),
        Launch("their scores", chosen * WHOLE + 2 * weights),
        Launch("sums of weights", weights + rows * FLOAT),
        Launch("weights by their sums", 2 * weights + rows * FLOAT),
        Launch("scaled weights", 2 * weights),
    ]


def feed_forward(name: str, slots: int, rows: int) -> list[Launch]:
    """SwiGLU of so many rows altogether."""
    matrix, wide, inner = slots * HIDDEN * INNER * PLAIN, rows * HIDDEN * PLAIN, rows * INNER * PLAIN
    flops = 2.0 * rows * HIDDEN * INNER
    return [
        Launch(f"gate of {name}", matrix + wide + inner, flops),
        Launch(f"up of {name}", matrix + wide + inner, flops),
        Launch(f"SiLU of {name}", 2 * inner),
        Launch(f"gate times up of {name}", 3 * inner),
        Launch(f"down of {name}", matrix + inner + wide, flops),
    ]


def unfused(rows: int) -> list[Launch]:
    pairs = rows * CHOICES
    wide = pairs * HIDDEN * PLAIN
    return [
        *routing(rows),
        Launch("sorted choices", 2 * pairs * WHOLE),
        Launch("rows of each expert", pairs * WHOLE + SLOTS * WHOLE),
        Launch("where experts begin", 2 * SLOTS * WHOLE),
        Launch("rows in the order of experts", 2 * wide + pairs * WHOLE),
        *feed_forward("experts", SLOTS, pairs),
        Launch("results by weights", 2 * wide + pairs * FLOAT),
        Launch("sums of results", 2 * wide + pairs * WHOLE),
        *feed_forward("the shared expert", 1, rows),
    ]


def fused(rows: int) -> Iterator[Launch]:
    make, plain = Maker("meta"), FORMS[0]
    routed = Sizes(R=rows * CHOICES, K=1, S=SLOTS, D=HIDDEN, I=INNER)
    shared = Sizes(R=rows, K=1, S=1, D=HIDDEN, I=INNER)
    product = 2.0 * HIDDEN * INNER
    calls = (
        (
            "router_scores",
            router(rows, EXPERTS, HIDDEN, ROUTER_PARTS, "ieee", make),
            2.0 * rows * HIDDEN * EXPERTS,
        ),
        ("gate", logits_of(V3, rows, EXPERTS, ROUTER_PARTS, False, make), 0.0),
        ("expert_order", order(routed, make), 0.0),
        ("permute", permute(routed, make), 0.0),
        ("gate_up", gate_up(plain, routed, make), 2 * routed.R * product),
        ("down", down(plain, routed, make), routed.R * product),
        ("unpermute", unpermute(routed, make), 0.0),
        ("gate_up of the shared expert", gate_up(plain, shared, make), 2 * rows * product),
        ("down of the shared expert", down(plain, shared, make), rows * product),
    )
    for name, arguments, flops in calls:
        yield Launch(name, size(arguments.values()), flops)
