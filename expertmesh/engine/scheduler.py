"""Which token rows are computed in the next step. No torch.

One idea: a request has known tokens (prompt and output) and computed ones, and computed catch up with known. There
is no prefill and no decoding phase: a chunk of a prompt, the next token, a prefix found in the cache and the
recomputation after a preemption are all the same.
"""

from collections import deque

from expertmesh.engine.cache import PageCache, hash_page
from expertmesh.errors import InputError
from expertmesh.request import Batch, FinishReason, Request, Sampled, Slice


class Scheduler:
    """Continuous batching over a paged cache: first come, first served; the youngest gives way when pages run out.

    No request starves: every running one that only decodes gets its row in every step, the oldest is never
    preempted, and what waits is admitted in the order of arrival, those that are held when they are not any more.
    """

    def __init__(
        self, cache: PageCache, max_batch_tokens: int, max_batch_requests: int, chunk: int, max_context: int
    ) -> None:
        self.cache = cache
        self.max_batch_tokens, self.max_batch_requests = max_batch_tokens, max_batch_requests
        self.chunk, self.max_context = chunk, max_context
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0
        self._arrivals = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def requests(self) -> int:
        """How many run or wait."""
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        """Queue a request. InputError where it can never run."""
        check_length(len(request.tokens), request.params.max_tokens, self.max_context)
        request.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.append(request)

    def abort(self, request: Request) -> None:
        if request.finish_reason is None:
            self.finish(request, "abort")

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request, wherever it is, and give its pages back."""
        request.finish_reason = reason
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def schedule(self) -> Batch:
        """The next step's rows: running requests first, those that decode before those that still read."""
        budget = self.max_batch_tokens
        counts: dict[Request, int] = {}
        # A stable sort: by arrival among equals.
        for request in sorted(self.running, key=lambda r: len(r.tokens) - r.computed > 1):
            if request not in self.running:
                continue  # preempted for one before it
            count = min(len(request.tokens) - request.computed, self.chunk, budget)
            if not count:
                continue
            before = self.preemptions
            if self._make_room(request, count, counts):
                counts[request] = count
                budget -= count
            if self.preemptions != before:  # rows of the preempted are free again
                budget = self.max_batch_tokens - sum(counts.values())
        while budget and len(self.running) < self.max_batch_requests:
            first = next((r for r in self.waiting if not r.held), None)
            if first is None or not self._admit(first):
                break
            self.waiting.remove(first)
            self.running.append(first)
            counts[first] = min(len(first.tokens) - first.computed, self.chunk, budget)
            budget -= counts[first]
        return Batch.of(Slice(request, request.computed, count) for request, count in counts.items())

    def update(self, batch: Batch, sampled: dict[str, Sampled]) -> list[Request]:
        """Enter the results of a step. Returns the requests that got a token or ended."""
        advanced = []
        for part in batch.slices:
            request = part.request
            if request.finish_reason is not None:
                continue  # aborted during the step
            samples = part.samples
            request.computed += part.count
            self._register(request)
            if samples:
                self._append(request, sampled[request.id])
                advanced.append(request)
        return advanced

    def _append(self, request: Request, sampled: Sampled) -> None:
        params = request.params
        if params.max_tokens == 0:
            self.finish(request, "length")
            return
        request.tokens.append(sampled.token)
        if sampled.logprobs is not None:
            request.logprobs.append(sampled.logprobs)
        if sampled.token in request.stop_ids:
            self.finish(request, "stop")
        elif request.output_length >= params.max_tokens or len(request.tokens) >= self.max_context:
            self.finish(request, "length")

    def _make_room(self, request: Request, count: int, counts: dict[Request, int]) -> bool:
        """Pages for `count` more rows, taken from the youngest where none are free. False: it was the youngest."""
        while not self._grow(request, request.computed + count):
            youngest = max(self.running, key=lambda r: r.arrival)
            self._preempt(youngest)
            counts.pop(youngest, None)
            if youngest is request:
                return False
        return True

    def _grow(self, request: Request, tokens: int) -> bool:
        new = self.cache.allocate(max(0, self.cache.pages_for(tokens) - len(request.pages)))
        if new is None:
            return False
        request.pages += new
        return True

    def _admit(self, request: Request) -> bool:
        """Let a waiting request in if all its known tokens find room; with less it would soon be preempted again."""
        pages, hashes = (
            self.cache.match(request.tokens) if request.params.prompt_logprobs is None else ([], [])
        )
        request.pages, request.page_hashes = pages, hashes
        known = len(pages) * self.cache.page_size
        # Somebody who runs may need a page in the next step.
        spare = len(self.running)
        room = self.cache.free - spare >= self.cache.pages_for(len(request.tokens)) - len(pages)
        if (room or not self.running) and self._grow(request, len(request.tokens)):
            request.computed = known
            request.cached_tokens = max(request.cached_tokens, min(request.computed, request.prompt_length))
            return True
        self._release(request)
        return False

    def _preempt(self, request: Request) -> None:
        """Take back all pages; the request keeps its tokens and will compute them again."""
        self.running.remove(request)
        self._release(request)
        request.computed = 0
        request.preemptions += 1
        request.prompt_logprobs.clear()
        self.preemptions += 1
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self.cache.release(request.pages)
        request.pages, request.page_hashes = [], []

    def _register(self, request: Request) -> None:
        """Offer the pages that are full now to later requests."""
        size = self.cache.page_size
        for index in range(len(request.page_hashes), request.computed // size):
            before = request.page_hashes[-1] if request.page_hashes else b""
            name = hash_page(before, request.tokens[index * size : (index + 1) * size])
            request.page_hashes.append(name)
            self.cache.register(request.pages[index], name)


def check_length(length: int, max_tokens: int, max_context: int) -> None:
    """InputError where a prompt of this length leaves no room for an output."""
    if length == 0:
        raise InputError("the prompt is empty; give at least one token")
    if length >= max_context + (max_tokens == 0):
        raise InputError(
            f"the prompt has {length} tokens, but the context holds {max_context}, output included; "
            "shorten the prompt, or raise max_context or cache_tokens if the model has more positions"
        )
