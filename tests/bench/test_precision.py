"""`expertmesh bench precision`."""

import json
from pathlib import Path

import pytest

from expertmesh.cli import main
from expertmesh.commands.bench_precision import _table
from expertmesh.config import demo_model
from tests.kernels.test_ops import NATIVE


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
def test_every_way_to_keep_weights_on_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "tale.txt"
    text.write_text("Once upon a time there was a king who had three daughters. " * 20)
    words = ["--text", str(text), "--tokens", "100", "--converted", str(demo_model()), "--json"]
    assert main(["bench", "precision", *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == [
        "float32",
        "none",
        "w8a8",
        "experts_int8",
        "experts_int4",
        "fp8",
        str(demo_model()),
    ]
    assert report[str(demo_model())] == report["none"]
    exact = report["float32"]["perplexity"]["tale.txt"]
    for name, found in report.items():
        assert found["perplexity"]["tale.txt"] == pytest.approx(exact, rel=0.05), name
    sizes = {name: found["weight_bytes"] for name, found in report.items()}
    assert sizes["experts_int4"] < sizes["fp8"] < sizes["none"] < sizes["float32"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--quantise", "int7"], "'int7' is not one of none, w8a8"),
        (["--tokens", "1"], "at least 2"),
        (["--text", "nowhere.txt"], "nowhere.txt: cannot be read"),
    ],
)
def test_what_cannot_be_judged(
    given: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "precision", *given]) == 2
    assert words in capsys.readouterr().err


def test_a_table_where_float32_has_no_room() -> None:
    found = {"weight_bytes": 2_000_000, "perplexity": {"a tale": 3.5}}
    lines = _table({"float32": {"refused": "too large"}, "w8a8": found}).splitlines()
    assert [line.split() for line in lines[1:]] == [["float32", "too", "large"], ["w8a8", "2.0", "3.500"]]
    assert "a tale" in lines[0]
