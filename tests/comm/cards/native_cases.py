"""Exchanges whose sums are exact in bfloat16, whatever their order."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertmesh.comm.base import Comm, MovingExchange, Received
from expertmesh.comm.exchange import TieredExchange
from expertmesh.comm.local import LocalWorld
from expertmesh.mesh.placement import Placement
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import algorithm


@dataclass(frozen=True)
class ExactCase:
    """Whole numbers from -3 to 3, weights 1 and 0.5, factors of experts 1 to 3, at most 4 choices."""

    placement: Placement
    topology: Topology
    rows: Sequence[int]
    choices: int
    width: int
    seed: int

    def of(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + rank)
        rows, experts = self.rows[rank], self.placement.experts
        x = torch.randint(-3, 4, (rows, self.width), generator=generator).to(torch.bfloat16)
        chosen = torch.rand(rows, experts, generator=generator).argsort()[:, : self.choices]
        return x, chosen, 0.5 + 0.5 * torch.randint(2, chosen.shape, generator=generator)

    def expert(self, received: Received, rank: int) -> Tensor:
        """Results of all rows, those that nobody needs among them."""
        factors = torch.from_numpy(self.placement.slots_LRS[0, rank] % 3 + 1)
        y = torch.zeros_like(received.x_RD, dtype=torch.float32)
        for slots, weights in zip(received.slots_RK.T, received.weights_RK.T, strict=True):
            result = received.x_RD.float() * (factors[slots] * weights)[:, None]
            y += torch.where(slots[:, None] >= 0, result, 0.0)
        return y.to(torch.bfloat16)


def run(case: ExactCase, make: Any, most: Sequence[int] = ()) -> list[tuple[list[Tensor], Counter[Any]]]:
    """Of each rank what came back in each step, and (row, slot) of all that arrived. most: what a rank is told to have
    of rows at most, in each step."""

    def program(comm: Comm) -> tuple[list[Tensor], Counter[Any]]:
        exchange: MovingExchange = make(comm)
        x, experts, weights = case.of(comm.rank)
        back, arrived = [], Counter[Any]()
        for rows in most or [max(case.rows)]:
            exchange.prepare(1, "even", rows)
            received = exchange.dispatch(0, x, experts, weights)
            back.append(exchange.combine(case.expert(received, comm.rank), received))
            for row, slot in (received.slots_RK >= 0).nonzero().tolist():
                arrived[tuple(received.x_RD[row].tolist()), int(received.slots_RK[row, slot])] += 1
        return back, arrived

    return LocalWorld(case.topology, 60).run(program)


def tiered(case: ExactCase) -> list[tuple[list[Tensor], Counter[Any]]]:
    return run(case, lambda comm: TieredExchange(comm, case.placement, algorithm("two_tier")))
