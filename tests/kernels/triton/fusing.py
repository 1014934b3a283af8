"""Which kernels a prologue and an expert layer launch, in their order, on Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from expertmesh.kernels import Rotary
from expertmesh.kernels.triton import attention, moe
from expertmesh.kernels.triton.kernel import Kernel
from expertmesh.kernels.triton.tiles import CPU
from tests.kernels.triton.example import Example
from tests.kernels.triton.gate_examples import V3
from tests.kernels.triton.ops import EPS, HIDDEN, SIZES, STEPS, halved, weights
from tests.support.attention import normal, rows_of

ROWS, INNER, SLOTS, EXPERTS = 4, 32, 4, 16


@contextmanager
def launched() -> Iterator[list[str]]:
    names: list[str] = []
    launch = Kernel.__call__

    def noted(self: Kernel, **arguments: Any) -> None:
        if all(self.grid(self.complete(arguments, CPU))):
            names.append(self.name)
        launch(self, **arguments)

    with mock.patch.object(Kernel, "__call__", noted):
        yield names


def prologue() -> None:
    """Of rows that decode."""
    s, (rows, pages) = SIZES, rows_of(STEPS["decoding"], SIZES)
    w: dict[str, Any] = weights(low_rank=True, biased=False, dtype=torch.float32)
    angles, count = normal(9, s.rope // 2, seed=1), len(STEPS["decoding"])
    rotary = Rotary(torch.arange(count), angles.cos(), angles.sin(), False)
    attention.mla_prologue(
        normal(count, HIDDEN, seed=2), w["norm"], EPS, halved(w["a"]), None, w["q_norm"], w["kv_norm"],
        halved(w["q_b"], s.heads), w["kv_b"], rotary, rows, normal(pages, s.page, s.cached, seed=3), s.heads,
    )  # fmt: skip


def expert_layer() -> None:
    """Routing, routed experts and the shared one, without an exchange."""
    x = normal(ROWS, HIDDEN, seed=1)
    chosen, shares = moe.router(x, normal(EXPERTS, HIDDEN, seed=2), normal(EXPERTS, seed=3), V3)
    gate_up, down = normal(SLOTS, 2 * INNER, HIDDEN, seed=4), normal(SLOTS, HIDDEN, INNER, seed=5)
    moe.experts(x, chosen.where(chosen < SLOTS, -1), shares, gate_up, down)
    moe.swiglu(x, gate_up[0], down[0])


def check(examples: list[Example]) -> Iterator[dict[str, Any]]:
    for run in (prologue, expert_layer):
        with launched() as names:
            run()
        yield {"example": run.__name__, "names": names}
