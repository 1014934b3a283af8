"""Every call of a layer at DeepSeek-V3's sizes against torch_npu's own shape functions, on tensors without memory."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from expertmesh.config.precision import PLAIN, W8A8, Format
from expertmesh.kernels import AttentionRows, Kernels, Rotary, Routing
from expertmesh.kernels.memory import Kept
from expertmesh.kernels.table import fused_by_ascend
from expertmesh.kernels.types import Prefill
from tests.kernels.npu.recording import Recorder, name_of

META, BF16 = torch.device("meta"), torch.bfloat16
HIDDEN, Q_LORA, NOPE, ROPE, VALUE, LATENT, PAGE = 7168, 1536, 128, 64, 128, 512, 128
EXPERTS, INNER, CHOICES = 256, 2048, 8
LENGTHS, PROMPTS = [1, 129, 4000, 70_000], [(1500, 1500), (100, 9000)]
V3 = Routing(CHOICES, 8, 4, "noaux_tc", "sigmoid", True, 2.5)


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def rows_of(decoding: bool, prompts: bool) -> tuple[AttentionRows, int]:
    lengths = LENGTHS if decoding else []
    first, prefills = len(lengths), []
    for count, length in PROMPTS if prompts else []:
        prefills.append(Prefill(first, count, length, empty(-(-length // PAGE), dtype=torch.int64)))
        first += count
    table = empty(len(lengths), -(-max(lengths, default=0) // PAGE), dtype=torch.int64)
    slots = empty(first, dtype=torch.int64)
    return AttentionRows(slots, len(lengths), table, torch.tensor(lengths), tuple(prefills)), first


def attended(k: Kernels, heads: int, format: Format, whole: bool, step: tuple[bool, bool]) -> Tensor:
    kept, (rows, T) = Kept(BF16, META), rows_of(*step)
    a = k.matrix((Q_LORA + LATENT + ROPE, HIDDEN), 1, format, kept)
    q_b = k.matrix((heads * (NOPE + ROPE), Q_LORA), heads, format, kept)
    o = k.matrix((HIDDEN, heads * VALUE), 1, format, kept)
    kv_b = k.latent_up(heads, NOPE, VALUE, LATENT, kept)
    table = empty(1 << 17, ROPE // 2, dtype=torch.float32)
    rotary = Rotary(empty(T, dtype=torch.int64), table, table, True)
    cache = k.cache(2000, PAGE, LATENT, ROPE, BF16, META)
    down = empty(T, HIDDEN), empty(HIDDEN), 1e-6, a, None, empty(Q_LORA), empty(LATENT)
    up = q_b, kv_b, rotary, rows, cache, heads
    queries = k.mla_prologue(*down, *up) if whole else k.mla_up(*k.mla_down(*down), *up)
    return k.linear(k.mla_attention(queries, rows, cache, kv_b, 0.1, VALUE), o)


def experts(k: Kernels, format: Format, slots: int) -> list[Tensor]:
    kept, T = Kept(BF16, META), 128
    x, bias = empty(T, HIDDEN), empty(EXPERTS, dtype=torch.float32)
    chosen, weights = k.router(x, empty(EXPERTS, HIDDEN, dtype=torch.float32), bias, V3)
    gate_up = k.matrix((slots, 2 * INNER, HIDDEN), 2, format, kept)
    down = k.matrix((slots, HIDDEN, INNER), 1, format, kept)
    shared = k.matrix((2 * INNER, HIDDEN), 2, format, kept), k.matrix((HIDDEN, INNER), 1, format, kept)
    return [k.experts(x, chosen, weights, gate_up, down), k.swiglu(x, *shared)]


def line(name: str, recorder: Recorder, results: list[Tensor], rows: int) -> dict[str, Any]:
    calls = sorted({name_of(func) for func, *_ in recorder.calls.values()})
    right = all(tuple(y.shape) == (rows, HIDDEN) and y.dtype == BF16 for y in results)
    return {"example": name, "ops": calls, "right": right}


def check() -> Iterator[dict[str, Any]]:
    import torch_npu  # noqa: F401

    kernels = fused_by_ascend()
    steps = {"decoding": (True, False), "prompts": (False, True), "both": (True, True)}
    for format, (heads, whole), (name, step) in product(
        (PLAIN, W8A8), ((128, True), (16, False)), steps.items()
    ):
        with Recorder() as recorder:
            y = attended(kernels, heads, format, whole, step)
        title = f"attention {format.name}, {heads} heads, {'whole' if whole else 'in halves'}, {name}"
        yield line(title, recorder, [y], rows_of(*step)[1])
    for format, slots in product((PLAIN, W8A8), (256, 8, 1)):
        with Recorder() as recorder:
            found = experts(kernels, format, slots)
        yield line(f"experts {format.name}, {slots} slots", recorder, found, 128)
