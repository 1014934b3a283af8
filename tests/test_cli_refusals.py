"""Wrong input of unusual kinds: one sentence, exit code 2, nothing on standard output."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from expertmesh.cli import main
from tests.support.files import TINY, random_checkpoint, write_tokenizer


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and err.startswith("expertmesh: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cache-tokens", 10**15), "GB are free beside the weights"),
        (("--cache-tokens", 10**20), "GB are free beside the weights"),
        (("--page-size", 10**15), "GB are free beside the weights"),
    ],
)
def test_a_cache_larger_than_the_memory(
    tiny_folder: Path, options: tuple[Any, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "generate", tiny_folder, "-p", "the", *options)


def test_a_name_that_no_folder_can_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert "File name too long" in refused(capsys, "generate", "x" * 300, "-p", "the")


def test_demo_is_refused_before_it_writes(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "max_tokens is -1" in refused(capsys, "demo", tiny_folder, "--max-tokens", -1)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_folder / name)
    assert "has no tokenizer.json" in refused(capsys, "demo", tmp_path)


def test_demo_of_a_model_without_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_checkpoint(tmp_path, TINY | {"n_routed_experts": 0, "n_shared_experts": 0, "vocab_size": 288})
    write_tokenizer(tmp_path)
    assert main(["demo", str(tmp_path), "--max-tokens", "2"]) == 0
    assert "rows per expert" not in capsys.readouterr().out


def test_bench_says_what_it_needs(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--threads must be at least 1" in refused(capsys, "bench", "engine", "--threads", -1)
    random_checkpoint(tmp_path, TINY | {"max_position_embeddings": 512})
    assert "has 512 positions; measuring takes 513" in refused(capsys, "bench", "engine", tmp_path, "--alone")


@pytest.mark.parametrize("arguments", [["-p", "-"], ["-p", b"\xff"]])
def test_bytes_that_are_no_text(tiny_folder: Path, arguments: list[Any]) -> None:
    command = [sys.executable, "-m", "expertmesh", "generate", str(tiny_folder), *arguments]
    done = subprocess.run(command, input=b"\xff\xfe", capture_output=True, check=False)
    assert done.returncode == 2 and done.stdout == b""
    assert (
        done.stderr.startswith(b"expertmesh: ")
        and b"not a text" in done.stderr
        and b"Traceback" not in done.stderr
    )
