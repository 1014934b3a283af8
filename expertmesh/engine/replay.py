"""Steps in which all rows are decoding: recorded once for a number of rows, then run again with one call."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from expertmesh.comm.base import Exchange, Received
from expertmesh.config import EngineConfig
from expertmesh.device import ALIGNED, Device
from expertmesh.kernels import AttentionRows
from expertmesh.kernels.tape import Graph, NotCaptured, Recorded
from expertmesh.model.step import Counts
from expertmesh.request import Batch, Slice


class Replay:
    """Recorded steps of a rank that is alone, and the tensors that they read a step's rows from.

    compute: the model, from tokens [T], positions [T] and rows to hidden states [T, D]; what it reads besides stays
    where it is from step to step. A graph that rounds the number of rows up gets rows that do nothing at the end: they
    are the first token of a sequence whose page, the one behind those of the cache, nobody reads.
    """

    def __init__(
        self,
        graph: Graph,
        config: EngineConfig,
        device: Device,
        compute: Callable[[Tensor, Tensor, AttentionRows], Tensor],
    ) -> None:
        assert config.max_context and config.page_size and config.cache_tokens  # resolved
        self._graph, self._compute, self._page = graph, compute, config.page_size
        self._most = config.max_batch_requests
        stride = -(-self._most // ALIGNED) * ALIGNED
        self._spare_page = config.cache_tokens // config.page_size
        width = -(-config.max_context // config.page_size)
        # Tokens, positions, slots and lengths of all rows, then the pages of each: so far as there are rows, they are
        # side by side.
        self._width, self._one_each = width, (one_each := 4 * stride)
        self._numbers = device.staging(one_each + self._most * width)
        self._rows = self._numbers.there[:one_each].view(4, stride)
        self._pages = self._numbers.there[one_each:].view(self._most, width)
        # Written through numpy, which takes a fraction of the time for single numbers.
        written = self._numbers.here.numpy()
        self._written, self._pages_written = (
            written[:one_each].reshape(4, -1),
            written[one_each:].reshape(-1, width),
        )
        self._recorded: dict[int, Recorded] = {}
        self._lacking = False

    def suits(self, batch: Batch) -> bool:
        """Whether this step can be one of those."""
        return not self._lacking and bool(batch.slices) and all(part.decodes for part in batch.slices)

    def run(self, batch: Batch) -> Tensor:
        """Hidden states [T, D]; they hold until the next step."""
        count = len(batch.slices)
        size = min(self._graph.size(count), self._most)
        if self._graph.ahead and size not in self._recorded:
            self._write((), size)
            try:
                self._record(size)
            except NotCaptured as error:
                self._lacking = True
                logging.getLogger(__name__).warning(
                    "steps are not recorded, and take longer to start: %s", error
                )
        self._write(batch.slices, size)
        if size not in self._recorded:
            return self._compute(*self._read(size))[:count] if self._lacking else self._record(size)
        self.again(size)
        return self._recorded[size].out[:count]

    def again(self, size: int) -> None:
        """Computes the last step of so many rows once more."""
        again = self._recorded[size].again
        assert again is not None
        again()

    def _record(self, size: int) -> Tensor:
        tokens_T, positions_T, rows = self._read(size)
        recorded = self._graph.record(lambda: self._compute(tokens_T, positions_T, rows))
        if recorded.again is not None:
            self._recorded[size] = recorded
        return recorded.out

    def _read(self, size: int) -> tuple[Tensor, Tensor, AttentionRows]:
        tokens, positions, slots, lengths = (each[:size] for each in self._rows)
        return tokens, positions, AttentionRows(slots, size, self._pages[:size], lengths, prefills=())

    def _write(self, slices: Sequence[Slice], size: int) -> None:
        tokens, positions, slots, lengths = self._written
        page, spare, pages_written = self._page, self._spare_page, self._pages_written
        for i, part in enumerate(slices):
            request, at = part.request, part.start
            pages = request.pages
            used = at // page + 1
            tokens[i] = request.tokens[at]
            positions[i] = at
            slots[i] = pages[at // page] * page + at % page
            lengths[i] = at + 1
            pages_written[i, :used] = pages[:used]
        if (count := len(slices)) < size:
            tokens[count:size], positions[count:size], slots[count:size] = 0, 0, spare * page
            lengths[count:size], pages_written[count:size, 0] = 1, spare
        self._numbers.send(self._one_each + size * self._width)


@dataclass(frozen=True)
class Some:
    """The exchange and the counts of a step of which only some rows are anybody's: the others choose no expert.
    Implements `comm.base.Exchange` and `model.step.Counts`. real_T1: which rows are."""

    exchange: Exchange
    counts: Counts
    real_T1: Tensor

    def prepare(self, pieces: int, split: str, rows: int) -> None:
        self.exchange.prepare(pieces, split, rows)

    def record(self, layer: int, experts_TK: Tensor, experts: int) -> None:
        self.counts.record(layer, experts_TK.where(self.real_T1, -1), experts)

    def dispatch(self, layer: int, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Received:
        return self.exchange.dispatch(layer, x_TD, experts_TK.where(self.real_T1, -1), weights_TK)

    def combine(self, y_RD: Tensor, received: Received) -> Tensor:
        return self.exchange.combine(y_RD, received)
