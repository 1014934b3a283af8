"""The command line on clusters: layouts, the exchange's benchmark, memory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertmesh.cli import main
from expertmesh.commands import cluster
from expertmesh.engine.ranks import ThreadRanks
from expertmesh.launch.launcher import Here
from expertmesh.llm import demo_model
from tests.support.files import CONFIGS

GENERATE = ["--token-ids", "5,6,7", "--max-tokens", "6", "--temperature", "0", "--ignore-eos", "--json"]
EXCHANGE = ["bench", "exchange", "--hidden", "96", "--tokens", "5", "--rounds", "1", "--json"]
ALGORITHMS = ["flat", "two_tier", "two_tier_int8", "two_tier_int8_both"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and err.startswith("expertmesh: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("more", [[], ["--ranks", "processes"], ["--exchange", "flat", "--redundant", "3"]])
def test_generate_on_a_cluster(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    _, alone, _ = run(capsys, "generate", str(tiny_folder), *GENERATE)
    cluster = ["--nodes", "2", "--cards", "2", "--attention-tp", "2", *more]
    code, out, err = run(capsys, "generate", str(tiny_folder), *GENERATE, *cluster)
    assert code == 0 and json.loads(out) == json.loads(alone)
    assert "2 nodes x 2 cards" in err and "attention TP 2 x DP 2" in err
    assert "MB a rank: weights" in err and "routed" in err and "MB sent: attention" in err


def test_a_failed_rank_is_one_line_and_status_1(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = ThreadRanks.__init__

    def broken(self: ThreadRanks, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.runners[3].collectives = None  # type: ignore[assignment]

    monkeypatch.setattr(ThreadRanks, "__init__", broken)
    code, out, err = run(capsys, "generate", str(tiny_folder), *GENERATE, "--nodes", "2", "--cards", "2")
    assert code == 1 and out == "" and "Traceback" not in err
    assert "expertmesh: rank 3 (node 1, card 1) on " in err.splitlines()[-1]


@pytest.mark.parametrize("ranks", ["threads", "processes"])
def test_bench_exchange(ranks: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--nodes", "2", "--cards", "3", "--no-perplexity", "--ranks", ranks]
    code, out, _ = run(capsys, *EXCHANGE, *more)
    report = json.loads(out)
    assert code == 0
    assert {"nodes": 2, "cards": 3, "tokens_per_rank": 5, "hidden": 96}.items() <= report.items()
    for key in ("cross_node_bytes", "predicted_cross_node_bytes", "messages", "seconds"):
        assert list(report[key]) == ALGORITHMS + ["all_to_all_single"] * (ranks == "processes")
        for phases in report[key].values():
            assert phases["total"] == pytest.approx(phases["dispatch"] + phases["combine"])
    assert report["cross_node_bytes"] == report["predicted_cross_node_bytes"]
    assert report["interface_bytes"] is None and report["card_imbalance"] >= 1
    assert report["reduction"]["flat"] == 0
    assert max(report["relative_error"].values()) < 0.02


def test_bench_exchange_saves_what_was_announced(capsys: pytest.CaptureFixture[str]) -> None:
    """V3's routing on 8 x 8, fewer rows and narrower ones than the default so that it is quick; scales and slots
    weigh more then, and the bars hold all the same."""
    more = ["--nodes", "8", "--cards", "8", "--hidden", "1024", "--tokens", "16", "--no-perplexity"]
    _, out, _ = run(capsys, *EXCHANGE, *more)
    reduction = json.loads(out)["reduction"]
    bars = {"two_tier": 0.50, "two_tier_int8": 0.62, "two_tier_int8_both": 0.735}
    assert all(reduction[name] >= bar for name, bar in bars.items()), reduction


def test_what_formats_cost_is_measured_on_the_demo_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertmesh.bench.perplexity.TOKENS", 24)
    _, out, _ = run(capsys, *EXCHANGE, "--nodes", "2", "--cards", "1", "--algorithms", "two_tier_int8_both")
    found = json.loads(out)["perplexity"]
    assert list(found) == ["flat", "two_tier_int8_both"]
    assert found["two_tier_int8_both"] != found["flat"]
    assert found["two_tier_int8_both"] == pytest.approx(found["flat"], rel=0.05)


def test_bench_overlap(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its ranks are processes without being told, and `auto` is its time over the best one's."""
    words = ["--nodes", "2", "--cards", "1", "--loads", "2x1", "--steps", "1", "--json"]
    code, out, _ = run(capsys, "bench", "overlap", str(tiny_folder), *words)
    found = json.loads(out)["loads"]["decode 2"]
    seconds = found["seconds"]
    assert code == 0 and found["on"] == seconds["off"] / seconds["on"]
    assert found["auto"] == seconds["auto"] / min(seconds["off"], seconds["on"])


@pytest.mark.parametrize(
    ("words", "timeout", "local"),
    [
        (["generate", "-p", "x"], 30.0, {"folder": str(demo_model())}),
        (["serve", "a/folder", "--timeout", "7"], 7.0, {"folder": str(Path("a/folder").absolute())}),
        (["bench", "overlap"], 30.0, {"folder": str(demo_model())}),
        (["bench", "exchange"], 300.0, {}),
    ],
)
def test_a_rank_that_is_not_the_drivers(
    words: list[str], timeout: float, local: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the model of its own machine, and waits as long as the command's own time limit says."""
    names = {
        "RANK": 1,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_ADDR": "h",
        "MASTER_PORT": 1,
    }
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    found: list[Any] = []
    monkeypatch.setattr(cluster, "work", lambda own, *rest: found.append((own.rank, *rest)))
    assert main(words) == 0 and found == [(1, timeout, None, local)]


@pytest.mark.parametrize(
    "words", [[*EXCHANGE, "--groups", "3"], ["bench", "overlap", "/nowhere"], ["chat", "/nowhere"]]
)
def test_what_would_start_ranks_is_closed_where_input_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []

    class Fake(Here):
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr(cluster, "Here", Fake)
    refused(capsys, *words, "--ranks", "processes", "--interface", "lo")
    assert len(closed) == 1


def test_memory_compares_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes((CONFIGS / "deepseek-v3.json").read_bytes())
    _, out, _ = run(capsys, "memory", str(tmp_path), "--layout", "2x8", "--layout", "8x8x8", "--json")
    small, large = json.loads(out)["layouts"]
    assert small["bytes"]["routed"] == 4 * large["bytes"]["routed"]
    assert np.isclose(large["total"] / small["total"], 1 / 3, atol=0.01)
    # 46.27 and 15.62 GB with one byte a number; here all are bfloat16, and the router float32.
    assert small["total"] == pytest.approx(2 * 46.27e9, rel=0.01)
    assert large["total"] == pytest.approx(2 * 15.62e9, rel=0.01)
    _, out, _ = run(
        capsys, "memory", str(tmp_path), "--layout", "2x8", "--layout", "1x1", "--rebalance", "auto", "--json"
    )
    moving, alone = json.loads(out)["layouts"]
    assert moving["bytes"].pop("spare") > 0 and alone["bytes"].pop("spare") == 0
    assert moving["bytes"] == small["bytes"]
    _, table, _ = run(capsys, "memory", str(tmp_path), "--layout", "2x8", "--layout", "8x8")
    assert "x 0.2500" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", *GENERATE, "--nodes", "0"], "nodes is 0"),
        (["generate", *GENERATE, "--cards", "4", "--attention-tp", "3"], "attention_tp 3 does not divide the 4"),
        (["generate", *GENERATE, "--cards", "3", "--attention-tp", "3"], "does not divide num_attention_heads 8"),
        (["generate", *GENERATE, "--nodes", "2", "--exchange", "ring"], "exchange 'ring' is not one of flat"),
        (["generate", *GENERATE, "--nodes", "2", "--ranks", "fibers"], "not one of auto, threads, processes"),
        (["generate", *GENERATE, "--nodes", "2", "--redundant", "65"], "65 redundant slots"),
        (["bench", "engine", "--nodes", "2", "--exchange", "ring"], "exchange 'ring'"),
        ([*EXCHANGE, "--algorithms", "ring"], "exchange 'ring' is not one of flat"),
        ([*EXCHANGE, "--algorithms", "flat,ring", "--ranks", "processes"], "exchange 'ring' is not one of flat"),
        ([*EXCHANGE, "--nodes", "0"], "nodes is 0"),
        ([*EXCHANGE, "--interface", "lo"], "--interface is of ranks that are processes"),
        (["generate", *GENERATE, "--nodes", "2", "--interface", "lo"], "--interface is of ranks that are processes"),
        (["bench", "overlap", "--ranks", "threads"], "--ranks threads: overlap hides what processes send"),
        ([*EXCHANGE, "--groups", "3"], "3 groups do not divide 256 experts"),
        ([*EXCHANGE, "--groups-per-token", "9"], "9 groups a token, but there are 8"),
        ([*EXCHANGE, "--seed", "-1"], "seed is -1, but must be from 0"),
        ([*EXCHANGE, "--seed", "99999999999999999"], "seed is 99999999999999999"),
        ([*EXCHANGE, "--redundant", "100000", "--ranks", "processes"], "100000 redundant slots"),
        (["bench", "engine", "--ranks", "fibers"], "not one of auto, threads, processes"),
        (["bench", "engine", "--timeout", "-1"], "timeout is -1"),
        (["memory", "--layout", "2x8", "--nodes", "3"], "--layout takes the place of --nodes"),
        ([*EXCHANGE, "--experts-per-token", "200"], "hold fewer than 200 experts"),
        ([*EXCHANGE, "--groups", "1", "--groups-per-token", "1", "--experts-per-token", "256"], "256 experts a token"),
        ([*EXCHANGE, "--tokens", "100000000"], "GB are free here"),
        ([*EXCHANGE, "--ranks", "fibers"], "not one of threads, processes"),
        (["memory", "--rebalance", "often"], "rebalance 'often' is not one of auto, off, every=STEPS"),
        (["memory", "--layout", "8by8"], "not of the form 8x8"),
        (["memory", "--layout", "0x8"], "nodes is 0"),
        (["memory", "/nowhere"], "no such folder"),
    ],
)  # fmt: skip
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *arguments)
