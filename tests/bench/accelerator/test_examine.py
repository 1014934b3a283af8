"""The whole examination on a CPU, of kernels that are right and of some that are not."""

import json
import re
import socket
import tomllib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from expertmesh import InputError
from expertmesh.bench.accelerator import report as reports
from expertmesh.bench.accelerator import sizes
from expertmesh.bench.accelerator.examine import examine, steps
from expertmesh.bench.accelerator.profile import known_card
from expertmesh.bench.accelerator.sizes import CARD, MIXED, RAGGED, Batch, Sizes
from expertmesh.bench.accelerator.ticks import TICKS
from expertmesh.cli import main
from expertmesh.commands.doctor_accelerator import the_kind
from expertmesh.kernels.table import OPS
from expertmesh.planner.cards import NUMBERS, known_cards, read_card

pytestmark = pytest.mark.timeout(300)
BLOCKS = replace(
    RAGGED, name="blocks", hidden=160, heads=2, q_lora=144, nope=64, rope=32, latent=48, inner=144, slots=2
)
SMALL = Sizes(
    ((RAGGED, (MIXED,)), (BLOCKS, (Batch("two", ((3, 1), (4, 2))),))),
    {RAGGED.name: ("float32", "bfloat16", "w8a8"), BLOCKS.name: ("fp8",)},
    memory=1 << 16, product=(8, 64, 64), rounds=3, repeats=3, seconds=0.05, messages=(64, 4096), tokens=2, limit=120.0,
)  # fmt: skip
TEXT = {"type": "string"}
NUMBER = {"type": ["number", "null"]}
STATE = {"enum": ["ok", "failed", "raised", "crashed", "hung", "none"]}


def rows(required: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A list of objects with these fields, and perhaps those."""
    item = {
        "type": "object",
        "required": list(required),
        "properties": required | more,
        "additionalProperties": False,
    }
    return {"type": "array", "items": item}


# Of report.json, which users send and others read: fields are added, and a change of one is another "schema".
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": [
        "schema", "date", "kind", "cards", "ok", "device", "known", "ticks", "speeds", "checks", "ops", "tokens",
        "links", "profile",
    ],
    "properties": {
        "schema": {"const": 1}, "date": TEXT, "kind": {"enum": ["cpu", "cuda", "npu"]},
        "cards": {"type": "integer"}, "ok": {"type": "boolean"}, "known": {"type": ["string", "null"]}, "host": TEXT,
        "device": {
            "type": "object", "required": ["state", "why"], "additionalProperties": False,
            "properties": {
                "state": STATE, "why": TEXT, "name": TEXT, "memory_bytes": NUMBER, "lacking": TEXT,
                "kernels": {"type": "object", "additionalProperties": TEXT},
                "software": {"type": "object", "additionalProperties": TEXT},
            },
        },
        "ticks": rows({"id": TEXT, "what": TEXT, "lines": TEXT, "state": STATE, "why": TEXT, "advice": TEXT}),
        "speeds": rows({"name": TEXT, "state": STATE, "why": TEXT}, value=NUMBER, unit=TEXT),
        "checks": rows({"name": TEXT, "state": STATE, "why": TEXT}, gain=NUMBER),
        "ops": rows(
            {"op": TEXT, "size": TEXT, "rows": TEXT, "precision": TEXT, "state": STATE, "why": TEXT},
            origin=TEXT, error=NUMBER, bound=NUMBER, runs=NUMBER, same={"type": "boolean"}, seconds=NUMBER,
            bytes=NUMBER, flops=NUMBER, gbs=NUMBER, tflops=NUMBER, share=NUMBER,
        ),
        "tokens": rows(
            {"cards": NUMBER, "exchange": TEXT, "weights": TEXT, "state": STATE, "why": TEXT}, tokens=NUMBER,
            different=NUMBER, margin=NUMBER,
        ),
        "links": rows({"kind": TEXT, "bytes": NUMBER, "state": STATE, "why": TEXT}, us=NUMBER, gbs=NUMBER),
        "profile": {"type": ["object", "null"]},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    heard: list[str] = []
    report = examine("cpu", 2, SMALL, heard.append)
    assert len(heard) == steps("cpu", 2, SMALL)
    return report


@pytest.fixture(scope="module")
def damaged() -> dict[str, Any]:
    only = replace(
        SMALL, models=((RAGGED, (MIXED,)),), precisions={RAGGED.name: ("float32",)}, limit=4.0, tokens=1
    )
    return examine("cpu", 1, only, program="tests.bench.accelerator.faulty:serve")


def ticked(report: dict[str, Any]) -> dict[str, str]:
    return {tick["id"]: tick["state"] for tick in report["ticks"]}


def test_all_that_applies_to_a_cpu_is_ok(found: dict[str, Any]) -> None:
    wrong = [row for part in ("ops", "speeds", "checks", "links", "tokens") for row in found[part]]
    assert [row for row in wrong if row["state"] not in ("ok", "none")] == []
    states = ticked(found)
    assert found["ok"] and list(states) == [tick.id for tick in TICKS]
    always = {"device", "kernels", "repeats", "collectives", "tokens", "converted", "cluster"}
    assert {name for name, state in states.items() if state == "ok"} >= always
    assert {row["op"] for row in found["ops"]} == set(OPS)
    assert all(
        row["error"] <= row["bound"] and row["runs"] >= 2 for row in found["ops"] if row["state"] == "ok"
    )


def test_the_report_is_of_the_published_form(found: dict[str, Any], damaged: dict[str, Any]) -> None:
    for report in (found, damaged):
        plain = json.loads(json.dumps(reports.anonymous(report), allow_nan=False))
        jsonschema.validate(plain, SCHEMA)


def test_whatever_kernels_do_is_a_line_of_the_report(damaged: dict[str, Any]) -> None:
    states = {row["op"]: row["state"] for row in damaged["ops"]}
    expected = {
        "rms_norm": "failed",
        "add": "failed",
        "embed": "raised",
        "count": "hung",
        "logits": "crashed",
    }
    assert {op: states[op] for op in expected} == expected
    assert {op for op, state in states.items() if state == "ok"} == set(OPS) - set(expected)
    why = {row["op"]: row["why"] for row in damaged["ops"]}
    assert "above 0.0001" in why["rms_norm"] and "gave different bits" in why["add"]
    assert why["embed"].startswith("RuntimeError: the driver says 507015")
    assert "no answer in 4 s" in why["count"] and "in hanging" in why["count"], "where it stands"
    assert "killed by SIGSEGV" in why["logits"] and "in deadly" in why["logits"]


def test_what_is_wrong_is_ticked_as_that(damaged: dict[str, Any]) -> None:
    states = ticked(damaged)
    assert not damaged["ok"] and states["kernels"] == "raised" and states["repeats"] == "failed"
    assert states["collectives"] == states["cluster"] == "none", "one card"
    shown = reports.text(damaged)
    assert "kernels raised: embed" in shown and "  what to do: " in shown
    assert re.search(r"^\d+ of \d+ things that apply here are ok$", shown, re.MULTILINE)


def test_models_and_links_that_are_wrong() -> None:
    nothing = replace(SMALL, models=(), tokens=1)
    report = examine("cpu", 2, nothing, program="tests.bench.accelerator.faulty:untrue")
    states = ticked(report)
    assert {states[name] for name in ("tokens", "cluster", "collectives")} == {"failed"}
    why = {tick["id"]: tick["why"] for tick in report["ticks"]}
    assert "tokens are not the reference's" in why["tokens"] and "came damaged" in why["collectives"]
    assert report["profile"]["node_gbs"]["value"] == report["profile"]["memory_gbs"]["value"], "no links"


def test_a_card_that_cannot_be_used() -> None:
    report = examine("cpu", 1, SMALL, program="tests.bench.accelerator.faulty:unusable")
    jsonschema.validate(reports.anonymous(report), SCHEMA)
    assert ticked(report) == {tick.id: "raised" if tick.id == "device" else "failed" for tick in TICKS}
    assert report["profile"] is None and "no such card" in reports.text(report) + reports.markdown(report)


def test_files_to_send_and_to_plan_with(
    found: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reports.write(tmp_path, reports.anonymous(found)) == ["report.json", "report.md", "card.toml"]
    card = read_card(tmp_path / "card.toml")
    assert set(tomllib.loads((tmp_path / "card.toml").read_text())) == {"title", "parameters", *NUMBERS}
    assert (
        card.cards_per_node == 2 and min(card.memory_gbs, card.bf16_tflops, card.node_gbs, card.launch_us) > 0
    )
    text = (tmp_path / "report.md").read_text()
    assert all(f"| {tick.id} |" in text for tick in TICKS)
    words = [
        "plan",
        "--model",
        "deepseek-v2-lite",
        "--card",
        str(tmp_path / "card.toml"),
        "--nodes",
        "1",
        "--cards",
        "2",
    ]
    assert main([*words, "--input", "64", "--output", "16"]) in (0, 1)
    assert "is no field of a card" not in capsys.readouterr().err


def test_nothing_tells_whose_machine_it_was(damaged: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.dumps(damaged)
    assert "node-17" in said and "/home/somebody" in said
    monkeypatch.setattr(socket, "gethostname", lambda: "node-17")
    said = json.dumps(reports.anonymous(damaged))
    assert "node-17" not in said and "somebody" not in said and "/home" not in said
    assert ".../kernel.o" in said and "507015" in said


def test_sizes_survive_a_message() -> None:
    for amount in (SMALL, CARD, sizes.CPU):
        assert Sizes.of(json.loads(json.dumps(asdict(amount)))) == amount


def test_the_command(
    found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from expertmesh.commands import doctor_accelerator

    asked: list[Any] = []
    answer: Callable[..., Any] = lambda *given: asked.append(given[:3]) or found  # noqa: E731
    monkeypatch.setattr(doctor_accelerator, "examine", answer)
    words = ["doctor", "--accelerator", "--device", "cpu"]
    assert main([*words, "--cards", "3", "--out", str(tmp_path / "new" / "folder")]) == 0
    assert asked == [("cpu", 3, sizes.CPU)]
    out = capsys.readouterr().out
    assert "written to" in out and "--card" in out
    assert main([*words, "--json"]) == 0
    assert "host" not in json.loads(capsys.readouterr().out)
    assert main([*words, "--json", "--identify"]) == 0
    assert json.loads(capsys.readouterr().out)["host"] == socket.gethostname()
    found["ok"] = False
    assert main(words) == 1
    found["ok"] = True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu", "--cards", "0"], "--cards is 0"),
        (["--device", "cpu", "--out", "/proc/nothing"], "--out /proc/nothing: "),
    ],
)
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--accelerator", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here")
def test_without_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--accelerator"]) == 2
    err = capsys.readouterr().err
    assert "expertmesh: no card that torch can use (npu: torch_npu is not installed; " in err
    assert "; cuda: " in err and "--device cpu" in err and err.count("\n") == 1
    (tmp_path / "davinci0").touch()
    expected = r"^there is a driver of npu, but no card that torch can use \(npu: torch_npu is not installed; [^;]*\);"
    with pytest.raises(InputError, match=expected):
        the_kind("auto", tmp_path)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("Ascend910B3", "ascend-910b"),
        ("Ascend910B2", "ascend-910b-376t"), ("Ascend910_9391", "ascend-910c"), ("AMD EPYC", None),
    ],
)  # fmt: skip
def test_drivers_names_of_cards(name: str, known: str | None) -> None:
    assert known_card(name) == known and (known is None or known in known_cards())
