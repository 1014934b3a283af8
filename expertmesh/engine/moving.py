"""Experts that move from rank to rank while requests go on: a rank's side.

Between two steps a part of some experts' weights travels into the spare memory of the ranks that are to have them, one
expert a rank at a time. When all of it is there it is compared with its source, and takes effect on all ranks between
two steps. Nothing that serves is written before.
"""

import zlib
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from expertmesh.comm.base import MovingExchange
from expertmesh.kernels.packed import slot_bytes
from expertmesh.mesh.migration import Move
from expertmesh.mesh.placement import Placement
from expertmesh.model.deepseek import DeepSeek
from expertmesh.model.moe import MoE


class Mover:
    """Of one rank."""

    def __init__(self, model: DeepSeek, exchange: MovingExchange) -> None:
        self._model, self._exchange, self._comm = model, exchange, exchange.comm
        self._spare: Tensor | None = None

    def stage(self, moves: Sequence[Move], start: int, stop: int) -> None:
        """Bytes [start, stop) of the moving experts come to their ranks. All ranks call it, between the same steps.

        Each goes over its source's rail to the node, and inside that to the rank: links that there are anyway."""
        comm, topology = self._comm, self._comm.topology
        me, size = comm.rank, stop - start
        across, inside = topology.rail_ranks(me), topology.node_ranks(me)

        def over(peer: int) -> list[Move]:  # what comes over a node's card with the source's place
            return [m for m in moves if m.source == peer and topology.node_of(m.rank) == topology.node_of(me)]

        mine = [m for m in moves if m.source == me]
        parts = [
            _joined(
                [
                    self._piece(m, start, stop)
                    for m in mine
                    if topology.node_of(m.rank) == topology.node_of(p)
                ],
                comm.device,
            )
            for p in across
        ]
        came = comm.exchange("weights", across, parts, [len(over(p)) * size for p in across])
        held = {
            m.rank: piece
            for p, part in zip(across, came, strict=True)
            for m, piece in zip(over(p), part.split(size), strict=False)
        }
        parts = [held.get(p, _joined([], comm.device)) for p in inside]
        to_me = next((m for m in moves if m.rank == me), None)
        relay = None if to_me is None else inside[topology.card_of(to_me.source)]
        came = comm.exchange("weights", inside, parts, [size * (p == relay) for p in inside])
        if to_me is not None:
            if self._spare is None:
                size_of_slot = sum(p.numel() for p in self._parts(to_me.layer, 0))
                self._spare = torch.empty(size_of_slot, dtype=torch.uint8, device=comm.device)
            self._spare[start:stop] = torch.cat(list(came))

    def checksums(self, moves: Sequence[Move]) -> list[int | None]:
        """For each move the checksum of what this rank gave, or got; None where it has no part in it."""
        out: list[int | None] = []
        for m in moves:
            if m.source == self._comm.rank:
                out.append(_checksum(self._parts(m.layer, m.source_slot)))
            elif m.rank == self._comm.rank and self._spare is not None:
                out.append(_checksum([self._spare]))
            else:
                out.append(None)
        return out

    def commit(self, moves: Sequence[Move], placement: Placement) -> None:
        """From the next step on this placement holds, with what has been staged in its slots."""
        for m in moves:
            if m.rank != self._comm.rank:
                continue
            assert self._spare is not None
            first = 0
            for part in self._parts(m.layer, m.slot):
                part.copy_(self._spare[first : first + part.numel()])
                first += part.numel()
        self._exchange.put(placement)

    def _moe(self, layer: int) -> MoE:
        moe = self._model.layers[layer][1]
        assert isinstance(moe, MoE)
        return moe

    def _parts(self, layer: int, slot: int) -> list[Tensor]:
        """A slot's weights as bytes."""
        moe = self._moe(layer)
        return [part for w in (moe.gate_up, moe.down) for part in slot_bytes(w, slot)]

    def _piece(self, move: Move, start: int, stop: int) -> Tensor:
        pieces, first = [], 0
        for part in self._parts(move.layer, move.source_slot):
            pieces.append(part[max(0, start - first) : max(0, stop - first)])
            first += part.numel()
        return _joined(pieces, self._comm.device)


def _checksum(parts: Sequence[Tensor]) -> int:
    """Of all parts one after the other."""
    return reduce(lambda sum_, part: zlib.crc32(part.cpu().numpy().data, sum_), parts, 0)


def _joined(pieces: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat(list(pieces)) if pieces else torch.empty(0, dtype=torch.uint8, device=device)
