"""A server under load: requests are sent as a `Load` says, and timed."""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from expertmesh.bench.client import Client, Timing
from expertmesh.bench.latency import Limits, report, summary
from expertmesh.bench.load import Load
from expertmesh.bench.prompts import Prompts, TokenPrompts, calibrate
from expertmesh.errors import InputError
from expertmesh.planner.arrivals import Arrival

APIS = ("completions", "chat")
BEFORE = 1 << 32  # number of the first request that is not of the load: no prompt of the load is like it


@dataclass(frozen=True)
class Form:
    """How requests are put. model: its name; None takes the first that the server lists. api: "completions", with
    token ids, or "chat", with words. eos: outputs may end by themselves. vocabulary: token ids are below it. warmup:
    requests before those that count. fields: more of every body."""

    model: str | None = None
    api: str = "completions"
    stream: bool = True
    eos: bool = False
    vocabulary: int = 4096
    warmup: int = 1
    fields: Mapping[str, Any] = field(default_factory=dict)

    def body(self, prompts: Prompts, number: int, arrival: Arrival) -> bytes:
        """Of request `number`, as it is sent."""
        said: dict[str, Any] = {"model": self.model, "temperature": 0, "max_tokens": arrival.output}
        if self.stream:
            said |= {"stream": True, "stream_options": {"include_usage": True}}
        if not self.eos:
            said["ignore_eos"] = True
        return json.dumps(said | dict(self.fields) | prompts.fields(number, arrival)).encode()


@dataclass(frozen=True)
class Session:
    """A server that has been found, and how it is asked."""

    client: Client
    form: Form
    prompts: Prompts

    @classmethod
    async def begin(cls, client: Client, form: Form, prefix: int = 0, seed: int = 0) -> "Session":
        """InputError where the server does not answer, or prompts of exact lengths cannot be made for it."""
        form = replace(form, model=form.model or (await client.models())[0])
        if form.api == "completions":
            return cls(client, form, TokenPrompts(form.vocabulary, prefix, seed))

        async def count(fields: dict[str, Any]) -> int:
            body = {"model": form.model, "max_tokens": 1} | fields
            return await client.count("/chat/completions", body)

        return cls(client, form, await calibrate(count, prefix, seed))

    async def warm_up(self, load: Load) -> None:
        """Requests like the first ones of the load, one after the other. InputError where one fails: a wrong model,
        key or length is better told before thousands of requests."""
        for number, arrival in zip(range(self.form.warmup), load.arrivals(), strict=False):
            timing = await self.ask(BEFORE + number, arrival)
            if timing.error is not None:
                raise InputError(f"{self.client.url} fails ({timing.error}): {timing.message}")

    async def ask(self, number: int, arrival: Arrival, timing: Timing | None = None) -> Timing:
        """Send a request now. timing: where its times are seen while it runs."""
        timing = timing or Timing((arrival.input, arrival.output), time.perf_counter())
        return await self.client.ask(self.prompts.path, self.form.body(self.prompts, number, arrival), timing)

    async def drive(self, load: Load, progress: bool = False) -> list[Timing]:
        """Send everything and wait for all ends. A body is made before its time comes."""
        gate = asyncio.Semaphore(load.concurrency) if load.concurrency else None
        timings: list[Timing] = []
        bar = tqdm(desc="requests", total=load.requests, leave=False, disable=None if progress else True)
        with bar:
            start = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                for number, arrival in enumerate(load.arrivals()):
                    body = self.form.body(self.prompts, number, arrival)
                    due = start + arrival.time
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    if gate is not None:
                        await gate.acquire()
                        due = max(due, time.perf_counter())
                    if due - start >= load.end:
                        break
                    timings.append(Timing((load.prefix + arrival.input, arrival.output), due))
                    tasks.create_task(self._send(body, timings[-1], gate, bar))
        return timings

    async def _send(
        self, body: bytes, timing: Timing, gate: asyncio.Semaphore | None, bar: "tqdm[Any]"
    ) -> None:
        await self.client.ask(self.prompts.path, body, timing)
        bar.update()
        if gate is not None:
            gate.release()


async def measure(
    client: Client, form: Form, load: Load, limits: Limits | None = None, progress: bool = False
) -> dict[str, Any]:
    """A load's report (`latency.report`), with what the client itself took."""
    session = await Session.begin(client, form, load.prefix, load.seed)
    await session.warm_up(load)
    before = time.process_time()
    timings = await session.drive(load, progress)
    used = time.process_time() - before
    head = {"url": client.url, "model": session.form.model, "api": form.api, "load": load.describe()}
    found = report(timings, limits or Limits())
    return head | found | {"client": overhead(timings, used, found["seconds"])}


def overhead(timings: list[Timing], used: float, seconds: float) -> dict[str, Any]:
    """What measuring took, used: seconds of computing. late_ms: how long after its time a request was sent."""
    events = sum(timing.events for timing in timings)
    return {
        "cores": used / seconds if seconds > 0 else 0.0,
        "us_per_event": 1e6 * used / events if events else None,
        "late_ms": summary([1000 * (timing.sent - timing.due) for timing in timings]),
    }
