"""The stream: what a page is sent, and how much of it."""

import asyncio
import base64
import json
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from expertmesh.engine.arrays import from_plain
from expertmesh.server.dashboard import feed
from expertmesh.server.dashboard.feed import COARSE, FINE, Feed, event, loads, placement
from expertmesh.server.states import States
from tests.support.states import state_of

V3: dict[str, Any] = {"nodes": 8, "cards": 8, "layers": tuple(range(3, 61)), "experts": 256, "redundant": 64}
LATENCY = {"ttft_p50": None, "ttft_p95": None, "tpot_p50": None, "tpot_p95": None}


def read(text: str) -> tuple[str, Any]:
    name, data, *rest = text.split("\n")
    assert rest == ["", ""]
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_only_what_is_new_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "PERIOD", 0.0)

    async def main() -> list[str]:
        states = States(lambda: LATENCY)
        first, names = state_of(), []

        async def follow() -> None:
            async for text in Feed(states, "x").events():
                names.append(read(text)[0])

        task = asyncio.create_task(follow())
        for change in ({}, {"time": 1.0}, {"events": []}, {"experts": state_of(seed=1)["experts"]}):
            states.publish(first | change)
            await asyncio.sleep(0.02)
        states.close()
        await task
        return names

    begin = ["hello", "history", "state", "placement", "loads", "log"]
    assert asyncio.run(main()) == [*begin, "state", "state", "log", "loads", "log"]


def test_loads_come_as_they_were() -> None:
    """To the last bit that is sent."""
    state = state_of(**V3)
    found = read(event("loads", loads(state)))[1]
    cards = np.frombuffer(base64.b64decode(found["cards"]), "<u2").reshape(58, 64) / FINE
    experts = (np.frombuffer(base64.b64decode(found["experts"]), "u1").reshape(58, 256) / COARSE) ** 2
    cards_LR, recent_LE = from_plain(state["experts"]["cards"]), from_plain(state["experts"]["recent"])
    assert cards == pytest.approx(cards_LR / cards_LR.mean(1, keepdims=True), abs=0.5 / FINE + 1e-9)
    assert np.sqrt(experts) == pytest.approx(
        np.sqrt(recent_LE / recent_LE.mean(1, keepdims=True)), abs=0.5 / COARSE + 1e-9
    )
    assert found["rows"] == recent_LE.sum(1).tolist()
    slots = read(event("placement", placement(state["placement"])))[1]
    held = np.frombuffer(base64.b64decode(slots["slots"]), "<i2").reshape(slots["shape"])
    assert np.array_equal(held, from_plain(state["placement"]["slots"]))


def test_loads_of_nothing() -> None:
    state = state_of()
    zeros = {name: state["experts"][name] | {"data": bytes(len(state["experts"][name]["data"]))} for name in
             ("recent", "cards")}  # fmt: skip
    found = loads(state | {"experts": state["experts"] | zeros})
    assert not np.frombuffer(base64.b64decode(found["cards"]), "<u2").any() and not any(found["rows"])


def test_a_page_of_v3_is_sent_little() -> None:
    """32 kB a second at most, and the placement when it changes."""

    async def main() -> dict[str, int]:
        states = States(lambda: LATENCY)
        states.publish(state_of(**V3))
        sizes: dict[str, int] = {}
        async with aclosing(Feed(states, "x").events()) as events:
            while len(sizes) < 6:
                text = await anext(events)
                sizes[read(text)[0]] = len(text)
        return sizes

    sizes = asyncio.run(main())
    assert sizes["loads"] < 34_000 and sizes["state"] < 24_000 and sizes["placement"] < 60_000, sizes


def test_numbers_are_short_and_finite() -> None:
    assert event("x", {"a": 1 / 3, "b": float("nan"), "c": [1, float("inf")]}) == (
        'event: x\ndata: {"a":0.33333,"b":null,"c":[1,null]}\n\n'
    )
