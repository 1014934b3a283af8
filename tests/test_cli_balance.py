"""`expertmesh balance`: from recorded loads to a placement and what it is worth."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertmesh.cli import main

CLUSTER = ("--nodes", 2, "--cards", 2, "--redundant", 4)


def recorded(file: Path, seed: int = 0, layers: int = 3, experts: int = 8) -> Path:
    """Skewed loads in the form of SGLang's; row 0 is a dense layer."""
    counts = np.random.default_rng(seed).zipf(1.5, (layers, experts)).clip(1, 500)
    file.write_text(json.dumps({"logical_count": [[0] * experts, *counts.tolist()]}), encoding="utf-8")
    return file


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    return recorded(tmp_path / "loads.json")


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = main(["balance", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(printed(capsys, *arguments, "--json"))
    return report


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = main(["balance", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and err.startswith("expertmesh: ") and err.count("\n") == 1
    return err


def even_loads(slots: Any, counts: Any) -> np.ndarray:
    """Of one layer's cards, worked out slowly."""
    replicas = {e: sum(e in card for card in slots) for e in range(len(counts))}
    return np.array([sum(counts[e] / replicas[e] for e in card if e >= 0) for card in slots])


def test_json_has_a_plan_and_its_figures(loads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = answer(capsys, loads, *CLUSTER)
    counts = json.loads(loads.read_text())["logical_count"]
    assert [layer["layer"] for layer in report["layers"]] == [1, 2, 3]
    assert {e for card in report["placement"][0] for e in card} == {-1} and len(report["placement"]) == 4
    for layer in report["layers"]:
        cards = even_loads(report["placement"][layer["layer"]], counts[layer["layer"]])
        assert layer["max_over_mean"] == pytest.approx(cards.max() / cards.mean())
        assert layer["spread"] == pytest.approx((cards.max() - cards.min()) / cards.mean())
    for mean, each in (("mean_max_over_mean", "max_over_mean"), ("mean_spread", "spread")):
        assert report[mean] == pytest.approx(np.mean([layer[each] for layer in report["layers"]]))
    assert report["seconds"] >= 0 and 0 <= report["cross_node_copies"] <= 1 and report["moves"] > 0


@pytest.mark.parametrize("redundant", [0, 1, 3, 7, 24])
def test_any_number_of_replicas(loads: Path, redundant: int, capsys: pytest.CaptureFixture[str]) -> None:
    report = answer(capsys, loads, "--nodes", 2, "--cards", 2, "--redundant", redundant)
    held = [[e for card in row for e in card if e >= 0] for row in report["placement"][1:]]
    assert all(set(row) == set(range(8)) and len(row) <= 8 + redundant for row in held)


def test_one_card(loads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = answer(capsys, loads)
    assert report["mean_max_over_mean"] == 1 and report["cross_node_copies"] == 0 and report["moves"] == 0


def test_starting_from_its_own_answer(
    loads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = answer(capsys, loads, *CLUSTER)
    (tmp_path / "first.json").write_text(json.dumps(first))
    start = (*CLUSTER, "--from", tmp_path / "first.json")
    second = answer(capsys, recorded(tmp_path / "next.json", 1), *start, "--budget", 0)
    assert second["moves"] == 0 and second["placement"] == first["placement"]
    assert second["before"]["mean_max_over_mean"] == second["mean_max_over_mean"]


def test_other_loads_judge_the_same_plan(
    loads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = recorded(tmp_path / "other.json", 1)
    report = answer(capsys, loads, *CLUSTER, "--eval", other)
    counts = json.loads(other.read_text())["logical_count"]
    cards = [even_loads(report["placement"][row], counts[row]) for row in (1, 2, 3)]
    even = report["eval"]["even"]
    assert even["mean_max_over_mean"] == pytest.approx(np.mean([c.max() / c.mean() for c in cards]))
    assert even["mean_spread"] == pytest.approx(np.mean([(c.max() - c.min()) / c.mean() for c in cards]))
    split = report["eval"]["split"]
    assert set(split) == set(even) and 1 <= split["mean_max_over_mean"] <= even["mean_max_over_mean"] + 1e-9
    same = answer(capsys, loads, *CLUSTER, "--eval", loads)
    assert same["eval"]["even"]["mean_spread"] == pytest.approx(same["mean_spread"])


def test_comparison(loads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = answer(capsys, loads, *CLUSTER, "--compare", "--eval", loads)
    ours, hierarchical, in_all, in_order = report["compare"]
    assert ours["mean_max_over_mean"] == report["mean_max_over_mean"]
    assert (
        in_all["mean_max_over_mean"]
        <= in_order["mean_max_over_mean"]
        == report["before"]["mean_max_over_mean"]
    )
    for row in (ours, hierarchical, in_all, in_order):
        assert row["eval"]["even"]["mean_spread"] == pytest.approx(row["mean_spread"])
    uneven = answer(capsys, loads, "--nodes", 2, "--cards", 2, "--redundant", 3, "--compare")["compare"]
    assert "8 experts and 3 replicas do not divide by 4 cards" in uneven[1]["impossible"]
    assert "do not divide by 4 cards" in printed(
        capsys, loads, "--nodes", 2, "--cards", 2, "--redundant", 3, "--compare"
    )


def test_table(loads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, loads, *CLUSTER, "--compare", "--eval", loads).splitlines()
    rows = [line.split() for line in out]
    assert [row[0] for row in rows[2:5]] == ["1", "2", "3"] and all(len(row) == 5 for row in rows[2:5])
    text = "\n".join(out)
    for words in (
        "3 layers of 8 experts on 2 x 2 cards",
        "moves: ",
        "other loads, even shares",
        "EPLB hierarchical",
    ):
        assert words in text


def test_windows_and_weights(loads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = recorded(tmp_path / "other.json", 1)
    assert answer(capsys, loads, other, *CLUSTER)["windows"] == 2
    weighted = answer(capsys, loads, f"{other}:1e-9", *CLUSTER, "--objective", "known")
    alone = answer(capsys, loads, *CLUSTER, "--objective", "known")
    assert weighted["before"]["mean_spread"] == pytest.approx(alone["before"]["mean_spread"])
    odd = recorded(tmp_path / "a:3", 2)  # a name, not a weight
    assert answer(capsys, odd, *CLUSTER)["windows"] == 1


def test_a_record_of_thousands_of_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "steps.npy", np.random.default_rng(0).integers(0, 9, (1000, 2, 8)))
    report = answer(capsys, tmp_path / "steps.npy", *CLUSTER)
    assert report["windows"] == 32 and len(report["layers"]) == 2


def test_a_routing_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.random.default_rng(0).integers(0, 6, (100, 2, 2))
    np.savez(tmp_path / "routing.npz", ids=ids)
    report = answer(capsys, tmp_path / "routing.npz", *CLUSTER, "--experts", 8, "--objective", "local")
    assert report["experts"] == 8 and 0 <= report["cross_node_copies"] <= 1


@pytest.mark.parametrize("kind", ["expertmesh", "sglang", "vllm", "vllm-ascend", "trtllm"])
def test_files_for_engines(
    kind: str, loads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "written"
    made = answer(capsys, loads, *CLUSTER, "--write", f"{kind}:{file}")
    again = answer(capsys, loads, *CLUSTER, "--from", file, "--budget", 0)
    assert again["placement"] == made["placement"] and again["moves"] == 0


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.html", b"<!DOCTYPE html>")])
def test_plots(
    name: str, start: bytes, loads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed(capsys, loads, *CLUSTER, "--compare", "--plot", tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--redundant", -1), "-1 redundant slots; must be at least 0"),
        (("--redundant", 25), "can use 24 at most"),
        (("--nodes", 0), "nodes is 0"),
        (("--cards", -2), "cards_per_node is -2"),
        (("--objective", "best"), "--objective best: not one of robust, known, local"),
        (("--budget", 3), "--budget takes"),
        (("--budget", -1, "--from", "x"), "--budget takes"),
        (("--groups", 3), "8 experts do not divide into 3 groups"),
        (("--experts", 9), "has 8 experts a layer, not 9"),
        (("--plot", "x.pdf"), "not a name that ends in .png or .html"),
        (("--plot", "/none/x.png"), "there is no folder /none"),
        (("--write", "sglang"), "not FORMAT:FILE"),
        (("--write", "pickle:x"), "not FORMAT:FILE"),
        (("--write", "sglang:/none/x"), "there is no folder /none"),
        (("--write", "sglang:/"), "cannot be written"),
        (("--from", "/none"), "/none: cannot be read"),
        (("--eval", "/none"), "/none: cannot be read"),
        (("--redundant", 3, "--write", "sglang:x"), "a sglang file has no empty slots"),
    ],
)
def test_impossible_options(
    options: tuple[Any, ...],
    message: str,
    loads: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, loads, *CLUSTER, *options)
    assert list(tmp_path.iterdir()) == [loads]


@pytest.mark.parametrize(
    "text", ["", "[[1, -1]]", "[[1], [1, 2]]", "[[0, 0]]", "[[NaN, 1]]", "{}", "no loads", "[1"]
)
def test_impossible_loads(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loads").write_text(text)
    assert f"{tmp_path}/loads: " in refused(capsys, tmp_path / "loads", *CLUSTER)


def test_files_that_do_not_go_together(
    loads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = recorded(tmp_path / "other.json", 1, experts=9)
    assert f"{other} has 4 layers of 9 experts, but {loads} has 4 layers of 8" in refused(
        capsys, loads, other
    )
    assert "has 4 layers of 9 experts, but" in refused(capsys, loads, "--eval", other)
    for weight in ("0", "-1", "nan", "inf"):
        assert "the weight of a file" in refused(capsys, f"{loads}:{weight}")
    counts = json.loads(loads.read_text())["logical_count"]
    (tmp_path / "dense.json").write_text(json.dumps([counts[1], *counts[1:]]))
    assert "layer 0 has experts there" in refused(capsys, loads, "--eval", tmp_path / "dense.json")
    assert "places experts on 4 cards" in refused(
        capsys, loads, "--cards", 2, "--from", _saved(tmp_path, printed(capsys, loads, *CLUSTER, "--json"))
    )


def _saved(folder: Path, text: str) -> Path:
    (folder / "plan.json").write_text(text)
    return folder / "plan.json"


def test_loads_that_generate_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Eight experts of each row and layer, under the model's own layers."""
    path = tmp_path / "loads.json"
    assert (
        main(["generate", "-p", "Once upon", "--max-tokens", "4", "--ignore-eos", "--loads", str(path)]) == 0
    )
    capsys.readouterr()
    assert main(["balance", str(path), "--nodes", "2", "--cards", "2", "--redundant", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in report["layers"]] == [1, 2, 3, 4]
    assert len(report["placement"]) == 5 and {e for card in report["placement"][0] for e in card} == {-1}
    assert main(["generate", "-p", "x", "--loads", str(tmp_path / "no" / "loads.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err
