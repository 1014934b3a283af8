"""Continuous batching with a fake model: whatever comes, is aborted or runs out, every text is as if it were alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expertmesh import InputError
from expertmesh.engine.cache import PageCache
from expertmesh.engine.scheduler import Scheduler
from expertmesh.request import Batch, Request, Sampled
from tests.support.fake import FakeModel, alone, request_of

# Two letters, so that beginnings are often equal.
prompts = st.lists(st.integers(1, 2), min_size=1, max_size=20)


def scheduler_of(
    pages: int = 100, size: int = 4, rows: int = 64, requests: int = 8, chunk: int = 64, context: int = 0
) -> Scheduler:
    return Scheduler(PageCache(pages, size), rows, requests, chunk, context or pages * size)


def finish_all(scheduler: Scheduler, most: int = 10_000, model: FakeModel | None = None) -> list[Batch]:
    model, batches = model or FakeModel(scheduler.cache.page_size), []
    while scheduler.busy:
        batch = scheduler.schedule()
        assert batch.slices, "requests wait, and nothing is computed"
        batches.append(batch)
        scheduler.update(batch, model.run(batch))
        assert len(batches) < most, "starved"
    return batches


def shapes(batch: Batch) -> list[tuple[str, int, int]]:
    return [(s.request.id, s.start, s.count) for s in batch.slices]


def test_prefill_then_decode() -> None:
    scheduler = scheduler_of()
    scheduler.add(request_of(0, [1] * 5, 3))
    first = scheduler.schedule()
    assert shapes(first) == [("0", 0, 5)] and first.slices[0].samples
    scheduler.update(first, {"0": Sampled(3)})
    assert shapes(scheduler.schedule()) == [("0", 5, 1)]


def test_chunks_do_not_sample_before_the_last() -> None:
    scheduler = scheduler_of(chunk=2)
    scheduler.add(request_of(0, [1] * 5, 3))
    seen = []
    for _ in range(3):
        batch = scheduler.schedule()
        seen += [(s.start, s.count, s.samples) for s in batch.slices]
        assert scheduler.update(batch, {"0": Sampled(3)}) == ([scheduler.running[0]] if seen[-1][2] else [])
    assert seen == [(0, 2, False), (2, 2, False), (4, 1, True)]


def test_decoding_comes_first_and_prefill_takes_what_is_left() -> None:
    scheduler = scheduler_of(rows=4, requests=4)
    scheduler.add(request_of(0, [1, 2], 9))
    scheduler.update(scheduler.schedule(), {"0": Sampled(1)})
    scheduler.add(request_of(1, [2] * 10, 9))
    scheduler.add(request_of(2, [2] * 10, 9))
    assert shapes(scheduler.schedule()) == [("0", 2, 1), ("1", 0, 3)]


def test_youngest_gives_way_and_is_the_first_to_come_back() -> None:
    scheduler = scheduler_of(pages=6, size=2, context=12)
    old, young = request_of(0, [1, 1, 1, 1], 9), request_of(1, [2, 2], 9)
    for request in (old, young):
        scheduler.add(request)
    for _ in range(3):
        batch = scheduler.schedule()
        scheduler.update(batch, {s.request.id: Sampled(3) for s in batch.slices})
    late = request_of(2, [2], 9)
    scheduler.add(late)
    while not young.preemptions:
        batch = scheduler.schedule()
        scheduler.update(batch, {s.request.id: Sampled(3) for s in batch.slices})
    assert old in scheduler.running and list(scheduler.waiting) == [young, late]
    assert young.pages == [] and young.computed == 0 and len(young.tokens) > 2


def test_max_tokens_0_computes_the_prompt_and_says_nothing() -> None:
    scheduler = scheduler_of()
    request = request_of(0, [1] * 5, 0)
    scheduler.add(request)
    finish_all(scheduler)
    assert request.finish_reason == "length" and request.tokens == [1] * 5


def test_end_by_length_by_context_and_by_stop_token() -> None:
    scheduler = scheduler_of(context=8)
    by_length, by_context, by_stop = (
        request_of(0, [1] * 3, 2),
        request_of(1, [1] * 5, 50),
        request_of(2, [1] * 3, 9),
    )
    for request in (by_length, by_context, by_stop):
        scheduler.add(request)
    while scheduler.busy:
        batch = scheduler.schedule()
        scheduler.update(
            batch, {s.request.id: Sampled(0 if s.request is by_stop else 4) for s in batch.slices}
        )
    assert (by_length.finish_reason, by_length.output_length) == ("length", 2)
    assert (by_context.finish_reason, len(by_context.tokens)) == ("length", 8)
    assert (by_stop.finish_reason, by_stop.tokens[3:]) == ("stop", [0])


@pytest.mark.parametrize(
    ("length", "max_tokens", "fits"), [(7, 1, True), (8, 1, False), (8, 0, True), (9, 0, False)]
)
def test_prompt_must_leave_room(length: int, max_tokens: int, fits: bool) -> None:
    scheduler = scheduler_of(context=8)
    if fits:
        scheduler.add(request_of(0, [1] * length, max_tokens))
        finish_all(scheduler)
        return
    with pytest.raises(InputError, match=f"the prompt has {length} tokens, but the context holds 8"):
        scheduler.add(request_of(0, [1] * length, max_tokens))
    assert not scheduler.busy


def test_empty_prompt() -> None:
    with pytest.raises(InputError, match="empty"):
        scheduler_of().add(request_of(0, [], 3))


def test_abort_of_what_has_ended_changes_nothing() -> None:
    scheduler = scheduler_of()
    request = request_of(0, [1], 1)
    scheduler.add(request)
    finish_all(scheduler)
    reason = request.finish_reason
    scheduler.abort(request)
    assert request.finish_reason == reason


def test_prompt_logprobs_are_of_computed_rows() -> None:
    """A prompt found in the cache has no logits to report, so such a request computes all of it."""
    scheduler, model = scheduler_of(size=2), FakeModel(2)
    for number, asks in enumerate([False, True, False]):
        scheduler.add(request_of(number, [1] * 9, 1, prompt_logprobs=asks))
        (batch,) = finish_all(scheduler, model=model)
        assert batch.slices[0].start == (0, 0, 8)[number]


@st.composite
def schedulers(draw: st.DrawFn) -> Scheduler:
    size = draw(st.integers(1, 5))
    pages = draw(st.integers(-(-21 // size), 40))  # the longest prompt and one token fit
    requests = draw(st.integers(1, 6))
    cache = PageCache(pages, size, draw(st.booleans()))
    context = draw(st.integers(21, pages * size))
    return Scheduler(cache, requests + draw(st.integers(0, 20)), requests, draw(st.integers(1, 30)), context)


@given(schedulers(), st.lists(st.tuples(prompts, st.integers(0, 40), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=150)
def test_every_request_ends_with_the_tokens_it_has_alone(
    scheduler: Scheduler, given_requests: list[tuple[list[int], int, bool]]
) -> None:
    requests = [request_of(i, *one) for i, one in enumerate(given_requests)]
    for request in requests:
        scheduler.add(request)
    longest = sum(len(prompt) + most for prompt, most, _ in given_requests)
    # Each of the older ones can make a request begin anew at most once for every token of its own.
    finish_all(scheduler, most=longest * (len(requests) + 1))
    assert scheduler.cache.free == scheduler.cache.pages
    for request, (prompt, most, _) in zip(requests, given_requests, strict=True):
        assert request.tokens == alone(prompt, most, scheduler.max_context)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, step, and are aborted between steps and during them."""

    @initialize(scheduler=schedulers())
    def start(self, scheduler: Scheduler) -> None:
        self.scheduler, self.model = scheduler, FakeModel(scheduler.cache.page_size)
        self.requests: list[Request] = []
        self.prompts: list[tuple[list[int], int]] = []

    @rule(prompt=prompts, max_tokens=st.integers(0, 30), prompt_logprobs=st.booleans())
    def add(self, prompt: list[int], max_tokens: int, prompt_logprobs: bool) -> None:
        request = request_of(len(self.requests), prompt, max_tokens, prompt_logprobs)
        self.scheduler.add(request)
        self.requests.append(request)
        self.prompts.append((prompt, max_tokens))

    @precondition(lambda self: self.requests)
    @rule(number=st.integers(0, 1000))
    def abort(self, number: int) -> None:
        self.scheduler.abort(self.requests[number % len(self.requests)])

    @rule(aborted=st.none() | st.integers(0, 1000))
    def step(self, aborted: int | None) -> None:
        running = list(self.scheduler.running)
        decoding = [r for r in running if len(r.tokens) - r.computed == 1]
        before = self.scheduler.preemptions
        batch = self.scheduler.schedule()
        self.check_batch(batch)
        if self.scheduler.preemptions == before:
            assert {r.id for r in decoding} <= {s.request.id for s in batch.slices}, (
                "a decoding request waits"
            )
        assert not running or running[0] in self.scheduler.running, "the oldest was preempted"
        assert batch.slices or not self.scheduler.busy
        sampled = self.model.run(batch)
        if aborted is not None and self.requests:
            self.scheduler.abort(self.requests[aborted % len(self.requests)])
        advanced = self.scheduler.update(batch, sampled)
        assert {r.id for r in advanced} <= sampled.keys()

    def check_batch(self, batch: Batch) -> None:
        s = self.scheduler
        assert batch.rows <= s.max_batch_tokens
        assert len({part.request.id for part in batch.slices}) == len(batch.slices)
        counts = [part.count for part in batch.slices]
        assert counts == sorted(counts, key=lambda n: n > 1), "rows of one come first"
        for part in batch.slices:
            assert part.request in s.running and part.start == part.request.computed
            assert 1 <= part.count <= s.chunk
            assert part.start + part.count <= len(part.request.tokens)
            assert part.start + part.count <= len(part.request.pages) * s.cache.page_size

    @invariant()
    def limits_are_kept(self) -> None:
        s = self.scheduler
        assert len(s.running) <= s.max_batch_requests
        arrivals = [r.arrival for r in [*s.running, *s.waiting]]
        assert arrivals == sorted(arrivals), "first come, first served"
        for request in self.requests:
            assert request.computed <= len(request.tokens) <= s.max_context
            assert (request.finish_reason is None) == (request in s.running or request in s.waiting)
            assert request in s.running or not request.pages

    @invariant()
    def pages_are_held_once_unless_they_hold_the_same_beginning(self) -> None:
        cache, texts = self.scheduler.cache, {}
        for request in self.scheduler.running:
            for index, page in enumerate(request.pages):
                full = (index + 1) * cache.page_size <= request.computed
                text = tuple(request.tokens[: (index + 1) * cache.page_size]) if full else (request.id,)
                assert texts.setdefault(page, text) == text
        assert cache.free == cache.pages - len(texts)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10_000):
            if not self.scheduler.busy:
                break
            self.step(None)
        assert self.scheduler.cache.free == self.scheduler.cache.pages
        for request, (prompt, most) in zip(self.requests, self.prompts, strict=True):
            expected = alone(prompt, most, self.scheduler.max_context)
            aborted = request.finish_reason == "abort"
            assert request.tokens == (expected[: len(request.tokens)] if aborted else expected)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=40)


def test_a_request_that_is_held_lets_others_pass() -> None:
    cache = PageCache(8, 4)
    scheduler = Scheduler(cache, 16, 4, 8, 32)
    held, free = request_of(0, [1, 2], 4), request_of(1, [3, 4], 4)
    held.held = True
    for request in (held, free):
        scheduler.add(request)
    assert [part.request for part in scheduler.schedule().slices] == [free] and scheduler.busy
    held.held = False
    assert {part.request for part in scheduler.schedule().slices} >= {held}
