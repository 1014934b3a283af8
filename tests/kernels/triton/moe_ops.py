"""Whole ops of the expert layer on Triton's interpreter: against those of `kernels.reference` with the numbers that
quantised matrices mean."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from expertmesh.config.precision import FP8
from expertmesh.engine.storage import dequantise_blocks
from expertmesh.kernels import reference
from expertmesh.kernels.memory import Kept
from expertmesh.kernels.triton import moe
from expertmesh.kernels.triton.weights import Quantised, matrix
from expertmesh.kernels.types import Routing
from tests.kernels.triton import small_floats
from tests.kernels.triton.example import Example, Maker
from tests.kernels.triton.gate_examples import LITE, V2, V3
from tests.kernels.triton.interpreter import errors
from tests.kernels.triton.moe_examples import floats
from tests.support.attention import normal

ROWS = (0, 1, 19)
CHOICES, SLOTS, HIDDEN, INNER = 3, 4, 144, 160
ROUTERS = {"V3": (V3, 64, True), "V2": (V2, 40, False), "V2-Lite": (LITE, 16, False)}
# What 8 bits leave of results that are compared with exact ones: rows, and what lies between the products, are rounded.
LOST = {"plain": 0.0, "int8": 0.03, "fp8": 0.12, "bytes": 0.0}


def quantised(kind: str, weight: Tensor) -> tuple[Any, Tensor]:
    """A weight [S, N, K] as a kind keeps it, and what that means."""
    if kind == "plain":
        return weight, weight
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    rows, group = (1, weight.shape[2]) if kind == "int8" else (moe.GROUP, moe.GROUP)
    S, N, K = weight.shape
    blocks = torch.zeros(S, -(-N // rows) * rows, -(-K // group) * group)
    blocks[:, :N, :K] = weight.float()
    highest = blocks.unflatten(2, (-1, group)).unflatten(1, (-1, rows)).abs().amax(dim=(2, 4))
    scales = highest / moe.LARGEST[dtype]
    exact = weight.float() / floats(torch.ones_like(weight), scales, rows, group)
    numbers = (exact.round() if kind == "int8" else exact).to(dtype)
    kept = numbers.view(torch.uint8) if kind == "bytes" else numbers
    return Quantised(kept, scales, rows, group), floats(numbers, scales, rows, group).to(weight.dtype)


def gate_and_up(kind: str, seed: int) -> tuple[Any, Tensor]:
    """[S, 2 * I, D]: the two are quantised apart from each other, as checkpoints have them."""
    halves = [
        quantised(kind, normal(SLOTS, INNER, HIDDEN, seed=seed + i, scale=HIDDEN**-0.5)) for i in (0, 1)
    ]
    means = torch.cat([half[1] for half in halves], dim=1)
    if kind == "plain":
        return means, means
    parts = [half[0] for half in halves]
    both = {
        field: torch.cat([getattr(part, field) for part in parts], dim=1) for field in ("numbers", "scales")
    }
    return Quantised(**both, rows=parts[0].rows, group=parts[0].group), means


def first(matrices: Any) -> Any:
    """The first slot's."""
    if isinstance(matrices, Tensor):
        return matrices[0]
    return replace(matrices, numbers=matrices.numbers[0], scales=matrices.scales[0])


def line(title: str, found: dict[str, Tensor], expected: dict[str, Tensor], lost: float) -> dict[str, Any]:
    return {"example": title, "dtype": "torch.float32", "errors": errors(found, expected), "lost": lost}


def routers() -> Iterator[dict[str, Any]]:
    for (name, (routing, experts, biased)), rows in product(ROUTERS.items(), ROWS):
        x, weight = normal(rows, HIDDEN, seed=1), normal(experts, HIDDEN, seed=2, scale=HIDDEN**-0.5)
        bias = normal(experts, seed=3) if biased else None
        found = _by_expert(*moe.router(x, weight, bias, routing), experts)
        expected = _by_expert(*reference.router(x, weight, bias, routing), experts)
        yield line(f"router {name} {rows} rows", {"weights": found}, {"weights": expected}, 0.0)
    ties = Routing(3, 4, 2, "noaux_tc", "sigmoid", True, 1.0)
    chosen, _ = moe.route(torch.zeros(1, 2, 16), torch.zeros(16), ties)
    yield line("router of equals", {"experts": chosen}, {"experts": torch.tensor([[0, 1, 2]] * 2)}, 0.0)
    unknown, _ = moe.route(torch.full((1, 1, 16), float("nan")), None, ties)
    yield line("router of NaN", {"experts": unknown}, {"experts": torch.tensor([[0, 1, 2]])}, 0.0)


def _by_expert(experts: Tensor, weights: Tensor, count: int) -> Tensor:
    return torch.zeros(experts.shape[0], count).scatter(1, experts, weights)


def layers() -> Iterator[dict[str, Any]]:
    for kind, rows in product(LOST, ROWS):
        gate_up, means_up = gate_and_up(kind, seed=4)
        down, means_down = quantised(kind, normal(SLOTS, HIDDEN, INNER, seed=6, scale=INNER**-0.5))
        x, generator = normal(rows, HIDDEN, seed=7), torch.Generator().manual_seed(rows)
        slots = torch.randint(-1, SLOTS, (rows, CHOICES), generator=generator)
        weights = torch.rand(rows, CHOICES, generator=generator)
        found = moe.experts(x, slots, weights, gate_up, down)
        expected = reference.experts(x, slots, weights, means_up, means_down)
        yield line(f"experts {kind} {rows} rows", {"y": found}, {"y": expected}, LOST[kind])
        found = moe.swiglu(x, first(gate_up), first(down))
        expected = reference.swiglu(x, means_up[0], means_down[0])
        yield line(f"swiglu {kind} {rows} rows", {"y": found}, {"y": expected}, LOST[kind])


def loaded(rows: int) -> Iterator[dict[str, Any]]:
    """A TP rank's part of an FP8 matrix, which begins inside of a block, as a loader keeps it: a single product, and
    one whose other factor is not quantised since its columns are cut."""
    whole, exact = quantised("fp8", normal(1, 2 * INNER, HIDDEN, seed=8, scale=HIDDEN**-0.5))
    mine, columns = range(INNER, 2 * INNER), range(HIDDEN)
    kept = Kept(torch.float32, torch.device("cpu"))
    part, both = (matrix((n * INNER, HIDDEN), n, FP8, kept) for n in (1, 2))
    for place in (part, both[:INNER], both[INNER:]):
        dequantise_blocks(whole.numbers[0, INNER:], whole.scales[0], (128, 128), (mine, columns), place)
    means, bias, x = exact[0, INNER:], normal(INNER, seed=9), normal(rows, HIDDEN, seed=7)
    found, expected = moe.linear(x, part, bias), reference.linear(x, means, bias)
    yield line(f"linear fp8 {rows} rows", {"y": found}, {"y": expected}, LOST["fp8"])
    down = normal(HIDDEN, INNER, seed=6, scale=INNER**-0.5)
    found, expected = moe.swiglu(x, both, down), reference.swiglu(x, torch.cat((means, means)), down)
    yield line(f"swiglu fp8 and plain {rows} rows", {"y": found}, {"y": expected}, LOST["fp8"])


def exchange() -> Iterator[dict[str, Any]]:
    """Rows that were quantised to be sent, read again: a half of the last of 8 bits is lost."""
    for dtype, rows in product(moe.LARGEST, ROWS):
        x = Maker(dtype=torch.float32, seed=rows).normal(rows, 300)
        numbers, scales, group = moe.quantise(x, dtype, whole=False)
        assert group == moe.GROUP
        found = moe.dequantise(numbers, scales, torch.float32)
        lost = 0.5 / 127 if dtype == torch.int8 else 2.0**-4
        yield line(f"exchange {dtype} {rows} rows", {"x": found}, {"x": x}, lost)


def check(examples: list[Example]) -> Iterator[dict[str, Any]]:
    small_floats.repair()
    yield from routers()
    yield from layers()
    for rows in ROWS:
        yield from loaded(rows)
    yield from exchange()
