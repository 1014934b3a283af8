"""The worker with an engine that only counts: who is called from which thread, and how everything ends."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, cast

import pytest

from expertmesh import Output, SamplingParams
from expertmesh.engine.engine import Engine
from expertmesh.errors import RankFailure
from expertmesh.server.worker import EngineStopped, Job, Worker


class Ranks:
    def __init__(self) -> None:
        self.callbacks: list[Callable[[str], None]] = []

    def on_failure(self, callback: Callable[[str], None]) -> None:
        self.callbacks.append(callback)


class Counting:
    """An engine whose requests get the text 0123... Each step waits for `gate`; the step number `fails_at` fails."""

    def __init__(self, fails_at: int = -1) -> None:
        self.ranks = Ranks()
        self.lengths: dict[str, tuple[int, int]] = {}  # now, and at the end
        self.threads: set[int] = set()
        self.aborted: list[str] = []
        self.steps, self.fails_at = 0, fails_at
        self.failure: Exception = RuntimeError("broken on purpose")
        self.gate = threading.Event()
        self.gate.set()

    @property
    def busy(self) -> bool:
        return bool(self.lengths)

    def submit(self, tokens: list[int], params: SamplingParams, key: str) -> None:
        self.threads.add(threading.get_ident())
        self.lengths[key] = (0, params.max_tokens)

    def abort(self, key: str) -> None:
        self.threads.add(threading.get_ident())
        self.aborted.append(key)
        self.lengths.pop(key, None)

    def step(self) -> list[Output]:
        self.threads.add(threading.get_ident())
        assert self.busy, "a step without work"
        self.gate.wait()
        self.steps += 1
        if self.steps == self.fails_at:
            raise self.failure
        self.lengths = {key: (now + 1, end) for key, (now, end) in self.lengths.items()}
        outputs = [_output(key, now, end) for key, (now, end) in self.lengths.items()]
        self.lengths = {key: (now, end) for key, (now, end) in self.lengths.items() if now < end}
        return outputs


def _output(key: str, now: int, end: int) -> Output:
    text = "".join(str(i % 10) for i in range(now))
    return Output(key, None, [1], text, list(range(now)), "length" if now == end else None)


def _job(length: int) -> Job:
    return Job([1], SamplingParams(max_tokens=length))


def _worker(engine: Counting) -> Worker:
    return Worker(cast(Engine, engine))


async def _texts(worker: Worker, *lengths: int) -> dict[int, str]:
    async with aclosing(worker.generate([_job(n) for n in lengths])) as outputs:
        return {number: output.text async for number, output in outputs}


async def _until(engine: Counting, steps: int) -> None:
    while engine.steps < steps:
        await asyncio.sleep(0.001)


def test_jobs_of_many_calls_end_with_their_own_outputs() -> None:
    engine = Counting()

    async def run() -> list[dict[int, str]]:
        worker = _worker(engine)
        worker.start()
        found = await asyncio.gather(*(_texts(worker, n, 1) for n in range(1, 9)))
        await worker.stop()
        return found

    assert asyncio.run(run()) == [{0: "01234567"[:n], 1: "0"} for n in range(1, 9)]
    assert len(engine.threads) == 1 and threading.get_ident() not in engine.threads
    assert not engine.aborted


def test_a_slow_reader_gets_larger_pieces_not_a_queue() -> None:
    engine = Counting()

    async def run() -> list[str]:
        worker = _worker(engine)
        worker.start()
        seen = []
        async with aclosing(worker.generate([_job(50)])) as outputs:
            async for _, output in outputs:
                seen.append(output.text)
                await _until(engine, 50)
                await asyncio.sleep(0.01)
        await worker.stop()
        return seen

    seen = asyncio.run(run())
    assert len(seen) <= 3
    assert seen[-1] == "0123456789" * 5


def test_nothing_is_stepped_while_idle() -> None:
    engine = Counting()

    async def run() -> None:
        worker = _worker(engine)
        worker.start()
        await _texts(worker, 3)
        await asyncio.sleep(0.05)
        assert engine.steps == 3
        await worker.stop()

    asyncio.run(run())


@pytest.mark.parametrize("leave", ["close", "cancel"])
def test_who_leaves_aborts_what_still_runs(leave: str) -> None:
    engine = Counting()

    async def read(worker: Worker) -> None:
        async with aclosing(worker.generate([_job(1), _job(1 << 30), _job(1 << 30)])) as outputs:
            async for _ in outputs:
                if leave == "close" and engine.steps > 3:
                    return

    async def run() -> None:
        worker = _worker(engine)
        worker.start()
        task = asyncio.create_task(read(worker))
        await _until(engine, 5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while engine.busy:
            await asyncio.sleep(0.001)
        await worker.stop()

    asyncio.run(run())
    assert sorted(engine.aborted) == ["1", "2"]


def test_a_failing_step_ends_all_calls_and_refuses_new_ones(caplog: pytest.LogCaptureFixture) -> None:
    engine = Counting(fails_at=3)

    async def run() -> list[Any]:
        worker = _worker(engine)
        worker.start()
        engine.gate.clear()
        calls = [asyncio.create_task(_texts(worker, n)) for n in (2, 5, 50)]
        await asyncio.sleep(0)  # each is submitted before the first step ends
        engine.gate.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert worker.problem is not None and "failed" in worker.problem
        with pytest.raises(EngineStopped, match="failed"):
            await _texts(worker, 1)
        await worker.stop()
        return found

    first, *others = asyncio.run(run())
    assert first == {0: "01"}
    assert all(isinstance(error, EngineStopped) for error in others)
    assert "broken on purpose" in caplog.text


@pytest.mark.parametrize("when", ["idle", "in a step"])
def test_a_rank_that_fails_is_told_once_and_at_once(when: str, caplog: pytest.LogCaptureFixture) -> None:
    """Also where nobody asks for anything, and where a step that runs tells it too."""
    engine = Counting(fails_at=1)
    engine.failure = RankFailure("rank 1 has died")

    async def run() -> None:
        worker = _worker(engine)
        for _ in range(2):  # one callback is enough
            worker.start()
            await worker.stop()
        worker.start()
        engine.gate.clear()
        calls = [asyncio.create_task(_texts(worker, 2))] if when == "in a step" else []
        await asyncio.sleep(0.01)
        (callback,) = engine.ranks.callbacks
        thread = threading.Thread(target=callback, args=("rank 1 has died",))
        thread.start()
        while worker.problem is None:
            await asyncio.sleep(0.001)
        with pytest.raises(EngineStopped, match="failed"):
            await _texts(worker, 1)
        engine.gate.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(error, EngineStopped) for error in found)
        await worker.stop()
        thread.join()

    asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == ["rank 1 has died"]


def test_stop_ends_what_is_waited_for_and_start_begins_again() -> None:
    engine = Counting()

    async def run() -> None:
        worker = _worker(engine)
        with pytest.raises(EngineStopped):
            await _texts(worker, 1)
        worker.start()
        call = asyncio.create_task(_texts(worker, 1 << 30))
        await _until(engine, 2)
        await worker.stop()
        with pytest.raises(EngineStopped):
            await call
        with pytest.raises(EngineStopped):
            await _texts(worker, 1)
        worker.start()
        assert await _texts(worker, 2) == {0: "01"}
        await worker.stop()

    asyncio.run(run())
    assert engine.aborted == ["0"]
    assert not engine.busy
