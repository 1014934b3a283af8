"""One rank: the weights, the cache's memory, and one step of the model over a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor

from expertmesh.comm.alone import Alone
from expertmesh.comm.base import Collectives, Exchange, Group, MovingExchange
from expertmesh.config import EngineConfig
from expertmesh.engine import sampler
from expertmesh.engine.moving import Mover
from expertmesh.engine.parts import Parts
from expertmesh.engine.plan import Plan, cut
from expertmesh.engine.replay import Replay
from expertmesh.kernels import AttentionRows, Rotary
from expertmesh.kernels.types import Prefill, rotary_table
from expertmesh.model.deepseek import DeepSeek
from expertmesh.model.step import Loads, Step
from expertmesh.request import Batch, Request, StepResult


class Runner:
    """Holds one rank's share of the model and computes steps. `run` is the whole of it.

    config is resolved.
    """

    def __init__(self, model: DeepSeek, config: EngineConfig, collectives: Collectives) -> None:
        self.model, self.config, self.collectives = model, config, collectives
        self.device = model.norm.device
        assert config.page_size
        self.page_size = config.page_size
        pages = (config.cache_tokens or 0) // self.page_size
        c = model.config
        self.cache = [
            model.kernels.cache(
                pages, self.page_size, c.kv_lora_rank, c.qk_rope_head_dim, model.norm.dtype, self.device
            )
            for _ in range(c.num_hidden_layers)
        ]
        self.cos, self.sin = rotary_table(model.config, config.max_context or 1)
        self.loads = Loads(model.kernels.count)
        self.parts = Parts()
        graph = model.kernels.graph
        alone = isinstance(collectives, Alone)
        self.replay = Replay(graph, config, self._decode) if graph is not None and alone else None

    @cached_property
    def mover(self) -> Mover:
        """Of a rank of several."""
        return Mover(self.model, cast(MovingExchange, self.collectives.exchange))

    @torch.inference_mode()
    def run(self, batch: Batch, plan: Plan) -> StepResult:
        """Compute my share of the TP group's batch; choose a token for each request whose known tokens are all
        computed. Every rank of the group gets the batch, the first one gives the results."""
        collectives = self.parts.of_step(self.collectives, plan.micro_batches)
        collectives.exchange.prepare(plan.pieces, plan.split, plan.rows)
        parts = cut(batch) if plan.micro_batches == 2 else (batch,)
        asked = [_asked(part) for part in parts]
        rows = collectives.run(
            [partial(self._compute, *each, collectives) for each in zip(parts, asked, strict=True)]
        )
        result = StepResult()
        group = self.collectives.group(0)  # of any number of rows: only the head is computed now
        sampling = [request for wanted in asked for _, request in wanted.sampling]
        if sampling:
            last = torch.cat([x[: len(wanted.sampling)] for x, wanted in zip(rows, asked, strict=True)])
            logits = self.model.head(last, group)
            if logits is not None:
                chosen = sampler.sample(logits, sampling, batch.masks)
                result.sampled.update({r.id: token for r, token in zip(sampling, chosen, strict=True)})
        for x_TD, wanted in zip(rows, asked, strict=True):
            first = len(wanted.sampling)
            for j in wanted.judged:
                judged = self._judge(j, x_TD[first : first + len(j.rows)], group)
                result.prompt_logprobs.setdefault(j.request.id, []).extend(judged)
                first += len(j.rows)
        return result

    def _compute(self, batch: Batch, wanted: "_Asked", collectives: Collectives) -> Tensor:
        """Hidden states of the rows whose logits somebody asked for: of all rows only those leave their rank."""
        group = collectives.group(batch.rows)
        if self.replay is not None and self.loads.repeatable and self.replay.suits(batch):
            x_TD = self.replay.run(batch)
        else:
            x_TD = self.model(self._step(batch, group, collectives.exchange))
        return group.gather_rows(x_TD, wanted.rows)

    def _decode(self, tokens_T: Tensor, positions_T: Tensor, rows: AttentionRows) -> Tensor:
        """Of a rank that is alone."""
        group, exchange = self.collectives.group(len(tokens_T)), self.collectives.exchange
        return self.model(self._step_of(tokens_T, positions_T, rows, group, exchange))

    def _step(self, batch: Batch, group: Group, exchange: Exchange) -> Step:
        """Positions, cache slots and pages of every row, from plain lists to tensors once."""
        size = self.page_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        decoding = [s for s in batch.slices if s.decodes]
        prefills = []
        for part in batch.slices:
            pages, end = part.request.pages, part.start + part.count
            if not part.decodes:
                used = self._ints(pages[: -(-end // size)])
                prefills.append(Prefill(len(tokens), part.count, end, used, part.tail))
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
        return self._step_of(self._ints(tokens), self._ints(positions), rows, group, exchange)

    def _step_of(
        self, tokens_T: Tensor, positions_T: Tensor, rows: AttentionRows, group: Group, exchange: Exchange
    ) -> Step:
        interleaved = self.model.config.rope_interleave and not self.model.kernels.de_interleaved
        return Step(
            tokens_T=tokens_T,
            rotary=Rotary(positions_T, self.cos, self.sin, interleaved),
            rows=rows,
            cache=self.cache,
            tp=group,
            exchange=exchange,
            loads=self.loads,
        )

    def _ints(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _judge(self, judged: "_Judged", rows: Tensor, group: Group) -> list[dict[int, float] | None]:
        """What the model thought of the prompt tokens that follow these rows."""
        # Nothing comes before the first token.
        found: list[dict[int, float] | None] = [None] if judged.begins else []
        count = judged.request.params.prompt_logprobs or 0
        for first in range(0, len(judged.following), PROMPT_LOGPROBS_ROWS):
            chosen = judged.following[first : first + PROMPT_LOGPROBS_ROWS]
            logits = self.model.head(rows[first : first + len(chosen)], group)
            if logits is not None:
                found += sampler.top_logprobs(logits, chosen, [count] * len(chosen))
        return found


@dataclass(frozen=True)
class _Judged:
    """Prompt tokens of one request that follow rows of this step, and those rows. begins: the first token is there."""

    request: Request
    begins: bool
    rows: range
    following: list[int]


@dataclass(frozen=True)
class _Asked:
    """The rows of a batch whose logits are wanted: of requests that sample, and of prompts that are judged."""

    sampling: list[tuple[int, Request]]
    judged: list[_Judged]

    @property
    def rows(self) -> list[int]:
        """First those that sample."""
        return [row for row, _ in self.sampling] + [row for j in self.judged for row in j.rows]


def _asked(batch: Batch) -> _Asked:
    sampling, judged, first = [], [], 0
    for part in batch.slices:
        request, length = part.request, part.request.prompt_length
        if request.params.prompt_logprobs is not None and part.start < length:
            following = request.tokens[part.start + 1 : min(part.start + part.count + 1, length)]
            judged.append(_Judged(request, part.start == 0, range(first, first + len(following)), following))
        first += part.count
        if part.samples:
            sampling.append((first - 1, request))
    return _Asked(sampling, judged)


# Rows whose logits are held at a time for prompt_logprobs: 128 of V3's vocabulary are 66 MB.
PROMPT_LOGPROBS_ROWS = 128
