"""DeepEP's exchange (deepseek-ai/DeepEP, and its edition for Ascend, which has the same `Buffer`).

An expert of DeepEP is one of our slots. Its normal mode returns what `Received` holds: a row for each rank that has any
of the row's slots, with these and their weights, and adds results up without weights; the host waits for counts. The
low-latency mode, for steps of few rows, returns memory for the most that can come to each slot, and applies weights
when it combines; the host waits for nothing.

Limits are those of the published kernels (csrc/kernels/legacy, deep_ep/buffers/legacy.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertmesh.comm.base import Comm, Received
from expertmesh.comm.cards.distributed import DistributedComm
from expertmesh.comm.cards.native import EvenSlots, StepShape, refuse
from expertmesh.comm.rows import quantised, restored
from expertmesh.errors import InputError
from expertmesh.mesh.placement import Placement
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import FORMATS

FEW = 128  # rows of a rank from which on a step goes in normal mode: low latency takes fewer
CARDS = 8  # of a node, where there are several
RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
HIDDEN = (2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192)  # of the low-latency mode
CHOICES = 9  # likewise


def check(shape: StepShape, topology: Topology) -> None:
    """InputError where DeepEP cannot do this."""
    found, ranks = [], topology.ranks
    if ranks not in RANKS:
        found.append(f"{ranks} ranks, not {', '.join(map(str, RANKS))}: change nodes or cards")
    if topology.nodes > 1 and topology.cards_per_node != CARDS:
        found.append(
            f"{topology.cards_per_node} cards of a node, not {CARDS} where there are several: change cards"
        )
    if shape.dtype != torch.bfloat16:
        found.append("rows are float32, and have to be bfloat16: set dtype bfloat16")
    if shape.hidden not in HIDDEN:
        found.append(f"rows of {shape.hidden} numbers, not {', '.join(map(str, HIDDEN))}")
    if shape.choices > CHOICES:
        found.append(f"{shape.choices} experts of a token, at most {CHOICES}")
    refuse("deepep", found)


@dataclass(frozen=True)
class _Few:
    """For combine in low-latency mode."""

    slots_TK: Tensor
    weights_TK: Tensor
    handle: Any
    per_slot: int


class DeepEPExchange:
    """The exchange of one rank over a DeepEP buffer. Implements `comm.base.MovingExchange`. fp8: rows go in FP8 blocks
    of 128. What is sent is not counted."""

    def __init__(self, comm: Comm, placement: Placement, buffer: Any, fp8: bool = False) -> None:
        """buffer: of both modes, with room for FEW rows of a rank in low-latency mode."""
        self.comm, self._buffer, self._fp8 = comm, buffer, fp8
        self._few, self._clean = False, True
        self.put(placement)

    def put(self, placement: Placement) -> None:
        self._slots = EvenSlots(self.comm, placement)

    def prepare(self, pieces: int, split: str, rows: int) -> None:
        """rows: decides the mode, the same on all ranks."""
        self._few = rows < FEW

    def dispatch(self, layer: int, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received:
        slots_TK, weights_TK = self._slots.choose(layer, experts_TK), weights_TK.float()
        if self._few:
            return self._dispatch_few(layer, x_TD, slots_TK, weights_TK)
        return self._dispatch_many(layer, x_TD, slots_TK, weights_TK)

    def combine(self, y_RD: Tensor, received: Received) -> Tensor:
        (trail,) = received.trail
        if isinstance(trail, _Few):
            y_SRD = y_RD.view(self._slots.per_rank, trail.per_slot, -1)
            out: Tensor
            out, _, hook = self._buffer.low_latency_combine(
                y_SRD, trail.slots_TK, trail.weights_TK, trail.handle, return_recv_hook=True
            )
            self.comm.turns.turn()
            hook()
            return out
        out, _, event = self._buffer.combine(y_RD, trail, async_finish=True)
        self.comm.turns.turn()
        event.current_stream_wait()
        return out

    def _dispatch_many(self, layer: int, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Received:
        self._clean = False
        buffer, form = self._buffer, FORMATS["fp8"]
        per_rank, per_node, per_slot, is_in_rank, _ = buffer.get_dispatch_layout(slots_TK, self._slots.total)
        x: Tensor | tuple[Tensor, Tensor] = x_TD
        if self._fp8:
            numbers, scales = quantised(x_TD, form)
            x = numbers.view(torch.float8_e4m3fn), scales.view(torch.float32)
        rows, slots_RK, weights_RK, _, handle, event = buffer.dispatch(
            x, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node, is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_slot, topk_idx=slots_TK, topk_weights=weights_TK, async_finish=True,
        )  # fmt: skip
        self.comm.turns.turn()
        event.current_stream_wait()
        if self._fp8:
            rows = restored([part.view(torch.uint8) for part in rows], form, x_TD.dtype)
        return Received(layer, rows, slots_RK, weights_RK, (handle,))

    def _dispatch_few(self, layer: int, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Received:
        total = self._slots.total
        if not self._clean:  # normal mode has used the same memory
            self._buffer.clean_low_latency_buffer(FEW, x_TD.shape[1], total)
            self._clean = True
        rows, counts_S, handle, _, hook = self._buffer.low_latency_dispatch(
            x_TD, slots_TK, FEW, total, use_fp8=self._fp8, return_recv_hook=True
        )
        self.comm.turns.turn()
        hook()
        if self._fp8:
            parts = [part.flatten(0, 1).contiguous().view(torch.uint8) for part in rows]
            x_RD = restored(parts, FORMATS["fp8"], x_TD.dtype)
        else:
            x_RD = rows.flatten(0, 1)
        per_slot = FEW * self.comm.topology.ranks
        place = torch.arange(per_slot, device=counts_S.device)
        slot = torch.arange(len(counts_S), device=counts_S.device)[:, None]
        slots_R1 = torch.where(place < counts_S[:, None], slot, -1).reshape(-1, 1)
        trail = _Few(slots_TK, weights_TK, handle, per_slot)
        return Received(layer, x_RD, slots_R1, torch.ones_like(slots_R1, dtype=torch.float32), (trail,))


def connect(comm: DistributedComm, placement: Placement, shape: StepShape, name: str) -> DeepEPExchange:
    """The exchange of this rank. All ranks call it. InputError where it is not to be had here, or a limit is met."""
    try:
        from deep_ep import Buffer
    except ImportError as error:
        raise InputError(
            f"exchange {name} needs deep_ep, which is not here ({error}); take two_tier"
        ) from None
    check(shape, comm.topology)
    ranks, per_rank = comm.topology.ranks, placement.slots_per_rank
    row_bytes = shape.hidden * shape.dtype.itemsize
    configs = Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks)
    few = Buffer.get_low_latency_rdma_size_hint(FEW, shape.hidden, ranks, per_rank * ranks)
    buffer = Buffer(
        comm.new_group(comm.topology.all_ranks()),
        num_nvl_bytes=max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs),
        num_rdma_bytes=max(few, *(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs)),
        low_latency_mode=True,
        num_qps_per_rank=per_rank,
    )
    return DeepEPExchange(comm, placement, buffer, fp8=name.endswith("_fp8"))
