"""The command line: what goes to which stream, what is refused and how."""

import io
import json
import math
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest
import torch

from expertmesh import LLM, InputError, ModelConfig, Output, SamplingParams, Topology
from expertmesh.cli import COMMANDS, main
from expertmesh.commands import bench_engine
from expertmesh.commands.demo import CHAT, PROMPTS, Part
from expertmesh.device import free_memory
from expertmesh.kernels.table import OPS
from expertmesh.llm import demo_model
from tests.support.files import (
    TINY,
    random_checkpoint,
    random_tensors,
    write_checkpoint,
    write_config,
    write_sparse,
    write_tokenizer,
)

Cli: TypeAlias = Callable[..., tuple[int, str, str]]
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
OPTIONS = ("--max-tokens", "6", "--temperature", "0", "--ignore-eos")
SPEED = r"%d tokens in \d+\.\d\d s \(\d+ tokens/s\)\n"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


@pytest.fixture
def without_tokenizer(tiny_folder: Path, tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_folder / name)
    return tmp_path


def texts(llm: LLM, *prompts: Any) -> list[str]:
    return [output.text for output in llm.generate(prompts, GREEDY)]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# --- generate


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--regex", "[0-9]{3}"), "[0-9]{3}"),
        (("--choice", "yes", "--choice", "no"), "yes|no"),
        (("--json-schema", '{"const": [1, 2]}'), r"\[1, *2\]"),
        (("--json-schema", "FILE"), r"\[1, *2\]"),
        (("--grammar", '{"type": "ebnf", "grammar": "root ::= \\"a\\" [bc]"}'), "a[bc]"),
    ],
)
def test_generate_writes_what_it_has_to(
    options: tuple[str, ...], pattern: str, cli: Cli, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "FILE").write_text('{"const": [1, 2]}')
    given = [str(tmp_path / o) if o == "FILE" else o for o in options]
    code, out, _ = cli("generate", tiny_folder, "-p", "the", "--seed", "3", *given)
    assert code == 0 and re.fullmatch(pattern, out.strip())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--json-schema", "no-such-file"), "--json-schema no-such-file: neither JSON text nor a file"),
        (("--json-schema", "{"), "--json-schema {: not valid JSON"),
        (("--json-schema", '{"type": "foo"}'), "foo"),
        (("--regex", "("), "grammar cannot be used"),
        (("--grammar", "{}"), "grammar must be a JSON object whose type is one of"),
        (("--min-tokens", "300"), "min_tokens is 300"),
    ],
)
def test_generate_names_what_is_wrong_with_a_grammar(
    options: tuple[str, ...], message: str, cli: Cli, tiny_folder: Path
) -> None:
    code, out, err = cli("generate", tiny_folder, "-p", "the", *options)
    assert (code, out) == (2, "") and message in err


def test_generate_writes_the_text_and_nothing_else(cli: Cli, tiny_folder: Path, tiny_llm: LLM) -> None:
    code, out, err = cli("generate", tiny_folder, "-p", "stop the", *OPTIONS)
    assert (code, out) == (0, texts(tiny_llm, "stop the")[0] + "\n")
    assert re.fullmatch(SPEED % 6, err)


def test_several_prompts_are_numbered(cli: Cli, tiny_folder: Path, tiny_llm: LLM) -> None:
    code, out, err = cli("generate", tiny_folder, "-p", "the", "--prompt", "stop", *OPTIONS)
    assert (code, out) == (0, "[0] {}\n[1] {}\n".format(*texts(tiny_llm, "the", "stop")))
    assert re.fullmatch(SPEED % 12, err)


def test_a_prompt_from_standard_input(
    cli: Cli, type_in: Callable[[str], None], tiny_folder: Path, tiny_llm: LLM
) -> None:
    type_in("the\nthing\n")
    code, out, _ = cli("generate", tiny_folder, "-p", "-", *OPTIONS)
    assert (code, out) == (0, texts(tiny_llm, "the\nthing\n")[0] + "\n")


def test_chat_sends_a_message(cli: Cli, tiny_folder: Path, tiny_llm: LLM) -> None:
    code, out, _ = cli("generate", tiny_folder, "--chat", "-p", "the", *OPTIONS)
    assert (code, out) == (0, texts(tiny_llm, [user("the")])[0] + "\n")
    assert out != texts(tiny_llm, "the")[0] + "\n"


def test_token_ids_need_no_tokenizer(cli: Cli, without_tokenizer: Path, tiny_llm: LLM) -> None:
    first, second = (output.token_ids for output in tiny_llm.generate([[5, 6, 7], [8]], GREEDY))
    code, out, _ = cli("generate", without_tokenizer, "--token-ids", "5,6,7", *OPTIONS)
    assert (code, [int(token) for token in out.split()]) == (0, first)
    code, out, _ = cli("generate", without_tokenizer, "--token-ids", "5, 6,7", "--token-ids", "8", *OPTIONS)
    assert (code, out) == (0, f"[0] {first}\n[1] {second}\n")


@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_json_is_all_there_is_on_standard_output(
    cli: Cli, tiny_folder: Path, tiny_llm: LLM, logprobs: int | None
) -> None:
    more = () if logprobs is None else ("--logprobs", logprobs)
    given = ("-p", "the", "-p", "stop", "--token-ids", "5,6,7")
    code, out, err = cli("generate", tiny_folder, "--json", *given, *OPTIONS, *more)
    assert code == 0 and re.fullmatch(SPEED % 18, err)
    items = json.loads(out)
    assert [item["prompt"] for item in items] == ["the", "stop", [5, 6, 7]]
    prompts: list[Any] = ["the", "stop", [5, 6, 7]]
    outputs = tiny_llm.generate(prompts, GREEDY)
    keys = {"prompt", "text", "token_ids", "finish_reason"} | ({"logprobs"} if more else set())
    for item, output in zip(items, outputs, strict=True):
        assert item.keys() == keys
        assert (item["text"], item["token_ids"]) == (output.text, output.token_ids)
        assert item["finish_reason"] == "length"
        for token, report in zip(output.token_ids, item.get("logprobs", ()), strict=bool(more)):
            assert len(report) == max(logprobs or 0, 1) and str(token) in report


def test_json_of_messages_has_their_text(cli: Cli, tiny_folder: Path, tiny_llm: LLM) -> None:
    _, out, _ = cli("generate", tiny_folder, "--json", "--chat", "-p", "the", "--token-ids", "8", *OPTIONS)
    assert [item["prompt"] for item in json.loads(out)] == ["the", [8]]
    assert [item["text"] for item in json.loads(out)] == texts(tiny_llm, [user("the")], [8])


SAMPLING: dict[str, Any] = {
    "max_tokens": 9, "temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 3, "presence_penalty": 0.5,
    "frequency_penalty": -0.5, "repetition_penalty": 1.2, "logprobs": 2,
}  # fmt: skip


def options(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_sampling_options_arrive(cli: Cli, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SamplingParams] = []

    def generate(llm: LLM, prompts: object, params: SamplingParams) -> None:
        seen.append(params)
        raise InputError("enough")

    monkeypatch.setattr(LLM, "generate", generate)
    more = ("--ignore-eos", "--stop", "a", "--stop", "b")
    refused(cli("generate", tiny_folder, "-p", "the", "--json", *options(SAMPLING), *more), "enough")
    assert seen == [SamplingParams(**SAMPLING, stop=("a", "b"), ignore_eos=True)]
    refused(cli("generate", tiny_folder, "-p", "the", "--json"), "enough")
    assert seen[1:] == [SamplingParams()]


def test_engine_options_arrive(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: dict[str, Any] = {
        "max_context": 20, "max_batch_tokens": 40, "max_batch_requests": 3, "chunk": 7, "page_size": 5,
        "cache_tokens": 100, "dtype": "bfloat16", "device": "cpu",
    }  # fmt: skip
    seen: list[Any] = []

    def load(*folder: str, **given: Any) -> None:
        seen.extend([*folder, given])
        raise InputError("enough")

    monkeypatch.setattr("expertmesh.commands.loading.LLM", load)
    for command in (("generate", "-p", "a"), ("chat",), ("demo",), ("serve", "--port", "0")):
        refused(cli(*command, "x", "--no-prefix-cache", "--strict", *options(plain)), "enough")
        told = seen[1].pop("progress")  # a server is told of it, to tell others
        assert callable(told) if command[0] == "serve" else told is True
        assert seen == [
            "x",
            {
                **plain,
                "quantise": "auto",
                "prefix_cache": False,
                "strict": True,
                "topology": Topology(),
                "launcher": None,
            },
        ]
        seen.clear()
    refused(cli("generate", "-p", "a"), "enough")
    assert seen == [
        None,
        {
            "dtype": "auto",
            "quantise": "auto",
            "prefix_cache": True,
            "strict": False,
            "progress": True,
            "topology": Topology(),
            "launcher": None,
        },
    ]


def test_the_checkpoint_recommends(cli: Cli, without_tokenizer: Path, tiny_llm: LLM) -> None:
    (without_tokenizer / "generation_config.json").write_text('{"do_sample": false}')
    given = ("--token-ids", "5,6", "--json", "--ignore-eos", "--max-tokens", 6)
    _, out, _ = cli("generate", without_tokenizer, *given)
    assert json.loads(out)[0]["token_ids"] == tiny_llm.generate([5, 6], GREEDY)[0].token_ids
    _, out, _ = cli("generate", without_tokenizer, *given, "--temperature", 2, "--seed", 1)
    assert json.loads(out)[0]["token_ids"] != tiny_llm.generate([5, 6], GREEDY)[0].token_ids


# --- chat


def test_a_conversation(cli: Cli, type_in: Callable[[str], None], tiny_folder: Path, tiny_llm: LLM) -> None:
    (first,) = texts(tiny_llm, [user("the")])
    said = [user("the"), {"role": "assistant", "content": first.strip()}, user("stop")]
    (second,) = texts(tiny_llm, said)
    type_in("the\n\n  stop \n/clear\nthe\n/exit\nnot this\n")
    code, out, err = cli("chat", tiny_folder, *OPTIONS)
    assert (code, out) == (0, f"{first}\n{second}\n{first}\n")
    assert err == "/clear begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer\n"


def test_the_system_message_outlives_clear(
    cli: Cli, type_in: Callable[[str], None], tiny_folder: Path, tiny_llm: LLM
) -> None:
    (answer,) = texts(tiny_llm, [{"role": "system", "content": "thing"}, user("the")])
    type_in("the\n/clear\nthe")
    assert cli("chat", tiny_folder, "--system", "thing", *OPTIONS)[:2] == (0, f"{answer}\n{answer}\n")


def test_a_message_that_does_not_fit_is_no_end(
    cli: Cli, type_in: Callable[[str], None], tiny_folder: Path, tiny_llm: LLM
) -> None:
    (answer,) = texts(tiny_llm, [user("the")])
    type_in("a" * 50 + "\nthe\n")
    code, out, err = cli("chat", tiny_folder, "--max-context", 32, *OPTIONS)
    assert (code, out) == (0, f"{answer}\n")
    assert "the context holds 32" in err and "/clear begins anew\n" in err and "Traceback" not in err


class Thinking:
    """Stands for an LLM whose template lets it think; remembers what it was asked."""

    folder = Path("thinking")
    answers = ("let me see</think>\nyes ", "well</think>no")

    def __init__(self) -> None:
        tokenizer = SimpleNamespace(has_chat_template=True, render=lambda messages: "...<think>\n")
        self.engine = SimpleNamespace(
            intake=SimpleNamespace(tokenizer=tokenizer), config=SimpleNamespace(max_context=9)
        )
        self.asked: list[list[dict[str, str]]] = []
        self.params: dict[str, Any] = {}

    def default_params(self, **given: Any) -> None:
        self.params = given

    def stream(self, prompts: list[list[dict[str, str]]], params: None) -> Iterator[Output]:
        self.asked.append(list(prompts[0]))
        text = self.answers[len(self.asked) % 2 - 1]
        yield Output("0", None, [], text, [], None, delta=text)
        if prompts[0][-1]["content"] == "interrupt":
            raise KeyboardInterrupt
        yield Output("0", None, [], text + "!", [], "stop", delta="!")


def test_thoughts_are_shown_but_are_no_part_of_the_conversation(
    cli: Cli, type_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends an answer and not the conversation."""
    llm = Thinking()
    monkeypatch.setattr("expertmesh.commands.chat.load_llm", lambda args: nullcontext(llm))
    type_in("interrupt\nmore\nagain\n")
    code, out, _ = cli("chat")
    assert (code, out) == (0, "let me see</think>\nyes \nwell</think>no!\nlet me see</think>\nyes !\n")
    *before, last = llm.asked[-1]
    assert [m["content"] for m in before] == ["interrupt", "yes", "more", "no!"] and last == user("again")
    assert llm.params["max_tokens"] == 9, "as long as the context allows"


# --- demo, doctor, serve, bench


def test_demo_writes_in_each_domain_and_tells_what_ran(cli: Cli) -> None:
    model = ModelConfig.from_folder(demo_model())
    code, out, err = cli("demo", "--max-tokens", 2)
    assert (code, err) == (0, "")
    for name, prompt in (PROMPTS | {"chat": CHAT}).items():
        assert f"--- {name}\n{prompt}" in out
        bars = rf"[ ▁▂▃▄▅▆▇█]{{{model.n_routed_experts}}}"
        assert re.search(rf"^  {name} +{bars} \d+\.\d\d$", out, re.MULTILINE)
    report = out.partition("--- what ran\n")[2]
    assert f"{model.num_hidden_layers} layers, {model.n_routed_experts} routed experts" in report
    tokens = re.search(r"; (\d+) tokens in ", report)
    assert tokens and 5 < int(tokens[1]) <= 10


def test_demo_of_a_model_without_chat(cli: Cli, without_tokenizer: Path) -> None:
    write_tokenizer(without_tokenizer, chat_template=None)
    code, out, _ = cli("demo", without_tokenizer, "--max-tokens", 1)
    assert code == 0 and "8 routed experts" in out and "--- chat" not in out


def test_demo_counts_the_rows_of_each_part_alone(
    cli: Cli, tiny_folder: Path, tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of a text but that of its last token goes to three experts, in the one layer that has them."""
    seen: dict[str, Part] = {}
    monkeypatch.setattr("expertmesh.commands.demo._report", lambda llm, loaded, parts: seen.update(parts))
    assert cli("demo", tiny_folder, "--max-tokens", 3)[0] == 0
    prompts: dict[str, Any] = PROMPTS | {"chat": [user(CHAT)]}
    assert seen.keys() == prompts.keys()
    for name, part in seen.items():
        rows = len(tiny_llm.tokens(prompts[name])) + part.tokens - 1
        assert part.tokens in (1, 2, 3) and [int(rows_E.sum()) for rows_E in part.loads] == [3 * rows], name


def test_demo_is_repeatable(cli: Cli, tiny_folder: Path) -> None:
    def written(seed: int) -> str:
        return cli("demo", tiny_folder, "--max-tokens", 8, "--seed", seed)[1].partition("--- what")[0]

    assert written(1) == written(1) != written(2)


def test_doctor_knows_the_machine(cli: Cli) -> None:
    code, out, err = cli("doctor", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert list(report) == ["machine", "devices", "kernels", "compiler", "network", "software"]
    assert {*OPS, "on reference"} == report["kernels"].keys()
    assert report["software"]["python"] == platform.python_version()
    assert torch.__version__.startswith(report["software"]["torch"].partition("+")[0])
    assert list(report["devices"]) == ["cpu", "cuda", "npu"]
    assert re.search(r"\d threads, \d+\.\d of \d+\.\d GB free; used$", report["devices"]["cpu"])
    assert report["devices"]["npu"].startswith("not used: torch_npu is not installed")
    assert "lo" in report["network"] or platform.system() != "Linux"


def test_doctor_for_people(cli: Cli) -> None:
    code, out, err = cli("doctor")
    assert (code, err) == (0, "")
    sections = [line for line in out.splitlines() if not line.startswith(" ")]
    assert sections == ["machine", "devices", "kernels", "compiler", "network", "software"]
    assert f"  python           {platform.python_version()}\n" in out


@pytest.mark.parametrize(("more", "name"), [((), None), (("--name", "mine"), "mine")])
def test_serve_loads_and_listens_where_it_is_told(
    cli: Cli, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], name: str | None
) -> None:
    """Up to where steps would begin."""
    seen: list[Any] = []

    class Told:
        failed = False

        def __init__(self, engine: Any, send: Any, grace: float, linger: float, telemetry: Any) -> None:
            seen.append((grace, linger))

        def put(self, frame: Any) -> None:
            assert frame["do"] in ("open", "gone"), frame

        def run(self, about: dict[str, str], opened: Callable[[], None]) -> bool:
            opened()
            return True

    monkeypatch.setattr("expertmesh.server.pump.Pump", Told)
    given = ("--grace", 7, "--linger", "inf", "--max-queue", 5)
    code, out, err = cli("serve", tiny_folder, "--host", "127.0.0.1", "--port", 0, *given, *more)
    assert (code, out, seen) == (0, "", [(7.0, math.inf)])
    rows = dict(line.split(None, 1) for line in err.splitlines())
    assert rows["model"] == f"{tiny_folder.name} ({tiny_folder})" and ", 5 wait, " in rows["requests"]
    assert rows["serving"] == f"{name or tiny_folder.name} at {rows['address']}"
    assert rows["address"].startswith("http://127.0.0.1:") and rows["address"].endswith("/v1")


def test_bench_says_before_it_measures_that_there_is_no_card(cli: Cli, tiny_folder: Path) -> None:
    code, out, err = cli("bench", "engine", tiny_folder, "--alone", "--device", "npu")
    assert (code, out) == (2, "") and err.startswith("expertmesh: device npu: ") and err.count("\n") == 1


def test_bench_measures_and_prints_json(cli: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    """Of a model with room for the benchmark's prompts."""
    write_config(tmp_path, TINY | {"max_position_embeddings": 1024})
    (tmp_path / "model.safetensors").symlink_to(tiny_folder / "model.safetensors")
    given = ("--rounds", 1, "--repeats", 1, "--alone", "--threads", 1, "--json")
    code, out, err = cli("bench", "engine", tmp_path, *given)
    report = json.loads(out)
    assert (code, err) == (0, "")
    ours = report.pop("expertmesh")
    rest = {"model": tmp_path.name, "dtype": "float32", "quantise": "none", "threads": 1, "rounds": 1}
    assert report == rest
    assert ours["load_seconds"] > 0 and ours["peak_rss_bytes"] > 10_000_000
    assert ours["prefill_tokens_per_second"] > 0
    assert set(ours["decode_tokens_per_second"]) == {"1", "16"}
    assert all(speed > 0 for speed in ours["decode_tokens_per_second"].values())


def measured(load: float, rss: int, prefill: float, one: float, sixteen: float) -> dict[str, Any]:
    return {
        "load_seconds": load, "bare_rss_bytes": 10, "peak_rss_bytes": rss, "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": {"1": one, "16": sixteen},
    }  # fmt: skip


@pytest.fixture
def long_folder(tmp_path: Path) -> Path:
    """Of more positions than measuring takes."""
    random_checkpoint(tmp_path, TINY | {"max_position_embeddings": 1024})
    return tmp_path


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three rounds of measurements, whose middle ones are 2 and 4 times better than transformers' and, but for memory,
    not as good as vLLM's. Returns who was measured."""
    runs = {
        "expertmesh": [(1, 100, 50, 5, 60), (2, 200, 40, 6, 80), (3, 300, 30, 7, 90)],
        "vllm": [(1, 400, 80, 8, 100)] * 3,
        "transformers": [(9, 800, 10, 3, 20), (1, 100, 25, 1, 16), (4, 400, 20, 2, 24)],
    }
    first = {"expertmesh": [1, 2, 3, 4], "vllm": [1, 2, 3, 4], "transformers": [1, 2, 3, 5]}
    turns: list[str] = []

    def run(name: str, command: list[str], environment: dict[str, str]) -> dict[str, Any]:
        turns.append(name)
        return measured(*runs[name][turns.count(name) - 1]) | {"first_tokens": first[name]}

    monkeypatch.setattr("expertmesh.commands.bench_engine._in_own_process", run)
    return turns


def test_bench_compares_medians(cli: Cli, long_folder: Path, tmp_path: Path, engines: list[str]) -> None:
    code, out, _ = cli("bench", "engine", long_folder, "--json", "--peers", tmp_path)
    report = json.loads(out)
    assert engines == ["expertmesh", "transformers"] * 3
    assert report["expertmesh"] == measured(2, 200, 40, 6, 80)
    said = {"version": "", "precision": "float32", "same_first_token": 0.75}
    assert report["transformers"] == measured(4, 400, 20, 2, 20) | said
    ratios = {"load": 2, "peak_rss": 2, "prefill": 2, "decode_1": 3, "decode_16": 4}
    assert (code, report["ratios"]) == (0, {"transformers": ratios})
    assert report["best_peer"] == {
        row: {"peer": "transformers", "ratio": ratio} for row, ratio in ratios.items()
    }


def test_bench_for_people(cli: Cli, long_folder: Path, tmp_path: Path, engines: list[str]) -> None:
    code, out, _ = cli(
        "bench", "engine", long_folder, "--dtype", "bfloat16", "--threads", 2, "--peers", tmp_path
    )
    title, head, *rows = out.splitlines()
    assert (code, title) == (0, f"{long_folder.name}, bfloat16, 2 threads, median of 3 rounds")
    assert head.split() == ["expertmesh", "transformers", "times", "better"]
    assert [row.split()[-3:] for row in rows] == [
        ["2", "4", "2.00"], ["0.0002", "0.0004", "2.00"], ["40", "20", "2.00"], ["6", "2", "3.00"], ["80", "20", "4.00"]
    ]  # fmt: skip


def test_bench_against_the_best(cli: Cli, long_folder: Path, tmp_path: Path, engines: list[str]) -> None:
    """Row by row; in the order in which they are named."""
    (vllm := tmp_path / "peers" / "vllm").mkdir(parents=True)
    (vllm / "peer.json").write_text('{"version": "0"}')
    given = ("--peers", vllm.parent, "--against", "transformers,vllm")
    code, out, err = cli("bench", "engine", long_folder, *given)
    title, head, *rows = out.splitlines()
    assert (code, err, engines) == (0, "", ["expertmesh", "transformers", "vllm"] * 3)
    assert title.endswith("median of 3 rounds")
    assert head.split() == ["expertmesh", "transformers", "vllm", "times", "better"]
    assert [row.split()[-3:] for row in rows] == [
        ["0.50", "than", "vllm"], ["2.00", "than", "transformers"], ["0.50", "than", "vllm"], ["0.75", "than", "vllm"],
        ["0.80", "than", "vllm"],
    ]  # fmt: skip


def test_bench_goes_on_without_an_engine_that_does_not_run_the_model(
    cli: Cli, long_folder: Path, tmp_path: Path, engines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (vllm := tmp_path / "peers" / "vllm").mkdir(parents=True)
    (vllm / "peer.json").write_text('{"version": "0"}')
    run = bench_engine._in_own_process

    def fails(name: str, *rest: Any) -> dict[str, Any]:
        if name == "vllm":
            raise InputError("measuring vllm failed:\n...\nValueError: no such heads")
        return run(name, *rest)

    monkeypatch.setattr(bench_engine, "_in_own_process", fails)
    given = ("bench", "engine", long_folder, "--peers", vllm.parent, "--against")
    code, out, _ = cli(*given, "transformers,vllm", "--json")
    report = json.loads(out)
    assert (code, report["vllm"]) == (0, {"failed": "ValueError: no such heads"})
    assert list(report["ratios"]) == ["transformers"] and engines == ["expertmesh", "transformers"] * 3
    engines.clear()
    _, out, _ = cli(*given, "transformers,vllm")
    assert "vllm fails: ValueError: no such heads" in out
    engines.clear()
    refused(cli(*given, "vllm"), "measuring vllm failed")


# --- what is refused


def refused(called: tuple[int, str, str], words: str) -> None:
    code, out, err = called
    assert (code, out) == (2, ""), err
    assert err.startswith("expertmesh: ") and err.count("expertmesh: ") == 1 and err.endswith("\n")
    assert words in err and "Traceback" not in err


def truncated(folder: Path) -> None:
    random_checkpoint(folder, TINY)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(30_000)


def one_shard_missing(folder: Path) -> None:
    random_checkpoint(folder, TINY, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()


def misshapen(folder: Path) -> None:
    write_checkpoint(folder, TINY, random_tensors(TINY) | {"lm_head.weight": torch.ones(280, 47)})


def other_tokenizer(folder: Path) -> None:
    random_checkpoint(folder, TINY | {"vocab_size": 200})
    write_tokenizer(folder)


def garbage_tokenizer(folder: Path) -> None:
    random_checkpoint(folder, TINY)
    (folder / "tokenizer.json").write_text("garbage")


LARGE = {
    "hidden_size": 16384,
    "intermediate_size": 131072,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 61,
}


def too_large(folder: Path) -> None:
    if free_memory() > 1_500_000_000_000:
        pytest.skip("this machine could hold it")
    write_sparse(folder, TINY | LARGE, shards=8)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no_such_folder": (lambda folder: folder.rmdir(), "no such folder"),
    "no_config": (lambda folder: None, "there is no config.json in it"),
    "config_of_another_kind": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "architecture": (
        lambda folder: write_config(folder, TINY | {"architectures": ["LlamaForCausalLM"]}),
        "architecture LlamaForCausalLM is not supported; supported are Deepseek",
    ),
    "no_weights": (lambda folder: write_config(folder, TINY), "neither model.safetensors nor"),
    "truncated": (truncated, "model.safetensors: truncated: 30000 bytes"),
    "missing_shard": (one_shard_missing, "1 of 3 shards are missing: model-00002-of-00003.safetensors"),
    "wrong_shape": (misshapen, "shape of lm_head.weight: [280, 47] in the file, [280, 48] in the model"),
    "other_tokenizer": (other_tokenizer, "they do not belong together"),
    "garbage_tokenizer": (garbage_tokenizer, "tokenizer.json: cannot be read as a tokenizer"),
    "too_large": (too_large, "its weights take 15"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_cannot_be_used(cli: Cli, tmp_path: Path, case: str) -> None:
    make, words = FOLDERS[case]
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    refused(cli("generate", folder, "-p", "a"), words)
    refused(cli("generate", folder, "-p", "a", "--json"), f"{folder}")


@pytest.mark.parametrize(
    "command", [("generate", "-p", "a"), ("chat",), ("serve", "--port", "0"), ("demo",), ("bench", "engine")]
)
def test_every_command_refuses_alike(cli: Cli, tmp_path: Path, command: tuple[str, ...]) -> None:
    refused(cli(*command, tmp_path / "nowhere"), "no such folder")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "no prompt: give -p TEXT"),
        (("--json",), "no prompt: give -p TEXT"),
        (("--token-ids", "1,two"), "--token-ids '1,two': not a list of numbers"),
        (("--token-ids", ""), "not a list of numbers"),
        (("-p", "a", "--temperature", "-1"), "temperature is -1.0"),
        (("-p", "a", "--temperature", "nan"), "temperature is nan"),
        (("-p", "a", "--temperature", "inf"), "temperature is inf"),
        (("-p", "a", "--top-p", "0"), "top_p is 0"),
        (("-p", "a", "--top-p", "1.5"), "top_p is 1.5, but must be a number from 0 to 1"),
        (("-p", "a", "--top-k", "-2"), "top_k is -2"),
        (("-p", "a", "--min-p", "2"), "min_p is 2.0"),
        (("-p", "a", "--max-tokens", "-1"), "max_tokens is -1"),
        (("-p", "a", "--presence-penalty", "3"), "presence_penalty is 3.0"),
        (("-p", "a", "--frequency-penalty", "-3"), "frequency_penalty is -3.0"),
        (("-p", "a", "--repetition-penalty", "0"), "repetition_penalty is 0"),
        (("-p", "a", "--logprobs", "-1"), "logprobs is -1"),
        (("-p", "a", "--stop", ""), "stop must be texts that are not empty"),
    ],
)
def test_values_are_refused_before_a_model_is_looked_for(
    cli: Cli, given: tuple[str, ...], words: str
) -> None:
    refused(cli("generate", "nowhere", *given), words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("-p", "a" * 600), "tokens, but the context holds 512"),
        (("-p", "a" * 30, "--max-context", "20"), "the prompt has 31 tokens, but the context holds 20"),
        (("-p", "a", "-p", "a" * 600, "--json"), "the context holds 512"),
        (("--token-ids", "279,280"), "token id 280 is outside the vocabulary of 280"),
        (("--token-ids", "5,-1"), "token id -1 is outside"),
        (("-p", "a", "--dtype", "float8"), "dtype 'float8' is not one of auto, float32, bfloat16"),
        (("-p", "a", "--page-size", "0"), "page_size is 0"),
        (("-p", "a", "--max-context", "513"), "max_context 513 is more than the model's 512"),
        (("-p", "a", "--max-batch-tokens", "5"), "max_batch_tokens 5 is less than max_batch_requests 64"),
        (("-p", "a", "--logprobs", "281"), "logprobs is more than the vocabulary of 280"),
    ],
)
def test_what_does_not_fit_the_model(cli: Cli, tiny_folder: Path, given: tuple[str, ...], words: str) -> None:
    refused(cli("generate", tiny_folder, *given), words)


def test_what_needs_a_tokenizer(cli: Cli, without_tokenizer: Path) -> None:
    refused(cli("generate", without_tokenizer, "-p", "a"), "has no tokenizer.json")
    refused(cli("generate", without_tokenizer, "--chat", "-p", "a"), "has no tokenizer.json")
    refused(cli("generate", without_tokenizer, "--token-ids", "1", "--stop", "a"), "need a tokenizer")
    refused(cli("chat", without_tokenizer), "has no chat template; use `expertmesh generate`")
    write_tokenizer(without_tokenizer, chat_template=None)
    refused(cli("generate", without_tokenizer, "--chat", "-p", "a"), "has no chat template")
    refused(cli("chat", without_tokenizer), "has no chat template")


def test_chat_refuses_values_before_a_model_is_looked_for(cli: Cli) -> None:
    refused(cli("chat", "nowhere", "--top-p", "2"), "top_p is 2.0")


def test_ports_are_tried_before_a_model_is_looked_for(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused(cli("serve", "nowhere", "--port", port), f"port {port} on 127.0.0.1 is in use")
    refused(cli("serve", "nowhere", "--port", 65536), "port 65536 is not from 0 to 65535")
    refused(cli("serve", "nowhere", "--port", -1), "port -1 is not from 0 to 65535")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--rounds", "0"), "--rounds and --repeats must be at least 1"),
        (("--repeats", "0"), "--rounds and --repeats must be at least 1"),
        (("--dtype", "int4"), "dtype 'int4' is not one of"),
        (
            ("--peers", "nowhere", "--against", "vllm"),
            "not set up: vllm; run `benchmarks/peers/setup vllm --into ",
        ),
        (("--against", "vllm,ollama"), "--against 'ollama' is not one of llama.cpp, vllm, transformers"),
    ],
)
def test_bench_refuses(cli: Cli, tiny_folder: Path, given: tuple[str, ...], words: str) -> None:
    refused(cli("bench", "engine", tiny_folder, *given), words)


@pytest.mark.parametrize(
    "arguments",
    [
        (), ("write",), ("gen",), ("generate", "--unknown"), ("generate", "-p"), ("generate", "a", "b"),
        ("generate", "-p", "a", "--max-tokens", "many"), ("generate", "-p", "a", "--chunk", "1.5"),
        ("chat", "--temperature", "hot"), ("serve", "--port", "http"), ("bench",), ("bench", "network"),
        ("doctor", "all"),
    ],
)  # fmt: skip
def test_unknown_words_end_with_the_usage(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith("usage: expertmesh") and ": error: " in err.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    for arguments, words in (["--help"], f"    {command} "), ([command, "--help"], f"expertmesh {command}"):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capsys.readouterr()
        assert (ended.value.code, err) == (0, "")
        assert words in out and COMMANDS[command][1:] in out


def test_an_interrupt_is_no_error(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("expertmesh.commands.generate.load_llm", interrupt)
    assert cli("generate", "-p", "a") == (130, "", "")


# --- as a process


def process(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "expertmesh", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    given = {"stdout": subprocess.PIPE} | more
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, env=env, **given)


def test_a_process_that_succeeds(tiny_folder: Path, tiny_llm: LLM) -> None:
    done = process("generate", tiny_folder, "-p", "-", "--json", *OPTIONS, input="stop the")
    assert done.returncode == 0 and re.fullmatch(SPEED % 6, done.stderr)
    assert json.loads(done.stdout)[0]["text"] == texts(tiny_llm, "stop the")[0]


def test_a_process_that_refuses(tmp_path: Path) -> None:
    done = process("generate", tmp_path / "nowhere", "-p", "a")
    refused((done.returncode, done.stdout, done.stderr), "no such folder")


def test_a_reader_that_has_gone(tiny_folder: Path) -> None:
    """As in `expertmesh generate ... | head -c 1`."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = process("generate", tiny_folder, "-p", "the", *OPTIONS, stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
