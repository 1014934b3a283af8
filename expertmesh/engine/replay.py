"""Steps in which all rows are decoding: recorded once for every number of rows, then run again with one call."""

from collections.abc import Callable

import torch
from torch import Tensor

from expertmesh.config import EngineConfig
from expertmesh.kernels import AttentionRows
from expertmesh.kernels.tape import Graph, Pool, Tape
from expertmesh.request import Batch


class Replay:
    """Tapes of a rank that is alone, and the tensors that they read a step's rows from.

    compute: the model, from tokens [T], positions [T] and rows to hidden states [T, D]; what it reads besides stays
    where it is from step to step.
    """

    def __init__(
        self, graph: Graph, config: EngineConfig, compute: Callable[[Tensor, Tensor, AttentionRows], Tensor]
    ) -> None:
        assert config.max_context and config.page_size
        self._graph, self._compute, self._page = graph, compute, config.page_size
        requests, pages = config.max_batch_requests, -(-config.max_context // config.page_size)
        self._tokens, self._positions, self._slots, self._lengths = (
            torch.zeros(requests, dtype=torch.int64) for _ in range(4)
        )
        self._pages = torch.zeros(requests, pages, dtype=torch.int64)
        # Written through numpy, which takes a fraction of the time for single numbers.
        self._written = [t.numpy() for t in (self._tokens, self._positions, self._slots, self._lengths)]
        self._pages_written = self._pages.numpy()
        self._pool = Pool()
        self._tapes: dict[int, tuple[Tape, Tensor]] = {}

    @staticmethod
    def suits(batch: Batch) -> bool:
        return bool(batch.slices) and all(part.decodes for part in batch.slices)

    def run(self, batch: Batch) -> Tensor:
        """Hidden states [T, D]; they hold until the next step."""
        count = self._write(batch)
        if count in self._tapes:
            tape, out = self._tapes[count]
            self._graph.replay(tape)
            return out
        tape = Tape(self._pool)
        rows = AttentionRows(
            self._slots[:count], count, self._pages[:count], self._lengths[:count], prefills=()
        )
        with self._graph.recording(tape):
            out = self._compute(self._tokens[:count], self._positions[:count], rows)
        if tape.whole:
            self._tapes[count] = tape, out
        return out

    def again(self, count: int) -> None:
        """Computes the last step of so many rows once more."""
        self._graph.replay(self._tapes[count][0])

    def _write(self, batch: Batch) -> int:
        tokens, positions, slots, lengths = self._written
        size = self._page
        for i, part in enumerate(batch.slices):
            request, at = part.request, part.start
            pages = request.pages
            used = at // size + 1
            tokens[i] = request.tokens[at]
            positions[i] = at
            slots[i] = pages[at // size] * size + at % size
            lengths[i] = at + 1
            self._pages_written[i, :used] = pages[:used]
        return len(batch.slices)
