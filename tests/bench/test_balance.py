"""`expertmesh bench balance`: its figures are those of the placements that it names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertmesh import Topology
from expertmesh.balancer.eplb import eplb
from expertmesh.bench.balance import EPLB, LEVEL, ORDER, OURS, QUICK, _drawn, bench_balance
from expertmesh.cli import main
from expertmesh.mesh.balance import balance, even_cards, moves, split_cards
from expertmesh.mesh.loads import Loads
from expertmesh.mesh.placement import default_placement
from expertmesh.mesh.synthetic import KINDS, synthetic

TOPOLOGY, REDUNDANT = Topology(2, 2), 8


def workloads() -> dict[str, Loads]:
    rng = np.random.default_rng(0)
    base = rng.zipf(1.5, (2, 16)).clip(1, 100) * 100
    return {
        name: Loads.of(np.rint(base * rng.lognormal(0, d, base.shape)).astype(int))
        for name, d in (("a", 0), ("b", 0.4))
    }


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return bench_balance(workloads(), TOPOLOGY, REDUNDANT, QUICK)


def fullest(loads_LR: np.ndarray) -> float:
    return float((loads_LR.max(1) / loads_LR.mean(1)).mean())


def test_known_loads_and_others(report: dict[str, Any]) -> None:
    a, b = workloads().values()
    known = balance(a, TOPOLOGY, REDUNDANT, objective="known")
    assert report["known"][OURS]["mean_max_over_mean"] == fullest(even_cards(known, a.total_LE))
    in_order = default_placement(16, a.layers, TOPOLOGY)
    assert report["known"][ORDER]["mean_max_over_mean"] == fullest(even_cards(in_order, a.total_LE))
    robust, published = balance(a, TOPOLOGY, REDUNDANT), eplb(a, TOPOLOGY, REDUNDANT)
    there, back = report["next"]["pairs"]
    assert [(pair["planned"], pair["judged"]) for pair in (there, back)] == [("a", "b"), ("b", "a")]
    for name, plan in ((OURS, robust), (EPLB, published), (ORDER, in_order)):
        assert there[name]["split"]["mean_max_over_mean"] == fullest(split_cards(plan, b.total_LE))
        found = [pair[name]["even"]["mean_spread"] for pair in (there, back)]
        assert report["next"]["mean"][name]["even"]["mean_spread"] == pytest.approx(np.mean(found))


def test_fewest_replicas(report: dict[str, Any]) -> None:
    loads = workloads()["a"]
    for redundant in range(0, 2 * REDUNDANT + 1, 4):
        cards = even_cards(balance(loads, TOPOLOGY, redundant, objective="known"), loads.total_LE)
        if (np.ptp(cards, axis=1) / cards.mean(1)).mean() < LEVEL:
            break
    assert report["redundancy"][OURS] == redundant


def test_moves_after_a_shift(report: dict[str, Any]) -> None:
    a, b = workloads().values()
    old = balance(a, TOPOLOGY, REDUNDANT)
    new = balance(b, TOPOLOGY, REDUNDANT, old=old)
    (row,) = report["shifts"]
    assert row["to"] == "b" and row[OURS]["moves"] == moves(old, new)
    assert row[OURS]["share"] == moves(old, new) / (2 * 24)
    assert row["before"]["even"]["mean_max_over_mean"] == fullest(even_cards(old, b.total_LE))
    assert row[OURS]["even"]["mean_max_over_mean"] == fullest(even_cards(new, b.total_LE))


def test_steps_are_not_below_the_mean_and_splits_not_above_even_shares(report: dict[str, Any]) -> None:
    assert list(report["steps"]) == ["8", "16"]
    for plans in report["steps"].values():
        for plan in plans.values():
            assert 1 - 1e-4 <= plan["split"] <= plan["even"] + 1e-4
    assert report["split_microseconds"] > 0


def test_bytes_across_nodes(report: dict[str, Any]) -> None:
    """A row of 7168 numbers: 14336 bytes, or 7168 and 56 scales of 4. Flat sends 8 copies, half of them across."""
    for row in report["copies"].values():
        copies, flat = row["copies"], 2 * 14336 * 8 / 2
        assert row["bytes"]["bfloat16"] == pytest.approx(copies * 2 * 14336 / flat)
        assert row["bytes"]["int8"] == pytest.approx(copies * (14336 + 7392) / flat)
        assert row["bytes"]["int8_both"] == pytest.approx(copies * 2 * 7392 / flat)


def test_drawn_rows_are_no_more_than_there_were() -> None:
    counts_E, rng = np.array([5000.0, 30, 0, 1]), np.random.default_rng(0)
    steps_NE = _drawn(counts_E, 2000, 50, rng)
    assert (steps_NE.sum(1) == 2000).all() and (steps_NE <= counts_E).all()
    np.testing.assert_allclose(steps_NE.mean(0), counts_E / counts_E.sum() * 2000, atol=3)
    for scale in (1e-6, 1e9):
        assert (_drawn(counts_E * scale, 2000, 3, rng).sum(1) == 2000).all()


def test_synthetic_workloads_are_seeded_and_related() -> None:
    first, again, other = (synthetic(2, seed) for seed in (0, 0, 1))
    assert list(first) == list(KINDS)
    shares = {name: loads.total_LE / loads.total_LE.sum() for name, loads in first.items()}
    for name, loads in first.items():
        assert (loads.total_LE == again[name].total_LE).all() and (
            loads.total_LE != other[name].total_LE
        ).any()
    away = [float(np.abs(shares[name] - shares["first"]).sum()) for name in ("same", "neighbour", "far")]
    assert away == sorted(away) and away[0] > 0


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    names = [str(tmp_path / f"{name}.npy") for name in "ab"]
    for name, loads in zip(names, workloads().values(), strict=True):
        np.save(name, loads.counts_WLE[0])
    return names


def test_the_command(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With replicas that EPLB has no plan for."""
    options = ["bench", "balance", *files, "--nodes", "1", "--cards", "3", "--redundant", "4", "--quick"]
    assert main([*options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["workloads"] == files and report["known"][EPLB] is None and report["copies"][EPLB] is None
    assert report["copies"]["robust"]["copies"] == 0 and report["copies"]["robust"]["bytes"] is None
    assert main(options) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 layers of 16 experts on 1 x 3 cards, 4 redundant slots a layer")
    assert f"{files[1]} > {files[0]}, split" in said and " us (" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--redundant", "-1"], "-1 redundant slots"),
        (["--redundant", "99999"], "at most"),
        (["--nodes", "0"], "nodes is 0"),
        (["--seed", "-1"], "--seed must be at least 0"),
    ],
)
def test_what_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "balance", *options]) == 2
    assert message in capsys.readouterr().err


def test_files_that_do_not_belong_together(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "c.npy", np.ones((3, 16)))
    for second, message in ((files[0], "is named twice"), (str(tmp_path / "c.npy"), "are not those of")):
        assert main(["bench", "balance", files[0], second]) == 2
        assert message in capsys.readouterr().err
