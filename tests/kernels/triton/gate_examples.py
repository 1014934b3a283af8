"""Examples of the kernels that route, checked against `kernels.reference`."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels import reference
from expertmesh.kernels.triton.tiles import ASCEND, TARGETS
from expertmesh.kernels.types import Routing
from tests.kernels.triton.example import Arguments, Example, Maker


def logits_of(r: Routing, rows: int, experts: int, parts: int, ties: bool, make: Maker) -> dict[str, Any]:
    logits = make.normal(parts, rows, experts, dtype=torch.float32)
    bias = make.normal(experts, scale=0.1, dtype=torch.float32)
    if ties and make.device.type != "meta":
        logits, bias = logits.mul(2).round(), bias.zero_()
    groups = r.groups if r.method != "greedy" else 1
    return {
        "logits_PTE": logits, "bias_E": bias - 2.0 if r.method == "noaux_tc" else None,
        "experts_TK": make.empty(rows, r.experts_per_token, dtype=torch.int64),
        "weights_TK": make.empty(rows, r.experts_per_token, dtype=torch.float32), "T": rows, "scale": r.scale,
        "PARTS": parts, "GROUPS": groups, "SIZE": experts // groups, "KEPT": r.groups_per_token if groups > 1 else 1,
        "BEST": min(2, experts // groups) if r.method == "noaux_tc" else 1, "K": r.experts_per_token,
        "SIGMOID": r.scoring == "sigmoid", "NORMALISE": r.normalise,
    }  # fmt: skip


def gate_reference(r: Routing, a: Arguments) -> dict[str, Tensor]:
    experts, weights = reference.route(a["logits_PTE"].sum(0), a["bias_E"], r)
    return {"experts_TK": experts, "weights_TK": weights}


def stable_gate_reference(r: Routing, a: Arguments) -> dict[str, Tensor]:
    """One row after the other, and sorts that keep the order of equals."""
    scores = a["logits_PTE"].sum(0).sigmoid()
    chosen = []
    for row in (scores + a["bias_E"]).unflatten(-1, (r.groups, -1)):
        worth = row.sort(dim=-1, descending=True).values[:, :2].sum(-1)
        outside = worth.argsort(descending=True, stable=True)[r.groups_per_token :]
        row[outside] = float("-inf")
        chosen.append(row.flatten().argsort(descending=True, stable=True)[: r.experts_per_token])
    experts = torch.stack(chosen)
    weights = scores.gather(-1, experts)
    return {"experts_TK": experts, "weights_TK": weights / (weights.sum(-1, keepdim=True) + 1e-20) * r.scale}


V3 = Routing(8, 8, 4, "noaux_tc", "sigmoid", True, 2.5)
V2 = Routing(6, 8, 3, "group_limited_greedy", "softmax", False, 16.0)
LITE = Routing(6, 1, 1, "greedy", "softmax", False, 1.0)


def gates() -> list[Example]:
    def example(
        name: str, r: Routing, rows: int, experts: int, parts: int = 1, full: bool = False
    ) -> Example:
        made = partial(logits_of, r, rows, experts, parts, False)
        return Example("gate", name, made, partial(gate_reference, r), full)

    ties = Example(
        "gate", "ties", partial(logits_of, V3, 9, 256, 1, True), partial(stable_gate_reference, V3)
    )
    return [
        example("V3 rows", V3, 6, 256, 3),
        example("V2 rows", V2, 5, 160),
        example("V2-Lite rows", LITE, 3, 64, 2),
        example("odd groups", replace(V3, experts_per_token=5, groups=5, groups_per_token=3), 7, 35),
        example("groups of one", replace(V3, experts_per_token=3, groups=6, groups_per_token=4), 5, 6),
        example("all groups", replace(V3, groups=4, experts_per_token=12), 5, 12),
        example("empty", V3, 0, 256),
        ties,
        example("V3", V3, 128, 256, 16, full=True),
    ]


def router(rows: int, experts: int, width: int, parts: int, precision: str, make: Maker) -> dict[str, Any]:
    return {
        "x_TD": make.normal(rows, width), "weight_ED": make.normal(experts, width, scale=0.1, dtype=torch.float32),
        "logits_PTE": make.empty(parts, rows, experts, dtype=torch.float32), "T": rows, "PARTS": parts, "E": experts,
        "D": width, "PRECISION": precision,
    }  # fmt: skip


def router_reference(a: Arguments) -> dict[str, Tensor]:
    share = -(-a["D"] // a["PARTS"])
    logits = torch.zeros_like(a["logits_PTE"])
    for part, (x, w) in enumerate(
        zip(a["x_TD"].split(share, 1), a["weight_ED"].split(share, 1), strict=True)
    ):
        logits[part] = x.float() @ w.T
    return {"logits_PTE": logits}


def routers() -> list[Example]:
    cuda = tuple(t for t in TARGETS if t not in ASCEND)
    small = {
        "ragged": (21, 19, 75, 3),
        "one row": (1, 8, 16, 1),
        "parts": (3, 33, 100, 7),
        "empty": (0, 8, 16, 2),
    }
    v3 = (128, 256, 7168, 16)
    return [
        *(
            Example("router_scores", name, partial(router, *sizes, "ieee"), router_reference)
            for name, sizes in small.items()
        ),
        Example("router_scores", "V3 tf32x3", partial(router, *v3, "tf32x3"), router_reference, True, cuda),
        Example("router_scores", "V3 ieee", partial(router, *v3, "ieee"), router_reference, True, ASCEND),
    ]


EXAMPLES = [*gates(), *routers()]
