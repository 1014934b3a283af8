"""Requests over several schedulers."""

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.engine.cache import PageCache
from expertmesh.engine.groups import Groups
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
