"""Requests over several schedulers."""

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.engine.cache import PageCache
from expertmesh.engine.groups import ANSWER, Groups, least_work
from expertmesh.engine.scheduler import Scheduler
from expertmesh.request import StepResult
from tests.support.fake import FakeModel, alone, request_of


def groups_of(count: int, pages: int = 32) -> Groups:
    return Groups([Scheduler(PageCache(pages, 4), 16, 4, 16, 64) for _ in range(count)])


@given(st.integers(1, 5), st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=12), max_size=20))
def test_every_request_ends_as_it_would_alone(count: int, prompts: list[list[int]]) -> None:
    groups, models = groups_of(count), [FakeModel(4) for _ in range(count)]
    requests = [request_of(i, prompt, 9) for i, prompt in enumerate(prompts)]
    for request in requests:
        groups.add(request)
    loads = [s.requests for s in groups.schedulers]
    assert max(loads) - min(loads) <= 1
    while groups.busy:
        batches = groups.schedule()
        results = [StepResult(model.run(batch)) for model, batch in zip(models, batches, strict=True)]
        groups.update(batches, results)
    assert [r.tokens for r in requests] == [alone(p, 9, 64) for p in prompts]
    assert groups.pages_held == 0


def test_an_aborted_request_leaves_nothing() -> None:
    groups = groups_of(3)
    requests = [request_of(i, [1, 2, 3], 9) for i in range(6)]
    for request in requests:
        groups.add(request)
    groups.schedule()
    assert groups.pages_held
    for request in requests:
        groups.abort(request)
        groups.abort(request)
    assert groups.pages_held == 0 and not groups.busy


def test_of_idle_groups_the_one_that_knows_the_beginning_is_taken() -> None:
    groups, model = groups_of(4), FakeModel(4)
    for group, first in enumerate([1, 2, 3, 4]):
        request = request_of(group, [first] * 9, 1)
        groups.add(request)
    batches = groups.schedule()
    groups.update(batches, [StepResult(model.run(batch)) for batch in batches])
    for request in list(groups._home):
        groups.abort(request)
    again = request_of(9, [3] * 9 + [1], 1)
    groups.add(again)
    assert groups.schedulers[2].requests == 1
    groups.schedule()
    assert again.cached_tokens == 8


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000)), min_size=1, max_size=9))
def test_least_work(groups: list[tuple[int, int]]) -> None:
    owed, known = map(list, zip(*groups, strict=True))
    chosen = least_work(owed, known)
    assert all(owed[chosen] - known[chosen] <= o - k for o, k in groups)
    more = [o + (1 << 20) * (group == chosen) for group, o in enumerate(owed)]
    assert len(groups) == 1 or least_work(more, known) != chosen, "what is full is not chosen"


@given(st.integers(2, 5), st.lists(st.integers(1, 4000), min_size=1, max_size=40))
def test_no_group_owes_more_than_another_by_more_than_a_request(count: int, lengths: list[int]) -> None:
    groups = Groups([Scheduler(PageCache(9999, 4, False), 64, 4, 64, 5000) for _ in range(count)])
    for number, length in enumerate(lengths):
        groups.add(request_of(number, [1] * length, 9))
    owed = [groups.owed(s) for s in groups.schedulers]
    assert max(owed) - min(owed) <= max(lengths) + ANSWER


def test_a_long_beginning_that_is_known_makes_up_for_some_requests() -> None:
    """And not for any number of them."""
    groups, model = (
        Groups([Scheduler(PageCache(999, 4), 4096, 8, 4096, 4096) for _ in range(2)]),
        FakeModel(4),
    )
    beginning = [3] * (2 * ANSWER + 8)
    groups.add(request_of(0, beginning, 1))
    batches = groups.schedule()
    groups.update(batches, [StepResult(model.run(batch)) for batch in batches])
    assert not groups.busy
    for number in range(6):
        groups.add(request_of(1 + number, [*beginning, 1 + number], 9))
    first, second = groups.schedulers
    assert (first.requests, second.requests) == (5, 1)  # the one there has all of the beginning to read
