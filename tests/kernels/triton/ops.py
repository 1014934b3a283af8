"""Whole ops of attention on Triton's interpreter, against those of `kernels.reference`: a prologue, whole or in its
halves, and attention on what it gives."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from typing import Any

import torch
from torch import Tensor

from expertmesh.errors import InputError
from expertmesh.kernels import AttentionRows, Queries, Rotary, reference
from expertmesh.kernels.places import de_interleaved
from expertmesh.kernels.triton import attention
from tests.kernels.triton.example import Example
from tests.kernels.triton.interpreter import errors
from tests.support.attention import Sizes, normal, row_count, rows_of

# (known tokens, rows of this step) of each sequence.
STEPS = {
    "decoding": [(7, 1), (1, 1), (30, 1)],
    "prompts": [(5, 5), (19, 17)],
    "both": [(9, 1), (40, 1), (6, 6), (33, 2)],
    "one row": [(1, 1)],
    "none": [],
}
SIZES = Sizes(heads=3)
HIDDEN, Q_LORA, EPS = 24, 20, 1e-5


def weights(low_rank: bool, biased: bool, dtype: torch.dtype) -> dict[str, Tensor | None]:
    s = SIZES
    low = (Q_LORA if low_rank else 0) + s.cached
    inner = Q_LORA if low_rank else HIDDEN
    made = {
        "norm": (HIDDEN,), "a": (low, HIDDEN), "bias": (low,) if biased else None,
        "q_norm": (Q_LORA,) if low_rank else None,
        "kv_norm": (s.latent,), "q_b": (s.heads * (s.nope + s.rope), inner),
        "kv_b": (s.heads * (s.nope + s.value), s.latent),
    }  # fmt: skip
    return {
        name: None if shape is None else normal(*shape, seed=i, dtype=dtype, scale=shape[-1] ** -0.5)
        for i, (name, shape) in enumerate(made.items())
    }


def halved(weight: Tensor, heads: int = 1) -> Tensor:
    """As a loader makes it for these kernels."""
    kept = torch.empty_like(weight)
    de_interleaved(kept, SIZES.rope, heads).copy_(weight)
    return kept


def run(
    ops: Any, whole: bool, x: Tensor, w: dict[str, Any], rotary: Rotary, rows: Any, pages: int
) -> dict[str, Tensor]:
    s = SIZES
    cache = normal(pages, s.page, s.cached, seed=20, dtype=x.dtype)
    down = x, w["norm"], EPS, w["a"], w["bias"], w["q_norm"], w["kv_norm"]
    up = w["q_b"], w["kv_b"], rotary, rows, cache, s.heads
    queries = ops.mla_prologue(*down, *up) if whole else ops.mla_up(*ops.mla_down(*down), *up)
    out = ops.mla_attention(queries, rows, cache, w["kv_b"], 0.3, s.value)
    return {"out": out, "cache": cache}


def alone(w: dict[str, Any]) -> bool:
    """Whether attention of a row that decodes has the same bits without the others."""
    s, step = SIZES, STEPS["decoding"]
    rows, pages = rows_of(step, s)
    cache, absorbed = normal(pages, s.page, s.cached, seed=20), normal(len(step), s.heads, s.cached, seed=21)
    none = absorbed.new_empty(0, s.heads, s.nope + s.rope)

    def attend(part: slice) -> Tensor:
        lengths = rows.lengths_B[part]
        these = AttentionRows(rows.slots_T[part], len(lengths), rows.pages_BM[part], lengths, ())
        return attention.mla_attention(Queries(none, absorbed[part]), these, cache, w["kv_b"], 0.3, s.value)

    together = attend(slice(None))
    return all(torch.equal(attend(slice(i, i + 1)), together[i : i + 1]) for i in range(len(step)))


def refused(w: dict[str, Any]) -> bool:
    """Whether weights that are as a checkpoint has them are told."""
    s, (rows, pages) = SIZES, rows_of(STEPS["one row"], SIZES)
    rotary = Rotary(
        torch.zeros(1, dtype=torch.int64), torch.zeros(1, s.rope // 2), torch.zeros(1, s.rope // 2), True
    )
    with suppress(InputError):
        run(attention, True, normal(1, HIDDEN, seed=1), w, rotary, rows, pages)
        return False
    return True


def check(examples: list[Example]) -> Iterator[dict[str, Any]]:
    s, dtype = SIZES, torch.float32
    for (name, step), whole, low_rank in product(STEPS.items(), (True, False), (True, False)):
        (rows, pages), count = rows_of(step, s), row_count(step)
        w, x = weights(low_rank, biased=low_rank, dtype=dtype), normal(count, HIDDEN, seed=9, dtype=dtype)
        angles = normal(50, s.rope // 2, seed=10)
        rotary = Rotary(torch.arange(count) * 2 + 1, angles.cos(), angles.sin(), True)
        expected = run(reference, whole, x, w, rotary, rows, pages)
        kept = w | {"a": halved(w["a"]), "q_b": halved(w["q_b"], s.heads)}
        if w["bias"] is not None:
            kept["bias"] = halved(w["bias"])
        apart = Rotary(rotary.positions_T, rotary.cosines, rotary.sines, False)
        found = run(attention, whole, x, kept, apart, rows, pages)
        title = f"{name}, {'whole' if whole else 'in halves'}, {'low' if low_rank else 'full'} rank"
        yield {"example": title, "dtype": str(dtype), "errors": errors(found, expected)}
    w = weights(low_rank=True, biased=True, dtype=torch.float32)
    yield {"example": "the same bits alone", "holds": alone(w)}
    yield {"example": "interleaved rows are refused", "holds": refused(w)}
