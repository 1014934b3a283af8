"""How the engine is, as the other process tells it."""

from datetime import UTC, datetime
from typing import Any

import pytest

from expertmesh.server import state as module
from expertmesh.server.state import EngineState

PLACE = {"rank": 3, "node": 1, "card": 1, "host": "b"}


def ready(**status: Any) -> EngineState:
    state = EngineState()
    known = {"since": 0.5, "patience": 10.0, "awaited": []} | status
    state.hear({"do": "ready", "capacity": 4, "max_context": 9, "about": {}, "status": known})
    return state


def test_while_loading() -> None:
    state = EngineState()
    for frame, phase, fraction in (
        (None, "starting", 0.0),
        ((1, 4), "weights", 0.25),
        ((4, 4), "ranks", 1.0),
    ):
        if frame:
            state.hear({"do": "loading", "done": frame[0], "total": frame[1]})
        for status, said in (state.readiness(), state.health()):
            assert (status, said["status"], said["phase"], said["fraction"]) == (
                503,
                "loading",
                phase,
                fraction,
            )
            assert "loading" in said["error"]["message"]
    assert ready().readiness() == (200, {"status": "ok"})


def test_healthy() -> None:
    state = ready()
    assert state.health() == (200, {"status": "ok"})
    state.draining = True
    assert state.health() == (200, {"status": "draining"})
    status, said = state.readiness()
    assert (status, said["status"]) == (503, "draining")


@pytest.mark.parametrize(
    ("awaited", "words"),
    [
        ([PLACE], "rank 3 (node 1, card 1) on b has not answered"),
        ([PLACE, PLACE | {"rank": 4}], "on b, rank 4 (node 1, card 1) on b have not answered"),
        ([], "the engine does not begin one"),
    ],
)
def test_a_step_that_takes_too_long(awaited: list[dict[str, Any]], words: str) -> None:
    status, said = ready(since=12.0, awaited=awaited).health()
    assert (status, said["status"]) == (503, "late")
    assert said["error"]["message"].startswith("no step has finished for 12 s: ")
    assert said["error"]["message"].endswith(words)
    assert said["ranks"] == awaited and said.get("host") == (awaited[0]["host"] if awaited else None)
    assert 11 <= (datetime.now(UTC) - datetime.fromisoformat(said["since"])).total_seconds() <= 30


def test_a_process_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ready()
    state.heard -= module.SILENT + 1
    status, said = state.health()
    assert (status, said["status"]) == (503, "silent")
    assert "not been heard of for 11 s" in said["error"]["message"]
    state.hear({"do": "state", "status": state.status})
    assert state.health()[0] == 200


def test_the_first_failure_counts() -> None:
    state = ready()
    state.fail("it died", **PLACE)
    state.fail("the process has ended")
    for status, said in (state.health(), state.readiness()):
        assert (status, said["status"], said["error"]["message"]) == (503, "failed", "it died")
        assert {name: said[name] for name in PLACE} == PLACE
