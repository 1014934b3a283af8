"""Checkpoints of whole numbers: what is read of them, bit by bit, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertmesh import LLM, InputError, ModelConfig, SamplingParams, Topology
from expertmesh.config import EngineConfig
from expertmesh.config.precision import INT4, W8A8
from expertmesh.convert.run import DESCRIPTION, converted
from expertmesh.engine.checkpoint import load
from expertmesh.engine.memory import new_weights
from expertmesh.kernels.packed import Packed, PackedRows
from expertmesh.kernels.table import kernels_for
from expertmesh.model.deepseek import DeepSeek
from expertmesh.weights import Shard, static_bytes
from tests.convert.checkpoints import made, source
from tests.kernels.test_ops import NATIVE

ATTENTION = "model.layers.1.self_attn.o_proj."
EXPERT = "model.layers.1.mlp.experts.3.up_proj."
Tensors = dict[str, Tensor]
native = pytest.mark.skipif(not NATIVE, reason="no C++ compiler")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as they were given, and as whole numbers; one file each."""
    base = tmp_path_factory.mktemp("quantised")
    found = {"plain": source(base / "plain", moe_intermediate_size=128, torch_dtype="bfloat16")}
    for to in ("w8a8", "int4"):
        made(found["plain"], to, base / to, 1 << 30)
        found[to] = base / to
    return found


def kept(folder: Path, shard: Shard | None = None, **options: Any) -> dict[str, Any]:
    """All weights of a rank by official name, packed ones as the whole matrix that they are rows of."""
    checkpoint = converted(folder)
    config = EngineConfig(**options)
    dtype = config.dtype_of(checkpoint.config)
    kernels = kernels_for("cpu", dtype)
    settled = config.resolve(checkpoint.config, 1 << 30)
    model = DeepSeek(
        checkpoint.config,
        shard or Shard.whole(checkpoint.config),
        kernels,
        new_weights(settled, dtype, "cpu", kernels),
    )
    load(checkpoint, model.weights(), shard or Shard.whole(checkpoint.config))
    return {n: w.packed if isinstance(w, PackedRows) else w for n, w in model.weights().items()}


def same(ours: dict[str, Any], others: dict[str, Any]) -> None:
    assert ours.keys() == others.keys()
    for name, weight in ours.items():
        if isinstance(weight, Packed):
            assert weight.format is others[name].format, name
            for part in ("data", "scale", "sums"):
                assert torch.equal(getattr(weight, part), getattr(others[name], part)), (name, part)
        elif isinstance(weight, Tensor):
            assert torch.equal(weight, others[name]), name
        else:
            assert torch.equal(weight.unpacked(), others[name].unpacked()), name


@native
@pytest.mark.parametrize(
    ("to", "quantise", "format"), [("w8a8", "w8a8", W8A8), ("int4", "experts_int4", INT4)]
)
def test_the_bits_are_those_of_the_engine(
    to: str, quantise: str, format: Any, folders: dict[str, Path]
) -> None:
    """Which quantises the same weights while it loads them."""
    ours = kept(folders[to])
    same(ours, kept(folders["plain"], quantise=quantise))
    assert ours[f"{EXPERT}weight"].format is format


@native
def test_a_tp_group_keeps_parts_of_the_same_numbers(folders: dict[str, Path]) -> None:
    whole = kept(folders["w8a8"])
    slots = Shard.whole(ModelConfig.from_folder(folders["w8a8"])).slots
    parts = [kept(folders["w8a8"], Shard(slots, rank, 2)) for rank in range(2)]
    # Split by columns: all parts have the scales of the whole. By rows: each has those of its own.
    for name, axis in ((ATTENTION, 1), ("model.layers.0.self_attn.q_b_proj.", 0)):
        found = torch.cat([part[f"{name}weight"].unpacked() for part in parts], axis)
        assert parts[0][f"{name}weight"].format is W8A8
        assert torch.equal(found, whole[f"{name}weight"].unpacked())
    down = [part["model.layers.0.mlp.down_proj.weight"].unpacked() for part in parts]
    assert torch.equal(torch.cat(down, 1), whole["model.layers.0.mlp.down_proj.weight"].unpacked())


@pytest.mark.parametrize("to", ["w8a8", "int4"])
def test_dequantised_where_it_is_asked_for(to: str, folders: dict[str, Path]) -> None:
    """For kernels that compute in float32, and with quantise none: numbers times scales, as the tools document it."""
    tensors = load_file(next(folders[to].glob("*.safetensors")))
    if to == "w8a8":
        exact = tensors[f"{EXPERT}weight"].float() * tensors[f"{EXPERT}weight_scale"]
    else:
        words = tensors[f"{EXPERT}weight_packed"].long() & 0xFFFFFFFF
        numbers = torch.stack([words // 16**i % 16 - 8 for i in range(8)], -1).flatten(1)
        exact = numbers[:, :48] * tensors[f"{EXPERT}weight_scale"]
    found = kept(folders[to], dtype="float32")[f"{EXPERT}weight"]
    assert torch.equal(found, exact)
    if NATIVE:
        plain = kept(folders[to], quantise="none")
        assert torch.equal(plain[f"{EXPERT}weight"].unpacked()[3, 128:], exact.bfloat16().float())


@native
@pytest.mark.parametrize(("to", "quantise"), [("w8a8", "w8a8"), ("int4", "experts_int4")])
def test_an_engine_takes_the_precision_of_the_checkpoint(
    to: str, quantise: str, folders: dict[str, Path]
) -> None:
    params, prompts = SamplingParams(max_tokens=8, temperature=0, logprobs=2), [[5, 6, 7], [9] * 20]

    def outputs(folder: Path, **options: Any) -> list[Any]:
        with LLM(folder, **options) as llm:
            engine, config = llm.engine, llm.engine.config
            assert config.quantise == options.get("quantise", quantise)
            packed = engine.kernels.graph is not None
            expected = static_bytes(
                engine.model, "bfloat16", Shard.whole(engine.model), config.quantise, packed=packed
            )
            if engine.layout.topology.ranks == 1:
                assert engine.ranks.memory.kinds == expected
            return [(o.token_ids, o.logprobs) for o in llm.generate(prompts, params)]

    found = outputs(folders[to])
    assert found == outputs(folders["plain"], quantise=quantise)
    assert len(outputs(folders[to], topology=Topology(1, 2, 2))[1][0]) == 8
    assert len(outputs(folders[to], quantise="none")[0][0]) == 8


# --- other tools' ways, and damage


def changed(folder: Path, out: Path, change: Callable[[Tensors, dict[str, Any]], None]) -> Path:
    """A copy whose tensors and description (or config.json, where there is none) are changed."""
    out.mkdir()
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    said = DESCRIPTION if (folder / DESCRIPTION).exists() else "config.json"
    fields = json.loads((folder / said).read_text())
    change(tensors, fields)
    for file in folder.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    for index in out.glob("*.index.json"):
        index.unlink()
    name = "quant_model_weights.safetensors" if said == DESCRIPTION else "model.safetensors"
    save_file(tensors, out / name)
    (out / said).write_text(json.dumps(fields))
    return out


def static(tensors: Tensors, types: dict[str, Any], scale: float = 0.03125, offset: float = 5.0) -> None:
    """The output projection of attention, for activations of one scale and offset (W8A8)."""
    weight, sizes = (tensors[f"{ATTENTION}weight"], tensors[f"{ATTENTION}weight_scale"])
    tensors |= {
        f"{ATTENTION}input_scale": torch.tensor([scale]),
        f"{ATTENTION}input_offset": torch.tensor([offset]),
        f"{ATTENTION}deq_scale": sizes[:, 0] * scale,
        f"{ATTENTION}quant_bias": (-weight.float().sum(1) * offset).int(),
    }
    del tensors[f"{ATTENTION}weight_scale"], tensors[f"{ATTENTION}weight_offset"]
    types[f"{ATTENTION}weight"] = "W8A8"


def static_bits(tensors: Tensors, types: dict[str, Any]) -> None:
    static(tensors, types)
    bits = tensors[f"{ATTENTION}deq_scale"].view(torch.int32).long()
    tensors[f"{ATTENTION}deq_scale"] = bits


def mixed(tensors: Tensors, types: dict[str, Any]) -> None:
    """W8A8_MIX; flat scales, zeros for norms, an MTP layer that is not there."""
    sizes = tensors[f"{ATTENTION}weight_scale"].flatten()
    static(tensors, types)
    tensors[f"{ATTENTION}weight_scale"] = sizes
    tensors["model.layers.0.input_layernorm.bias"] = torch.zeros(48)
    types[f"{ATTENTION}weight"] = "W8A8_MIX"
    for name in [n for n in tensors if n.startswith("model.layers.2.")]:
        del tensors[name]


@pytest.mark.parametrize("change", [static, static_bits, mixed])
def test_matrices_for_activations_of_one_scale(
    change: Callable[[Tensors, dict[str, Any]], None], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Are read as those for activations that are quantised row by row: the numbers are the same. The scale is a power
    of two here, so that the scales are exact."""
    folder = changed(folders["w8a8"], tmp_path / "static", change)
    ours, others = (kept(f, dtype="float32") for f in (folder, folders["w8a8"]))
    assert torch.equal(ours[f"{ATTENTION}weight"], others[f"{ATTENTION}weight"])
    assert converted(folder).has_mtp == (change is not mixed)


def _set(name: str, value: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, types: dict[str, Any]) -> None:
        if value is None:
            del tensors[name]
        elif isinstance(value, str | dict):
            types[name] = value
        else:
            tensors[name] = value(tensors[name]) if callable(value) else value

    return change


def _first(number: float) -> Callable[[Tensor], Tensor]:
    def change(old: Tensor) -> Tensor:
        new = old.clone()
        new.flatten()[0] = number
        return new

    return change


def biased(tensors: Tensors, types: dict[str, Any]) -> None:
    static(tensors, types)
    tensors[f"{ATTENTION}quant_bias"][2] += 1000


HOSTILE = [
    ("w8a8", _set(f"{EXPERT}weight_scale", None), rf"missing: {EXPERT}weight_scale"),
    ("w8a8", _set(f"{EXPERT}weight", None), rf"missing: {EXPERT}weight\b"),
    (
        "w8a8",
        _set(f"{EXPERT}weight_scale", torch.ones(128, 2)),
        r"shape of .*weight_scale: \[128, 2\] in the file",
    ),
    ("w8a8", _set(f"{EXPERT}weight_scale", torch.ones(128, 1).int()), r"type of .*weight_scale: torch.int32"),
    ("w8a8", _set(f"{EXPERT}weight", torch.ones(128, 48)), r"type of .*weight: torch.float32"),
    ("w8a8", _set(f"{EXPERT}weight", "W4A8_DYNAMIC"), "W4A8_DYNAMIC by its description; only FLOAT and"),
    ("w8a8", _set(f"{EXPERT}weight", "FLOAT"), "surplus: .*weight_scale"),
    ("w8a8", _set("metadata", {"quarot": {"a": 1}}), "rotations of activations"),
    ("w8a8", _set("model.norm.bias", torch.ones(48)), r"surplus: model\.norm\.bias, which is not 0"),
    ("w8a8", _set(f"{EXPERT}weight_scale", _first(-1.0)), "its scales are not all finite and at least 0"),
    (
        "w8a8",
        _set(f"{EXPERT}weight_scale", _first(torch.nan)),
        "its scales are not all finite and at least 0",
    ),
    ("w8a8", _set(f"{EXPERT}weight_offset", _first(1.0)), "weight_offset is not 0; only symmetric numbers"),
    ("w8a8", biased, "quant_bias holds a bias, and the model has none there"),
    ("int4", _set(f"{EXPERT}weight_scale", None), rf"missing: {EXPERT}weight_scale"),
    (
        "int4",
        _set(f"{EXPERT}weight_packed", torch.ones(128, 5).int()),
        r"shape of .*weight_packed: \[128, 5\]",
    ),
    (
        "int4",
        _set(f"{EXPERT}weight_shape", torch.tensor([128, 47])),
        r"value of .*weight_shape: not \[128, 48\]",
    ),
    ("int4", _set(f"{EXPERT}weight_scale", _first(torch.inf)), "its scales are not all finite"),
    ("int4", _set("quantization_config", {"quant_method": "compressed-tensors"}), "only 'pack-quantized'"),
    ("int4", _set("quantization_config", {"quant_method": "gptq"}), "quantisation 'gptq' is not supported"),
]


@pytest.mark.parametrize(("to", "change", "words"), HOSTILE)
def test_what_is_refused(to: str, change: Any, words: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders[to], tmp_path / "bad", change)
    with pytest.raises(InputError, match=words):
        kept(folder, dtype="float32")


def test_a_description_that_is_not_there(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders["w8a8"], tmp_path / "bad", lambda tensors, types: None)
    (folder / DESCRIPTION).unlink()
    with pytest.raises(InputError, match=r"quant_model_description\*\.json is missing"):
        kept(folder)
