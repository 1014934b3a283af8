"""A stand-in for torch_npu's npu_moe_distribute_dispatch_v2 and _combine_v2, over any transport of ours.

Signatures and what they promise are those of op-plugin's documentation (docs/zh/custom_APIs/torch_npu, 26.1):
  - dispatch sends row t to the rank of each of expert_ids[t] and returns them by local expert; within one, they are
    here by sender and row. Memory is for global_bs * min(local experts, K) rows; what is behind the last is garbage.
  - expert_token_nums counts the rows of each local expert (type 1); assist_info_for_combine [A * 128] and
    ep_recv_counts hold what combine needs, and nobody else may look at or change it.
  - with quant_mode 2 rows are int8 and dynamic_scales [A] float32, the largest number of a row being 127.
  - combine returns, in the type of expand_x, the sum over k of expert_scales[t, k] times the result of choice k.
What the documentation restricts is checked, and that all ranks pass the same where they have to. It does not say
what is in assist_info and in the counts behind the first: here they are random.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertmesh.comm.base import Comm

SERVER = 8


class FusedOps:
    """Of one rank. chip: A2 or A3; types: of rows that it takes, those of the documentation where not given."""

    TYPES = (torch.bfloat16, torch.float16)

    def __init__(self, comm: Comm, chip: str, group: str, types: Collection[torch.dtype] = TYPES) -> None:
        self._types = types
        self._comm, self._chip, self._group = comm, chip, group
        self._known: dict[bytes, Any] = {}
        self._generator = np.random.default_rng(comm.rank)

    def npu_moe_distribute_dispatch_v2(
        self, x: Tensor, expert_ids: Tensor, group_ep: str, ep_world_size: int, ep_rank_id: int, moe_expert_num: int, *,
        scales: Tensor | None = None, x_active_mask: Tensor | None = None, expert_scales: Tensor | None = None,
        elastic_info: Tensor | None = None, performance_info: Tensor | None = None, group_tp: str = "",
        tp_world_size: int = 0, tp_rank_id: int = 0, expert_shard_type: int = 0, shared_expert_num: int = 1,
        shared_expert_rank_num: int = 0, quant_mode: int = 0, global_bs: int = 0, expert_token_nums_type: int = 1,
        comm_alg: str = "", zero_expert_num: int = 0, copy_expert_num: int = 0, const_expert_num: int = 0,
    ) -> tuple[Any, ...]:  # fmt: skip
        rows, width = x.shape
        assert (scales, x_active_mask, elastic_info, performance_info) == (None,) * 4
        assert (expert_shard_type, shared_expert_num, shared_expert_rank_num) == (0, 1, 0)
        assert (zero_expert_num, copy_expert_num, const_expert_num) == (0, 0, 0)
        assert x.dtype in self._types
        assert quant_mode in (0, 2) and expert_token_nums_type == 1
        self._check_ids(expert_ids, rows, moe_expert_num, ep_world_size, comm_alg)
        self._check_group(group_ep, ep_world_size, ep_rank_id, group_tp, tp_world_size, tp_rank_id, comm_alg)
        self._check_size(rows, width, expert_ids.shape[1], moe_expert_num, ep_world_size, comm_alg)
        self._check_scales(expert_scales, expert_ids, comm_alg)
        assert global_bs and global_bs % ep_world_size == 0 and rows <= global_bs // ep_world_size
        self._same([ep_world_size, moe_expert_num, global_bs, quant_mode, expert_ids.shape[1], width])
        local = moe_expert_num // ep_world_size
        most = global_bs * min(local, expert_ids.shape[1])
        return self._dispatched(x, expert_ids, expert_scales, local, most, quant_mode, global_bs)

    def npu_moe_distribute_combine_v2(
        self, expand_x: Tensor, expert_ids: Tensor, assist_info_for_combine: Tensor, ep_send_counts: Tensor,
        expert_scales: Tensor, group_ep: str, ep_world_size: int, ep_rank_id: int, moe_expert_num: int, *,
        tp_send_counts: Tensor | None = None, x_active_mask: Tensor | None = None, expand_scales: Tensor | None = None,
        shared_expert_x: Tensor | None = None, elastic_info: Tensor | None = None, ori_x: Tensor | None = None,
        const_expert_alpha_1: Tensor | None = None, const_expert_alpha_2: Tensor | None = None,
        const_expert_v: Tensor | None = None, performance_info: Tensor | None = None, group_tp: str = "",
        tp_world_size: int = 0, tp_rank_id: int = 0, expert_shard_type: int = 0, shared_expert_num: int = 1,
        shared_expert_rank_num: int = 0, global_bs: int = 0, comm_quant_mode: int = 0, comm_alg: str = "",
        zero_expert_num: int = 0, copy_expert_num: int = 0, const_expert_num: int = 0,
    ) -> Tensor:  # fmt: skip
        unused = (x_active_mask, shared_expert_x, elastic_info, ori_x, performance_info)
        assert (*unused, const_expert_alpha_1, const_expert_alpha_2, const_expert_v) == (None,) * 8
        assert (expert_shard_type, shared_expert_num, shared_expert_rank_num, comm_quant_mode) == (0, 1, 0, 0)
        assert (zero_expert_num, copy_expert_num, const_expert_num) == (0, 0, 0)
        known = self._known.pop(assist_info_for_combine.numpy().tobytes())
        assert expand_x.dtype in self._types
        assert tuple(expand_x.shape) == known["shape"]
        assert torch.equal(ep_send_counts, known["counts"])
        assert expert_ids.dtype == torch.int32 and torch.equal(expert_ids, known["ids"])
        assert expert_scales.dtype == torch.float32 and expert_scales.shape == expert_ids.shape
        assert (group_ep, ep_world_size, moe_expert_num, global_bs) == known["setting"]
        self._check_group(group_ep, ep_world_size, ep_rank_id, group_tp, tp_world_size, tp_rank_id, comm_alg)
        if self._chip == "A2":
            assert comm_alg == known["alg"] and tp_send_counts is None
            assert expand_scales is not None and torch.equal(
                expand_scales.view(torch.int32), known["expand_scales"]
            )
        else:
            assert comm_alg == "" and expand_scales is None
            assert tp_send_counts is not None and tp_send_counts.dtype == torch.int32
        return self._combined(expand_x, expert_scales, known)

    def _dispatched(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor | None,
        local: int,
        most: int,
        quant_mode: int,
        global_bs: int,
    ) -> tuple[Any, ...]:
        every = self._comm.topology.all_ranks()
        values, row_scales = x, torch.ones(len(x))
        if quant_mode == 2:
            row_scales = x.float().abs().amax(1) / 127
            values = (x.float() / row_scales[:, None]).round().to(torch.int8)
        weights = torch.ones(ids.shape) if weights is None else weights
        owner = ids // local
        sent = [(owner == r).nonzero() for r in every]  # row, then choice
        heads = [torch.cat([where, (ids[tuple(where.T)] % local)[:, None]], 1) for where in sent]
        came = self._swap(heads, torch.int64, 3)
        rows_came = self._swap([values[where[:, 0]] for where in sent], values.dtype, x.shape[1])
        scales_came = self._swap([row_scales[where[:, :1]] for where in sent], torch.float32, 1)
        weights_came = self._swap([weights[tuple(where.T)][:, None] for where in sent], torch.float32, 1)
        source = torch.cat([torch.full((len(part),), r) for r, part in enumerate(came)])
        head = torch.cat(came)
        order = torch.argsort(head[:, 2], stable=True)
        count = len(order)
        assert count <= most
        expand_x = torch.full((most, x.shape[1]), 77 if quant_mode else torch.nan, dtype=values.dtype)
        expand_x[:count] = torch.cat(rows_came)[order]
        dynamic_scales, expand_scales = torch.full((2, most), torch.nan).unbind()
        dynamic_scales[:count] = torch.cat(scales_came)[order, 0]
        expand_scales[:count] = torch.cat(weights_came)[order, 0]
        assist = torch.from_numpy(self._generator.integers(-(1 << 31), 1 << 31, most * 128).astype(np.int32))
        servers = len(every) // SERVER if self._chip == "A2" else 0
        size = local * len(every) + 2 * global_bs * ids.shape[1] * servers
        counts = torch.from_numpy(self._generator.integers(0, 1 << 31, size).astype(np.int32))
        self._known[assist.numpy().tobytes()] = {
            "shape": (most, x.shape[1]), "counts": counts.clone(), "ids": ids.clone(), "source": source[order],
            "head": head[order], "setting": (self._group, len(every), local * len(every), global_bs), "alg": self._alg,
            "expand_scales": expand_scales.view(torch.int32).clone(),
        }  # fmt: skip
        sums = torch.bincount(head[:, 2], minlength=local)
        tp = torch.zeros(1, dtype=torch.int32)
        given = dynamic_scales if quant_mode else None
        return expand_x, given, assist, sums, counts, tp, expand_scales if self._chip == "A2" else None

    def _combined(self, y: Tensor, weights: Tensor, known: dict[str, Any]) -> Tensor:
        head, source = known["head"], known["source"]
        back = [(source == r).nonzero()[:, 0] for r in self._comm.topology.all_ranks()]
        heads = torch.cat(self._swap([head[b] for b in back], torch.int64, 3))
        results = torch.cat(self._swap([y[b] for b in back], y.dtype, y.shape[1]))
        by_choice = torch.full((*weights.shape, y.shape[1]), torch.nan)
        by_choice[heads[:, 0], heads[:, 1]] = results.float()
        return (by_choice * weights[:, :, None]).sum(1).to(y.dtype)

    def _swap(self, parts: list[Tensor], dtype: torch.dtype, width: int) -> list[Tensor]:
        """parts[i] to rank i."""
        flat = [part.to(dtype).contiguous().flatten().view(torch.uint8) for part in parts]
        came = self._comm.exchange("dispatch", self._comm.topology.all_ranks(), flat)
        return [part.contiguous().view(dtype).view(-1, width) for part in came]

    def _same(self, values: list[int]) -> None:
        mine = torch.tensor(values)
        every = self._swap([mine[None]] * self._comm.topology.ranks, torch.int64, len(values))
        assert all(torch.equal(each[0], mine) for each in every), "ranks differ"

    def _check_ids(self, ids: Tensor, rows: int, experts: int, ranks: int, alg: str) -> None:
        assert ids.dtype == torch.int32 and ids.ndim == 2 and len(ids) == rows
        assert bool(((ids >= 0) & (ids < experts)).all()) and experts % ranks == 0 and 1 <= experts <= 1024
        assert all(len(set(row)) == len(row) for row in ids.tolist())
        if alg == "fullmesh" and self._chip == "A2":
            assert experts // ranks <= 24

    def _check_group(
        self, group: str, size: int, rank: int, tp_group: str, tp: int, tp_rank: int, alg: str
    ) -> None:
        assert group == self._group and 1 <= len(group) < 128
        assert (size, rank) == (self._comm.topology.ranks, self._comm.rank)
        assert tp_group != group and tp_rank == 0 and tp in ((0,) if self._chip == "A2" else (0, 1))
        assert alg != "fullmesh_v2" or tp == 1
        if self._chip == "A2":
            sizes = {"hierarchy": (16, 32, 64), "fullmesh": (2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256)}
            assert size in sizes[alg]
            assert alg != "hierarchy" or self._comm.topology.cards_per_node == SERVER
        else:
            assert 2 <= size <= 768 and alg in ("", "fullmesh_v1", "fullmesh_v2")

    def _check_size(self, rows: int, width: int, choices: int, experts: int, ranks: int, alg: str) -> None:
        self._alg = alg
        assert 0 < rows <= {"fullmesh": 256, "fullmesh_v2": 256}.get(alg, 512)
        assert 0 < choices <= (12 if alg == "fullmesh_v2" else 16)
        if self._chip == "A2":
            assert width % 32 == 0 and 0 < width <= (10240 if alg == "hierarchy" else 7168)
        else:
            assert 1024 <= width <= 8192

    def _check_scales(self, expert_scales: Tensor | None, ids: Tensor, alg: str) -> None:
        if self._chip == "A3":
            assert expert_scales is None
        else:
            assert expert_scales is not None and expert_scales.dtype == torch.float32
            assert expert_scales.shape == ids.shape
