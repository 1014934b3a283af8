"""One scheduler and one page cache for each TP group: data parallel over the groups. No torch."""

from collections.abc import Sequence

from expertmesh.engine.scheduler import Scheduler
from expertmesh.request import Batch, FinishReason, Request, StepResult


class Groups:
    """Sends each request to one group, where it stays. All groups step together or none does."""

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        self.schedulers = list(schedulers)
        self._home: dict[Request, Scheduler] = {}

    @property
    def busy(self) -> bool:
        return any(s.busy for s in self.schedulers)

    @property
    def preemptions(self) -> int:
        return sum(s.preemptions for s in self.schedulers)

    @property
    def pages_held(self) -> int:
        """Pages of all caches that some request holds."""
        return sum(s.cache.pages - s.cache.free for s in self.schedulers)

    def add(self, request: Request) -> None:
        """To the group with the fewest requests; of several to the one that knows most of its beginning."""
        fewest = min(s.requests for s in self.schedulers)
        idle = [s for s in self.schedulers if s.requests == fewest]
        home = idle[0]
        if len(idle) > 1:
            names = list(home.cache.names(request.tokens))
            home = max(idle, key=lambda s: s.cache.known(names))
        home.add(request)
        self._home[request] = home

    def abort(self, request: Request) -> None:
        if request.finish_reason is None:
            self.finish(request, "abort")

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request, wherever it is."""
        self._home.pop(request).finish(request, reason)

    def schedule(self) -> list[Batch]:
        """The next step's rows of each group."""
        return [s.schedule() for s in self.schedulers]

    def update(self, batches: Sequence[Batch], results: Sequence[StepResult]) -> list[Request]:
        """Enter the results of a step. Returns the requests that got a token or ended."""
        advanced: list[Request] = []
        for scheduler, batch, result in zip(self.schedulers, batches, results, strict=True):
            for part in batch.slices:
                part.request.prompt_logprobs += result.prompt_logprobs.get(part.request.id, [])
            advanced += scheduler.update(batch, result.sampled)
        for request in advanced:
            if request.finish_reason is not None:
                self._home.pop(request)
        return advanced
