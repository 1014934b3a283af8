"""What Prometheus reads, by the parser of its own client, and by promtool where it is installed."""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from expertmesh import Output
from expertmesh.engine.arrays import from_plain
from expertmesh.server.metrics import RECENT, Metrics
from tests.support.states import state_of

V3 = {"nodes": 8, "cards": 8, "layers": tuple(range(3, 61)), "experts": 256, "redundant": 64}
UNITS = ("_seconds", "_bytes", "_tokens", "_ratio", "_pages", "_rows")


def parsed(text: bytes) -> dict[str, dict[tuple[str, ...], float]]:
    """Name of each sample -> values of its labels -> its value."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation and family.type != "unknown", family.name
        for sample in family.samples:
            values = found.setdefault(sample.name, {})
            assert tuple(sample.labels.values()) not in values, sample
            values[tuple(sample.labels.values())] = sample.value
    return found


def test_counters_are_those_of_the_state() -> None:
    state = state_of()
    found = parsed(Metrics().render(state))
    assert found["expertmesh_up"] == {(): 1.0}
    assert found["expertmesh_requests_running"] == {("0",): 5.0, ("1",): 5.0}
    assert found["expertmesh_requests_finished_total"] == {("stop",): 200, ("length",): 70, ("abort",): 3}
    assert found["expertmesh_generation_tokens_total"] == {(): 80_000}
    assert found["expertmesh_step_seconds_total"][("ranks",)] == 80.0
    assert found["expertmesh_request_queue_seconds_count"] == {(): sum(state["queue"]["counts"])}
    assert (
        found["expertmesh_sent_bytes_total"][("dispatch", "across")] == state["links"]["bytes"]["dispatch"][1]
    )
    assert found["expertmesh_node_sent_bytes_total"][("0", "1")] == state["links"]["nodes"][0][1]
    assert found["expertmesh_balancer_moved_experts_total"] == {(): 60}
    cards_LR = from_plain(state["experts"]["cards"])
    assert found["expertmesh_card_load_ratio"][("2", "7")] == pytest.approx(
        cards_LR[1, 7] / cards_LR[1].mean()
    )
    assert "expertmesh_expert_rows_total" not in found


def test_there_are_as_many_series_as_the_model_has_parts() -> None:
    found = parsed(Metrics().render(state_of(**V3), experts=True))  # type: ignore[arg-type]
    assert len(found["expertmesh_expert_rows_total"]) == 58 * 256
    assert len(found["expertmesh_card_load_ratio"]) == 58 * 64
    assert sum(map(len, parsed(Metrics().render(state_of(**V3))).values())) < 5000  # type: ignore[arg-type]


def test_names_follow_the_custom() -> None:
    families = list(text_string_to_metric_families(Metrics().render(state_of(), True).decode()))
    assert all(family.name.startswith("expertmesh_") for family in families)
    timed = [f.name for f in families if "seconds" in f.name or "ratio" in f.name or "bytes" in f.name]
    assert all(name.endswith(UNITS) for name in timed)
    promtool = shutil.which("promtool")
    if promtool:
        done = subprocess.run(
            [promtool, "check", "metrics"],
            input=Metrics().render(state_of(), True),
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    ("state", "up"), [(None, 0.0), (state_of() | {"problem": "broken"}, 0.0), (state_of(), 1.0)]
)
def test_an_engine_that_does_not_run_is_not_up(state: dict[str, Any] | None, up: float) -> None:
    assert parsed(Metrics().render(state))["expertmesh_up"] == {(): up}


def test_one_card_without_a_balancer() -> None:
    state = state_of(1, 1, redundant=0)
    state["balance"], state["parts"] = None, state["parts"] | {"seconds": []}
    state["links"] = {"bytes": {}, "nodes": [[0]], "recent": [[0]], "recent_bytes": {}}
    found = parsed(Metrics().render(state))
    assert not [name for name in found if "balancer" in name]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def output(tokens: int, reason: str | None = None) -> Output:
    return Output("r", None, [1, 2], "", list(range(tokens)), reason)  # type: ignore[arg-type]


def test_times_of_requests_are_observed_as_they_go_by() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    # Seconds to wait, number of the choice, tokens so far, why it ended.
    plan = [
        (2.0, 0, 1, None),
        (1.0, 1, 2, None),
        (0.5, 0, 2, None),
        (1.5, 0, 5, "stop"),
        (0.0, 1, 2, "abort"),
    ]

    async def outputs() -> AsyncGenerator[tuple[int, Output]]:
        for seconds, number, tokens, reason in plan:
            clock.now += seconds
            yield number, output(tokens, reason)

    async def main() -> int:
        return len([each async for each in metrics.observed(outputs())])

    assert asyncio.run(main()) == len(plan)
    found = parsed(metrics.render(None))
    sums = {name: found[f"expertmesh_{name}_seconds_sum"][()] for name in
            ("time_to_first_token", "inter_token", "time_per_output_token", "request")}  # fmt: skip
    assert sums == pytest.approx({
        "time_to_first_token": 2.0 + 3.0, "inter_token": 1.5 + 1.5 / 3, "time_per_output_token": 3.0 / 4,
        "request": 5.0,
    })  # fmt: skip
    first = {f"ttft_p{percent}": np.percentile([2, 3], percent) for percent in (50, 95)}
    assert metrics.recent() == pytest.approx(first | {"tpot_p50": 0.75, "tpot_p95": 0.75})
    clock.now += RECENT + 5
    assert set(metrics.recent().values()) == {None}


def test_a_call_that_is_given_up_closes_its_source() -> None:
    closed: list[bool] = []

    async def outputs() -> AsyncGenerator[tuple[int, Output]]:
        try:
            yield 0, output(1)
            yield 0, output(2)
        finally:
            closed.append(True)

    async def main() -> None:
        seen = Metrics().observed(outputs())
        async for _ in seen:
            break
        await seen.aclose()

    asyncio.run(main())
    assert closed == [True]


def test_a_server_is_read(url: str) -> None:
    httpx.post(
        f"{url}/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 3, "ignore_eos": True}
    )
    answer = httpx.get(f"{url}/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert parsed(answer.content)["expertmesh_up"] == {(): 1.0}
    assert parsed(answer.content)["expertmesh_time_to_first_token_seconds_count"][()] >= 1
    assert "expertmesh_expert_rows_total" in parsed(httpx.get(f"{url}/metrics?experts=1").content)
