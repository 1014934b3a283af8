"""`expertmesh plan`: what it prints, and refuses."""

import argparse
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from expertmesh.cli import main
from expertmesh.commands import serve
from expertmesh.commands.options import ENGINE_OPTIONS, given
from expertmesh.config import EngineConfig
from expertmesh.planner.models import model

ASKED = ("--model", "deepseek-v3", "--card", "ascend-910b", "--cards", 64, "--input", 3500, "--output", 1500)
SMALL = (
    "--model",
    "deepseek-v2-lite",
    "--card",
    "h20",
    "--nodes",
    2,
    "--cards",
    2,
    "--input",
    500,
    "--output",
    100,
)
PLAN = {
    "mode", "decode", "prefill", "gives", "limited_by", "memory_gb", "prefill_memory_gb", "traffic", "imbalance",
    "step", "start", "notes",
}  # fmt: skip


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = main(["plan", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(printed(capsys, *arguments, "--json"))
    return document


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = main(["plan", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and err.startswith("expertmesh: ") and err.count("\n") == 1
    return err


def started(line: str) -> argparse.Namespace:
    """The words of a printed line, as the command that they start takes them."""
    words = line.split()
    assert words[:2] == ["expertmesh", "serve"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    serve.add_arguments(parser)
    return parser.parse_args(words[2:])


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    document = answer(capsys, *ASKED, "--tpot", 50, "--ttft", 2000)
    assert set(document) == {
        "title", "model", "card", "nodes", "cards_per_node", "input", "output", "cached", "limits", "plans", "next",
        "front", "simulation",
    }  # fmt: skip
    assert (document["nodes"], document["cards_per_node"], document["front"]) == (8, 8, [])
    assert document["limits"] == {"tpot_ms": 50.0, "ttft_ms": 2000.0}
    for plan in document["plans"]:
        assert set(plan) == PLAN
        g, step = plan["gives"], plan["step"]
        assert g["tpot_ms"] <= 50 and g["ttft_ms"] <= 2000 and g["cards"] == 64
        assert g["tokens_per_s"] == pytest.approx(64 * g["tokens_per_s_per_card"])
        for memory in filter(None, (plan["memory_gb"], plan["prefill_memory_gb"])):
            assert sum(memory.values()) == pytest.approx(64) and min(memory.values()) >= 0
        assert step["hidden_ms"] == pytest.approx(sum(p["ms"] for p in step["parts"]) - step["ms"])
        assert 0 < step["of_floor"] <= 1 and step["bound"] in {p["bound"] for p in step["parts"]}
        assert plan["limited_by"] and plan["traffic"]["dispatch_bytes"] > 0
        assert 1 <= plan["imbalance"]["lasting"] <= plan["imbalance"]["one_step"] < 2
    assert {"change", "gain", "per_card", "tpot_ms", "ttft_ms", "cards"} == set(document["next"][0])


@pytest.mark.parametrize(
    "more",
    [(), ("--prefill", "together"), ("--engine-only",), ("--exchange", "collective", "--weights", "w4a8")],
)
def test_the_line_that_starts_the_engine(capsys: pytest.CaptureFixture[str], more: tuple[str, ...]) -> None:
    for plan in answer(capsys, *ASKED, "--tpot", 100, "--drafts", 0, *more)["plans"]:
        instances = [one for one in (plan["decode"], plan["prefill"]) if one]
        assert len(instances) == len(plan["start"])
        for one, line in zip(instances, plan["start"], strict=True):
            args = started(line)
            assert (args.nodes, args.cards) == (one["nodes"], one["ranks_per_node"])
            assert (args.attention_tp, args.redundant) == (one["attention_tp"], one["redundant"])
            assert args.overlap == ("on" if one["overlap"] else "off")
            config = EngineConfig(
                quantise=args.quantise, exchange=args.exchange, redundant=args.redundant, overlap=args.overlap,
                **given(args, ENGINE_OPTIONS),
            )  # fmt: skip
            config.resolve(model("deepseek-v3"), 10**12)
        notes = " ".join(plan["notes"])
        assert ("prefill on nodes of its own" in notes) == (plan["mode"] == "apart")
        assert ("bfloat16" in notes) == (plan["decode"]["cache"] != "bf16")
        assert "computes on CPUs today" in notes
    if more[-1:] == ("w4a8",):
        assert "no kernels for w4a8" in notes and "no collective exchange" in notes


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, *ASKED, "--tpot", 50, "--top", 2)
    for word in (
        "tokens/s per card", "limited by", "requests in flight", "attention TP", "KB across nodes", "the fullest rank",
        "Memory of a rank", "bound by", "of its floor", "what would help next", "Start it so", "But today", "2.",
    ):  # fmt: skip
        assert word in text
    assert max(map(len, text.splitlines())) < 400


class Page(HTMLParser):
    """Tags that are open, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_front_and_its_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, config = tmp_path / "plan.html", tmp_path / "<b>&.json"
    config.write_text(
        Path("expertmesh/planner/models/deepseek-v2-lite.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    document = answer(capsys, "--model", config, *SMALL[2:], "--plot", file)
    front = [plan["gives"] for plan in document["front"]]
    assert len(front) > 2 and all(a["tpot_ms"] < b["tpot_ms"] for a, b in pairwise(front))
    best = document["plans"][0]["gives"]
    assert any(abs(best["tpot_ms"] / point["tpot_ms"] - 1) < 0.05 for point in front)
    assert document["limits"]["tpot_ms"] is None
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and "<b>&.json" in page.text  # escaped
    assert "http" not in text.replace("http://www.w3.org", "") and "<script" not in text
    tags = [tag for tag, _ in page.seen]
    assert tags.count("svg") == 3 and tags.count("table") >= 4 and "prefers-color-scheme" in text
    for _, attributes in (seen for seen in page.seen if seen[0] == "svg"):
        assert attributes["role"] == "img" and f'id="{attributes["aria-labelledby"]}"' in text
    assert len(front) <= text.count("<circle") <= len(front) + 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--card", "ascend-910x"), "card 'ascend-910x' is not known; nearest are"),
        (("--model", "deepsek-v3"), "model 'deepsek-v3' is not known; nearest are"),
        (("--tpot", "nan"), "--tpot is nan; give a number above 0"),
        (("--tpot", "0"), "--tpot is 0; give a number above 0"),
        (("--ttft", "inf"), "--ttft is inf"),
        (("--input", "-3"), "--input is -3"),
        (("--output", "1e12"), r"--output is 1e\+12"),
        (("--input", "200000"), "over the 163840 positions of deepseek-v2-lite; give fewer"),
        (("--cached", "500"), "--cached is 500; give from 0 to less than the 500"),
        (("--attention-tp", "3"), "attention_tp 3 does not divide the 2 cards"),
        (("--nodes", "0"), "0 nodes of 2 cards"),
        (("--top", "0"), "--top is 0"),
        (("--weights", "fp9"), "weight precision 'fp9' is not one of"),
        (("--tpot", "0.01"), "no layout has a TPOT of 0.01 ms; the lowest is"),
        (("--plot", "/nowhere/plan.html"), "give a file that can be written"),
        (("--engine-only", "--exchange", "collective"), "--engine-only plans with an --exchange of flat, "),
        (("--engine-only", "--weights", "w4a8"), "the engine has no kernels for w4a8 weights"),
        (
            ("--engine-only", "--cache", "fp8"),
            "--engine-only plans with cache bf16; leave out one of the two",
        ),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str) -> None:
    assert re.search(message, refused(capsys, *SMALL, *more))


def test_loads_of_another_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "loads.json"
    file.write_text(json.dumps({"logical_count": [[1] * 8]}), encoding="utf-8")
    assert "has 8 experts a layer, not 64" in refused(capsys, *SMALL, "--tpot", 50, "--loads", file)


def test_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--card, --cards, --input, --output missing" in refused(capsys, "--model", "deepseek-v3")
    assert "are not whole nodes of 8; give --nodes" in refused(capsys, *ASKED, "--cards", 20)


def test_requests_are_replayed_against_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = (*SMALL, "--tpot", 50)
    at_rate = answer(capsys, *asked, "--simulate", "poisson")
    found, gives = at_rate["simulation"], at_rate["plans"][0]["gives"]
    assert found["finished"] + found["rejected"] == 1000 and found["tokens"] <= 1.1 * gives["tokens_per_s"]
    assert answer(capsys, *asked)["simulation"] is None
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"time": 1, "input": 40, "output": 7}\n{"time": 0, "input": 300, "output": 20}\n')
    assert answer(capsys, *asked, "--simulate", trace)["simulation"]["finished"] == 2
    assert "TTFT" in printed(capsys, *asked, "--simulate", trace).split("one by one")[1]
    assert "No such file" in refused(capsys, *asked, "--simulate", "nowhere.jsonl")
    assert "--prefill elsewhere" in refused(capsys, *asked, "--prefill", "elsewhere", "--simulate", "poisson")
