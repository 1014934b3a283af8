"""This machine as a card: what is written is read back, and every number says where it is from."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertmesh import InputError
from expertmesh.bench import machine, reached
from expertmesh.bench.kernels import Ceilings
from expertmesh.bench.machine import LARGE, Setting, numbers, write_card
from expertmesh.bench.transport import exchange_seconds
from expertmesh.cli import main
from expertmesh.comm.local import cores
from expertmesh.commands import bench_kernels
from expertmesh.kernels.table import native
from expertmesh.planner.cards import MAY_BE_ZERO, NUMBERS, read_card
from expertmesh.planner.parameters import NAMES
from tests.kernels.test_ops import NATIVE

compiled = pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
MEASURED = {
    "memory_bytes": 24e9,
    "cache_bytes": 32e6,
    "cached": 100e9,
    "ceilings": {"read": 40e9, "bf16": 1.5e12, "torch bf16": 1.8e12, "w8a8": 3.5e12, "float32": 0.3e12},
    "launch": 0.25e-6,
    "in_place": 30e-6,
    "copied": 1e-3,
    "peer": 5e-6,
    "exchange": {"dispatch": 100e-6, "combine": 80e-6, "total": 180e-6, "rate": 3e9},
}


PARAMETERS = {
    "memory_efficiency": {"value": 0.9, "source": "measured"},
    "passes": {"value": 0.0, "source": "none"},
}


def values(**setting: Any) -> dict[str, float]:
    return {name: entry["value"] for name, entry in numbers(Setting(**setting), MEASURED).items()}


def test_a_profile_has_every_number_of_a_card_in_its_unit() -> None:
    found = values()
    assert tuple(found) == NUMBERS
    assert all(value > 0 or name in MAY_BE_ZERO for name, value in found.items())
    expected = {
        "memory_gb": 24, "memory_gbs": 40, "bf16_tflops": 1.8, "int8_tflops": 3.5, "fp8_tflops": 0, "fp4_tflops": 0,
        "fp32_tflops": 0.3, "cache_mb": 32, "cache_gbs": 100,
        "node_us": 30, "launch_us": 0.25, "dispatch_us": 100, "combine_us": 80, "peer_us": 5, "across_us": 30,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["node_gbs"] == found["across_gbs"] == pytest.approx(LARGE / 1e6, rel=1e-3)


@pytest.mark.skipif(cores() < 2, reason="one core")
def test_several_cards_share_the_machine() -> None:
    one, two = values(), values(cards=2)
    shared = ("memory_gb", "memory_gbs", "bf16_tflops", "int8_tflops")
    assert {name: one[name] / 2 for name in shared} == pytest.approx({name: two[name] for name in shared})
    assert two["cards_per_node"] == two["domain_ranks"] == 2 and two["node_gbs"] == one["node_gbs"]


def test_a_network_that_is_told() -> None:
    entries = numbers(Setting(across_gbs=1.25, across_us=20), MEASURED)
    assert (entries["across_gbs"]["value"], entries["across_us"]["value"]) == (1.25, 20)
    assert "given" in entries["across_gbs"]["source"]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    report = {"title": 'a "machine"\n', "numbers": numbers(Setting(), MEASURED), "parameters": PARAMETERS}
    write_card(tmp_path / "here.toml", report)
    card = read_card(tmp_path / "here.toml")
    assert card.name == "here" and card.title == report["title"]
    assert {name: getattr(card, name) for name in NUMBERS} == values()
    entries = numbers(Setting(), MEASURED) | PARAMETERS
    assert card.sources == {name: entry["source"] for name, entry in entries.items()}
    assert card.parameters == {"memory_efficiency": 0.9, "passes": 0.0}


@compiled
def test_the_whole_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_kernels, "COLD", 1 << 16)
    monkeypatch.setattr(machine, "LARGE", 1 << 16)
    monkeypatch.setattr(reached, "WIDE", 128)
    monkeypatch.setattr(machine, "Ceilings", lambda *_: Ceilings(native(), 1 << 16, (8, 32, 64)))
    out = tmp_path / "here.toml"
    assert main(["bench", "machine", "--rounds", "1", "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["out"] == str(out) and report["threads"] >= 1
    assert tuple(report["numbers"]) == NUMBERS
    written = tomllib.loads(out.read_text())
    assert {name: written[name] for name in NUMBERS} == report["numbers"]
    card = read_card(out)
    assert min(card.memory_gbs, card.bf16_tflops, card.node_gbs, card.dispatch_us, card.launch_us) > 0
    assert report["parameters"] == written["parameters"] and set(card.parameters) <= set(NAMES)
    assert 0 < card.parameters["memory_efficiency"] <= 1


def test_exchanges_by_size_and_kind() -> None:
    found = exchange_seconds(2, (64, 4096), 2, of=min)
    assert set(found) == {64, 4096} and all(set(kinds) == {"in place", "copied"} for kinds in found.values())
    assert all(seconds > 0 for kinds in found.values() for seconds in kinds.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cards", "0"], "--cards is 0, but must be from 1 to the"),
        (["--cards", "4096"], "--cards is 4096"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--across-gbs", "-1"], "--across-gbs is -1.0, but must be above 0"),
        (["--across-us", "nan"], "--across-us is nan"),
        (["--out", "here.json"], "--out here.json: a profile is a file that ends in .toml"),
        (["--out", "/nowhere/here.toml"], "there is no folder /nowhere"),
    ],
)
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "machine", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--out .*: Is a directory"):
        (tmp_path / "here.toml").mkdir()
        write_card(tmp_path / "here.toml", {"title": "x", "numbers": {}, "parameters": {}})


def test_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from expertmesh.commands import bench_planning

    made: Callable[..., Any] = lambda setting, kernels: {  # noqa: E731
        "title": "this machine", "measured": MEASURED, "numbers": numbers(setting, MEASURED), "parameters": PARAMETERS
    }  # fmt: skip
    monkeypatch.setattr(bench_planning, "bench_machine", made)
    monkeypatch.setattr(bench_planning, "own_kernels", lambda: None)
    monkeypatch.setattr(bench_planning, "check_kernel_memory", lambda: None)
    assert main(["bench", "machine"]) == 0
    out = capsys.readouterr().out
    assert "float32 0.3 TFLOPS" in out and out.count("\n") == 1 + len(NUMBERS) + len(PARAMETERS)
