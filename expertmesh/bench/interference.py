"""What a long prompt does to others while it is computed: how long a short one waits for its first token, and how long
an answer on its way stands still."""

import asyncio
import statistics
import time
from itertools import pairwise
from typing import Any

from expertmesh.bench.client import Timing
from expertmesh.bench.latency import e2e
from expertmesh.bench.serve import BEFORE, Session
from expertmesh.errors import InputError
from expertmesh.planner.arrivals import Arrival

STREAM = 192  # tokens of the answer that is on its way
POLL = 0.005  # seconds


async def interference(session: Session, long: int, short: int, rounds: int) -> dict[str, float]:
    """Medians, in milliseconds. long, short: tokens of the prompts, whose answers are one token. Short ones come at
    times spread evenly over the computation of the long one; all prompts are new to the server."""
    probe = _Probe(session)
    await probe.ask(long)  # which warms it up
    alone = [await probe.ask(long) for _ in range(rounds)]
    first = [await probe.ask(short) for _ in range(rounds)]
    taken = statistics.median(map(e2e, alone)) / 1000
    beside = [await probe.beside(long, short, taken * (n + 0.5) / rounds) for n in range(rounds)]
    pauses = [await probe.pause(long, short) for _ in range(rounds)]
    return {
        "long_alone_ms": statistics.median(map(e2e, alone)),
        "long_beside_ms": statistics.median(e2e(one) for one, _ in beside),
        "short_alone_ms": statistics.median(map(e2e, first)),
        "short_beside_ms": statistics.median(e2e(one) for _, one in beside),
        "short_beside_worst_ms": max(e2e(one) for _, one in beside),
        "pause_ms": statistics.median(pauses),
    }


class _Probe:
    """Asks with a new prompt each time."""

    def __init__(self, session: Session) -> None:
        self._session, self._number = session, 2 * BEFORE

    async def ask(self, tokens: int, output: int = 1, timing: Timing | None = None) -> Timing:
        self._number += 1
        found = await self._session.ask(self._number, Arrival(0.0, tokens, output), timing)
        if found.error is not None:
            raise InputError(f"the server fails ({found.error}): {found.message}")
        return found

    async def beside(self, long: int, short: int, delay: float) -> tuple[Timing, Timing]:
        """Both, the short one so many seconds later."""
        task = asyncio.create_task(self.ask(long))
        await asyncio.sleep(delay)
        second = await self.ask(short)
        return await task, second

    async def pause(self, long: int, short: int) -> float:
        """The longest time without text, in milliseconds, of an answer during which a long prompt comes."""
        timing = Timing((short, STREAM), time.perf_counter())
        task = asyncio.create_task(self.ask(short, STREAM, timing))
        while not timing.texts and not task.done():
            await asyncio.sleep(POLL)
        other = await self.ask(long)
        await task
        meanwhile = (b - a for a, b in pairwise(timing.texts) if b >= other.sent and a <= other.end)
        return 1000 * max(meanwhile, default=0.0)


def compared(found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """With what chunks bring: how many times shorter the wait of a short prompt is, and the pause of an answer."""
    whole, chunked = found["whole"], found["chunked"]
    return found | {
        "times_shorter": {
            name: whole[name] / chunked[name]
            for name in ("short_beside_ms", "short_beside_worst_ms", "pause_ms")
            if chunked[name] > 0
        }
    }
