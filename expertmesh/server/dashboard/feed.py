"""States as a stream of events, small enough for a page that is open all day.

`hello` is what does not change; `state` comes once a second and has a few hundred numbers; what grows with the model
is sent when it is new: `loads` (layers x cards, layers x experts), `placement` and `log`. Of DeepSeek-V3 on 64 cards
`loads` are 32 kB, since they travel as ratios to their layer's mean in one or two bytes.
"""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertmesh.engine.arrays import from_plain
from expertmesh.server.states import State, States

PERIOD = 1.0  # seconds between two states for a page
# A ratio in 16 bits has steps of 1/1024, in 8 bits its square root has steps of 1/51: up to 25 times the mean.
FINE, COARSE = 1024, 51
ONCE = ("model", "cluster")
ALWAYS = ("time", "uptime", "problem", "latency", "requests", "tokens", "cache", "steps", "recent", "parts")


class Feed:
    """What pages are sent. Pages that follow together share what was made for one of them."""

    def __init__(self, states: States, name: str) -> None:
        self._states, self._name = states, name
        self._made: tuple[State | None, dict[str, str]] = None, {}

    async def events(self) -> AsyncGenerator[str]:
        """Server-sent events, until all ends."""
        told: dict[str, str] = {}
        async for state in self._states.follow():
            events = self._events(state)
            if not told:
                yield events["hello"]
                yield event("history", columns(list(self._states.history)))
            for name in ("state", "placement", "loads", "log"):
                if told.get(name) != events[name]:
                    yield events[name]
            told = events
            await asyncio.sleep(PERIOD)

    def _events(self, state: State) -> dict[str, str]:
        if self._made[0] is not state:
            self._made = state, self._make(state)
        return self._made[1]

    def _make(self, state: State) -> dict[str, str]:
        hosts = [{"host": rank["host"], "pid": rank["pid"]} for rank in state["ranks"]]
        now = {name: state[name] for name in ALWAYS} | {
            "balance": state["balance"],
            "silence": [round(rank["silence"], 1) for rank in state["ranks"]],
            "point": self._states.history[-1] if self._states.history else None,
        }
        return {
            "hello": event(
                "hello", {name: state[name] for name in ONCE} | {"name": self._name, "ranks": hosts}
            ),
            "state": event("state", now),
            "placement": event("placement", placement(state["placement"])),
            "loads": event("loads", loads(state)),
            "log": event("log", state["events"]),
        }


def event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(_short(data), ensure_ascii=False, separators=(',', ':'))}\n\n"


def columns(points: list[dict[str, float | None]]) -> dict[str, list[float | None]]:
    """Points as one list for each name."""
    return {name: [each[name] for each in points] for name in points[-1]} if points else {}


def loads(state: State) -> dict[str, Any]:
    """Ratios to the mean of each layer, and what the mean is, in rows of the window."""
    experts = state["experts"]
    recent_LE, cards_LR = from_plain(experts["recent"]), from_plain(experts["cards"])
    cards = np.clip(_ratios(cards_LR) * FINE, 0, 65535).round().astype("<u2")
    each = np.clip(np.sqrt(_ratios(recent_LE)) * COARSE, 0, 255).round().astype("u1")
    return {
        "layers": experts["layers"],
        "rows": recent_LE.sum(1).tolist(),
        "seconds": state["recent"]["seconds"],
        "imbalance": experts["imbalance"],
        "cards": _text(cards),
        "experts": _text(each),
        "nodes": state["links"]["recent"],
        "bytes": state["links"]["recent_bytes"],
    }


def placement(plain: dict[str, Any]) -> dict[str, Any]:
    """The expert in each slot of each rank, layer by layer, -1 where it is empty."""
    slots_LRS = from_plain(plain["slots"])
    return {"version": plain["version"], "shape": list(slots_LRS.shape), "slots": _text(slots_LRS)}


def _ratios(values_LX: NDArray[Any]) -> NDArray[np.float64]:
    values = values_LX.astype(np.float64)
    mean_L = values.mean(1, keepdims=True) if values.size else values
    return values / np.where(mean_L > 0, mean_L, 1.0)


def _text(array: NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _short(data: Any) -> Any:
    """Numbers as a page needs them: no more than five digits behind the point."""
    if isinstance(data, float):
        return round(data, 5) if np.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _short(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_short(value) for value in data]
    return data
