"""Conversions: what they write, that one goes on where it was interrupted, and what is refused."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertmesh.config import ModelConfig
from expertmesh.convert import files
from expertmesh.convert.files import alone_in
from expertmesh.convert.formats import TARGETS
from expertmesh.convert.journal import FILE, Journal
from expertmesh.convert.run import MEMORY, convert, converted, prepare
from expertmesh.convert.verify import verify
from expertmesh.errors import InputError
from tests.convert.checkpoints import SHARD, SMALL, contents, made, source
from tests.support.files import write_sparse

PATCHED = ("replace", "fsync", "pwrite")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def whole(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted conversion writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    made(plain, "w8a8", out)
    return contents(out)


@pytest.mark.parametrize("to", TARGETS)
def test_what_is_written_can_be_read_and_converted_on(to: str, plain: Path, tmp_path: Path) -> None:
    before = contents(plain)
    c = made(plain, to, tmp_path / "out")
    found = verify(c)
    assert set(found) == {
        "embedding", "attention", "norm", "dense", "router", "routed", "shared", "mtp"
    }  # fmt: skip
    assert (
        0
        < found["routed"].mean
        <= found["routed"].worst
        < {"bf16": 3e-3, "fp8": 0.04, "w8a8": 0.01, "int4": 0.2}[to]
    )
    assert len(c.shards) > 3 and all(shard.nbytes <= SHARD for shard in c.shards)
    result = converted(tmp_path / "out")
    assert result.has_mtp and result.stored.keys() == c.checkpoint.stored.keys()
    tensors: dict[str, Any] = {}
    for shard in c.shards:  # whole files, to the library that the format is of
        tensors |= load_file(tmp_path / "out" / shard.file)
    assert sum(t.nbytes for t in tensors.values()) == result.bytes == sum(s.nbytes for s in c.shards)
    assert contents(plain) == before and (tmp_path / "out" / "tokenizer_config.json").exists()
    assert not (tmp_path / "out" / ".cache").exists()
    for other in TARGETS.keys() - {to}:
        made(tmp_path / "out", other, tmp_path / other)
        assert converted(tmp_path / other).has_mtp and (tmp_path / other / FILE).exists()


def test_modelslim_files(plain: Path, whole: dict[str, bytes]) -> None:
    types = json.loads(whole["quant_model_description.json"])
    index = json.loads(whole["quant_model_weight_w8a8_dynamic.safetensors.index.json"])["weight_map"]
    assert (
        types["model_quant_type"] == "W8A8_DYNAMIC"
        and types["version"] == "1.0.0"
        and types["group_size"] == 0
    )
    assert index.keys() == {
        name for name, kind in types.items() if kind in ("FLOAT", "W8A8_DYNAMIC") and "." in name
    }
    expert = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert {types[expert + part] for part in ("", "_scale", "_offset")} == {"W8A8_DYNAMIC"}
    assert types["model.layers.1.self_attn.kv_b_proj.weight"] == types["lm_head.weight"] == "FLOAT"
    assert types["model.layers.0.self_attn.o_proj.bias"] == "FLOAT"
    count = len(set(index.values()))
    assert set(index.values()) == {
        f"quant_model_weight_w8a8_dynamic-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)
    }
    config = json.loads(whole["config.json"])
    assert config["quantize"] == "w8a8_dynamic" and "quantization_config" not in config


class Interrupted(BaseException):
    """As KeyboardInterrupt, which would end the tests where it is not caught."""


def calls(
    monkeypatch: pytest.MonkeyPatch, at: tuple[str, int] | None, error: BaseException
) -> dict[str, int]:
    """Counts the calls that change the disk, and lets one of them fail."""
    counts = dict.fromkeys(PATCHED, 0)

    def counting(name: str) -> Any:
        real = getattr(os, name)

        def call(*args: Any) -> Any:
            counts[name] += 1
            if at == (name, counts[name]):
                raise error
            return real(*args)

        return call

    for name in PATCHED:
        monkeypatch.setattr(files.os, name, counting(name))
    return counts


def test_interrupted_anywhere_and_begun_again(
    plain: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        counts = calls(patch, None, Interrupted())
        made(plain, "w8a8", tmp_path / "counted")
    # All renamings, and some of the rest, of which there are many.
    points = [("replace", i) for i in range(1, counts["replace"] + 1)]
    points += [("fsync", i) for i in range(1, counts["fsync"] + 1, 5)]
    points += [("pwrite", i) for i in range(1, counts["pwrite"] + 1, counts["pwrite"] // 10)]
    assert len(points) > 30
    for number, at in enumerate(points):
        out = tmp_path / str(number)
        full = number % 2 == 0
        with monkeypatch.context() as patch:
            calls(patch, at, OSError(errno.ENOSPC, "No space left on device") if full else Interrupted())
            with pytest.raises(
                InputError if full else Interrupted, match="the disk is full" if full else None
            ):
                made(plain, "w8a8", out)
        there = contents(out) if (out / FILE).exists() else {}
        done = Journal.read(out).done if there else {}
        assert not [name for name in there if name.endswith(".part")]
        stamps = {name: (out / name).stat().st_ino for name in done}
        made(plain, "w8a8", out)
        assert contents(out) == whole, at
        assert {name: (out / name).stat().st_ino for name in done} == stamps, (
            "a finished shard was made again"
        )


KILLED = """
import os, signal, sys
from pathlib import Path
from expertmesh.convert import files
from expertmesh.convert.run import convert, prepare
real, count = os.pwrite, 0
def pwrite(handle, data, offset):
    global count
    count += 1
    if count == int(sys.argv[3]):
        real(handle, data[: len(data) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(handle, data, offset)
files.os.pwrite = pwrite
convert(prepare(Path(sys.argv[1]), "w8a8", Path(sys.argv[2]), int(sys.argv[4])))
"""


def test_killed_while_writing(plain: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-c", KILLED, str(plain), str(out), "150", str(SHARD)]
    assert subprocess.run(words).returncode == -signal.SIGKILL
    assert list(out.glob("*.part")) and len(Journal.read(out).done) > 0
    made(plain, "w8a8", out)
    assert contents(out) == whole


def test_a_finished_folder_is_left_alone_and_repaired(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    c = made(plain, "w8a8", out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    convert(c)
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    shard = out / c.shards[1].file
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match="is not what was written; delete it and start again"):
        verify(c)
    shard.unlink()
    convert(c)
    assert verify(c)


@pytest.mark.parametrize(
    "lost", ["config.json", "tokenizer_config.json", "quant_model_description.json", "index"]
)
def test_what_is_lost_of_a_finished_folder_comes_back(
    lost: str, plain: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made(plain, "w8a8", out)
    (out / (TARGETS["w8a8"].index if lost == "index" else lost)).unlink()
    made(plain, "w8a8", out)
    assert contents(out) == whole


def test_what_was_left_by_a_killed_one_takes_no_room(
    plain: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    c = made(plain, "w8a8", out)
    (out / c.shards[0].file).unlink()
    part = out / f"{c.shards[0].file}{files.PART}"
    part.write_bytes(b"half")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0 if part.exists() else 1 << 40))
    made(plain, "w8a8", out)
    assert contents(out) == whole


def test_a_wrong_number_is_found(plain: Path, tmp_path: Path) -> None:
    """Also where the checksum is that of the wrong file."""
    out = tmp_path / "out"
    c = made(plain, "w8a8", out, 1 << 30)
    (shard,) = out.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, 5] += 2
    save_file(tensors, shard)
    journal = Journal.read(out)
    journal.done[shard.name] = shard.stat().st_size, files.checksum(shard)
    journal.write(out)
    with pytest.raises(
        InputError, match=r"experts\.2\.up_proj\.weight is further from the source than w8a8 explains"
    ):
        verify(c)


def test_the_memory_that_it_takes(tmp_path: Path) -> None:
    """A checkpoint that is larger than the bound, with single tensors of a third of it."""
    folder = tmp_path / "model"
    folder.mkdir()
    fields = SMALL | {
        "hidden_size": 2048, "vocab_size": 12_000, "intermediate_size": 15_000, "num_hidden_layers": 1,
        "num_nextn_predict_layers": 0, "torch_dtype": "bfloat16",
    }  # fmt: skip
    write_sparse(folder, fields, shards=2)
    program = """
import resource, sys
from pathlib import Path
from expertmesh.convert.run import convert, prepare
from expertmesh.convert.verify import verify
c = prepare(Path(sys.argv[1]), "w8a8", Path(sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(c)
verify(c)
print(c.checkpoint.bytes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""
    words = [sys.executable, "-c", program, str(folder), str(tmp_path / "out")]
    size, grown = map(int, subprocess.run(words, check=True, capture_output=True, text=True).stdout.split())
    assert size > MEMORY > grown


# --- what is refused


def refused(folder: Path, to: str, out: Path, words: str, shard_size: int = SHARD) -> None:
    with pytest.raises(InputError, match=words) as caught:
        made(folder, to, out, shard_size)
    assert "\n" not in str(caught.value)


def test_what_is_refused(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(plain, "w8a8", plain / "out", "is inside of the source")
    refused(plain, "w8a8", plain, "is inside of the source")
    refused(plain / "config.json", "w8a8", tmp_path / "out", "config.json")
    (tmp_path / "file").write_text("")
    refused(plain, "w8a8", tmp_path / "file", "is a file, not a folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    refused(plain, "w8a8", tmp_path / "full", "has thesis.tex in it, which is of no conversion")
    refused(plain, "w8a8", tmp_path / "file" / "out", "Not a directory")
    with alone_in(tmp_path / "full"):
        refused(plain, "w8a8", tmp_path / "full", "another conversion is writing to this folder")
    usage = namedtuple("usage", "total used free")(10, 10, 1_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    refused(
        plain,
        "w8a8",
        tmp_path / "room",
        r"\d\.\d MB are to be written, and the disk has 0\.0 MB free; make room",
    )


def test_a_folder_of_another_conversion_is_refused(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(plain, "w8a8", out)
    before = contents(out)
    refused(plain, "int4", out, "was begun with --to w8a8; go on with that")
    refused(plain, "w8a8", out, f"was begun with --shard-size {SHARD}", SHARD + 1)
    refused(
        source(tmp_path / "other", routed_scaling_factor=1.0), "w8a8", out, "was begun with another source"
    )
    assert contents(out) == before
    (out / FILE).write_text('{"done": []}')
    refused(plain, "w8a8", out, "is no journal of a conversion, or damaged; delete the folder")


def test_a_source_that_cannot_be_converted(tmp_path: Path) -> None:
    folder = source(tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "w8a8", tmp_path / "out", "model.norm.weight holds numbers that are not finite")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"missing: lm_head\.weight"):
        prepare(folder, "w8a8", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_tied_embeddings_and_no_low_rank(tmp_path: Path) -> None:
    folder = source(tmp_path / "tied", tie_word_embeddings=True, q_lora_rank=None, num_nextn_predict_layers=0)
    c = made(folder, "fp8", tmp_path / "out")
    assert verify(c)["attention"].tensors == 12
    assert ModelConfig.from_folder(tmp_path / "out").fp8_block == (128, 128)
