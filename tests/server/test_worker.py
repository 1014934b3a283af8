"""The worker with an engine that only counts, at the other end of its frames: who gets what, and how all ends."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from expertmesh import InputError, Output, SamplingParams
from expertmesh.engine.tokenizer import Tokenizer
from expertmesh.llm import demo_model
from expertmesh.server.frames import Frame
from expertmesh.server.worker import EngineStopped, Job, Worker

STATUS = {"since": 0.0, "patience": 10.0, "awaited": []}


class Counting:
    """The other end: each request gets the tokens 0, 1, 2, ..., one in a step."""

    def __init__(self, capacity: int = 4, **options: Any) -> None:
        self.sent: list[Frame] = []
        self.running: dict[str, tuple[int, int]] = {}  # tokens so far, and at the end
        self.worker = Worker(self._receive, **options)
        ready = {"do": "ready", "capacity": capacity, "max_context": 99, "about": {}, "status": STATUS}
        self.ready = lambda: self.worker.hear(ready)

    def _receive(self, frame: Frame) -> None:
        self.sent.append(frame)
        if frame["do"] == "submit":
            self.running[frame["key"]] = (0, frame["params"].get("max_tokens", 128))
        else:
            del self.running[frame["key"]]

    def step(self) -> None:
        news: dict[str, list[Any]] = {}
        for key, (now, end) in list(self.running.items()):
            news[key] = [[now], None, None, 0, "length" if now + 1 == end else None]
            self.running[key] = (now + 1, end)
            if now + 1 == end:
                del self.running[key]
        self.worker.hear({"do": "tokens", "new": news})

    async def go(self, steps: int = 1000) -> None:
        """So many steps, with time for others after each."""
        for _ in range(steps):
            self.step()
            for _ in range(5):
                await asyncio.sleep(0)

    @property
    def told(self) -> list[tuple[str, str]]:
        return [(frame["key"], frame["reason"]) for frame in self.sent if frame["do"] == "finish"]


def _job(length: int, **params: Any) -> Job:
    return Job([1], SamplingParams(max_tokens=length, **params))


async def _last(worker: Worker, *lengths: int) -> dict[int, Output]:
    async with aclosing(worker.generate([_job(n) for n in lengths])) as outputs:
        return {number: output async for number, output in outputs}


async def _tokens(worker: Worker, *lengths: int) -> dict[int, list[int]]:
    return {number: list(output.token_ids) for number, output in (await _last(worker, *lengths)).items()}


def run(work: Callable[[Counting], Awaitable[Any]], **options: Any) -> tuple[Counting, Any]:
    """work, with an engine that is ready."""

    async def main() -> tuple[Counting, Any]:
        engine = Counting(**options)
        engine.ready()
        return engine, await asyncio.wait_for(work(engine), 60)  # type: ignore[arg-type]

    return asyncio.run(main())


def refused(worker: Worker, choices: int = 1) -> EngineStopped:
    with pytest.raises(EngineStopped) as info:
        worker.check(choices)
    return info.value


def test_jobs_of_many_calls_end_with_their_own_outputs() -> None:
    async def work(engine: Counting) -> list[dict[int, list[int]]]:
        calls = [asyncio.create_task(_tokens(engine.worker, n, 1)) for n in range(1, 9)]
        await asyncio.sleep(0)
        await engine.go(9)
        return await asyncio.gather(*calls)

    engine, found = run(work)
    assert found == [{0: list(range(n)), 1: [0]} for n in range(1, 9)]
    assert engine.told == [] and engine.worker.open == 0 and engine.worker.idle.is_set()


def test_the_wait_in_the_engine_is_part_of_every_output_after_it_was_told() -> None:
    async def main() -> list[float]:
        engine = Counting()
        engine.ready()
        seen: list[float] = []
        async with aclosing(engine.worker.generate([_job(9)])) as outputs:
            for waited in ({"0": 1.5}, {}):
                news = {"0": [[1], None, None, 0, None]}
                asyncio.get_running_loop().call_soon(
                    engine.worker.hear, {"do": "tokens", "new": news, "waited": waited}
                )
                seen.append((await anext(outputs))[1].queued)
        return seen

    assert asyncio.run(main()) == [1.5, 1.5]


def test_a_slow_reader_gets_larger_pieces_not_a_queue_and_what_it_has_stays_as_it_is() -> None:
    async def work(engine: Counting) -> list[Output]:
        seen = []
        async with aclosing(engine.worker.generate([_job(50)])) as outputs:
            reading = asyncio.ensure_future(anext(outputs))
            await asyncio.sleep(0)
            engine.step()
            seen.append((await reading)[1])
            for _ in range(50):
                engine.step()
            seen += [output async for _, output in outputs]
        return seen

    _, (first, last) = run(work)
    assert (first.token_ids, first.finish_reason) == ([0], None)
    assert (list(last.token_ids), last.finish_reason) == (list(range(50)), "length")
    assert last.token_ids[-2:] == [48, 49] and last.token_ids[3] == 3 and len(first.token_ids) == 1


@pytest.mark.parametrize("leave", ["close", "cancel"])
def test_who_leaves_aborts_what_still_runs(leave: str) -> None:
    async def read(engine: Counting) -> None:
        async with aclosing(engine.worker.generate([_job(1), _job(1 << 30), _job(1 << 30)])) as outputs:
            async for _, output in outputs:
                if leave == "close" and len(output.token_ids) > 3:
                    return

    async def work(engine: Counting) -> None:
        task = asyncio.create_task(read(engine))
        await asyncio.sleep(0)
        await engine.go(6)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    engine, _ = run(work)
    assert sorted(engine.told) == [("1", "abort"), ("2", "abort")]
    assert not engine.running and engine.worker.idle.is_set()


def test_a_stop_text_is_found_here_and_what_comes_behind_it_does_not_count() -> None:
    tokenizer = Tokenizer.of(demo_model(), 8192)
    assert tokenizer is not None
    ids = tokenizer.encode("one two three four five six seven", special=False)
    stop = "three"

    async def work(engine: Counting) -> list[Output]:
        job = Job([1], SamplingParams(stop=(stop,)))
        outputs = engine.worker.generate([job])
        reading = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0)
        for token in ids:  # all before anybody reads
            engine.worker.hear({"do": "tokens", "new": {"0": [[token], None, None, 0, None]}})
        return [(await reading)[1], *[output async for _, output in outputs]]

    engine, outputs = run(work, tokenizer=tokenizer)
    assert outputs[-1].text == "one two " and outputs[-1].finish_reason == "stop"
    assert "".join(output.delta for output in outputs) == "one two "
    taken = list(outputs[-1].token_ids)
    assert taken == ids[: len(taken)] and stop in tokenizer.decode(taken)
    assert stop not in tokenizer.decode(taken[:-1])
    assert engine.told == [("0", "stop")]


@pytest.mark.parametrize("frame", [{"message": "rank 1 died", "place": {"rank": 1}}])
def test_a_failure_ends_all_calls_and_refuses_new_ones(frame: dict[str, Any]) -> None:
    async def work(engine: Counting) -> list[Any]:
        calls = [asyncio.create_task(_tokens(engine.worker, n)) for n in (2, 5, 50)]
        await asyncio.sleep(0)
        await engine.go(2)
        engine.worker.hear({"do": "failed"} | frame)
        return await asyncio.gather(*calls, return_exceptions=True)

    engine, (first, *others) = run(work)
    assert first == {0: [0, 1]}
    assert [str(error) for error in others] == ["rank 1 died"] * 2
    assert (refused(engine.worker).status, str(refused(engine.worker))) == (500, "rank 1 died")
    assert engine.worker.problem == "rank 1 died"


def test_a_request_that_the_engine_refuses() -> None:
    async def work(engine: Counting) -> None:
        call = asyncio.create_task(_tokens(engine.worker, 5, 5))
        await asyncio.sleep(0)
        engine.worker.hear({"do": "refuse", "key": "1", "message": "it is too long"})
        engine.worker.hear({"do": "refuse", "key": "77", "message": "nobody waits for it"})
        with pytest.raises(InputError, match="it is too long"):
            await call

    engine, _ = run(work)
    assert sorted(engine.told) == [("0", "abort"), ("1", "abort")]


def test_a_request_that_the_engine_stumbles_over_is_not_called_wrong() -> None:
    async def work(engine: Counting) -> None:
        call = asyncio.create_task(_tokens(engine.worker, 5))
        await asyncio.sleep(0)
        engine.worker.hear({"do": "refuse", "key": "0", "message": None})
        with pytest.raises(EngineStopped, match="internal error") as caught:
            await call
        assert (caught.value.status, caught.value.code) == (500, "internal_error")

    run(work)


def test_a_request_that_takes_too_long() -> None:
    async def work(engine: Counting) -> dict[int, list[int]]:
        late = asyncio.create_task(_tokens(engine.worker, 1 << 30))
        await asyncio.sleep(0)
        with pytest.raises(EngineStopped, match=r"longer than the 0\.05 s") as info:
            await late
        assert (info.value.status, info.value.code) == (504, "timeout")
        call = asyncio.create_task(_tokens(engine.worker, 3))
        await asyncio.sleep(0)
        await engine.go(3)
        return await call

    engine, found = run(work, request_timeout=0.05)
    assert engine.told == [("0", "abort")] and found == {0: [0, 1, 2]}


def test_choices_beyond_the_queue_are_told_when_to_come_again() -> None:
    async def work(engine: Counting) -> None:
        assert engine.worker.room == 7
        call = asyncio.create_task(_tokens(engine.worker, 2, 2, 9, 9, 9))
        await asyncio.sleep(0)
        engine.worker.check(2)
        for choices in (3, 7):
            full = refused(engine.worker, choices)
            assert (full.status, full.code, full.headers) == (429, "queue_full", {"Retry-After": "5"})
        with pytest.raises(EngineStopped, match="5 choices run or wait, and 3 more"):
            await _tokens(engine.worker, 1, 1, 1)
        never = refused(engine.worker, 8)
        assert (never.status, never.headers) == (400, {})
        await engine.go(2)  # two have ended
        engine.worker.check(4)
        assert 1 <= int(refused(engine.worker, 5).headers["Retry-After"]) <= 120
        await engine.go(9)
        await call
        engine.worker.check(7)

    run(work, capacity=4, max_queue=3)


@pytest.mark.parametrize(("capacity", "room"), [(1, 1025), (64, 64 + 1024), (100, 1700)])
def test_the_queue_that_is_worked_out(capacity: int, room: int) -> None:
    engine = Counting(capacity)
    engine.ready()
    assert engine.worker.room == room


def test_before_it_is_ready_and_when_it_stops() -> None:
    engine = Counting()
    engine.worker.hear({"do": "loading", "done": 30_000_000, "total": 120_000_000})
    loading = refused(engine.worker)
    assert (loading.status, loading.code, str(loading)) == (
        503,
        "loading",
        "the model is loading: 25% of 120 MB",
    )
    assert loading.headers == {"Retry-After": "5"}
    engine.ready()
    engine.worker.check()
    engine.worker.state.draining = True
    stopping = refused(engine.worker)
    assert (stopping.status, stopping.code) == (503, "shutting_down")
    assert stopping.headers["Connection"] == "close"


def test_a_number_that_no_frame_holds() -> None:
    def send(frame: Frame) -> None:
        raise OverflowError

    engine = Counting()
    engine.ready()
    engine.worker._send = send

    async def main() -> None:
        with pytest.raises(InputError, match="64 bits"):
            await _tokens(engine.worker, 1)

    asyncio.run(main())
    assert engine.worker.open == 0
