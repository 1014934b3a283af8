"""Every op of `kernels.npu` on the published semantics, against `kernels.reference`: with small sizes without limits,
the same within the limits of a card (so that torch's own ops step in), and with DeepSeek-V3's of two heads. Then what
torch itself checks schemas and shape functions with, on the calls that were made."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.library import opcheck

from expertmesh.config.precision import PLAIN, W8A8, Format
from expertmesh.kernels import Kernels, Rotary, reference
from expertmesh.kernels.memory import Kept
from expertmesh.kernels.npu.contracts import PUBLISHED, Limit
from expertmesh.kernels.table import fused_by_ascend, reference_kernels
from expertmesh.kernels.types import Routing
from tests.kernels.npu.published import registered
from tests.kernels.npu.recording import Recorder, difference, name_of
from tests.support.attention import Sizes, normal, row_count, rows_of

# (known tokens, rows of this step) of each sequence.
STEPS = {
    "decoding": [(7, 1), (1, 1), (30, 1)],
    "prompts": [(5, 5), (19, 17)],
    "both": [(9, 1), (40, 1), (6, 6), (33, 2)],
    "one row": [(1, 1)],
    "none": [],
}
CPU = torch.device("cpu")
EPS = 1e-5
ROUTERS = {
    "V3": (Routing(8, 8, 4, "noaux_tc", "sigmoid", True, 2.5), 64, True),
    "V2": (Routing(6, 8, 3, "group_limited_greedy", "softmax", False, 16.0), 40, False),
    "V2-Lite": (Routing(6, 1, 1, "greedy", "softmax", False, 1.0), 16, False),
    "not normalised": (Routing(3, 4, 2, "noaux_tc", "sigmoid", False, 1.0), 16, True),
}


@dataclass(frozen=True)
class Setting:
    """Sizes of an attention layer, and what is computed how."""

    name: str
    limits: Mapping[str, Limit]
    sizes: Sizes
    hidden: int
    q_lora: int | None
    dtype: torch.dtype
    format: Format = PLAIN
    biased: bool = False
    interleaved: bool = True


SMALL = Sizes(heads=3)
BF16, F32 = torch.bfloat16, torch.float32
V3 = Sizes(heads=2, nope=128, rope=64, value=128, latent=512, page=16)
SETTINGS = (
    Setting("float32", {}, SMALL, 24, 20, F32),
    Setting("bfloat16", {}, SMALL, 24, 20, BF16),
    Setting("w8a8", {}, Sizes(heads=3, latent=32), 64, 40, BF16, W8A8),
    Setting("biased", {}, SMALL, 24, 20, F32, biased=True),
    Setting("full rank", {}, SMALL, 24, None, F32),
    Setting("rotary parts in halves", {}, SMALL, 24, 20, F32, interleaved=False),
    Setting("within limits, float32", PUBLISHED, SMALL, 24, 20, F32),
    Setting("within limits, bfloat16", PUBLISHED, SMALL, 24, 20, BF16),
    Setting("V3", PUBLISHED, V3, 7168, 1536, BF16),
    Setting("V3, w8a8", PUBLISHED, V3, 7168, 1536, BF16, W8A8),
)


def weights(s: Setting) -> dict[str, Tensor | None]:
    z, low = s.sizes, (s.q_lora or 0) + s.sizes.cached
    made = {
        "norm": (s.hidden,), "a": (low, s.hidden), "bias": (low,) if s.biased else None,
        "q_norm": (s.q_lora,) if s.q_lora else None, "kv_norm": (z.latent,),
        "q_b": (z.heads * (z.nope + z.rope), s.q_lora or s.hidden),
        "kv_b": (z.heads * (z.nope + z.value), z.latent),
    }  # fmt: skip
    return {
        name: None if shape is None else normal(*shape, seed=i, dtype=s.dtype, scale=shape[-1] ** -0.5)
        for i, (name, shape) in enumerate(made.items())
    }


def kept(kernels: Kernels, w: Mapping[str, Tensor | None], s: Setting) -> dict[str, Any]:
    """As a loader makes it: of rows in uneven pieces."""
    memory, found = Kept(s.dtype, CPU), dict(w)
    for name in ("a", "q_b"):
        tensor = w[name]
        assert tensor is not None
        found[name] = filled(kernels.matrix(tuple(tensor.shape), 1, s.format, memory), tensor)
    z, kv_b = s.sizes, w["kv_b"]
    assert kv_b is not None
    found["kv_b"] = filled(kernels.latent_up(z.heads, z.nope, z.value, z.latent, memory), kv_b)
    return found


def filled(place: Any, tensor: Tensor) -> Any:
    for first in range(0, len(tensor), 7):
        place[first : first + 7].copy_(tensor[first : first + 7])
    return place


def attended(
    kernels: Kernels, s: Setting, w: Mapping[str, Any], step: list[tuple[int, int]], whole: bool
) -> dict[str, Tensor]:
    z, count = s.sizes, row_count(step)
    (rows, pages), old = (
        rows_of(step, z),
        normal(len(step) * 10 + 8, z.page, z.cached, seed=20, dtype=s.dtype),
    )
    cache = kernels.cache(pages, z.page, z.latent, z.rope, s.dtype, CPU)
    two = not isinstance(cache, Tensor)
    if two:
        cache.latents.copy_(old[:pages, :, None, : z.latent])
        cache.keys.copy_(old[:pages, :, None, z.latent :])
    else:
        cache.copy_(old[:pages])
    angles = normal(50, z.rope // 2, seed=10)
    rotary = Rotary(torch.arange(count) * 2 % 50, angles.cos(), angles.sin(), s.interleaved)
    x = normal(count, s.hidden, seed=9, dtype=s.dtype)
    down = x, w["norm"], EPS, w["a"], w["bias"], w["q_norm"], w["kv_norm"]
    up = w["q_b"], w["kv_b"], rotary, rows, cache, z.heads
    queries = kernels.mla_prologue(*down, *up) if whole else kernels.mla_up(*kernels.mla_down(*down), *up)
    out = kernels.mla_attention(queries, rows, cache, w["kv_b"], z.nope**-0.5, z.value)
    known = torch.cat((cache.latents, cache.keys), dim=-1).squeeze(2) if two else cache
    return {"out": out, "cache": known}


def attention() -> Iterator[dict[str, Any]]:
    for s in SETTINGS:
        kernels, w = fused_by_ascend(s.limits), weights(s)
        for whole in (True, False):
            mine = kept(kernels, w, s)
            for name, step in STEPS.items():
                if s.hidden > 1000 and name not in ("both", "none"):
                    continue
                with Recorder() as recorder:
                    found = attended(kernels, s, mine, step, whole)
                expected = attended(reference_kernels(), s, w, step, whole)
                errors = {part: difference(found[part], expected[part]) for part in found}
                title = f"attention, {s.name}, {name}, {'whole' if whole else 'in halves'}"
                ops = sorted({name_of(func) for func, *_ in recorder.calls.values()})
                yield {"example": title, "kind": kind_of(s), "errors": errors, "ops": ops}


def kind_of(s: Setting) -> str:
    return "w8a8" if s.format is W8A8 else str(s.dtype).removeprefix("torch.")


def routers(kernels: Kernels) -> Iterator[dict[str, Any]]:
    for (name, (routing, count, biased)), rows in product(ROUTERS.items(), (0, 1, 19)):
        x, weight = normal(rows, 24, seed=1), normal(count, 24, seed=2, scale=24**-0.5)
        bias = normal(count, seed=3) if biased else None
        found, expected = (
            torch.zeros(rows, count).scatter(1, *op.router(x, weight, bias, routing))
            for op in (kernels, reference)
        )
        yield {
            "example": f"router {name} {rows} rows",
            "kind": "float32",
            "errors": {"w": difference(found, expected)},
        }


def layers(dtype: torch.dtype, format: Format, limits: Mapping[str, Limit]) -> Iterator[dict[str, Any]]:
    kernels, memory = fused_by_ascend(limits), Kept(dtype, CPU)
    kind = "w8a8" if format is W8A8 else str(dtype).removeprefix("torch.")
    for slots, rows in product((4, 1), (0, 1, 19)):
        hidden, inner, choices = 48, 64 if limits else 20, 3
        gate_up = normal(slots, 2 * inner, hidden, seed=4, dtype=dtype, scale=hidden**-0.5)
        down = normal(slots, hidden, inner, seed=5, dtype=dtype, scale=inner**-0.5)
        made = [kernels.matrix(tuple(t.shape), 1, format, memory) for t in (gate_up, down)]
        for matrix, tensor in zip(made, (gate_up, down), strict=True):
            for slot in range(slots):
                filled(matrix[slot], tensor[slot])
        x, generator = normal(rows, hidden, seed=7, dtype=dtype), torch.Generator().manual_seed(rows)
        mine = torch.randint(-1, slots, (rows, choices), generator=generator)
        for name, chosen in (("some", mine), ("none mine", torch.full_like(mine, -1))):
            weight = torch.rand(rows, choices, generator=generator)
            found = kernels.experts(x, chosen, weight, *made)
            expected = reference.experts(x, chosen, weight, gate_up, down)
            title = f"experts, {kind}, {slots} slots, {rows} rows, {name}, limits {bool(limits)}"
            yield {"example": title, "kind": kind, "errors": {"y": difference(found, expected)}}
        dense = [kernels.matrix(tuple(t.shape[1:]), 1, format, memory) for t in (gate_up, down)]
        for matrix, tensor in zip(dense, (gate_up, down), strict=True):
            matrix.copy_(tensor[0])
        found, expected = kernels.swiglu(x, *dense), reference.swiglu(x, gate_up[0], down[0])
        yield {
            "example": f"swiglu, {kind}, {rows} rows",
            "kind": kind,
            "errors": {"y": difference(found, expected)},
        }


def checked(recorder: Recorder) -> Iterator[dict[str, Any]]:
    """Schemas and shape functions against what was called. The prologue's shape function knows bfloat16 alone."""
    for func, args, kwargs in list(recorder.calls.values()):
        name = name_of(func)
        if name == "npu_mla_prolog_v3" and args[3].dtype != BF16:
            continue
        opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))
        yield {"opcheck": name}


def check() -> Iterator[dict[str, Any]]:
    import torch_npu  # noqa: F401

    torch.set_num_threads(1)
    library = registered()
    with torch.inference_mode(), Recorder() as recorder:
        yield from attention()
        yield from routers(fused_by_ascend({}))
        for dtype, format in ((F32, PLAIN), (BF16, PLAIN), (BF16, W8A8)):
            yield from layers(dtype, format, {})
            yield from layers(dtype, format, PUBLISHED)
    yield from checked(recorder)
    del library
