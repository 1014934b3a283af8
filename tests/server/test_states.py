"""States on an event loop: nobody waits for a slow follower, and everybody ends when all ends."""

import asyncio
from typing import Any

from expertmesh.server.states import POINTS, States, point
from tests.support.states import state_of

LATENCY = {"ttft_p50": 0.25, "ttft_p95": None, "tpot_p50": None, "tpot_p95": None}


def test_a_follower_gets_the_newest_and_then_what_is_new() -> None:
    async def main() -> list[Any]:
        states, seen = States(lambda: LATENCY), []

        async def follow() -> None:
            async for state in states.follow():
                seen.append((state["time"], state["problem"]))
                await asyncio.sleep(0)

        states.publish({**state_of(), "time": 1.0})
        task = asyncio.create_task(follow())
        await asyncio.sleep(0.01)
        for number in (2.0, 3.0):  # without a pause: the follower misses the first
            states.publish({**state_of(), "time": number})
        await asyncio.sleep(0.01)
        states.fail("broken")
        await asyncio.sleep(0.01)
        states.close()
        await task
        return seen

    assert asyncio.run(main()) == [(1.0, None), (3.0, None), (3.0, "broken")]


def test_who_comes_after_the_end_ends_at_once() -> None:
    async def main() -> list[Any]:
        states = States(lambda: LATENCY)
        states.close()
        return [state async for state in states.follow()]

    assert asyncio.run(main()) == []


def test_the_history_has_a_point_a_second_and_forgets() -> None:
    async def main() -> None:
        states, state = States(lambda: LATENCY), state_of()
        for half in range(2 * POINTS + 40):
            states.publish({**state, "time": half / 2})
        times = [each["time"] for each in states.history]
        assert times == [float(n) for n in range(20, POINTS + 20)]

    asyncio.run(main())


def test_a_point_has_rates() -> None:
    found = point(state_of() | {"latency": LATENCY})
    assert (found["generated"], found["prompt"], found["running"], found["waiting"]) == (400.0, 100.0, 10, 2)
    assert found["step"] == (8 + 0.05 + 0.1 + 0.07) / 200 and found["ttft_p50"] == 0.25
    idle = state_of() | {"latency": LATENCY}
    idle["recent"] = idle["recent"] | {"steps": 0, "seconds": 0.0}
    assert (point(idle)["step"], point(idle)["imbalance"], point(idle)["generated"]) == (None, None, 0.0)
