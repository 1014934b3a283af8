"""Other engines to compare with: which are found, what they are given to read, and how they are started."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from expertmesh import InputError, ModelConfig
from expertmesh.bench import driver, peers
from expertmesh.bench.peers import LlamaCpp, Source, Work
from expertmesh.engine.checkpoint import open_checkpoint
from tests.support.files import FP8, TINY, random_checkpoint

# Stands in for llama.cpp's converter: tells what it was given.
CONVERTER = "import json, sys; open(sys.argv[-1], 'w').write(json.dumps(sys.argv[1:-1]))"


def set_up(folder: Path, *names: str) -> Path:
    """Environments with nothing in them but this Python."""
    for name in names:
        programs = folder / name / "bin"
        programs.mkdir(parents=True)
        # Not a link, beside which Python would look for its library.
        (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (programs / "python").chmod(0o755)
        (folder / name / "peer.json").write_text(json.dumps({"version": f"{name} 1"}))
    return folder


def source_of(folder: Path, scratch: Path, dtype: str = "bfloat16") -> Source:
    scratch.mkdir()
    return Source(open_checkpoint(folder, ModelConfig.from_folder(folder)), dtype, scratch)


def test_those_that_are_set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers also beside this engine; a folder that setting up did not finish does not count."""
    set_up(tmp_path, "vllm")
    (tmp_path / "llama.cpp" / "bin").mkdir(parents=True)
    found = peers.choose(None, tmp_path, threads=3)
    assert [(peer.name, peer.version) for peer in found] == [("vllm", "vllm 1"), ("transformers", "")]
    assert found[0].environment["OMP_NUM_THREADS"] == "3"
    assert found[1].python == Path(sys.executable)
    set_up(tmp_path, "transformers")
    assert peers.choose(["transformers"], tmp_path, 3)[0].python == tmp_path / "transformers/bin/python"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert peers.choose(None, tmp_path / "none", 3) == []


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["vllm", "sglang"], "--against 'sglang' is not one of llama.cpp, vllm, transformers"),
        (["vllm", "llama.cpp"], "not set up: llama.cpp; run `benchmarks/peers/setup llama.cpp --into "),
    ],
)
def test_unknown_and_missing_ones(tmp_path: Path, names: list[str], words: str) -> None:
    with pytest.raises(InputError) as error:
        peers.choose(names, set_up(tmp_path, "vllm"), 1)
    assert str(error.value).startswith(words)


def test_the_checkpoint_says_how_it_routes(tmp_path: Path) -> None:
    (folder := tmp_path / "model").mkdir()
    random_checkpoint(folder, TINY | {"torch_dtype": "bfloat16"}, shards=2)
    copy = source_of(folder, tmp_path / "copy").folder
    config = json.loads((copy / "config.json").read_text())
    given = json.loads((folder / "config.json").read_text())
    assert config == given | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    linked = [file for file in copy.iterdir() if file.name != "config.json"]
    assert len(linked) == 3 and all(file.resolve().parent == folder for file in linked)


def test_fp8_is_written_out(tmp_path: Path) -> None:
    (folder := tmp_path / "model").mkdir()
    fp8 = {"torch_dtype": "bfloat16", "quantization_config": FP8 | {"weight_block_size": [16, 16]}}
    random_checkpoint(folder, TINY | fp8)
    copy = source_of(folder, tmp_path / "copy").folder
    types = {tensor.dtype for tensor in load_file(copy / "model.safetensors").values()}
    assert types == {torch.bfloat16, torch.float32}
    assert "quantization_config" not in json.loads((copy / "config.json").read_text())


def test_llama_cpp_converts_once(tmp_path: Path) -> None:
    (folder := tmp_path / "model").mkdir()
    random_checkpoint(folder, TINY)
    (peer,) = peers.choose(["llama.cpp"], set_up(tmp_path, "llama.cpp"), 1)
    assert isinstance(peer, LlamaCpp)
    (peer.folder / "bin" / "convert.py").write_text(CONVERTER)
    source = source_of(folder, tmp_path / "copy")
    assert (peer.precision(source, False), peer.precision(source, True)) == ("bfloat16", "int8")
    made = peer.prepare(source, "int8")
    tree = str(peer.folder / "source" / "llama.cpp")
    assert json.loads(made.read_text()) == [tree, str(source.folder), "--outtype", "q8_0", "--outfile"]
    (peer.folder / "bin" / "convert.py").write_text("raise SystemExit('no')")
    assert peer.prepare(source_of(folder, tmp_path / "again"), "int8") == made
    # Other weights in the same folder are converted anew; what fails leaves nothing.
    os.utime(folder / "model.safetensors", (1, 1))
    with pytest.raises(InputError, match=r"llama\.cpp cannot convert the checkpoint:\nno"):
        peer.prepare(source_of(folder, tmp_path / "other"), "int8")
    assert list(made.parent.iterdir()) == [made]
    work = Work(2, 3, tmp_path / "prompts")
    program = str(peer.folder / "bin" / "measure")
    assert peer.command(made, "int8", work) == [program, str(made), "2", "3", str(tmp_path / "prompts")]


def test_the_driver_needs_nothing_of_this_engine(tmp_path: Path) -> None:
    """It runs where this engine is not installed, with its standard library's modules and not with its neighbours."""
    program = "import runpy, sys; sys.argv = ['driver', '--help']; "
    program += f"runpy.run_path({driver.__file__!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0 and "transformers,vllm" in done.stdout


def test_every_process_gets_the_same_prompts(tmp_path: Path) -> None:
    prompts = driver.prompts_of(300, repeats=2)
    assert prompts == driver.prompts_of(300, repeats=2)
    assert [len(tokens) for tokens in prompts] == [512, 32, *2 * [512, *17 * [32]]]
    assert max(max(tokens) for tokens in prompts) == 299
    (file := tmp_path / "prompts").write_text("\n".join(" ".join(map(str, p)) for p in prompts))
    assert list(driver.read_prompts(file)) == prompts


class Counting:
    """An engine that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def prefill(self, tokens: list[int]) -> None:
        self.asked.append(len(tokens))

    def decode(self, prompts: list[list[int]], count: int) -> tuple[float, list[int]]:
        self.asked.append((len(prompts), count))
        return 2.0, [tokens[0] for tokens in prompts]

    def peak_rss(self) -> int:
        return 7

    def close(self) -> None:
        self.asked.append("closed")


def test_what_is_measured() -> None:
    engine = Counting()
    prompts = driver.prompts_of(1000, repeats=1)
    report = driver.measure(lambda: engine, iter(prompts), repeats=1)
    assert engine.asked == [512, (1, 4), 512, (1, 48), (16, 24), "closed"]
    assert report["decode_tokens_per_second"] == {"1": 24, "16": 192}
    assert report["peak_rss_bytes"] == 7 and report["bare_rss_bytes"] > 1e7
    assert report["first_tokens"] == [prompts[n][0] for n in (1, *range(3, 20))]


def test_transformers_under_the_driver(tmp_path: Path) -> None:
    """As it is run, in a process of its own."""
    (folder := tmp_path / "model").mkdir()
    random_checkpoint(folder, TINY | {"max_position_embeddings": 1024})
    (file := tmp_path / "prompts").write_text(
        "\n".join(" ".join(map(str, p)) for p in driver.prompts_of(TINY["vocab_size"], 1))
    )
    (peer,) = peers.choose(["transformers"], tmp_path, 1)
    source = source_of(folder, tmp_path / "copy", "float32")
    command = peer.command(peer.prepare(source, "float32"), "float32", Work(1, 1, file))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["decode_tokens_per_second"]) == {"1", "16"} and len(report["first_tokens"]) == 18


@pytest.mark.parametrize("words", [["sglang"], []])
def test_setup_refuses(words: list[str]) -> None:
    script = Path(__file__).parents[2] / peers.SETUP
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_setup_names_what_is_missing(tmp_path: Path) -> None:
    """One line: here without a compiler."""
    script = Path(__file__).parents[2] / peers.SETUP
    done = subprocess.run(
        [sys.executable, script, "llama.cpp", "--into", tmp_path], capture_output=True, text=True, env={"PATH": ""},
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "setup: llama.cpp: cmake is missing: install cmake\n")
    assert not (tmp_path / "llama.cpp" / "peer.json").exists()
