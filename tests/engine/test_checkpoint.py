"""Opening a folder and loading one rank's weights: what is read, what is refused, and that nothing is executed."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertmesh import LLM, InputError, ModelConfig, SamplingParams
from expertmesh.device import free_memory
from expertmesh.engine.checkpoint import (
    Checkpoint,
    check_memory,
    load,
    open_checkpoint,
)
from expertmesh.engine.storage import dequantise_blocks
from expertmesh.kernels import kernels_for
from expertmesh.model.deepseek import DeepSeek
from expertmesh.model.layers import New
from expertmesh.weights import DTYPE_BYTES, Shard
from tests.support.files import (
    FP8,
    TINY,
    dequantised,
    official_config,
    random_checkpoint,
    random_tensors,
    write_checkpoint,
    write_config,
    write_header,
    write_index,
    write_sparse,
)

BLOCK = 10  # divides no size of TINY evenly by chance alone
TINY_FP8 = TINY | {
    "quantization_config": FP8 | {"weight_block_size": [BLOCK, BLOCK]},
    "torch_dtype": "bfloat16",
}


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(folder, ModelConfig.from_folder(folder))


def model_of(config: ModelConfig, shard: Shard, dtype: torch.dtype, device: str = "cpu") -> DeepSeek:
    kernels = kernels_for("cpu")
    return DeepSeek(config, shard, kernels, New(dtype, torch.device(device), kernels))


def loaded(folder: Path, shard: Shard | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    checkpoint = opened(folder)
    shard = shard or Shard.whole(checkpoint.config)
    weights = model_of(checkpoint.config, shard, dtype).weights()
    load(checkpoint, weights, shard)
    return weights


def broken(folder: Path) -> str:
    """The one message that opening this folder gives."""
    with pytest.raises(InputError) as caught:
        opened(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


# --- what is read


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_values(tmp_path: Path, stored: str, computed: torch.dtype, shards: int) -> None:
    config = TINY | {"torch_dtype": stored, "attention_bias": True}
    tensors = random_checkpoint(tmp_path, config, shards=shards)
    weights = loaded(tmp_path, dtype=computed)
    assert weights.keys() == tensors.keys()
    for name, tensor in weights.items():
        router = name.endswith(("gate.weight", "correction_bias"))  # decides who computes: never rounded
        assert tensor.dtype == (torch.float32 if router else computed)
        assert torch.equal(tensor, tensors[name].to(tensor.dtype)), name


@pytest.mark.parametrize("shards", [1, 2])
def test_fp8_is_what_its_dequantised_copy_is(tmp_path: Path, shards: int) -> None:
    """Weights bit by bit, and what an engine makes of both."""
    (tmp_path / "fp8").mkdir()
    (tmp_path / "plain").mkdir()
    plain = dequantised(random_checkpoint(tmp_path / "fp8", TINY_FP8, shards=shards), BLOCK)
    write_checkpoint(tmp_path / "plain", TINY, plain)
    weights = loaded(tmp_path / "fp8")
    assert all(torch.equal(tensor, plain[name]) for name, tensor in weights.items())
    params = SamplingParams(max_tokens=24, temperature=0, logprobs=3)
    outputs = [LLM(tmp_path / n, dtype="float32").generate([[5, 6, 7]], params) for n in ("fp8", "plain")]
    assert outputs[0][0].token_ids == outputs[1][0].token_ids
    assert outputs[0][0].logprobs == outputs[1][0].logprobs


@pytest.mark.parametrize("config", [TINY | {"attention_bias": True}, TINY_FP8], ids=["plain", "fp8"])
@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_a_tp_group_make_the_whole(tmp_path: Path, config: dict[str, Any], size: int) -> None:
    random_checkpoint(tmp_path, config)
    checkpoint, whole = opened(tmp_path), loaded(tmp_path)
    slots = Shard.whole(checkpoint.config).slots
    parts = [loaded(tmp_path, Shard(slots, rank, size)) for rank in range(size)]
    for name, tensor in whole.items():
        split = checkpoint.weights[name].split
        if split is None:
            assert all(torch.equal(part[name], tensor) for part in parts), name
        else:
            assert torch.equal(torch.cat([part[name] for part in parts], split), tensor), name


def test_slots_hold_the_experts_that_the_shard_says(tmp_path: Path) -> None:
    tensors = random_checkpoint(tmp_path, TINY)
    config = ModelConfig.from_folder(tmp_path)
    shard = Shard({1: (6, -1, 2)})
    model = model_of(config, shard, torch.float32)
    load(opened(tmp_path), model.weights(), shard)
    moe: Any = model.layers[1][1]
    for slot, expert in ((0, 6), (2, 2)):
        gate, up = (tensors[f"model.layers.1.mlp.experts.{expert}.{n}_proj.weight"] for n in ("gate", "up"))
        assert torch.equal(moe.gate_up[slot], torch.cat((gate, up)))
    names = [n for n in model.weights() if ".experts." in n]
    assert len(names) == 6 and not [n for n in names if ".experts.0." in n]


def test_axis_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, TINY)
    with pytest.raises(InputError, match="does not divide by the TP group's size 3"):
        loaded(tmp_path, Shard({1: (0,)}, 0, 3))


def test_bytes_read_are_those_of_the_share(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, TINY)
    checkpoint = opened(tmp_path)
    assert checkpoint.bytes == sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    for shard in (Shard.whole(checkpoint.config), Shard({1: (3,)}, 1, 2)):
        weights = model_of(checkpoint.config, shard, torch.bfloat16).weights()
        expected = sum(tensor.numel() * 4 for tensor in weights.values())  # stored as float32
        assert load(checkpoint, weights, shard) == expected
    assert sum(tensor.nbytes for tensor in weights.values()) < expected


@st.composite
def blocked(draw: st.DrawFn) -> tuple[Tensor, Tensor, tuple[int, int], list[range]]:
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    block = (draw(st.integers(1, 16)), draw(st.integers(1, 16)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = (torch.randn(rows, columns, generator=generator) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=generator) + 0.1
    first = [draw(st.integers(0, n - 1)) for n in (rows, columns)]
    last = [draw(st.integers(f + 1, n)) for f, n in zip(first, (rows, columns), strict=True)]
    return weight, scale, block, [range(f, n) for f, n in zip(first, last, strict=True)]


@given(blocked(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_dequantise_blocks(
    case: tuple[Tensor, Tensor, tuple[int, int], list[range]], dtype: torch.dtype
) -> None:
    """Against one number at a time: partial last blocks, parts that begin and end inside a block."""
    weight, scale, block, (rows, columns) = case
    target = torch.full((len(rows), len(columns)), torch.nan, dtype=dtype)
    part = weight[rows.start : rows.stop, columns.start : columns.stop]
    dequantise_blocks(part, scale, block, [rows, columns], target)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            number = float(weight[row, column]) * scale[row // block[0], column // block[1]]
            assert target[i, j] == number.to(dtype)


def test_mtp_layers_may_be_absent_as_a_whole(tmp_path: Path) -> None:
    config = TINY | {"num_nextn_predict_layers": 1}
    tensors = random_tensors(config)
    write_checkpoint(tmp_path, config, tensors)
    assert opened(tmp_path).has_mtp
    without = {n: t for n, t in tensors.items() if not n.startswith("model.layers.2.")}
    write_checkpoint(tmp_path, config, without)
    assert not opened(tmp_path).has_mtp
    write_checkpoint(tmp_path, config, without | {"model.layers.2.enorm.weight": torch.ones(48)})
    assert "missing: model.layers.2.hnorm.weight" in broken(tmp_path)


def test_tables_and_tied_heads_are_passed_over(tmp_path: Path) -> None:
    """Moonlight and Kimi K2 carry rotary tables; some writers store a tied head all the same."""
    config = TINY | {"tie_word_embeddings": True}
    tensors = random_tensors(config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = torch.zeros(280, 48)
    write_checkpoint(tmp_path, config, tensors)
    assert len(opened(tmp_path).entries) == len(tensors) - 2


def test_files_may_be_links(tmp_path: Path) -> None:
    """The hub's cache keeps the data elsewhere."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    random_checkpoint(blobs, TINY, shards=2)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert opened(snapshot).entries.keys() == opened(blobs).entries.keys()


# --- what is refused


def test_every_wrong_tensor_is_named_at_once(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    del tensors["model.norm.weight"]
    tensors["model.extra"] = torch.ones(2)
    tensors["lm_head.weight"] = torch.ones(280, 47)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.float8_e4m3fn)
    write_checkpoint(tmp_path, TINY, tensors, shards=2)
    message = broken(tmp_path)
    assert "4 problems" in message
    assert "missing: model.norm.weight" in message
    assert "surplus: model.extra" in message
    assert "shape of lm_head.weight: [280, 47] in the file, [280, 48] in the model" in message
    assert "type of model.embed_tokens.weight: torch.float8_e4m3fn in the file, float32" in message


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, {"model.norm.weight": torch.ones(48)})
    message = broken(tmp_path)
    assert message.count("missing: ") == 20 and "more" in message.splitlines()[-1]


def test_fp8_tensors_without_scales(tmp_path: Path) -> None:
    tensors = random_tensors(TINY_FP8)
    del tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"]
    write_checkpoint(tmp_path, TINY_FP8, tensors)
    assert "missing: model.layers.0.self_attn.o_proj.weight_scale_inv" in broken(tmp_path)


def test_plain_checkpoint_that_claims_fp8(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY_FP8, random_tensors(TINY))
    message = broken(tmp_path)
    assert "80 problems" in message  # 40 matrices: each of another type, each without scales
    assert "missing: model.layers.0.self_attn.q_a_proj.weight_scale_inv" in message


def test_truncated_file(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, TINY)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors: truncated" in broken(tmp_path)


def test_garbage_header(tmp_path: Path) -> None:
    write_config(tmp_path, TINY)
    write_header(tmp_path / "model.safetensors", b"garbage")
    assert "model.safetensors" in broken(tmp_path)


def test_missing_shards_are_named_with_what_is_still_to_come(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, TINY, shards=9)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    write_index(tmp_path, index["weight_map"], total=50_000_000_000)
    for number in range(2, 9):
        (tmp_path / f"model-{number:05}-of-00009.safetensors").unlink()
    message = broken(tmp_path)
    assert (
        "7 of 9 shards are missing: model-00002-of-00009.safetensors" in message and "and 2 more" in message
    )
    assert "50.0 GB are still to come" in message
    write_index(tmp_path, index["weight_map"], total=1 << 60)
    assert "too small for this model" in broken(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", 7, None])
def test_index_that_names_files_elsewhere(tmp_path: Path, name: Any) -> None:
    write_config(tmp_path, TINY)
    save_file({"a": torch.ones(1)}, tmp_path.parent / "model.safetensors")
    write_index(tmp_path, {"model.norm.weight": name})
    assert "files outside the folder" in broken(tmp_path)


BAD_INDEXES = [
    b"",
    b"{",
    b"[]",
    b"{}",
    b'{"weight_map": []}',
    b'{"weight_map": {"a": []}}',
    b"[" * 100_000,
    b"\xff",
]


@pytest.mark.parametrize("content", BAD_INDEXES, ids=range(len(BAD_INDEXES)))
def test_index_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    write_config(tmp_path, TINY)
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    assert "index.json" in broken(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    write_config(tmp_path, TINY)
    assert "neither model.safetensors nor" in broken(tmp_path)


class Trap:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    folder, trace = tmp_path / "model", tmp_path / "trace"
    folder.mkdir()
    write_config(folder, TINY)
    for name in ("pytorch_model.bin", "consolidated.pt"):
        (folder / name).write_bytes(pickle.dumps(Trap(trace)))
    assert "consolidated.pt is of a format that is not read" in broken(folder)
    assert not trace.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert trace.exists(), "the trap itself must work"


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    """With auto_map pointing at it, and the folder as the working directory, where imports look first."""
    folder, trace = tmp_path / "model", tmp_path / "trace"
    folder.mkdir()
    config = TINY | {"auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}}
    random_checkpoint(folder, config)
    for name in ("modeling_deepseek", "configuration_deepseek", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"open({str(trace)!r}, 'w')\n")
    code = (
        "import sys; sys.path.append('.')\n"
        "from expertmesh import LLM, SamplingParams\n"
        "print(LLM('.').generate([[3, 4]], SamplingParams(max_tokens=2))[0].token_ids)\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not trace.exists()


# --- memory, and a checkpoint of the size of V3


def test_too_little_memory_is_said_in_gigabytes() -> None:
    check_memory(Path("model"), 10, 10)
    with pytest.raises(InputError, match=r"model: its weights take 20\.0 GB in memory and 3\.5 GB are free"):
        check_memory(Path("model"), 20_000_000_000, 3_500_000_000)


@pytest.fixture(scope="module")
def v3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3 with holes for data: 163 files of real headers and real sizes."""
    folder = tmp_path_factory.mktemp("v3")
    write_sparse(folder, official_config("deepseek-v3"), shards=163)
    return folder


def test_v3_is_refused_before_anything_is_loaded(v3_folder: Path) -> None:
    if free_memory() > 1_300_000_000_000:
        pytest.skip("this machine could hold it")
    with pytest.raises(InputError, match=r"its weights take 13\d\d\.\d GB in memory"):
        LLM(v3_folder)


def test_one_rank_of_v3_reads_its_own_ranges(v3_folder: Path) -> None:
    """A rank of TP 8 with two experts, on a dense and an expert layer: the last element of its share of each split
    axis arrives in the last place, and the bytes read are those of its share."""
    checkpoint = opened(v3_folder)
    assert len(checkpoint.entries) == 91_991 and checkpoint.has_mtp
    shard = Shard(dict.fromkeys(checkpoint.config.moe_layers, (7, -1, 200)), tp_rank=3, tp_size=8)
    shapes = model_of(checkpoint.config, shard, torch.bfloat16, "meta").weights()
    assert ("model.layers.3.mlp.experts.200.up_proj.weight" in shapes) is True
    assert ("model.layers.3.mlp.experts.8.up_proj.weight" in shapes) is False
    names = [n for n in shapes if n.startswith(("model.layers.0.", "model.layers.3."))]
    targets = {n: torch.empty_like(shapes[n], device="cpu") for n in names}
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.3.self_attn.q_b_proj.weight"):
        mark_last(checkpoint, name, shard)
    assert load(checkpoint, targets, shard) == sum(share(checkpoint, name, shard) for name in names)
    for name, tensor in targets.items():
        marked = name.endswith(("0.mlp.down_proj.weight", "3.self_attn.q_b_proj.weight"))
        assert tensor.count_nonzero() == (1 if marked else 0), name
        assert not marked or tensor[-1, -1] == 3.0


def share(checkpoint: Checkpoint, name: str, shard: Shard) -> int:
    """Bytes of a rank's part of a tensor, and of all its scales."""
    weight = checkpoint.weights[name]
    parts = 1 if weight.split is None else shard.tp_size
    scale = checkpoint.weights.get(f"{name}_scale_inv")
    return weight.numel // parts * DTYPE_BYTES[weight.dtype] + (scale.numel * 4 if scale else 0)


def mark_last(checkpoint: Checkpoint, name: str, shard: Shard) -> None:
    """Write 1.0 * 3.0 where the last row and column of the shard's part is in the file."""
    weight, scale = checkpoint.weights[name], checkpoint.entries[f"{name}_scale_inv"]
    last = [
        (n if axis != weight.split else shard.part(n, name).stop) - 1 for axis, n in enumerate(weight.shape)
    ]
    put(
        checkpoint.entries[name].file,
        checkpoint.entries[name].offset + last[0] * weight.shape[1] + last[1],
        b"\x38",
    )
    block = last[0] // 128 * scale.shape[1] + last[1] // 128
    put(scale.file, scale.offset + block * 4, torch.tensor(3.0).numpy().tobytes())


def put(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)
