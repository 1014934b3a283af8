"""One rank: the weights, the cache's memory, and one step of the model over a batch."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertmesh.comm.base import Collectives, Group
from expertmesh.config import EngineConfig
from expertmesh.engine import sampler
from expertmesh.kernels import AttentionRows, Rotary
from expertmesh.kernels.types import Prefill, rotary_table
from expertmesh.model.deepseek import DeepSeek
from expertmesh.model.step import Loads, Step
from expertmesh.request import Batch, Slice, StepResult


class Runner:
    """Holds one rank's share of the model and computes steps. `run` is the whole of it.

    config is resolved.
    """

    def __init__(self, model: DeepSeek, config: EngineConfig, collectives: Collectives) -> None:
        self.model, self.config, self.collectives = model, config, collectives
        self.device = model.norm.device
        pages = (config.cache_tokens or 0) // config.page_size
        shape = (pages, config.page_size, model.config.latent_dim)
        self.cache = [
            _lazy_zeros(shape, model.norm.dtype, self.device) for _ in range(model.config.num_hidden_layers)
        ]
        self.cos, self.sin = rotary_table(model.config, config.max_context or 1)
        self.loads = Loads()

    @property
    def cache_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.cache)

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        """Compute my share of the TP group's batch; choose a token for each request whose known tokens are all
        computed. Every rank of the group gets the batch, the first one gives the results."""
        group = self.collectives.group(batch.rows)
        step = self._step(batch, group)
        (hidden_TD,) = group.all_gather(self.model(step))
        result = StepResult()
        wanted, last_rows, first = [], [], 0
        for part in batch.slices:
            if part.start < part.request.prompt_length and part.request.params.prompt_logprobs is not None:
                found = self._prompt_logprobs(part, hidden_TD[first : first + part.count], step)
                result.prompt_logprobs[part.request.id] = found
            first += part.count
            if part.samples:
                wanted.append(part.request)
                last_rows.append(first - 1)
        if wanted:
            rows = hidden_TD if len(last_rows) == hidden_TD.shape[0] else hidden_TD[last_rows]
            logits = self.model.head(rows, step)
            if group.leads:
                chosen = sampler.sample(logits, wanted)
                result.sampled.update({r.id: token for r, token in zip(wanted, chosen, strict=True)})
        return result

    def _step(self, batch: Batch, group: Group) -> Step:
        """Positions, cache slots and pages of every row, from plain lists to tensors once."""
        size = self.config.page_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        decoding = [s for s in batch.slices if s.count == 1]
        prefills = []
        for part in batch.slices:
            pages, end = part.request.pages, part.start + part.count
            if part.count > 1:
                used = self._ints(pages[: -(-end // size)])
                prefills.append(Prefill(len(tokens), part.count, end, used))
            tokens += part.request.tokens[part.start : end]
            positions += range(part.start, end)
            slots += [pages[p // size] * size + p % size for p in range(part.start, end)]
        used_pages = [s.request.pages[: s.start // size + 1] for s in decoding]
        most = max(map(len, used_pages), default=0)
        table = [pages + [0] * (most - len(pages)) for pages in used_pages]
        rows = AttentionRows(
            slots_T=self._ints(slots),
            decoding=len(decoding),
            pages_BM=self._ints(table),
            lengths_B=self._ints([s.start + 1 for s in decoding]),
            prefills=tuple(prefills),
        )
        return Step(
            tokens_T=self._ints(tokens),
            rotary=self._rotary(self._ints(positions)),
            rows=rows,
            cache=self.cache,
            tp=group,
            exchange=self.collectives.exchange,
            loads=self.loads,
        )

    def _ints(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _rotary(self, positions_T: Tensor) -> Rotary:
        interleaved = self.model.config.rope_interleave
        return Rotary(self.cos[positions_T, None], self.sin[positions_T, None], interleaved)

    def _prompt_logprobs(self, part: Slice, hidden_TD: Tensor, step: Step) -> list[dict[int, float] | None]:
        """What the model thought of each prompt token that follows a row of this slice."""
        request = part.request
        # Nothing comes before the first token.
        found: list[dict[int, float] | None] = [None] if part.start == 0 else []
        following = request.tokens[part.start + 1 : min(part.start + part.count + 1, request.prompt_length)]
        count = request.params.prompt_logprobs or 0
        for first in range(0, len(following), PROMPT_LOGPROBS_ROWS):
            chosen = following[first : first + PROMPT_LOGPROBS_ROWS]
            logits = self.model.head(hidden_TD[first : first + len(chosen)], step)
            if step.tp.leads:
                found += sampler.top_logprobs(logits, chosen, [count] * len(chosen))
        return found


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory is taken when it is first written: a cache sized for the worst case costs nothing at first.

    Zeros and not just any memory, since attention reads whole pages and masks what is not written yet.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    flat = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(flat).view(dtype).view(shape)


# Rows whose logits are held at a time for prompt_logprobs: 128 of V3's vocabulary are 66 MB.
PROMPT_LOGPROBS_ROWS = 128
