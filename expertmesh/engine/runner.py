"""One rank: the weights, the cache's memory, and one step of the model over a batch."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertmesh.config import EngineConfig
from expertmesh.engine import sampler
from expertmesh.engine.checkpoint import Checkpoint, check_memory, free_memory, load, static_bytes
from expertmesh.kernels import AttentionRows, Kernels, Rotary
from expertmesh.kernels.types import Prefill, rotary_table
from expertmesh.model.deepseek import DeepSeek
from expertmesh.model.step import Alone, Exchange, Group, Loads, Step
from expertmesh.request import Batch, Sampled, Slice
from expertmesh.weights import Shard


@dataclass(frozen=True)
class Memory:
    """Static memory of one rank, in bytes."""

    weights: int
    cache: int


class Runner:
    """Holds one rank's share of the model and computes steps. `run` is the whole of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        kernels: Kernels,
        shard: Shard,
        progress: bool = False,
    ) -> None:
        model = checkpoint.config
        self.device = torch.device("cpu")
        # "auto" follows the checkpoint; the cache's size, which depends on the weights, is settled after them.
        dtype = torch.float32 if config.resolve(model, 1 << 40).dtype == "float32" else torch.bfloat16
        sizes = DeepSeek(model, shard, kernels, dtype, torch.device("meta")).weights()
        free = free_memory()
        weight_bytes = static_bytes(sizes)
        check_memory(checkpoint.folder, weight_bytes, free)
        self.config = config.resolve(model, free - weight_bytes)
        self.model = DeepSeek(model, shard, kernels, dtype, self.device)
        load(checkpoint, self.model.weights(), shard, progress)
        page_size = self.config.page_size
        pages = (self.config.cache_tokens or 0) // page_size
        self.cache = [
            _lazy_zeros((pages, page_size, model.latent_dim), dtype, self.device)
            for _ in range(model.num_hidden_layers)
        ]
        cache_bytes = sum(t.numel() * t.element_size() for t in self.cache)
        self.memory = Memory(weight_bytes, cache_bytes)
        self.cos, self.sin = rotary_table(model, self.config.max_context or 1)
        self.group: Group = Alone()
        self.exchange: Exchange = Alone()
        self.loads = Loads()

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[str, Sampled]:
        """Compute the batch's rows and choose a token for each request whose known tokens are all computed."""
        step = self._step(batch)
        hidden_TD = self.model(step)
        wanted, last_rows, first = [], [], 0
        for part in batch.slices:
            if part.start < part.request.prompt_length and part.request.params.prompt_logprobs is not None:
                self._prompt_logprobs(part, hidden_TD[first : first + part.count], step)
            first += part.count
            if part.samples:
                wanted.append(part.request)
                last_rows.append(first - 1)
        if not wanted:
            return {}
        rows = hidden_TD if len(last_rows) == hidden_TD.shape[0] else hidden_TD[last_rows]
        chosen = sampler.sample(self.model.head(rows, step), wanted)
        return {request.id: token for request, token in zip(wanted, chosen, strict=True)}

    def _step(self, batch: Batch) -> Step:
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
                used = torch.tensor(pages[: -(-end // size)], device=self.device)
                prefills.append(Prefill(len(tokens), part.count, end, used))
            tokens += part.request.tokens[part.start : end]
            positions += range(part.start, end)
            slots += [pages[p // size] * size + p % size for p in range(part.start, end)]
        used_pages = [s.request.pages[: s.start // size + 1] for s in decoding]
        most = max(map(len, used_pages), default=0)
        table = [pages + [0] * (most - len(pages)) for pages in used_pages]
        rows = AttentionRows(
            slots_T=torch.tensor(slots, device=self.device),
            decoding=len(decoding),
            pages_BM=torch.tensor(table, dtype=torch.int64, device=self.device),
            lengths_B=torch.tensor([s.start + 1 for s in decoding], device=self.device),
            prefills=tuple(prefills),
        )
        return Step(
            tokens_T=torch.tensor(tokens, device=self.device),
            rotary=self._rotary(torch.tensor(positions, device=self.device)),
            rows=rows,
            cache=self.cache,
            tp=self.group,
            exchange=self.exchange,
            loads=self.loads,
        )

    def _rotary(self, positions_T: Tensor) -> Rotary:
        interleaved = self.model.config.rope_interleave
        return Rotary(self.cos[positions_T, None], self.sin[positions_T, None], interleaved)

    def _prompt_logprobs(self, part: Slice, hidden_TD: Tensor, step: Step) -> None:
        """What the model thought of each prompt token that follows a row of this slice."""
        request = part.request
        if part.start == 0:
            request.prompt_logprobs.append(None)  # nothing comes before the first token
        following = request.tokens[part.start + 1 : min(part.start + part.count + 1, request.prompt_length)]
        count = request.params.prompt_logprobs or 0
        for first in range(0, len(following), PROMPT_LOGPROBS_ROWS):
            chosen = following[first : first + PROMPT_LOGPROBS_ROWS]
            logits = self.model.head(hidden_TD[first : first + len(chosen)], step)
            request.prompt_logprobs += sampler.top_logprobs(logits, chosen, [count] * len(chosen))


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
