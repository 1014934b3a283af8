"""A stand-in for DeepEP's `Buffer`, over any transport of ours.

Signatures and what they promise are those of deepseek-ai/DeepEP (deep_ep/buffers/legacy.py): normal mode sends a row
once to each rank that has any of its experts, with their local numbers, -1 elsewhere, and combine adds up without
weights; low-latency mode fills memory for the most that can come to each local expert, by sender and row here, and
combine applies weights. What has been asked for asynchronously is there after `current_stream_wait` or the hook, not
before: until then it is garbage. Handles hold what is nobody's business.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from expertmesh.comm.base import Comm

HIDDEN = (2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192)


class Event:
    """What is done by a stream that this one has to wait for."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def current_stream_wait(self) -> None:
        self._finish()


class Buffer:
    """Of one rank. most: rows of a rank that low-latency mode has room for."""

    def __init__(self, comm: Comm, most: int) -> None:
        self._comm, self._most, self._ranks = comm, most, comm.topology.ranks
        self._dirty, self._held = False, 0
        self.modes: list[str] = []

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, previous_event: Any = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Event]:  # fmt: skip
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous() and num_experts % self._ranks == 0
        local = num_experts // self._ranks
        valid = (topk_idx >= 0) & (topk_idx < num_experts)
        assert bool((valid | (topk_idx == -1)).all())
        is_in = torch.stack([((topk_idx // local) == rank).any(1) for rank in range(self._ranks)], dim=1)
        by_expert = torch.bincount(topk_idx[valid], minlength=num_experts).int()
        per_node = is_in.unflatten(1, (self._comm.topology.nodes, -1)).any(2).sum(0).int()
        self._layout = is_in.sum(0).int(), per_node, by_expert, is_in
        return *self._layout, Event(lambda: None)

    def dispatch(
        self, x: Any, handle: Any = None, num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None, is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None, topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None, expert_alignment: int = 1, num_worst_tokens: int = 0, config: Any = None,
        previous_event: Any = None, async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Tensor, Tensor, list[int], Any, Event]:  # fmt: skip
        assert handle is None and async_finish and topk_idx is not None and topk_weights is not None
        given = (num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank)
        assert all(a is b for a, b in zip(given, self._layout, strict=True))
        assert topk_weights.dtype == torch.float32 and topk_weights.shape == topk_idx.shape
        parts = x if isinstance(x, tuple) else (x,)
        self._check_rows(parts, len(topk_idx))
        self._dirty = True
        self.modes.append("normal")
        local, is_in = len(self._layout[2]) // self._ranks, self._layout[3]
        rows = [is_in[:, rank].nonzero()[:, 0] for rank in range(self._ranks)]
        mine = [topk_idx[r] - rank * local for rank, r in enumerate(rows)]
        mine = [torch.where((t >= 0) & (t < local), t, -1) for t in mine]
        weights = [torch.where(t >= 0, topk_weights[r], 0.0) for t, r in zip(mine, rows, strict=True)]
        came = [self._swap([part[r] for r in rows]) for part in parts]
        idx, weight = torch.cat(self._swap(mine)), torch.cat(self._swap(weights))
        real = [torch.cat(part) for part in came]
        shown = [torch.full_like(part.float(), torch.nan).to(part.dtype) for part in real]
        counts = [int((idx == expert).sum()) for expert in range(local)]
        handle = (object(), rows, [len(part) for part in came[0]], len(topk_idx))
        late = Event(lambda: _fill(shown, real))
        return tuple(shown) if isinstance(x, tuple) else shown[0], idx, weight, counts, handle, late

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None = None, bias: Any = None, config: Any = None,
        previous_event: Any = None, async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, Event]:  # fmt: skip
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and async_finish and bias is None
        _, rows, counts, total = handle
        assert len(x) == sum(counts)
        out = torch.zeros(total, x.shape[1])
        for r, part in zip(rows, self._swap(list(x.split(counts))), strict=True):
            out.index_add_(0, r, part.float())
        shown = torch.full_like(out, torch.nan).to(torch.bfloat16)
        return shown, None, Event(lambda: _fill([shown], [out]))

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        assert num_max_dispatch_tokens_per_rank == self._most and hidden in HIDDEN
        self._dirty = False

    def low_latency_dispatch(
        self, x: Tensor, topk_idx: Tensor, num_max_dispatch_tokens_per_rank: int, num_experts: int,
        cumulative_local_expert_recv_stats: Any = None, dispatch_wait_recv_cost_stats: Any = None,
        use_fp8: bool = True, round_scale: bool = False, use_ue8m0: bool = False, async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, Tensor, Any, None, Callable[[], None]]:  # fmt: skip
        assert not self._dirty and return_recv_hook and not async_finish and self._held < 2
        assert x.shape[1] in HIDDEN and len(x) < num_max_dispatch_tokens_per_rank == self._most
        assert topk_idx.dtype == torch.int64 and topk_idx.shape[1] <= 9 and num_experts % self._ranks == 0
        self._check_rows((x,), len(topk_idx))
        self._held += 1
        self.modes.append("low latency")
        local = num_experts // self._ranks
        sent = [((topk_idx // local) == rank).nonzero() for rank in range(self._ranks)]
        heads = [torch.cat([w, (topk_idx[tuple(w.T)] % local)[:, None]], 1) for w in sent]
        head, rows = self._swap(heads), torch.cat(self._swap([x[w[:, 0]] for w in sent]))
        source = torch.cat([torch.full((len(part),), rank) for rank, part in enumerate(head)])
        joined = torch.cat(head)
        counts, places = torch.zeros(local, dtype=torch.int32), torch.empty(len(rows), dtype=torch.int64)
        for row, expert in enumerate(joined[:, 2].tolist()):
            places[row] = expert * self._most * self._ranks + counts[expert]
            counts[expert] += 1
        packed = torch.full((local, self._most * self._ranks, x.shape[1]), torch.nan, dtype=x.dtype)
        shown_counts = torch.full_like(counts, 1 << 20)
        result: Any = packed
        if use_fp8:
            result = (
                packed.to(torch.float8_e4m3fn),
                torch.full((*packed.shape[:2], x.shape[1] // 128), torch.nan),
            )

        def hook() -> None:
            shown_counts.copy_(counts)
            if not use_fp8:
                packed.view(-1, x.shape[1])[places] = rows
                return
            scales = rows.float().unflatten(1, (-1, 128)).abs().amax(2).clamp(min=1e-4) / 448
            numbers = (rows.float().unflatten(1, (-1, 128)) / scales[:, :, None]).flatten(1)
            result[0].view(torch.uint8).view(-1, x.shape[1])[places] = numbers.to(torch.float8_e4m3fn).view(
                torch.uint8
            )
            result[1].view(-1, scales.shape[1])[places] = scales

        return result, shown_counts, (object(), joined, source, places, packed.shape), None, hook

    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Any, use_logfmt: bool = False,
        zero_copy: bool = False, async_finish: bool = False, return_recv_hook: bool = False,
        out: Tensor | None = None, combine_wait_recv_cost_stats: Any = None,
    ) -> tuple[Tensor, None, Callable[[], None]]:  # fmt: skip
        _, head, source, places, shape = handle
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape == shape
        assert return_recv_hook and not async_finish and out is None and topk_weights.dtype == torch.float32
        self._held -= 1
        flat = x.view(-1, x.shape[2])
        back = [(source == rank).nonzero()[:, 0] for rank in range(self._ranks)]
        heads = torch.cat(self._swap([head[b] for b in back]))
        results = torch.cat(self._swap([flat[places[b]] for b in back]))
        by_choice = torch.full((*topk_idx.shape, x.shape[2]), torch.nan)
        by_choice[heads[:, 0], heads[:, 1]] = results.float()
        real = (by_choice * topk_weights[:, :, None]).sum(1).to(torch.bfloat16)
        shown = torch.full_like(real, torch.nan)
        return shown, None, lambda: _fill([shown], [real])

    def _check_rows(self, parts: Any, rows: int) -> None:
        assert all(part.is_contiguous() and len(part) == rows for part in parts)
        if len(parts) == 1:
            assert parts[0].dtype == torch.bfloat16
        else:
            assert parts[0].dtype == torch.float8_e4m3fn and parts[1].dtype == torch.float32
            assert parts[1].shape[1] * 128 == parts[0].shape[1]

    def _swap(self, parts: list[Tensor]) -> list[Tensor]:
        """parts[i] to rank i."""
        dtype, width = parts[0].dtype, parts[0].shape[1]
        flat = [part.contiguous().flatten().view(torch.uint8) for part in parts]
        came = self._comm.exchange("dispatch", self._comm.topology.all_ranks(), flat)
        return [part.contiguous().view(dtype).view(-1, width) for part in came]


def _fill(shown: list[Tensor], real: list[Tensor]) -> None:
    for garbage, values in zip(shown, real, strict=True):
        garbage.copy_(values)
