"""`expertmesh convert`: the demo model in every precision, and what it says there."""

import json
from pathlib import Path

import pytest
import torch

from expertmesh.cli import main
from expertmesh.config import demo_model
from expertmesh.convert.run import converted
from tests.kernels.test_ops import NATIVE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("demo")
    for to, given in (
        ("bf16", demo_model()),
        ("w8a8", demo_model()),
        ("int4", demo_model()),
        ("fp8", base / "bf16"),
    ):
        assert main(["convert", str(given), "--to", to, "--out", str(base / to), "--no-verify"]) == 0
    return {to: base / to for to in ("bf16", "w8a8", "int4", "fp8")}


@pytest.mark.parametrize("to", ["bf16", "w8a8", "int4", "fp8"])
@pytest.mark.parametrize("layout", [[], ["--cards", "2", "--attention-tp", "2"]], ids=["alone", "tp2"])
def test_the_demo_model_writes_in_every_precision(
    to: str, layout: list[str], folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-p", "Once upon a time there was", "--max-tokens", "8", "--temperature", "0", "--json"]
    assert main(["generate", str(folders[to]), *words, *layout]) == 0
    (output,) = json.loads(capsys.readouterr().out)
    assert (len(output["token_ids"]) == 8 and "king" in output["text"].lower()) or " a " in output["text"]


def test_fp8_comes_back_from_bfloat16(folders: dict[str, Path]) -> None:
    """Each number of eight bits as it was; scales as near as bfloat16 has the largest number of a block."""
    before, after = converted(demo_model()), converted(folders["fp8"])
    assert before.stored.keys() == after.stored.keys() and after.has_mtp
    for name in before.stored:
        if f"{name}_scale_inv" not in before.entries:
            assert torch.equal(
                *(c.stored[name].rows(0, c.weights[name].shape[0]) for c in (before, after))
            ), name
            continue
        values = [
            c.entries[name].rows(0, c.weights[name].shape[0]).view(torch.uint8) for c in (before, after)
        ]
        assert torch.equal(*values), name
        scales = [c.entries[f"{name}_scale_inv"] for c in (before, after)]
        torch.testing.assert_close(*(s.rows(0, s.shape[0]) for s in scales), rtol=2.0**-8, atol=0)


def test_what_it_says(tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--to", "fp8", "--out", str(tmp_path / "same")]) == 2
    assert "--to fp8: the checkpoint is in this precision already" in capsys.readouterr().err
    assert main(["convert", "--to", "w8a8", "--out", str(folders["w8a8"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("demo, fp8 -> w8a8: 0.032 GB -> 0.033 GB in 1 files in ")
    assert lines[2].split() == ["tensors", "mean", "worst", "of", "bound"]
    table = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines[3:]}
    assert table["routed"][0] == 960 and 0 < table["routed"][1] <= table["routed"][2] < 0.01
    assert table["norm"][1:] == [0, 0, 0] and all(row[3] <= 1 for row in table.values())


@pytest.mark.skipif(not NATIVE, reason="no C++ compiler")
def test_memory_knows_the_precision(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    def report(*words: str) -> dict[str, object]:
        assert main(["memory", *words, "--json"]) == 0
        found: dict[str, object] = json.loads(capsys.readouterr().out)
        return found

    for to, kept in (("w8a8", "w8a8"), ("int4", "experts_int4")):
        ours, told = report(str(folders[to])), report("--quantise", kept)
        assert ours["quantise"] == kept and ours["layouts"] == told["layouts"]
    assert report(str(folders["w8a8"]), "--quantise", "none")["layouts"] == report()["layouts"]
