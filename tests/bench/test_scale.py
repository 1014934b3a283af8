"""A smaller and a larger cluster with the same memory a rank: counted on the engine, predicted without it."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from expertmesh import LLM, InputError, ModelConfig, SamplingParams, Topology
from expertmesh.bench.counting import PAGE, Trial, capacity, held_bytes
from expertmesh.bench.scale import bench_scale
from expertmesh.bench.steptime import Step, Work, step_seconds, work_of
from expertmesh.cli import main
from expertmesh.config import EngineConfig, cache_bytes_per_token
from expertmesh.engine.ranks import ThreadRanks
from expertmesh.llm import demo_model
from expertmesh.planner.cards import card
from expertmesh.weights import Shard, static_bytes
from tests.support.files import official_config

SMALL = ["--layout", "1x4", "--layout", "4x4x2", "--context", "64", "--requests", "4", "--steps", "2"]


@cache
def report(*options: str) -> dict[str, Any]:
    """Of small clusters of the demo model."""
    captured: dict[str, Any] = {}

    def keep(found: dict[str, Any]) -> str:
        captured.update(found)
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("expertmesh.commands.bench.json.dumps", keep)
        assert main(["bench", "scale", *SMALL, *options, "--json"]) == 0
    return captured


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--exchange", "flat"),
        ("--exchange", "two_tier_int8_both", "--redundant", "16"),
        ("--dtype", "float32"),
    ],
    ids=" ".join,
)
def test_counts_are_as_predicted(options: tuple[str, ...]) -> None:
    for layout in report(*options)["layouts"]:
        assert layout["memory"]["counted"] == layout["memory"]["predicted"]
        for load in layout["loads"].values():
            counted, predicted = load["counted"], load["predicted"]
            # Which experts have rows is not known beforehand, and with it what a step reads.
            for name in counted.keys() - {
                "touched_experts",
                "seconds",
                "planner_seconds",
                "tokens_per_second_and_card",
            }:
                assert counted[name] == pytest.approx(predicted[name], rel=1e-12), name
            assert counted["touched_experts"] == pytest.approx(predicted["touched_experts"], abs=0.3)


def test_ratios_follow_from_what_was_counted() -> None:
    found = report()
    ratios, (small, large) = found["ratios"]["counted"], found["layouts"]
    assert ratios["routed"] == 1 / 4 and ratios["tokens_per_expert_equal"] == pytest.approx(4 * 2)
    assert ratios["weights"] == large["memory"]["counted"]["weights"] / small["memory"]["counted"]["weights"]
    assert ratios["requests"] == ratios["requests_per_group"] * 8
    assert small["loads"]["equal"] == small["loads"]["full"]
    assert found["ratios"]["predicted"].keys() == ratios.keys()
    assert small["loads"]["full"]["counted"]["across_per_token"] == 0  # one node


def test_every_rank_stays_within_the_memory() -> None:
    found = report()
    for layout in found["layouts"]:
        memory = layout["memory"]["counted"]
        page = memory["cache"] // memory["cache_pages"]
        held = memory["weights"] + memory["cache"]
        assert held <= found["memory_per_rank"] < held + page


def test_the_cache_is_filled_by_requests_that_run_together() -> None:
    """As many as the formula says, none of them preempted, and more would wait."""
    with LLM(cache_tokens=11 * PAGE, page_size=PAGE, max_context=64, prefix_cache=False) as llm:
        room = capacity(11, 64)
        for _ in range(room + 1):
            llm.engine.submit([7] * 33, SamplingParams(max_tokens=31, temperature=0, ignore_eos=True))
        llm.engine.step()
        (group,) = llm.engine.scheduler.schedulers
        assert (len(group.running), len(group.waiting)) == (room, 1)
        for _ in range(12):
            llm.engine.step()
        assert group.preemptions == 0 and len(group.running) == room


@pytest.mark.parametrize(
    ("pages", "context", "room"), [(7, 256, 0), (8, 256, 1), (16, 256, 1), (17, 256, 2), (26, 256, 3)]
)
def test_capacity(pages: int, context: int, room: int) -> None:
    assert capacity(pages, context) == room


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_held_bytes_are_those_of_the_formula(dtype: str) -> None:
    with LLM(dtype=dtype, topology=Topology(2, 2), cache_tokens=64) as llm:
        ranks = llm.engine.ranks
        assert isinstance(ranks, ThreadRanks)
        for runner in ranks.runners:
            assert held_bytes(runner.model) == ranks.memory.kinds


def test_step_time_is_the_sum_of_its_parts() -> None:
    """2 ms of reading beside 1 ms of products at their peaks, and 1 ms on each kind of link."""
    b = card("ascend-910b")
    reached = b.reached
    found = step_seconds(Work(1.6e9, 1.6e9, 294.9e9, 25e6, 196e6, 3), b)
    computing, travelling = 2e-3 / reached.memory_efficiency, 1e-3 / reached.link_efficiency
    assert found["computing"] == pytest.approx(computing)
    assert found["travelling"] == pytest.approx(travelling)
    assert found["total_without_starting"] == pytest.approx(computing + travelling)
    assert found["total"] == pytest.approx(computing + travelling + 3 * (b.dispatch_us + b.combine_us) * 1e-6)
    bound = step_seconds(Work(1.6e9, 0, 2949e9, 0, 0, 0), b)
    assert bound["total"] == pytest.approx(10e-3 / reached.matmul_efficiency)


def test_work_of_v3_is_what_its_parameters_say() -> None:
    """37 billion active parameters a token, less the table of the embedding: on one rank with one token."""
    v3 = ModelConfig.from_dict(official_config("deepseek-v3"))
    shard = Shard.whole(v3)
    kinds = static_bytes(v3, "bfloat16", shard)
    per_token = cache_bytes_per_token(v3, "bfloat16")
    rows = v3.num_experts_per_tok * len(v3.moe_layers)
    work = work_of(v3, kinds, per_token, 2, 1, Step(1, 1, rows, 8 / 256, 0, 0))
    active = 37.55e9 - v3.vocab_size * v3.hidden_size  # 37 B of the paper and the routers
    assert work.flops / 2 == pytest.approx(active, rel=0.01)
    assert work.weights / 2 == pytest.approx(active, rel=0.01)
    assert work.cache == 70_272 and work.exchanges == 58


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layout", "2x8"], "--layout is given once"),
        (["--layout", "1x1", "--layout", "2x2"], "one rank sends nothing"),
        (["--memory-per-rank", "much"], "memory_per_rank is 'much', not a size like 64GB"),
        (["--memory-per-rank", "1MB"], "memory_per_rank 1MB is too little"),
        (["--memory-per-rank", "3.8MB"], "the weights leave room for"),
        (["--steps", "0"], "steps is 0, but must be from 1 to 14"),
        (["--steps", "15"], "steps is 15"),
        (["--context", "32"], "context is 32, but must be more than a page"),
        (["--context", "99999"], "max_context 99999 is more than the model's 2048"),
        (["--requests", "0"], "requests must be at least 1"),
        (["--card", "ascend-910x"], "card 'ascend-910x' is not known"),
        (["--exchange", "ring"], "exchange 'ring' is not one of"),
        (["/nowhere"], "no such folder"),
    ],
)
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scale", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    config = json.loads((demo_model() / "config.json").read_text()) | {"n_routed_experts": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no routed experts"):
        bench_scale(tmp_path, [Topology(1, 2), Topology(2, 2)], Trial(), card("ascend-910b"))


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scale", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "1x4 TP4" in out and "4x4 TP2" in out and "0.2500" in out and "requests in flight" in out
    assert EngineConfig().memory_per_rank is None
