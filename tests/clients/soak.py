"""`python -m tests.clients.soak`: a server of many ranks under a load that does not end, and what must hold meanwhile.

Every request is greedy, in FP32, and one of a few kinds, of which each has been answered alone before: its text must be
the same whatever else runs. The cache has room for one request of the longest kind, so that requests wait for pages and
give them back all the time, and at the end such a request shows whether every page has come back.
"""

import argparse
import asyncio
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil

from expertmesh.bench.client import Client, Timing
from expertmesh.bench.prompts import TokenPrompts
from expertmesh.bench.serve import Form, Session
from expertmesh.bench.started import Started, started
from expertmesh.planner.arrivals import Arrival

CONTEXT = 1024  # tokens of the longest request, and of the cache of each TP group
OPTIONS = (
    *("--nodes", "2", "--cards", "4", "--dtype", "float32", "--overlap", "off"),
    *("--cache-tokens", str(CONTEXT), "--max-context", str(CONTEXT)),
)
GROUPS = 2  # TP groups, each with a cache of its own
KINDS = [(8, 24), (40, 12), (130, 16), (24, 40), (300, 4), (64, 8)]  # tokens of prompts and answers
CUT = 0.1  # of the clients go away in the middle
WARM = 15.0  # seconds of load at least, before memory is looked at
QUIET = 15.0  # seconds in which connections that nobody uses are closed
GROWTH, SPARE = 0.05, 32e6  # what memory may grow by: of itself, and bytes that an allocator keeps
BOUND = 45.0  # seconds until everybody knows of a rank that has died: the ranks' own time-out and some


@dataclass
class Judge:
    """What was found wrong, and how many requests ended how."""

    faults: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)

    def check(self, right: bool, message: str) -> None:
        if not right:
            self.faults.append(message)
            print(f"FAULT: {message}", flush=True)

    def judge(self, kind: int, timing: Timing, alone: Sequence[str]) -> None:
        """An answer is complete and the same as alone; or it was refused because there are too many."""
        self.ends[timing.error or "complete"] += 1
        if timing.error == "429":
            return
        self.check(timing.error is None, f"{KINDS[kind]}: {timing.error}: {timing.message}")
        if timing.error is None:
            self.check(timing.output == KINDS[kind][1], f"{KINDS[kind]}: {timing.output} tokens came")
            self.check(timing.text == alone[kind], f"{KINDS[kind]}: {timing.text!r}, alone {alone[kind]!r}")


@dataclass(frozen=True)
class Crowd:
    """Clients of one server."""

    session: Session
    judge: Judge
    alone: list[str]

    @classmethod
    async def of(cls, client: Client, judge: Judge) -> "Crowd":
        """With the answer to each kind of request, asked alone."""
        session = await Session.begin(client, Form(vocabulary=8192))
        crowd = cls(session, judge, [])
        for kind in range(len(KINDS)):
            timing = await crowd.ask(kind)
            judge.check(timing.error is None, f"{KINDS[kind]} alone: {timing.error}: {timing.message}")
            crowd.alone.append(timing.text)
        return crowd

    async def ask(self, kind: int, timing: Timing | None = None) -> Timing:
        arrival = Arrival(0.0, *KINDS[kind])
        body = self.session.form.body(self.session.prompts, kind, arrival)
        return await self.session.client.ask(
            self.session.prompts.path, body, timing or Timing(KINDS[kind], 0.0), keep=True
        )

    async def stay(self, kind: int) -> None:
        self.judge.judge(kind, await self.ask(kind), self.alone)

    async def leave(self, kind: int, patience: float) -> None:
        """Go away in the middle of the answer, or while waiting for it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self.ask(kind)
        self.judge.ends["cut off"] += 1

    async def one(self, rng: random.Random) -> None:
        kind = rng.randrange(len(KINDS))
        if rng.random() < CUT:
            await self.leave(kind, rng.uniform(0.0, 2.0))
        else:
            await self.stay(kind)

    async def loop(self, seed: int, until: float) -> None:
        rng = random.Random(seed)
        while time.monotonic() < until:
            await self.one(rng)

    async def streams(self, number: int, seconds: float) -> None:
        """So many at any time, for so long."""
        until = time.monotonic() + seconds
        await asyncio.gather(*(self.loop(seed, until) for seed in range(number)))

    async def queued(self, number: int) -> None:
        """So many at once."""
        rng = random.Random(number)
        await asyncio.gather(*(self.one(rng) for _ in range(number)))


@dataclass(frozen=True)
class Footprint:
    """files, sockets among them, and bytes that the processes of a server hold by themselves."""

    files: int
    memory: int

    @classmethod
    def of(cls, server: Started) -> "Footprint":
        root = psutil.Process(server.process.pid)
        tree = [root, *root.children(recursive=True)]
        return cls(sum(p.num_fds() for p in tree), sum(p.memory_full_info().uss for p in tree))

    @classmethod
    async def quiet(cls, server: Started, files: int = 0) -> "Footprint":
        """Once no more than so many files are open, or the time for it is over."""
        for _ in range(int(QUIET)):
            if (found := cls.of(server)).files <= files:
                return found
            await asyncio.sleep(1)
        return cls.of(server)


async def soak(server: Started, args: argparse.Namespace, judge: Judge) -> None:
    """The load, and nothing that stays of it."""
    async with Client(server.url, reuse=False) as client:
        crowd = await Crowd.of(client, judge)
        # The same load, shorter: what is made once is made, for as many requests at a time as there will be.
        await crowd.streams(args.streams, max(WARM, min(60.0, 15 * args.minutes)))
        await crowd.queued(args.queued)
    before = await Footprint.quiet(server)
    async with Client(server.url, reuse=False) as client:
        crowd = Crowd(Session(client, crowd.session.form, crowd.session.prompts), judge, crowd.alone)
        await crowd.streams(args.streams, 60 * args.minutes)
        await crowd.queued(args.queued)
        await _every_page(crowd.session, judge)
    after = await Footprint.quiet(server, before.files)
    print(f"{dict(judge.ends)}\nbefore {before}\nafter  {after}", flush=True)
    judge.check(after.files <= before.files, f"{after.files} files are open, before the load {before.files}")
    most = before.memory * (1 + GROWTH) + SPARE
    judge.check(
        after.memory <= most, f"{after.memory / 1e6:.0f} MB, before the load {before.memory / 1e6:.0f}"
    )
    judge.check(judge.ends["complete"] > 0, "no request was completed")


async def _every_page(session: Session, judge: Judge) -> None:
    """One request for each group that needs its whole cache: it ends only where no page is held by anybody."""
    prompts = TokenPrompts(8192, seed=1)

    async def longest(number: int) -> None:
        body = session.form.body(prompts, number, Arrival(0.0, CONTEXT - 8, 8))
        try:
            async with asyncio.timeout(120):
                timing = await session.client.ask(prompts.path, body, Timing((0, 0), 0.0))
        except TimeoutError:
            judge.check(False, "a request that needs every page does not end: pages are lost")
        else:
            said = f"{timing.error}: {timing.message}"
            judge.check(timing.error is None, f"a request that needs every page ended with {said}")

    for first in (0, GROUPS):
        await asyncio.gather(*(longest(first + number) for number in range(GROUPS)))


async def terminate(server: Started, judge: Judge) -> None:
    """SIGTERM under load: what runs is completed, and the exit code is 0."""
    async with Client(server.url, reuse=False) as client:
        crowd = await Crowd.of(client, judge)
        timings = [Timing(KINDS[0], 0.0) for _ in range(8)]
        asked = [asyncio.create_task(crowd.ask(0, timing)) for timing in timings]
        while not all(timing.texts or task.done() for timing, task in zip(timings, asked, strict=True)):
            await asyncio.sleep(0.002)
        server.process.send_signal(signal.SIGTERM)
        for timing in await asyncio.gather(*asked):
            judge.judge(0, timing, crowd.alone)
    code = await asyncio.to_thread(server.process.wait, BOUND)
    judge.check(code == 0, f"exit code {code} after SIGTERM; it said {server.said[-3:]}")


async def kill_rank(server: Started, args: argparse.Namespace, judge: Judge) -> None:
    """A rank dies under load: every request ends, in time and with a reason; /health says which rank it was."""
    async with Client(server.url, reuse=False) as client:
        crowd = await Crowd.of(client, judge)
        rng = random.Random(0)
        asked = [asyncio.create_task(crowd.ask(rng.randrange(len(KINDS)))) for _ in range(args.streams)]
        await asyncio.sleep(2)
        victim = _ranks(server)[-1]
        victim.kill()
        done, still = await asyncio.wait(asked, timeout=BOUND)
        judge.check(not still, f"{len(still)} of {len(asked)} requests have not ended after {BOUND:g} s")
        for task in still:
            task.cancel()
        for timing in (task.result() for task in done):
            judge.ends[timing.error or "complete"] += 1
            told = timing.error is None or timing.error not in ("broken off", "no connection", "timeout")
            judge.check(told, f"a request ended without a reason: {timing.error}: {timing.message}")
    print(dict(judge.ends), flush=True)
    status, said = await _health(server)
    judge.check(status == 503, f"/health says {status} after a rank has died: {said}")
    judge.check("rank" in said, f"/health does not name the rank that has died: {said}")


def _ranks(server: Started) -> list[psutil.Process]:
    """Processes of the ranks: those that have no children of their own and hold the weights."""
    tree = psutil.Process(server.process.pid).children(recursive=True)
    leaves = [process for process in tree if not process.children()]
    return sorted(leaves, key=lambda process: process.memory_info().rss)


async def _health(server: Started) -> tuple[int, str]:
    url = server.url.removesuffix("/v1") + "/health"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.text()


def run(args: argparse.Namespace, judge: Judge) -> None:
    ranks = ["--ranks", args.ranks]

    def with_server(work: Callable[[Started], Any]) -> None:
        with started([*OPTIONS, *ranks]) as server:
            asyncio.run(work(server))

    if args.kill_rank:
        with_server(lambda server: kill_rank(server, args, judge))
        return

    async def all_of(server: Started) -> None:
        await soak(server, args, judge)
        await terminate(server, judge)

    with_server(all_of)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="of the streams (default: 5)")
    parser.add_argument("--ranks", choices=("threads", "processes"), default="threads")
    parser.add_argument("--streams", type=int, default=200, help="at any time (default: 200)")
    parser.add_argument(
        "--queued", type=int, default=1000, help="requests at once after that (default: 1000)"
    )
    parser.add_argument(
        "--kill-rank", action="store_true", help="instead: a rank that is a process is killed under load"
    )
    args = parser.parse_args()
    if args.kill_rank:
        args.ranks = "processes"
    judge = Judge()
    run(args, judge)
    print(f"{len(judge.faults)} faults" if judge.faults else "no fault")
    return 1 if judge.faults else 0


if __name__ == "__main__":
    sys.exit(main())
