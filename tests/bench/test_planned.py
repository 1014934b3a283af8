"""Steps of the engine beside what is predicted of them: what is measured, and how predictions are scored."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh import InputError, Topology
from expertmesh.bench.planned import Case, Grid, bench_planned, planner, score, share
from expertmesh.cli import main
from expertmesh.comm.local import cores
from expertmesh.llm import demo_model
from expertmesh.planner.cards import card

CARD = card("ascend-910b")
SMALL = Grid((Topology(1, 1, 1), Topology(1, 2, 2)), ("none",), (1, 3), (64,), (40,), rounds=2, turns=2)


def rows(predicted: list[float], measured: list[float]) -> list[dict[str, Any]]:
    return [
        {"predicted": p, "measured": m, "rows": 1 + i % 2}
        for i, (p, m) in enumerate(zip(predicted, measured, strict=True))
    ]


def test_every_case_is_measured_and_predicted() -> None:
    asked: list[Case] = []

    def predict(case: Case) -> float:
        asked.append(case)
        return 1e-3 * case.requests

    found = bench_planned([demo_model()], SMALL, predict)
    assert len(found["rows"]) == len(asked) == 2 * (2 + 1)
    assert {(case.requests, case.rows, case.context) for case in asked} == {
        (1, 1, 64),
        (3, 1, 64),
        (1, 40, 40),
    }
    for row, case in zip(found["rows"], asked, strict=True):
        assert row["measured"] > 0 and row["spread"] >= 1 and row["predicted"] == 1e-3 * case.requests
        assert row["topology"]["attention_tp"] == case.topology.attention_tp
    assert found["error"] > 0 and found["by_phase"].keys() == {"decode", "prefill"}


@given(
    measured=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=8),
    factor=st.floats(0.01, 100),
    data=st.data(),
)
def test_a_constant_factor_is_no_error_of_ratios(
    measured: list[float], factor: float, data: st.DataObject
) -> None:
    found = score(rows([factor * m for m in measured], measured))
    assert found["factor"] == pytest.approx(factor)
    assert found["ratio_error"] == pytest.approx(0, abs=1e-9) and found["pair_error"] == pytest.approx(
        0, abs=1e-9
    )
    assert found["error"] == pytest.approx(abs(factor - 1), abs=1e-9)


def test_errors_of_two_cases() -> None:
    found = score(rows([2.0, 1.0], [1.0, 1.0]))
    root = math.sqrt(2)
    assert found["factor"] == pytest.approx(root) and found["error"] == pytest.approx(0.5)
    assert found["pair_error"] == pytest.approx(1.0)  # one ratio, twice what was measured
    assert found["by_phase"] == pytest.approx({"decode": root - 1, "prefill": 1 - 1 / root})
    assert score(rows([1.0], [1.0]))["by_phase"]["prefill"] is None


def test_predictions_grow_with_everything() -> None:
    predict = planner(CARD)
    base = Case(demo_model(), Topology(1, 1, 1), "none", 4, 1, 256)
    for larger in ({"requests": 64}, {"rows": 64}, {"context": 2048}, {"topology": Topology(1, 2, 1)}):
        assert predict(replace(base, **larger)) > predict(base)
    assert predict(replace(base, quantise="w8a8")) < predict(base)


def test_a_rank_has_its_share_of_the_machine() -> None:
    half = share(CARD, 2)
    assert half.memory_gbs == CARD.memory_gbs / 2 and half.int8_tflops == CARD.int8_tflops / 2
    assert half.cards_per_node == 2 and half.node_gbs == CARD.node_gbs
    assert half.launch_us == CARD.launch_us + CARD.reached.eager_us and half.reached.eager_us == 0  # no tapes
    crowd = share(CARD, 4 * cores())
    assert crowd.launch_us == pytest.approx(4 * half.launch_us)
    assert crowd.dispatch_us == pytest.approx(4 * CARD.dispatch_us)
    assert share(CARD, 1).reached == CARD.reached and share(CARD, 1).launch_us == CARD.launch_us


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--card", "/nowhere/here.toml"], "/nowhere/here.toml: No such file or directory"),
        (["--card", "h1000"], "card 'h1000' is not known"),
        (["--layout", "40x40"], "1600 ranks on"),
        (["--layout", "2by2"], "not of the form 8x8"),
        (["--quantise", "w4"], "quantise 'w4' is not one of"),
        (["--batches", "1,,2"], "--batches '1,,2': not of the form 1,16"),
        (["--batches", "0"], "--batches: sizes must be at least 1"),
        (["--contexts", "4"], "--contexts: at least 16 tokens for 5 rounds of 4 batches"),
        (["--rounds", "0"], "--rounds and --turns must be at least 1"),
        (["--card", "h20", "--batches", "", "--prompts", ""], "nothing to measure"),
        (["/nowhere", "--card", "h20"], "no such folder"),
    ],
)
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "planner", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize("json_", [False, True])
def test_the_command(json_: bool, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--layout", "1x1", "--quantise", "none", "--batches", "2", "--contexts", "40", "--prompts", "20"]
    few = ["--card", "h20", "--rounds", "1", "--turns", "1"]
    assert main(["bench", "planner", *words, *few, *["--json"] * json_]) == 0
    out = capsys.readouterr().out
    if json_:
        report = json.loads(out)
        assert report["card"] == "h20" and [row["rows"] for row in report["rows"]] == [1, 20]
    else:
        assert "2x1" in out and "1x20" in out and "of ratios between two cases" in out


def test_a_grid_without_prompts_measures_decoding_alone() -> None:
    grid = replace(SMALL, prompts=())
    assert all(case.decodes for case in grid.cases(Path(), Topology(), "none"))
    with pytest.raises(InputError, match="nothing to measure"):
        bench_planned([demo_model()], replace(SMALL, batches=(), prompts=()), lambda case: 1.0)
