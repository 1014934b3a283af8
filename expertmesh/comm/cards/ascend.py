"""Ascend's own exchange: the fused ops npu_moe_distribute_dispatch_v2 and _combine_v2 of torch_npu.

An op's experts are our slots, replicas and empty ones among them. Dispatch returns a row for every choice, in the order
of my slots, in memory for the most that can come; how many did stays on the card. So each row has one choice, and rows
behind the last have none. Weights are applied by combine, to results of weight 1. Shared experts stay the model's.

Limits, sizes and which arguments a chip takes are those of the ops' documentation (op-plugin,
docs/zh/custom_APIs/torch_npu, 26.1). What assist_info and the counts for combine hold is the ops' own affair.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from expertmesh.comm.base import Comm, Received
from expertmesh.comm.cards.distributed import DistributedComm
from expertmesh.comm.cards.native import EvenSlots, StepShape, refuse, slots_in_order, too_many
from expertmesh.errors import InputError
from expertmesh.mesh.placement import Placement
from expertmesh.mesh.topology import Topology

Chip: TypeAlias = Literal["A2", "A3"]  # Ascend 910B, and 910C
CARDS = 8  # of a node, where the ops know of nodes
MIB = 1 << 20


class FusedOps(Protocol):
    """What is used of torch_npu."""

    @property
    def npu_moe_distribute_dispatch_v2(self) -> Any: ...

    @property
    def npu_moe_distribute_combine_v2(self) -> Any: ...


@dataclass(frozen=True)
class Way:
    """One of the ops' algorithms on one chip, and its limits. name: `comm_alg` of dispatch; back: of combine; ranks,
    rows, choices, hidden: what it takes; per_rank: slots of a rank; slots: of all; scaled: weights travel too, so that
    sums can be made on the way; tp: it is told that there is no TP group; nodes: it takes nodes of 8 cards, so many."""

    name: str
    back: str
    ranks: Collection[int]
    rows: int
    choices: int
    hidden: range
    per_rank: int
    slots: int
    scaled: bool = False
    tp: bool = False
    nodes: Collection[int] = ()

    def problems(self, shape: StepShape, topology: Topology, per_rank: int) -> list[str]:
        """What does not fit, and what would."""
        ranks = topology.ranks
        found = too_many(shape.rows, self.rows, topology)
        if shape.dtype not in (torch.bfloat16, torch.float16):
            found.append("rows are float32, and have to be bfloat16: set dtype bfloat16")
        if ranks not in self.ranks:
            found.append(f"{ranks} ranks, not {_listed(self.ranks)}: change nodes or cards")
        if self.nodes and (topology.cards_per_node != CARDS or topology.nodes not in self.nodes):
            nodes = f"{topology.nodes} nodes of {topology.cards_per_node} cards"
            found.append(f"{nodes}, not {_listed(self.nodes)} nodes of {CARDS}: change nodes and cards")
        if shape.choices > self.choices:
            found.append(f"{shape.choices} experts of a token, at most {self.choices}")
        if shape.hidden not in self.hidden:
            wide = f"{self.hidden.start} to {self.hidden[-1]} in steps of {self.hidden.step}"
            found.append(f"rows of {shape.hidden} numbers, not {wide}")
        if per_rank > self.per_rank:
            found.append(
                f"{per_rank} slots of a rank, at most {self.per_rank}: more ranks, or a lower redundant"
            )
        if per_rank * ranks > self.slots:
            found.append(f"{per_rank * ranks} slots in all, at most {self.slots}: a lower redundant")
        return found

    def buffer_bytes(self, shape: StepShape, ranks: int, per_rank: int) -> int:
        """What the communicator's buffer has to hold."""
        hidden, rows, choices = shape.hidden, shape.rows, shape.choices
        if self.name == "hierarchy":
            row = _up(rows * (2 * hidden + 16 * _up(choices, 8)), 512)
            return (per_rank * ranks + ranks // 4) * row + 8 * MIB
        if self.name == "fullmesh":
            return 2 * (rows * ranks * min(per_rank, choices) * hidden * 2 + 2 * MIB)
        there = _up(2 * hidden, 32) + 64
        there = _up(there, 480) // 480 * 512 if self.name == "fullmesh_v2" else _up(there, 512)
        return 2 * (per_rank * rows * ranks * there + (choices + 1) * rows * _up(2 * hidden, 512))


# The preferred one first. Rows of A2 are those that every driver takes.
WAYS: dict[Chip, tuple[Way, ...]] = {
    "A2": (
        Way("hierarchy", "hierarchy", (16, 32, 64), 256, 16, range(32, 10241, 32), 1024, 1024, True, nodes=(2, 4, 8)),
        Way(
            "fullmesh", "fullmesh", (2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256), 256, 16, range(32, 7169, 32), 24, 1024,
            scaled=True,
        ),
    ),
    "A3": (
        Way("fullmesh_v2", "", range(2, 769), 256, 12, range(1024, 8193), 1024, 1024, tp=True),
        Way("fullmesh_v1", "", range(2, 769), 512, 16, range(1024, 8193), 1024, 1024, tp=True),
    ),
}  # fmt: skip


def chip_of(device_name: str) -> Chip:
    """Of the name that the driver gives a card. InputError where the ops do not know it."""
    for beginning, chip in (("Ascend910B", "A2"), ("Ascend910_93", "A3")):
        if device_name.startswith(beginning):
            return chip  # type: ignore[return-value]
    raise InputError(
        f"exchange npu_distribute runs on Ascend 910B and 910C, not on {device_name}; take two_tier"
    )


def way_of(
    chip: Chip, shape: StepShape, topology: Topology, per_rank: int, name: str = "npu_distribute"
) -> Way:
    """The first way whose limits hold. InputError, which names them, where none does."""
    ways = WAYS[chip]
    found = [way.problems(shape, topology, per_rank) for way in ways]
    for way, problems in zip(ways, found, strict=True):
        if not problems:
            return way
    # Of the one that is nearest to fitting, and of several the one that takes most.
    way, problems = min(zip(ways, found, strict=True), key=lambda pair: (len(pair[1]), -pair[0].rows))
    refuse(f"{name} ({way.name} on Ascend {chip})", problems)
    return way


@dataclass(frozen=True)
class _Trail:
    """What combine needs. slots_TK: as they went; rows: those that are mine, of which one may be a stand-in; rest: what
    the ops have for each other."""

    slots_TK: Tensor
    weights_TK: Tensor
    rows: int
    assist: Tensor
    ep_counts: Tensor
    tp_counts: Tensor
    expand_scales: Tensor | None


class AscendExchange:
    """The exchange of one rank by fused ops. Implements `comm.base.MovingExchange`.

    An op runs to its end on the card's stream: nothing of ours is started meanwhile, so a step that is cut in two is
    not faster. What is sent is not counted.
    """

    def __init__(
        self,
        comm: Comm,
        placement: Placement,
        way: Way,
        ops: FusedOps,
        group: str,
        int8: bool = False,
    ) -> None:
        """group: the name of a communicator in which nothing else happens; int8: rows go as whole numbers of 8 bits
        with a scale each."""
        self.comm, self._way, self._ops, self._int8 = comm, way, ops, int8
        ranks = comm.topology.ranks
        self._most, self._group = 1, {"group_ep": group, "ep_world_size": ranks, "ep_rank_id": comm.rank}
        if way.tp:
            self._group |= {"tp_world_size": 1, "tp_rank_id": 0}
        self.put(placement)

    def put(self, placement: Placement) -> None:
        self._slots = EvenSlots(self.comm, placement)

    def prepare(self, pieces: int, split: str, rows: int) -> None:
        """rows: memory is taken for what ranks with so many may send."""
        self._most = max(1, rows)

    def dispatch(self, layer: int, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received:
        slots_TK = self._slots.choose(layer, experts_TK).int()
        x, weights = x_TD, weights_TK.float()
        if not len(x):  # the ops want a row of every rank
            x = x.new_ones(1, x.shape[1])
            mine = torch.arange(slots_TK.shape[1], dtype=torch.int32, device=x.device)[None]
            slots_TK = (mine + self.comm.rank * self._slots.per_rank) % self._slots.total
            weights = weights.new_zeros(1, weights.shape[1])
        found = self._ops.npu_moe_distribute_dispatch_v2(
            x=x, expert_ids=slots_TK, **self._common(), comm_alg=self._way.name, quant_mode=2 if self._int8 else 0,
            expert_scales=weights if self._way.scaled else None, expert_token_nums_type=1,
        )  # fmt: skip
        rows, scales, assist, counts_S, ep_counts, tp_counts, expand_scales = found
        if self._int8:
            rows = (rows.float() * scales[:, None]).to(x.dtype)
        trail = _Trail(slots_TK, weights, len(x_TD), assist, ep_counts, tp_counts, expand_scales)
        slots_R1 = slots_in_order(counts_S, len(rows))
        return Received(layer, rows, slots_R1, torch.ones_like(slots_R1, dtype=torch.float32), (trail,))

    def combine(self, y_RD: Tensor, received: Received) -> Tensor:
        (trail,) = received.trail
        way = self._way
        out: Tensor = self._ops.npu_moe_distribute_combine_v2(
            expand_x=y_RD, expert_ids=trail.slots_TK, assist_info_for_combine=trail.assist,
            ep_send_counts=trail.ep_counts, expert_scales=trail.weights_TK, **self._common(), comm_alg=way.back,
            tp_send_counts=trail.tp_counts if way.tp else None,
            expand_scales=trail.expand_scales if way.scaled else None,
        )  # fmt: skip
        return out[: trail.rows]

    def _common(self) -> dict[str, Any]:
        """Arguments that are the same on all ranks and in both ops."""
        slots, ranks = self._slots.total, self.comm.topology.ranks
        return {**self._group, "moe_expert_num": slots, "global_bs": self._most * ranks}


def connect(comm: DistributedComm, placement: Placement, shape: StepShape, name: str) -> AscendExchange:
    """The exchange of this rank. All ranks call it. InputError where it is not to be had here, or a limit is met."""
    try:
        import torch_npu
    except ImportError as error:
        raise InputError(
            f"exchange {name} needs torch_npu, which is not here ({error}); take two_tier"
        ) from None
    per_rank, topology = placement.slots_per_rank, comm.topology
    way = way_of(chip_of(torch_npu.npu.get_device_name()), shape, topology, per_rank, name)
    options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
    size = way.buffer_bytes(shape, topology.ranks, per_rank)
    options.hccl_config = {"hccl_buffer_size": -(-size // MIB)}
    group = comm.new_group(topology.all_ranks(), options)
    backend: Any = group._get_backend(comm.device)
    label = backend.get_hccl_comm_name(comm.rank)
    return AscendExchange(comm, placement, way, torch_npu, label, int8=name.endswith("_int8"))


def _listed(numbers: Collection[int]) -> str:
    if isinstance(numbers, range):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
