"""The ops of an expert layer, made of kernels. Signatures and shapes are documented in `kernels.table`, semantics in
`kernels.reference`."""

from typing import TypeAlias

import torch
from torch import Tensor

from expertmesh.kernels import eager
from expertmesh.kernels.triton.table import KERNELS
from expertmesh.kernels.triton.tiles import target_of, tiles
from expertmesh.kernels.triton.weights import Quantised
from expertmesh.kernels.types import Routing

# Columns of a row that share a scale where they are not all of it.
GROUP = 128
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Variants of the products for matrices that are quantised.
VARIANTS = {torch.int8: "_int8", torch.float8_e4m3fn: "_fp8", torch.uint8: "_bytes"}
# Programs that share the sums of a router's products: few rows alone would leave most of a card idle.
ROUTER_PARTS = 16


Matrices: TypeAlias = Tensor | Quantised
# Numbers, and where they are quantised their scales, of so many columns each.
Rows: TypeAlias = tuple[Tensor, Tensor | None, int]


def router(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    (T, D), E = x_TD.shape, weight_ED.shape[0]
    logits = x_TD.new_empty(ROUTER_PARTS, T, E, dtype=torch.float32)
    # Three products of TF32 are as exact as one of float32, and faster.
    precision = "tf32x3" if x_TD.device.type == "cuda" else "ieee"
    KERNELS["router_scores"](
        x_TD=x_TD,
        weight_ED=weight_ED,
        logits_PTE=logits,
        T=T,
        PARTS=ROUTER_PARTS,
        E=E,
        D=D,
        PRECISION=precision,
    )
    return route(logits, bias_E, routing)


def route(logits_PTE: Tensor, bias_E: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """Of logits in parts that are added up."""
    (parts, T, E), r = logits_PTE.shape, routing
    groups = r.groups if r.method != "greedy" else 1
    experts = logits_PTE.new_empty(T, r.experts_per_token, dtype=torch.int64)
    weights = logits_PTE.new_empty(T, r.experts_per_token)
    KERNELS["gate"](
        logits_PTE=logits_PTE, bias_E=bias_E, experts_TK=experts, weights_TK=weights, T=T, scale=r.scale, PARTS=parts,
        GROUPS=groups, SIZE=E // groups, KEPT=r.groups_per_token if groups > 1 else 1,
        # V3 judges a group by its two best experts, V2 by the best one.
        BEST=min(2, E // groups) if r.method == "noaux_tc" else 1,
        K=r.experts_per_token, SIGMOID=r.scoring == "sigmoid", NORMALISE=r.normalise,
    )  # fmt: skip
    return experts, weights


def experts(
    x_RD: Tensor, slots_RK: Tensor, weights_RK: Tensor, gate_up_SID: Matrices, down_SDI: Matrices
) -> Tensor:
    (R, K), D = slots_RK.shape, x_RD.shape[1]
    order, place, offsets = expert_order(slots_RK, _numbers(down_SDI).shape[0])
    x = permute(x_RD, order, offsets[-1:], K, _numbers(gate_up_SID).dtype)
    y = _feed_forward(x, offsets, gate_up_SID, down_SDI, x_RD.dtype)
    out = torch.empty_like(x_RD)
    KERNELS["unpermute"](y_PD=y, place_RK=place, weights_RK=weights_RK, out_RD=out, R=R, D=D, K=K)
    return out


def swiglu(x_TD: Tensor, gate_up: Matrices, down: Matrices) -> Tensor:
    """A dense layer is one expert that has all rows."""
    return _feed_forward(*_one_expert(x_TD, gate_up), gate_up, down, x_TD.dtype)


def linear(x_TD: Tensor, weight: Matrices, bias: Tensor | None = None) -> Tensor:
    """By library kernels, but with weights that are quantised: the second product of one expert."""
    if not isinstance(weight, Quantised):
        return eager.linear(x_TD, weight, bias)
    y = _product(*_one_expert(x_TD.contiguous(), weight), weight, x_TD.dtype)
    return y if bias is None else y + bias


def _one_expert(x_TD: Tensor, matrices: Matrices) -> tuple[Rows, Tensor]:
    """All rows as products with these want them, and where the only expert's begin and end."""
    (T, D), dtype = x_TD.shape, _numbers(matrices).dtype
    offsets = torch.arange(2, device=x_TD.device, dtype=torch.int32) * T
    return quantise(x_TD, dtype, _whole(dtype)) if dtype in LARGEST else (x_TD, None, D), offsets


def expert_order(slots_RK: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a row and a choice, sorted by slot: the pair at each place, the place of each pair (-1: none), and where
    each slot's places begin and end, [S + 1]; int32."""
    P = slots_RK.numel()
    order, place = slots_RK.new_empty(2, P, dtype=torch.int32)
    offsets = slots_RK.new_empty(slots + 1, dtype=torch.int32)
    KERNELS["expert_order"](
        slots_P=slots_RK, order_P=order, place_P=place, offsets_N=offsets, P=P, N=slots + 1
    )
    return order, place, offsets


def permute(x_RD: Tensor, order_P: Tensor, end: Tensor, choices: int, dtype: torch.dtype) -> Rows:
    """Rows in expert order, as products with matrices of this type want them. end: how many there are."""
    if dtype in LARGEST:
        return quantise(x_RD, dtype, _whole(dtype), order_P, end, choices)
    P, D = order_P.shape[0], x_RD.shape[1]
    y = x_RD.new_empty(P, D)
    KERNELS["permute"](x_RD=x_RD, order_P=order_P, end=end, y_PD=y, P=P, D=D, K=choices)
    return y, None, D


def quantise(
    x_RD: Tensor, dtype: torch.dtype, whole: bool, order_P: Tensor | None = None, end: Tensor | None = None,
    choices: int = 1,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Rows as 8-bit numbers, scales [P, groups], and the columns of a group: all where rows are taken as a whole."""
    P, D = (x_RD if order_P is None else order_P).shape[0], x_RD.shape[1]
    group = D if whole else GROUP
    y, scale = x_RD.new_empty(P, D, dtype=dtype), x_RD.new_empty(P, -(-D // group), dtype=torch.float32)
    KERNELS["quantise"](
        x_RD=x_RD, order_P=order_P, end=end, y_PD=y, scale_PG=scale, P=P, D=D, K=choices, GROUP=GROUP, WHOLE=whole,
        LARGEST=LARGEST[dtype],
    )  # fmt: skip
    return y, scale, group


def dequantise(numbers_TD: Tensor, scales_TG: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows that were quantised in groups of 128 columns."""
    T, D = numbers_TD.shape
    y = numbers_TD.new_empty(T, D, dtype=dtype)
    KERNELS["dequantise"](x_TD=numbers_TD, scale_TG=scales_TG, y_TD=y, T=T, D=D, GROUP=GROUP)
    return y


def _whole(dtype: torch.dtype) -> bool:
    """Whether rows that multiply such matrices have one scale each: whole numbers have (W8A8), FP8 has blocks."""
    return dtype == torch.int8


def _numbers(matrices: Matrices) -> Tensor:
    return matrices.numbers if isinstance(matrices, Quantised) else matrices


def _feed_forward(x: Rows, offsets: Tensor, gate_up: Matrices, down: Matrices, dtype: torch.dtype) -> Tensor:
    """Both products of experts with rows in their order."""
    (P, D), S, I = x[0].shape, offsets.shape[0] - 1, _numbers(down).shape[-1]  # noqa: E741
    kernel, kind = KERNELS["gate_up" + _variant(gate_up)], _numbers(down).dtype
    # Ascend's matrix units would hand every block of a sum to vector units to be scaled, which take longer than the
    # products: there a row has one scale, and is quantised when all of it is known.
    later = kind == torch.int8 and x[0].device.type == "npu"
    h: Rows = (x[0].new_empty(P, I, dtype=dtype), None, I)
    if kind in LARGEST and not later:
        group = tiles(kernel.name, target_of(offsets.device))["BLOCK_I"]
        h = x[0].new_empty(P, I, dtype=kind), offsets.new_empty(P, -(-I // group), dtype=torch.float32), group
    kernel(
        x_PD=x[0], x_scale=x[1], **_matrix(gate_up, "w_SID", D), offsets=offsets, h_PI=h[0], h_scale=h[1], S=S, D=D,
        I=I, X_GROUP=x[2], LARGEST=LARGEST.get(kind, 0.0),
    )  # fmt: skip
    if later:
        h = quantise(h[0], kind, whole=True)
    return _product(h, offsets, down, dtype)


def _product(h: Rows, offsets: Tensor, down: Matrices, dtype: torch.dtype) -> Tensor:
    """Rows in the order of their matrices, each times its own: [P, D]."""
    (P, I), D, S = h[0].shape, _numbers(down).shape[-2], offsets.shape[0] - 1  # noqa: E741
    y = h[0].new_empty(P, D, dtype=dtype)
    KERNELS["down" + _variant(down)](
        h_PI=h[0], h_scale=h[1], **_matrix(down, "w_SDI", I), offsets=offsets, y_PD=y, S=S, D=D, I=I, X_GROUP=h[2]
    )  # fmt: skip
    return y


def _variant(matrices: Matrices) -> str:
    """End of the names of kernels for these."""
    return VARIANTS.get(_numbers(matrices).dtype, "")


def _matrix(matrices: Matrices, name: str, columns: int) -> dict[str, Tensor | int | None]:
    if isinstance(matrices, Quantised):
        scales, rows, group = matrices.scales, matrices.rows, matrices.group
        return {name: matrices.numbers, "w_scale": scales, "W_ROWS": rows, "W_GROUP": min(group, columns)}
    return {name: matrices, "w_scale": None, "W_ROWS": 1, "W_GROUP": columns}
