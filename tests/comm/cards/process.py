"""One rank of a small cluster as a process over gloo: `python -m tests.comm.cards.process RANK FOLDER`."""

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from expertmesh.comm.base import CommError
from expertmesh.comm.cards.distributed import DistributedComm
from expertmesh.comm.cards.exchange import CardExchange
from expertmesh.mesh.placement import default_placement
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import ALGORITHMS, algorithm
from tests.comm.cards.world import CPU, experts_of

TOPOLOGY = Topology(2, 2, 2)


def program(comm: DistributedComm) -> list[Tensor]:
    """What all algorithms give this rank, in two pieces, with ragged rows."""
    placement = default_placement(8, [0], TOPOLOGY, 4)
    generator = torch.Generator().manual_seed(comm.rank)
    x = torch.randn(3 * comm.rank, 130, generator=generator)
    experts = torch.rand(len(x), 8, generator=generator).argsort()[:, :3]
    weights = torch.rand(len(x), 3, generator=generator)
    out = []
    for name in sorted(ALGORITHMS):
        for split in ("even", "now"):
            exchange = CardExchange(comm, placement, algorithm(name))
            exchange.prepare(2, split, 60)
            received = exchange.dispatch(0, x, experts, weights)
            out.append(exchange.combine(experts_of(received, comm.rank * 3), received))
    return out


def main(rank: int, folder: Path) -> None:
    """The last rank ends before the others, which say what they see of it."""
    store = dist.FileStore(str(folder / "store"), TOPOLOGY.ranks)
    comm = DistributedComm(TOPOLOGY, rank, CPU, "gloo", store, 60.0)
    torch.save(program(comm), folder / f"{rank}.pt")
    if rank == TOPOLOGY.ranks - 1:
        return
    try:
        comm.exchange("combine", TOPOLOGY.all_ranks(), [torch.zeros(1, dtype=torch.uint8)] * 4, [1] * 4)
    except CommError as error:
        (folder / f"{rank}.txt").write_text(f"{error.suspects} {error}", encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
