"""Ops are compared with the reference before they are timed, and what is reported follows from the times."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.bench import kernels, ops
from expertmesh.bench.kernels import Case, Ceilings, Way, check, copies_of, measure, row
from expertmesh.cli import main
from expertmesh.commands import bench_kernels
from expertmesh.kernels.table import kernels_of, native
from expertmesh.native import NotBuilt
from tests.kernels.test_ops import NATIVE

compiled = pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
TINY = ops.Attention("tiny", 48, 2, 24, 32, 8, 16, 16)
LIMITS = {"read": 10.0, "bf16": 100.0, "torch bf16": 200.0, "w8a8": 400.0, "float32": 50.0}


def ceilings(*_: Any) -> Ceilings:
    return Ceilings(native(), 1 << 16, (8, 32, 64))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "V3_RANK", TINY)
    monkeypatch.setattr(ops, "MIDR", ops.Attention("less", 40, 1, 16, 16, 4, 8, 8, layers=3))
    monkeypatch.setattr(ops, "V2_LITE", ops.Mixture("few", 32, 16, 8, 3))
    monkeypatch.setattr(ops, "VOCABULARY", 100)
    monkeypatch.setattr(ops, "EXPERTS", 32)
    monkeypatch.setattr(kernels, "SECONDS", 0.0)
    monkeypatch.setattr(bench_kernels, "COLD", 1 << 16)
    monkeypatch.setattr(bench_kernels, "Ceilings", ceilings)


@compiled
@pytest.mark.usefixtures("tiny")
def test_every_op_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--rounds", "1", "--quick", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kernels"] == NATIVE[0].name and report["threads"] == torch.get_num_threads()
    assert set(report["ceilings"]) == set(LIMITS) and min(report["ceilings"].values()) > 0
    rows = report["rows"]
    assert {r["op"].split()[0] for r in rows} == {*ops.OPS, "prefill"}
    for op in ("prologue", "experts"):
        assert {r["precision"] for r in rows if r["op"] == op} == set(kernels.PRECISIONS)
    assert {(r["size"], r["tokens"]) for r in rows if r["op"] == "prologue"} >= {("tiny", 1), ("less", 1)}
    for r in rows:
        assert r["ratio"] == pytest.approx(r["seconds"] / r["others"][r["baseline"]])
        assert r["limit"] == pytest.approx(r["floor_seconds"] / r["others"][r["baseline"]])
        assert r["of_ceiling"] == pytest.approx(r["floor_seconds"] / r["seconds"])
        assert 0 <= r["error"] < 0.06


@compiled
@pytest.mark.usefixtures("tiny")
def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["bench", "kernels", "--rounds", "1", "--ops", "prologue,router", "--precisions", "bf16"]) == 0
    )
    title, limits, head, *lines = capsys.readouterr().out.splitlines()
    assert NATIVE[0].name in title and "GB/s" in limits
    assert len(lines) == 5 + 3 + 3 + 2 and {line.split()[0] for line in lines} == {"prologue", "router"}
    assert head.split()[:7] == ["op", "size", "tokens", "ms", "ratio", "bar", "limit"]


@compiled
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("op", ops.OPS)
def test_all_copies_of_the_weights_give_the_same(op: str) -> None:
    """Except for experts, of which every turn takes others, and attention, which has other pages."""
    setting = ops.Setting(kernels_of(native()), ["bf16", "w8a8"], 1 << 16, quick=True)
    for case in ops.OPS[op](setting):
        ways = {**case.ours, **case.theirs, **case.beside}
        check(case, ways)
        for way in ways.values():
            first, last = ([t.clone() for t in case.seen(way.call(i))] for i in (0, way.copies - 1))
            same = all(torch.equal(a, b) for a, b in zip(first, last, strict=True))
            assert same or op in ("experts", "attention")


def case_of(ours: Callable[[int], Any], theirs: Callable[[int], Any], copies: int = 1) -> Case:
    expected = [torch.ones(3)]
    return Case(
        "op", "size", 2, {"bf16": Way(ours, copies)}, {"slow": Way(theirs, copies), "fast": Way(theirs, copies)},
        lambda: expected, 100, 500, other_bytes=50,
    )  # fmt: skip


def right(turn: int) -> list[Tensor]:
    return [torch.ones(3)]


@pytest.mark.parametrize("value", [0.9, float("nan")])
def test_a_wrong_result_is_never_timed(value: float) -> None:
    calls = []

    def wrong(turn: int) -> list[Tensor]:
        calls.append(turn)
        return [torch.tensor([1.0, 1.0, value])]

    for case in (case_of(wrong, right), case_of(right, wrong)):
        calls.clear()
        unused: Any = None
        with pytest.raises(RuntimeError, match=r"op, size, 2 tokens: \w+ is .* off"):
            measure(case, unused, 1)
        assert calls == [0]


def test_what_was_there_before_is_no_result() -> None:
    out = torch.zeros(3)
    idle = Case(
        "op", "size", 1, {"bf16": Way(lambda i: [out], 1)}, {"their": Way(lambda i: [out.fill_(1)], 1)},
        lambda: [out.fill_(1)], 1, 1, before=out.zero_,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="bf16 is 1 off"):
        check(idle, {**idle.theirs, **idle.ours})


@compiled
def test_copies_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SECONDS", 0.0)
    turns: list[int] = []

    def ours(turn: int) -> list[Tensor]:
        turns.append(turn)
        return [torch.ones(3)]

    (found,) = measure(case_of(ours, right, copies=3), ceilings(), 5)
    assert turns == [0, 0, 0, 1, 2, 0, 1]  # compared, timed for the first time, then cycled over
    assert found["baseline"] in ("slow", "fast") and found["precision"] == "bf16"


def test_ratios_are_of_the_fastest_and_of_the_lower_limit() -> None:
    seconds = {"bf16": 50.0, "slow": 200.0, "fast": 100.0}
    found = row(case_of(right, right), "bf16", seconds, LIMITS, 0.0)
    assert (found["baseline"], found["ratio"]) == ("fast", 0.5)
    # 100 numbers of 2 bytes and 50 other ones, against 500 operations at the better of two speeds.
    assert (found["bound"], found["floor_seconds"], found["of_ceiling"]) == ("memory", 25.0, 0.5)
    assert found["limit"] == 0.25


def test_as_many_copies_as_no_cache_holds() -> None:
    assert [copies_of(size, 1000) for size in (10, 999, 1000, 5000)] == [100, 2, 1, 1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--ops", "prologue,sort"], "--ops 'sort' is not one of prologue, attention"),
        (["--precisions", "fp64"], "--precisions 'fp64' is not one of bf16, w8a8"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--threads", "-1"], "--threads must be at least 1"),
    ],
)
def test_refusals(given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", *given]) == 2
    assert words in capsys.readouterr().err


def test_without_memory_or_a_compiler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_kernels, "free_memory", lambda: 10**9)
    assert main(["bench", "kernels"]) == 2
    assert "needs 6 GB of memory, and 1.0 GB are free here" in capsys.readouterr().err

    def missing() -> None:
        raise NotBuilt("no C++ compiler is installed; install g++ or clang++")

    monkeypatch.setattr(bench_kernels, "free_memory", lambda: 10**11)
    monkeypatch.setattr(bench_kernels, "native", missing)
    assert main(["bench", "kernels"]) == 2
    assert "no kernels to measure: no C++ compiler is installed" in capsys.readouterr().err
