"""Examples of the kernels of attention, checked against `kernels.reference`."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels import reference
from expertmesh.kernels.triton.tiles import ASCEND
from tests.kernels.triton.example import Arguments, Example, Maker


@dataclass(frozen=True)
class Sizes:
    """T rows, D hidden, Q and C low ranks, P rotary part, N and V parts of a head, H heads, G tokens of a page, splits
    of SPAN pages or more, MOST of them; lengths of sequences."""

    T: int = 5
    D: int = 40
    Q: int = 24
    C: int = 20
    P: int = 8
    N: int = 12
    V: int = 10
    H: int = 3
    G: int = 4
    SPAN: int = 1
    MOST: int = 2
    lengths: tuple[int, ...] = (1, 9, 4)


# DeepSeek-V3 in a TP group of 8.
V3 = Sizes(
    T=128, D=7168, Q=1536, C=512, P=64, N=128, V=128, H=16, G=32, SPAN=16, MOST=32, lengths=(4096,) * 128
)
RAGGED = Sizes()
SMALL = {
    "ragged": RAGGED,
    "even": Sizes(T=32, D=64, Q=32, C=32, P=32, N=16, V=16, H=2, G=16, MOST=1, lengths=(33, 16)),
    "one row": replace(RAGGED, T=1, H=1, lengths=(7,)),
    "many heads": replace(RAGGED, T=17, H=18, MOST=3, lengths=(3,)),
    "empty": replace(RAGGED, T=0, lengths=()),
}


def down(s: Sizes, bias: bool, make: Maker) -> dict[str, Any]:
    X = s.Q + s.C + s.P
    return {
        "x_TD": make.normal(s.T, s.D), "norm_D": make.normal(s.D), "a_XD": make.weight(X, s.D),
        "bias_X": make.normal(X) if bias else None, "low_TX": make.empty(s.T, X), "T": s.T, "eps": 1e-5, "D": s.D,
        "X": X,
    }  # fmt: skip


def down_reference(a: Arguments) -> dict[str, Tensor]:
    return {
        "low_TX": reference.linear(
            reference.rms_norm(a["x_TD"], a["norm_D"], a["eps"]), a["a_XD"], a["bias_X"]
        )
    }


def norm(s: Sizes, make: Maker) -> dict[str, Any]:
    q, kv = make.normal(s.T, s.Q + s.C + s.P).split([s.Q, s.C + s.P], dim=-1)
    return {
        "q_TQ": q, "q_norm_Q": make.normal(s.Q), "q_eps": 1e-6, "kv_TX": kv, "kv_norm_C": make.normal(s.C),
        "kv_eps": 1e-6, "c_q_TQ": make.empty(s.T, s.Q), "c_kv_TC": make.empty(s.T, s.C), "k_TP": make.empty(s.T, s.P),
        "Q": s.Q, "Q_STRIDE": q.stride(0), "C": s.C, "P": s.P, "KV_STRIDE": kv.stride(0),
    }  # fmt: skip


def norm_reference(a: Arguments) -> dict[str, Tensor]:
    c_kv, k_P = a["kv_TX"].split([a["C"], a["P"]], dim=-1)
    c_q = reference.rms_norm(a["q_TQ"], a["q_norm_Q"], a["q_eps"])
    return {"c_q_TQ": c_q, "c_kv_TC": reference.rms_norm(c_kv, a["kv_norm_C"], a["kv_eps"]), "k_TP": k_P}


def up(s: Sizes, whole: bool, absorb: bool, make: Maker) -> dict[str, Any]:
    """whole: of rows as they come from the projection down, else of gathered ones, which are normed."""
    low = make.normal(s.T, s.Q + s.C + s.P)
    c_q, c_kv, k = low.split([s.Q, s.C, s.P], dim=-1)
    if not whole:
        c_q, c_kv, k = c_q.contiguous(), c_kv.contiguous(), k.contiguous()
    R, width = s.P // 2, (s.C if absorb else s.N) + s.P
    return {
        "c_q_TQ": c_q, "q_norm_Q": make.normal(s.Q) if whole else None, "q_eps": 1e-6, "c_kv_TC": c_kv,
        "kv_norm_C": make.normal(s.C) if whole else None, "kv_eps": 1e-6, "k_TP": k,
        "q_b_HXQ": make.weight(s.H * (s.N + s.P), s.Q), "kv_b_HXC": make.weight(s.H * (s.N + s.V), s.C),
        "cos_TR": make.normal(s.T, R, dtype=torch.float32), "sin_TR": make.normal(s.T, R, dtype=torch.float32),
        "slots_T": make.shuffled(s.T, s.T + 3), "query_THX": make.empty(s.T, s.H, width),
        "cache_SX": make.empty(s.T + 3, s.C + s.P), "T": s.T, "Q": s.Q, "Q_STRIDE": c_q.stride(0), "C": s.C,
        "KV_STRIDE": c_kv.stride(0), "K_STRIDE": k.stride(0), "H": s.H, "N": s.N, "V": s.V, "P": s.P, "R": R,
        "ABSORB": absorb,
    }  # fmt: skip


def turned(x: Tensor, a: Arguments) -> Tensor:
    """Rotary positions of rows [T, H, P] whose pairs are apart."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = a["cos_TR"][:, None], a["sin_TR"][:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def up_reference(a: Arguments) -> dict[str, Tensor]:
    c_q, c_kv, H, N = a["c_q_TQ"], a["c_kv_TC"], a["H"], a["N"]
    c_q = c_q if a["q_norm_Q"] is None else reference.rms_norm(c_q, a["q_norm_Q"], a["q_eps"])
    c_kv = c_kv if a["kv_norm_C"] is None else reference.rms_norm(c_kv, a["kv_norm_C"], a["kv_eps"])
    q = reference.linear(c_q, a["q_b_HXQ"]).unflatten(-1, (H, -1))
    plain, rotary = q[..., :N], turned(q[..., N:], a)
    if a["ABSORB"]:
        plain = torch.einsum("thn,hnc->thc", plain, a["kv_b_HXC"].unflatten(0, (H, -1))[:, :N])
    cache = a["cache_SX"].clone()
    cache[a["slots_T"]] = torch.cat((c_kv, turned(a["k_TP"][:, None], a)[:, 0]), dim=-1)
    return {"query_THX": torch.cat((plain, rotary), dim=-1), "cache_SX": cache}


def pages(s: Sizes, make: Maker) -> tuple[Tensor, Tensor]:
    """A cache, and a table of scattered pages, [B, M]; beyond a sequence's own it has page 0, as a step's has."""
    most = max((-(-length // s.G) for length in s.lengths), default=0)
    every = len(s.lengths) * most
    table = make.shuffled(every, every + 2).view(len(s.lengths), most)
    if make.device.type != "meta":
        for row, length in zip(table, s.lengths, strict=True):
            row[-(-length // s.G) :] = 0
    return make.normal(every + 2, s.G, s.C + s.P), table


def splits(s: Sizes) -> int:
    """Of the longest sequence."""
    return min(s.MOST, max((math.ceil(length / s.G / s.SPAN) for length in s.lengths), default=1))


def decode(s: Sizes, make: Maker) -> dict[str, Any]:
    cache, table = pages(s, make)
    B, S = len(s.lengths), splits(s)
    return {
        "query_BHX": make.normal(B, s.H, s.C + s.P), "cache_MGX": cache, "pages_BM": table,
        "lengths_B": make.whole(list(s.lengths)), "part_BHSC": make.empty(B, s.H, S, s.C, dtype=torch.float32),
        "lse_BHS": make.empty(B, s.H, S, dtype=torch.float32), "scale": 0.3, "M": table.shape[1], "S": S, "C": s.C,
        "P": s.P, "H": s.H, "G": s.G, "SPAN": s.SPAN, "MOST": s.MOST,
    }  # fmt: skip


def decode_reference(a: Arguments) -> dict[str, Tensor]:
    C, G = a["C"], a["G"]
    part, lse = torch.zeros_like(a["part_BHSC"]), torch.full_like(a["lse_BHS"], float("-inf"))
    for b, length in enumerate(a["lengths_B"].tolist()):
        known = a["cache_MGX"][a["pages_BM"][b]].flatten(0, 1)[:length].float()
        each = max(a["SPAN"], math.ceil(math.ceil(length / G) / a["MOST"])) * G
        for split, some in enumerate(known.split(each)):
            scores = a["query_BHX"][b].float() @ some.T * a["scale"]
            part[b, :, split] = scores.softmax(-1) @ some[:, :C]
            lse[b, :, split] = scores.logsumexp(-1)
    return {"part_BHSC": part, "lse_BHS": lse}


def merge(s: Sizes, make: Maker) -> dict[str, Any]:
    B, S = len(s.lengths), splits(s)
    lse = make.normal(B, s.H, S, dtype=torch.float32)
    if make.device.type != "meta":
        lse[..., 1:][..., -1:] = float("-inf")  # a split without tokens
    return {
        "part_BHSC": make.normal(B, s.H, S, s.C, dtype=torch.float32), "lse_BHS": lse,
        "kv_b_HXC": make.weight(s.H * (s.N + s.V), s.C), "out_BHV": make.empty(B, s.H, s.V), "B": B, "S": S, "C": s.C,
        "H": s.H, "N": s.N, "V": s.V,
    }  # fmt: skip


def merge_reference(a: Arguments) -> dict[str, Tensor]:
    latent = (a["lse_BHS"].softmax(-1).unsqueeze(-1) * a["part_BHSC"]).sum(2)
    w_uv = a["kv_b_HXC"].unflatten(0, (a["H"], -1))[:, a["N"] :]
    out = torch.einsum("bhc,hvc->bhv", latent, w_uv.float())
    return {"out_BHV": out.to(a["out_BHV"].dtype)}


def prompt(s: Sizes) -> tuple[Sizes, int]:
    """One sequence that is longer than its rows of this step."""
    length = s.T + s.T // 2 if s.T else 0
    return replace(s, lengths=(length,) if length else ()), length


def expand(s: Sizes, make: Maker) -> dict[str, Any]:
    s, L = prompt(s)
    cache, table = pages(s, make)
    X = s.H * (s.N + s.V)
    return {
        "cache_MGX": cache, "pages_M": table.flatten(), "kv_b_XC": make.weight(X, s.C), "up_LX": make.empty(L, X),
        "L": L, "X": X, "C": s.C, "P": s.P, "G": s.G,
    }  # fmt: skip


def expand_reference(a: Arguments) -> dict[str, Tensor]:
    known = a["cache_MGX"][a["pages_M"]].flatten(0, 1)[: a["L"], : a["C"]]
    return {"up_LX": reference.linear(known, a["kv_b_XC"])}


def prefill(s: Sizes, make: Maker) -> dict[str, Any]:
    s, L = prompt(s)
    cache, table = pages(s, make)
    return {
        "query_THX": make.normal(s.T, s.H, s.N + s.P), "up_LHX": make.normal(L, s.H, s.N + s.V), "cache_MGX": cache,
        "pages_M": table.flatten(), "out_THV": make.empty(s.T, s.H, s.V), "scale": 0.3, "T": s.T, "L": L, "H": s.H,
        "N": s.N, "V": s.V, "P": s.P, "C": s.C, "G": s.G,
    }  # fmt: skip


def prefill_reference(a: Arguments) -> dict[str, Tensor]:
    T, L, N, C = a["T"], a["L"], a["N"], a["C"]
    rotary = a["cache_MGX"][a["pages_M"]].flatten(0, 1)[:L, None, C:]
    keys = torch.cat((a["up_LHX"][..., :N], rotary.expand(-1, a["H"], -1)), dim=-1)
    scores = torch.einsum("thx,lhx->htl", a["query_THX"].float(), keys.float()) * a["scale"]
    later = torch.ones(T, L, dtype=torch.bool).triu(L - T + 1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    out = torch.einsum("htl,lhv->thv", weights, a["up_LHX"][..., N:].float())
    return {"out_THV": out.to(a["out_THV"].dtype)}


def of(kernel: str, arguments: Any, expected: Any, full: Sizes = V3, name: str = "") -> list[Example]:
    """At all small sizes, and at a whole model's."""
    made = [Example(kernel, name + key, partial(arguments, s), expected) for key, s in SMALL.items()]
    return [*made, Example(kernel, name + "V3", partial(arguments, full), expected, full=True)]


PROMPT = replace(V3, T=2048)
EXAMPLES = [
    *of("mla_down", lambda s, make: down(s, False, make), down_reference),
    Example("mla_down", "biased", partial(down, RAGGED, True), down_reference),
    *of("mla_norm", norm, norm_reference),
    *of("mla_up", lambda s, make: up(s, True, True, make), up_reference, name="whole absorbed "),
    *of("mla_up", lambda s, make: up(s, False, True, make), up_reference, name="half absorbed "),
    *of("mla_up", lambda s, make: up(s, True, False, make), up_reference, PROMPT, name="whole plain "),
    *of("mla_decode", decode, decode_reference),
    *of("mla_merge", merge, merge_reference),
    *of("mla_expand", expand, expand_reference, PROMPT),
    *of("mla_prefill", prefill, prefill_reference, PROMPT),
    *(
        # With larger pages Ascend's vector and matrix units wait for each other less often.
        Example(
            kernel,
            "V3 large pages",
            partial(arguments, replace(sizes, G=128, SPAN=4)),
            expected,
            True,
            ASCEND,
        )
        for kernel, arguments, expected, sizes in (
            ("mla_decode", decode, decode_reference, V3),
            ("mla_expand", expand, expand_reference, PROMPT),
            ("mla_prefill", prefill, prefill_reference, PROMPT),
        )
    ),
]
