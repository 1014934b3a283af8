"""Examples of the kernels of the expert layer, checked against what an exchange sends and plain products."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from expertmesh.comm import rows as wire
from expertmesh.kernels.triton.tiles import ASCEND, CPU, TARGETS, tiles
from expertmesh.mesh.traffic import FORMATS
from tests.kernels.triton import gate_examples
from tests.kernels.triton.example import Arguments, Example, Maker

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Columns of a row that share a scale in an exchange.
BLOCK = FORMATS["int8"].scaled
# Of whole numbers Triton makes no products in Blackwell's tensor memory.
INT8_TARGETS = tuple(t for t in TARGETS if t != "sm_100")
FP8_TARGETS = tuple(t for t in TARGETS if t not in (*ASCEND, "sm_80"))


# ---- rows in the order of their experts


@dataclass(frozen=True)
class Sizes:
    """R rows with K choices, S slots, D hidden, I inner, B columns of a block with one scale. mine: share of choices
    that are my slots'."""

    R: int = 11
    K: int = 3
    S: int = 5
    D: int = 72
    I: int = 40  # noqa: E741
    B: int = 32
    mine: float = 0.6


# DeepSeek-V3 with 256 experts over 32 cards, and 128 rows of each: 8 rows an expert and card.
FULL = Sizes(R=2048, K=8, S=8, D=7168, I=2048, B=128)
SMALL = {
    "ragged": Sizes(),
    "even": Sizes(R=32, K=2, S=2, D=64, I=32, mine=1.0),
    "one row": Sizes(R=1, K=1, S=1, D=16, I=16, mine=1.0),
    "one slot has all": Sizes(R=37, K=1, S=4, D=32, I=48, mine=0.0),
    "none is mine": Sizes(R=4, mine=-1.0),
    "empty": Sizes(R=0),
}
# Rows of several blocks with a scale each, the last one short.
WIDE = {"wide": Sizes(D=300), "even": Sizes(R=3, D=512), "narrow": Sizes(D=40), "empty": Sizes(R=0)}


def slots_of(s: Sizes, make: Maker) -> Tensor:
    """[R, K]: different slots, -1 where an expert is not mine."""
    if make.device.type == "meta":
        return make.empty(s.R, s.K, dtype=torch.int64)
    chance = make.normal(s.R, s.K, dtype=torch.float32).sigmoid()
    if not s.R:
        return make.empty(0, s.K, dtype=torch.int64)
    slots = torch.stack([make.shuffled(s.K, s.S) for _ in range(s.R)])
    if s.mine == 0.0:
        return torch.full_like(slots, s.S - 2)
    return slots.masked_fill(chance > s.mine, -1)


def sorted_pairs(slots_RK: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """order_P, place_P, offsets, as torch's stable sort gives them; -7 where nothing is written."""
    flat = slots_RK.flatten()
    by_slot = flat.argsort(stable=True)
    order = by_slot[(flat < 0).sum() :].int()
    place = torch.full_like(flat, -1, dtype=torch.int32)
    place[order.long()] = torch.arange(len(order), dtype=torch.int32)
    ends = torch.bincount(flat[flat >= 0], minlength=slots).cumsum(0)
    offsets = torch.cat((ends.new_zeros(1), ends)).int()
    return torch.cat((order, order.new_full((len(flat) - len(order),), -7))), place, offsets


def order(s: Sizes, make: Maker) -> dict[str, Any]:
    P = s.R * s.K
    return {
        "slots_P": slots_of(s, make), "order_P": make.empty(P, dtype=torch.int32),
        "place_P": make.empty(P, dtype=torch.int32), "offsets_N": make.empty(s.S + 1, dtype=torch.int32), "P": P,
        "N": s.S + 1,
    }  # fmt: skip


def order_reference(a: Arguments) -> dict[str, Tensor]:
    found = sorted_pairs(a["slots_P"], a["N"] - 1)
    return dict(zip(("order_P", "place_P", "offsets_N"), found, strict=True))


def pairs(s: Sizes, make: Maker) -> tuple[Tensor, Tensor, Tensor]:
    if make.device.type == "meta":
        order, place, offsets = (make.empty(n, dtype=torch.int32) for n in (s.R * s.K, s.R * s.K, s.S + 1))
        return order, place, offsets
    return sorted_pairs(slots_of(s, make), s.S)


def permute(s: Sizes, make: Maker) -> dict[str, Any]:
    order_P, _, offsets = pairs(s, make)
    P = s.R * s.K
    return {
        "x_RD": make.normal(s.R, s.D), "order_P": order_P, "end": offsets[-1:], "y_PD": make.empty(P, s.D), "P": P,
        "D": s.D, "K": s.K,
    }  # fmt: skip


def rows_in_order(a: Arguments) -> Tensor:
    """Of which rows of y is known what they are, and which rows of x they are."""
    if a["order_P"] is None:
        return torch.arange(a["P"])
    return a["order_P"][: int(a["end"])].long() // a["K"]


def permute_reference(a: Arguments) -> dict[str, Tensor]:
    y, rows = a["y_PD"].clone(), rows_in_order(a)
    y[: len(rows)] = a["x_RD"][rows]
    return {"y_PD": y}


def unpermute(s: Sizes, make: Maker) -> dict[str, Any]:
    _, place, _ = pairs(s, make)
    return {
        "y_PD": make.normal(s.R * s.K, s.D), "place_RK": place.view(s.R, s.K),
        "weights_RK": make.normal(s.R, s.K, dtype=torch.float32), "out_RD": make.empty(s.R, s.D), "R": s.R, "D": s.D,
        "K": s.K,
    }  # fmt: skip


def unpermute_reference(a: Arguments) -> dict[str, Tensor]:
    weights = a["weights_RK"].masked_fill(a["place_RK"] < 0, 0)
    y = a["y_PD"][a["place_RK"].clamp(min=0).long()].float()
    return {"out_RD": torch.einsum("rk,rkd->rd", weights, y).to(a["out_RD"].dtype)}


# ---- 8-bit numbers


def quantise(dtype: torch.dtype, whole: bool, ordered: bool, s: Sizes, make: Maker) -> dict[str, Any]:
    order_P, _, offsets = pairs(s, make)
    P = s.R * s.K if ordered else s.R
    x = make.normal(s.R, s.D)
    if s.R and make.device.type != "meta":
        x[0] = 0.0
    groups = 1 if whole else -(-s.D // BLOCK)
    return {
        "x_RD": x, "order_P": order_P if ordered else None, "end": offsets[-1:] if ordered else None,
        "y_PD": make.empty(P, s.D, dtype=dtype), "scale_PG": make.empty(P, groups, dtype=torch.float32), "P": P,
        "D": s.D, "K": s.K if ordered else 1, "GROUP": BLOCK, "WHOLE": whole, "LARGEST": LARGEST[dtype],
    }  # fmt: skip


def as_sent(x_TD: Tensor, dtype: torch.dtype, block: int) -> tuple[Tensor, Tensor]:
    """Numbers and scales as rows of an exchange have them, with blocks of so many columns."""
    name = "int8" if dtype == torch.int8 else "fp8"
    numbers, scales = wire.quantise(x_TD, replace(FORMATS[name], scaled=block))
    return torch.from_numpy(numbers).view(dtype), torch.from_numpy(scales).view(torch.float32)


def quantise_reference(a: Arguments) -> dict[str, Tensor]:
    y, scale, rows = a["y_PD"].clone(), a["scale_PG"].clone(), rows_in_order(a)
    block = a["D"] if a["WHOLE"] else a["GROUP"]
    y[: len(rows)], scale[: len(rows)] = as_sent(a["x_RD"][rows], y.dtype, block)
    return {"y_PD": y, "scale_PG": scale}


def dequantise(dtype: torch.dtype, s: Sizes, make: Maker) -> dict[str, Any]:
    x = make.normal(s.R, s.D, dtype=torch.float32)
    if make.device.type == "meta":
        numbers = make.empty(s.R, s.D, dtype=dtype)
        scales = make.empty(s.R, -(-s.D // BLOCK), dtype=torch.float32)
    else:
        numbers, scales = as_sent(x, dtype, BLOCK)
    return {
        "x_TD": numbers, "scale_TG": scales, "y_TD": make.empty(s.R, s.D), "T": s.R, "D": s.D, "GROUP": BLOCK,
    }  # fmt: skip


def dequantise_reference(a: Arguments) -> dict[str, Tensor]:
    return {"y_TD": floats(a["x_TD"], a["scale_TG"], 1, a["GROUP"]).to(a["y_TD"].dtype)}


# ---- products of experts


@dataclass(frozen=True)
class Form:
    """How rows and matrices are kept: types of 8 bits or None, whether a row has one scale and a matrix one for each
    output (else blocks have them), and whether what lies between the products is quantised tile by tile."""

    name: str
    x: torch.dtype | None = None
    w: torch.dtype | None = None
    whole: bool = False
    between: bool = False
    targets: tuple[str, ...] = TARGETS


FORMS = (
    Form(""),
    Form("_int8", torch.int8, torch.int8, whole=True, targets=INT8_TARGETS),
    Form("_int8", torch.int8, torch.int8, whole=True, between=True, targets=INT8_TARGETS),
    Form("_fp8", torch.float8_e4m3fn, torch.float8_e4m3fn, between=True, targets=FP8_TARGETS),
    Form("_bytes", None, torch.uint8),
)


def matrices(form: Form, s: Sizes, shape: tuple[int, ...], make: Maker) -> dict[str, Any]:
    """Of weights [..., N, K]: numbers, scales, and the blocks that have one."""
    N, K = shape[-2:]
    if form.w is None:
        return {"w": make.weight(*shape), "w_scale": None, "W_ROWS": 1, "W_GROUP": K}
    rows, group = (1, K) if form.whole else (s.B, min(s.B, K))
    scales = (*shape[:-2], -(-N // rows), -(-K // group))
    blocks = {"W_ROWS": rows, "W_GROUP": group}
    if make.device.type == "meta":
        return {
            "w": make.empty(*shape, dtype=form.w),
            "w_scale": make.empty(*scales, dtype=torch.float32),
            **blocks,
        }
    stored = torch.float8_e4m3fn if form.w == torch.uint8 else form.w
    # Such that products of rows of unit size have about unit size.
    scale = (make.normal(*scales, dtype=torch.float32).sigmoid() + 0.5) * 4 * K**-0.5 / LARGEST[stored]
    largest = LARGEST[stored]
    numbers = (make.normal(*shape, dtype=torch.float32) * largest / 4).clamp(-largest, largest)
    numbers = numbers.round() if stored == torch.int8 else numbers
    return {"w": numbers.to(stored).view(form.w), "w_scale": scale, **blocks}


def floats(numbers: Tensor, scales: Tensor | None, rows: int, group: int) -> Tensor:
    """What numbers [..., N, K] with a scale for each block of rows x group mean, float32."""
    N, K = numbers.shape[-2:]
    values = numbers.view(torch.float8_e4m3fn) if numbers.dtype == torch.uint8 else numbers
    if scales is None:
        return values.float()
    return (
        values.float() * scales.repeat_interleave(rows, -2)[..., :N, :].repeat_interleave(group, -1)[..., :K]
    )


def rows_of(form: Form, P: int, K: int, block: int, make: Maker) -> tuple[Tensor, Tensor | None, int]:
    """Rows [P, K] as a form has them, their scales, and columns of one scale."""
    if form.x is None:
        return make.normal(P, K), None, K
    if make.device.type == "meta":
        return make.empty(P, K, dtype=form.x), make.empty(P, -(-K // block), dtype=torch.float32), block
    return *as_sent(make.normal(P, K, dtype=torch.float32), form.x, block), min(block, K)


def gate_up(form: Form, s: Sizes, make: Maker) -> dict[str, Any]:
    _, _, offsets = pairs(s, make)
    P = s.R * s.K
    x, x_scale, group = rows_of(form, P, s.D, s.D if form.whole else s.B, make)
    w = matrices(form, s, (s.S, 2, s.I, s.D), make)
    block = tiles("gate_up" + form.name, CPU)["BLOCK_I"]
    return {
        "x_PD": x, "x_scale": x_scale, "w_SID": w.pop("w"), **w, "offsets": offsets,
        "h_PI": make.empty(P, s.I, dtype=form.x if form.between else None),
        "h_scale": make.empty(P, -(-s.I // block), dtype=torch.float32) if form.between else None,
        "S": s.S, "D": s.D, "I": s.I, "X_GROUP": group, "LARGEST": LARGEST.get(form.x, 0.0),
    }  # fmt: skip


def gate_up_reference(a: Arguments) -> dict[str, Tensor]:
    x = floats(a["x_PD"], a["x_scale"], 1, a["X_GROUP"])
    w = floats(a["w_SID"], a["w_scale"], a["W_ROWS"], a["W_GROUP"])
    made = {"h_PI": a["h_PI"].clone()} | ({} if a["h_scale"] is None else {"h_scale": a["h_scale"].clone()})
    for slot, (first, end) in enumerate(zip(a["offsets"][:-1], a["offsets"][1:], strict=True)):
        h = silu(x[first:end] @ w[slot, 0].T) * (x[first:end] @ w[slot, 1].T)
        if a["h_scale"] is None:
            made["h_PI"][first:end] = h.to(a["h_PI"].dtype)
        elif end > first:
            block = tiles("gate_up_int8", CPU)["BLOCK_I"]
            made["h_PI"][first:end], made["h_scale"][first:end] = as_sent(h, a["h_PI"].dtype, block)
    return made


def down(form: Form, s: Sizes, make: Maker) -> dict[str, Any]:
    _, _, offsets = pairs(s, make)
    P = s.R * s.K
    h, h_scale, group = rows_of(form, P, s.I, s.B if form.between else s.I, make)
    w = matrices(form, s, (s.S, s.D, s.I), make)
    return {
        "h_PI": h, "h_scale": h_scale, "w_SDI": w.pop("w"), **w, "offsets": offsets, "y_PD": make.empty(P, s.D),
        "S": s.S, "D": s.D, "I": s.I, "X_GROUP": group,
    }  # fmt: skip


def down_reference(a: Arguments) -> dict[str, Tensor]:
    h = floats(a["h_PI"], a["h_scale"], 1, a["X_GROUP"])
    w = floats(a["w_SDI"], a["w_scale"], a["W_ROWS"], a["W_GROUP"])
    y = a["y_PD"].clone()
    for slot, (first, end) in enumerate(zip(a["offsets"][:-1], a["offsets"][1:], strict=True)):
        y[first:end] = (h[first:end] @ w[slot].T).to(y.dtype)
    return {"y_PD": y}


def of(
    kernel: str, arguments: Any, expected: Any, name: str = "", targets: tuple[str, ...] = TARGETS,
    small: Mapping[str, Sizes] = SMALL,
) -> list[Example]:  # fmt: skip
    """At all small sizes, and at a whole model's."""
    made = [
        Example(kernel, name + key, partial(arguments, s), expected, False, targets)
        for key, s in small.items()
    ]
    return [*made, Example(kernel, name + "V3", partial(arguments, FULL), expected, True, targets)]


def products() -> list[Example]:
    made = []
    for form in FORMS:
        said = "blocks between " if form.between else ""
        made += of("gate_up" + form.name, partial(gate_up, form), gate_up_reference, said, form.targets)
        made += of("down" + form.name, partial(down, form), down_reference, said, form.targets)
    return made


def eights() -> list[Example]:
    made = []
    for dtype, targets in ((torch.int8, TARGETS), (torch.float8_e4m3fn, FP8_TARGETS)):
        name = str(dtype).removeprefix("torch.")
        for whole, ordered in ((True, True), (False, True), (False, False)):
            said = f"{name} {'rows' if whole else 'blocks'} {'in order ' if ordered else ''}"
            arguments = partial(quantise, dtype, whole, ordered)
            made += of("quantise", arguments, quantise_reference, said, targets, WIDE)
        made += of("dequantise", partial(dequantise, dtype), dequantise_reference, f"{name} ", targets, WIDE)
    return made


EXAMPLES = [
    *gate_examples.EXAMPLES,
    *of("expert_order", order, order_reference),
    *of("permute", permute, permute_reference),
    *of("unpermute", unpermute, unpermute_reference),
    *eights(),
    *products(),
]
