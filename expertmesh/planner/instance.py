"""One instance of an engine in a simulation: TP groups with queues and pages of their own that step together."""

from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import ceil, inf, nan

from expertmesh.planner.clock import Chunk, Clock

STRETCH = 64  # most steps of decoding that are taken at once, where nothing comes or ends meanwhile


@dataclass(eq=False, slots=True)
class Request:
    """input, output: tokens; steps: of decoding that it still needs, drafts accounted for; known: tokens that are to be
    in the cache before it is decoded; computed: how many of these are. first, end: when its first and last tokens came;
    waited: seconds in queues. Times of what has not come are nan."""

    number: int
    time: float
    input: int
    output: int
    steps: int
    known: float = 0.0
    computed: float = 0.0
    per_step: float = 0.0
    last_step: int = 0
    queued: float = 0.0
    waited: float = 0.0
    first: float = nan
    end: float = nan


@dataclass(eq=False)
class Group:
    """One TP group. queue: requests without pages; filling: those whose tokens are computed, in order; running: those
    that are decoded, the oldest first. Of these base + rate * step tokens are in the cache."""

    pages: int
    page: int
    queue: deque[Request] = field(default_factory=deque)
    filling: list[Request] = field(default_factory=list)
    running: dict[int, Request] = field(default_factory=dict)
    base: float = 0.0
    rate: float = 0.0

    @property
    def requests(self) -> int:
        return len(self.queue) + len(self.filling) + len(self.running)

    @property
    def missing(self) -> float:
        """Tokens that are still to be computed, of requests with pages."""
        return sum(request.known - request.computed for request in self.filling)

    def tokens(self, step: float) -> float:
        """Of running requests."""
        return self.base + self.rate * step if self.running else 0.0

    def used(self, step: float, more: float = 0.0, requests: int = 0) -> float:
        """Pages, at most: each request may have begun one; more: tokens of so many further requests."""
        held = self.tokens(step) + sum(r.known for r in self.filling) + more
        return held / self.page + len(self.filling) + len(self.running) + requests

    def fits(self, tokens: float) -> bool:
        """Whether a request would ever, alone."""
        return tokens / self.page + 1 <= self.pages

    def admit(self, step: int, now: float) -> None:
        """From the queue, in order, while there is room, for what runs as well in its next steps."""
        while self.queue:
            request = self.queue[0]
            alone = not self.filling and not self.running
            if not alone and self.used(step + STRETCH, request.known + 1, 1) > self.pages:
                return
            self.queue.popleft()
            request.waited += now - request.queued
            self.filling.append(request)

    def chunks(self, budget: float) -> list[Chunk]:
        """The next tokens to compute, no more than the budget of a step; they count as computed."""
        found: list[Chunk] = []
        for request in self.filling:
            tokens = min(budget, request.known - request.computed)
            if tokens > 0:
                found.append(Chunk(tokens, request.computed))
                request.computed += tokens
                budget -= tokens
        return found

    def computed(self) -> list[Request]:
        """Those of which all is computed; they are in no list any more."""
        done = [r for r in self.filling if r.computed >= r.known]
        self.filling = [r for r in self.filling if r.computed < r.known]
        return done

    def start(self, request: Request, step: int) -> None:
        """Decode it from now on."""
        self.running[request.number] = request
        request.last_step = step + request.steps
        self.base += request.known - request.per_step * step
        self.rate += request.per_step

    def leave(self, request: Request, step: int) -> float:
        """Decode it no more. Its tokens in the cache."""
        del self.running[request.number]
        tokens = request.known + request.per_step * (request.steps - (request.last_step - step))
        self.base -= request.known - request.per_step * (request.last_step - request.steps)
        self.rate -= request.per_step
        if not self.running:
            self.base = self.rate = 0.0  # without the error of many sums
        return tokens

    def preempt(self, step: int, now: float) -> None:
        """The youngest one gives way: its tokens are computed again later."""
        if self.filling:
            request = self.filling.pop()
        else:
            request = next(reversed(self.running.values()))
            request.known = self.leave(request, step)
            request.steps = request.last_step - step
        request.computed, request.queued = 0.0, now
        self.queue.appendleft(request)

    def make_room(self, step: int, now: float) -> int:
        """Pages for one more step. How many requests gave way; one that is alone never does."""
        count = 0
        while self.used(step + 1) > self.pages and len(self.filling) + len(self.running) > 1:
            self.preempt(step, now)
            count += 1
        return count


class Instance:
    """TP groups in step. A turn is one step with tokens of prompts, or a stretch of steps of decoding alone.

    budget: tokens of prompts that a group computes in a step; gather: seconds that prompts wait for further
    ones, while others are decoded and a step is not full, since it takes nearly as long for one group as for all.
    """

    def __init__(
        self, groups: int, pages: int, page: int, budget: float, gather: float, clock: Clock
    ) -> None:
        self.groups = [Group(pages, page) for _ in range(groups)]
        self.preemptions = 0
        self.decoded = 0.0  # seconds of all requests while they were decoded
        self.turn = 0  # number of the one that is on, or comes next
        self._budget, self._gather, self._clock = budget, gather, clock
        self.peak = 0.0  # most pages of a group, of all of its
        self._step = 0
        self._ends: list[tuple[int, int, Group, Request]] = []
        self._since = self._seconds = 0.0
        self._steps = 0  # of the turn that is on; 0: none is

    @property
    def idle(self) -> bool:
        return self._steps == 0

    def begin(self, now: float) -> float | None:
        """Start a turn. When it ends; None where there is nothing to do."""
        for group in self.groups:
            self.preemptions += group.make_room(self._step, now)
            group.admit(self._step, now)
            for request in group.computed():  # by others
                self.start(group, request)
        until = self._patience()
        budget = self._budget if until <= now else 0.0
        chunks = [group.chunks(budget) for group in self.groups]
        self._steps = 1 if any(chunks) else self._stretch()
        if not self._steps:
            return None
        self._since, self._seconds = now, self._time(chunks)
        if until > now:
            self._steps = max(1, min(self._steps, ceil((until - now) / self._seconds)))
        self.turn += 1
        used = max(group.used(self._step + self._steps) / group.pages for group in self.groups)
        self.peak = max(self.peak, used)
        return now + self._steps * self._seconds

    def cut(self, now: float) -> float | None:
        """End the stretch that is on after the step that is on. When that is; None where it ends then anyway."""
        done = max(1, ceil((now - self._since) / self._seconds - 1e-9)) if self._steps > 1 else self._steps
        if done >= self._steps:
            return None
        self._steps = done
        self.turn += 1
        return self._since + done * self._seconds

    def end(self) -> tuple[list[tuple[Group, Request]], list[Request]]:
        """The turn has ended. Requests that have just been computed, which are not decoded yet, with their groups, and
        those whose last token has come."""
        self.decoded += sum(len(g.running) for g in self.groups) * self._steps * self._seconds
        self._step += self._steps
        self._steps = 0
        done = []
        while (last := self._next_end()) is not None and last <= self._step:
            _, _, group, request = heappop(self._ends)
            group.leave(request, self._step)
            done.append(request)
        return [(group, request) for group in self.groups for request in group.computed()], done

    def start(self, group: Group, request: Request) -> None:
        """Decode it from the next step on."""
        group.start(request, self._step)
        heappush(self._ends, (request.last_step, request.number, group, request))

    def _patience(self) -> float:
        """Until when prompts wait for more of them; -inf: they do not."""
        waiting = [request.queued for group in self.groups for request in group.filling]
        decoding = any(group.running for group in self.groups)
        full = all(group.missing >= self._budget for group in self.groups)
        if not waiting or not decoding or full:
            return -inf
        return min(waiting) + self._gather

    def _next_end(self) -> int | None:
        """The step after which the next request ends; those that gave way are forgotten."""
        while self._ends:
            last, number, group, request = self._ends[0]
            if number in group.running and request.last_step == last:
                return last
            heappop(self._ends)
        return None

    def _stretch(self) -> int:
        """Steps of decoding until a request ends or a group may be out of pages; 0 where none is decoded."""
        last = self._next_end()
        if last is None:
            return 0
        steps = min(STRETCH, last - self._step)
        while steps > 1 and any(g.used(self._step + steps) > g.pages for g in self.groups):
            steps //= 2
        return steps

    def _time(self, chunks: list[list[Chunk]]) -> float:
        """Of one step."""
        seconds = self._clock.prefill(chunks, len(self.groups)) if any(chunks) else 0.0
        running = [len(group.running) for group in self.groups]
        if any(running):
            tokens = max(group.tokens(self._step + self._steps / 2) for group in self.groups)
            seconds += self._clock.decode(max(running), sum(running) / len(running), tokens)
        return seconds
