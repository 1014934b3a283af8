"""One scheduler and one page cache for each TP group: data parallel over the groups. No torch."""

from collections.abc import Sequence

from expertmesh.engine.scheduler import Scheduler
from expertmesh.request import Batch, FinishReason, Request, StepResult

# Rows that a request is taken to decode, which nobody knows before: what a group owes for each of its requests beside
# the tokens that it still has to read. So many tokens found in a cache make up for one request more.
ANSWER = 256


def least_work(owed: Sequence[int], known: Sequence[int]) -> int:
    """The group that has a new request's prompt computed first: owed rows that each has to compute for the requests it
    has, and of those of the prompt that it knows from others (`known`) none. The first of equals."""
    return min(range(len(owed)), key=lambda group: owed[group] - known[group])


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
        """To the group that has least to do when it is there: see `least_work`."""
        home = self.schedulers[0]
        if len(self.schedulers) > 1:
            reuses = request.params.prompt_logprobs is None  # else all of its rows are wanted
            names = list(home.cache.names(request.tokens)) if reuses else []
            known = [s.cache.known(names) * s.cache.page_size for s in self.schedulers]
            group = least_work([self.owed(s) for s in self.schedulers], known)
            home, request.known = self.schedulers[group], known[group]
        home.add(request)
        self._home[request] = home

    def owed(self, scheduler: Scheduler) -> int:
        """Rows to compute for the requests that are there: an estimate."""
        requests = (*scheduler.waiting, *scheduler.running)
        return sum(len(r.tokens) - (r.computed or r.known) + ANSWER for r in requests)

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
