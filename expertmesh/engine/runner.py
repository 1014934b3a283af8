"""One rank: the weights, the cache's memory, and one step of the model over a batch."""

from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from expertmesh.comm.alone import Alone
from expertmesh.comm.base import Collectives, Exchange, Group, MovingExchange
from expertmesh.config import EngineConfig
from expertmesh.device import Device
from expertmesh.engine import sampler
from expertmesh.engine.moving import Mover
from expertmesh.engine.parts import Parts
from expertmesh.engine.plan import Plan, cut
from expertmesh.engine.replay import Replay, Some
from expertmesh.kernels import AttentionRows, Kernels, Rotary
from expertmesh.kernels.capture import CardGraph
from expertmesh.kernels.tape import Graph, Taped
from expertmesh.kernels.types import Prefill, rotary_table
from expertmesh.model.deepseek import DeepSeek
from expertmesh.model.step import Counts, Loads, Step
from expertmesh.request import Batch, Request, Slice, StepResult


class Runner:
    """Holds one rank's share of the model and computes steps. `run` is the whole of it.

    config is resolved.
    """

    def __init__(
        self, model: DeepSeek, config: EngineConfig, collectives: Collectives, device: Device
    ) -> None:
        assert config.page_size and config.cache_tokens and config.max_context
        self.model, self.config, self.collectives, self.device = model, config, collectives, device
        self._page, self._slots = config.page_size, config.cache_tokens
        # Of several ranks each would have to record, and to run again, in the same steps.
        graph = _graph_of(model.kernels, device) if isinstance(collectives, Alone) else None
        spare = 1 if graph is not None and graph.ahead else 0  # where rows that do nothing write
        c, pages = model.config, config.cache_tokens // self._page + spare
        sizes = (pages, self._page, c.kv_lora_rank, c.qk_rope_head_dim)
        self.cache = [
            model.kernels.cache(*sizes, model.norm.dtype, device.where) for _ in range(c.num_hidden_layers)
        ]
        # Computed on the host, so that it has the same bits everywhere.
        table = rotary_table(model.config, config.max_context)
        self.cos, self.sin = (each.to(device.where) for each in table)
        self.loads = Loads(model.kernels.count)
        self.parts = Parts(device.clock)
        self.replay: Replay | None = None
        if graph is not None:
            self.replay = Replay(graph, config, device, self._decode_some if graph.ahead else self._decode)

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
        return self.model(self._step_of(tokens_T, positions_T, rows, group, exchange, self.loads))

    def _decode_some(self, tokens_T: Tensor, positions_T: Tensor, rows: AttentionRows) -> Tensor:
        """The same of rows of which some do nothing: those that write behind the cache choose no expert."""
        group = self.collectives.group(len(tokens_T))
        some = Some(self.collectives.exchange, self.loads, (rows.slots_T < self._slots).unsqueeze(1))
        return self.model(self._step_of(tokens_T, positions_T, rows, group, some, some))

    def _step(self, batch: Batch, group: Group, exchange: Exchange) -> Step:
        """Positions, cache slots and pages of every row, from plain lists to tensors once."""
        size = self._page
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        decoding = [s for s in batch.slices if s.decodes]
        prefills: list[tuple[int, Slice]] = []
        for part in batch.slices:
            pages, end = part.request.pages, part.start + part.count
            if not part.decodes:
                prefills.append((len(tokens), part))
            tokens += part.request.tokens[part.start : end]
            positions += range(part.start, end)
            slots += [pages[p // size] * size + p % size for p in range(part.start, end)]
        used_pages = [s.request.pages[: s.start // size + 1] for s in decoding]
        most = max(map(len, used_pages), default=0)
        table = list(chain.from_iterable(pages + [0] * (most - len(pages)) for pages in used_pages))
        lengths = [s.start + 1 for s in decoding]
        whole = [part.request.pages[: -(-(part.start + part.count) // size)] for _, part in prefills]
        tokens_T, positions_T, slots_T, lengths_B, table_P, *pages_of = self.device.put(
            [tokens, positions, slots, lengths, table, *whole]
        )
        rows = AttentionRows(
            slots_T=slots_T,
            decoding=len(decoding),
            pages_BM=table_P.view(len(decoding), most),
            lengths_B=lengths_B,
            prefills=tuple(
                Prefill(first, part.count, part.start + part.count, pages_M, part.tail)
                for (first, part), pages_M in zip(prefills, pages_of, strict=True)
            ),
        )
        return self._step_of(tokens_T, positions_T, rows, group, exchange, self.loads)

    def _step_of(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        rows: AttentionRows,
        group: Group,
        exchange: Exchange,
        loads: Counts,
    ) -> Step:
        interleaved = self.model.config.rope_interleave and not self.model.kernels.de_interleaved
        return Step(
            tokens_T=tokens_T,
            rotary=Rotary(positions_T, self.cos, self.sin, interleaved),
            rows=rows,
            cache=self.cache,
            tp=group,
            exchange=exchange,
            loads=loads,
        )

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


def _graph_of(kernels: Kernels, device: Device) -> Graph | None:
    """What steps with these kernels are recorded in, where they can be."""
    if kernels.graph is not None:
        return Taped(kernels.graph)
    return CardGraph(device.library) if device.is_card and not kernels.uncaptured else None


# Rows whose logits are held at a time for prompt_logprobs: 128 of V3's vocabulary are 66 MB.
PROMPT_LOGPROBS_ROWS = 128
