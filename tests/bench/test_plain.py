"""The copy without FP8 blocks, which other engines are measured with, is the same model."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from expertmesh import LLM, InputError, ModelConfig
from expertmesh.bench.plain import write_plain_copy
from expertmesh.engine.checkpoint import Checkpoint, open_checkpoint
from tests.support.files import FP8, TINY, dequantised, random_checkpoint
from tests.support.reference import Pair, Reference, check_outputs, greedy, prompts_for

BLOCK = 16
TINY_FP8 = TINY | {"torch_dtype": "bfloat16", "num_nextn_predict_layers": 1}
TINY_FP8 |= {"quantization_config": FP8 | {"weight_block_size": [BLOCK, BLOCK]}}


def written(folder: Path, config: dict[str, Any] = TINY_FP8) -> tuple[Checkpoint, dict[str, Tensor], Path]:
    """An FP8 checkpoint, its tensors, and an empty folder."""
    source, copy = folder / "fp8", folder / "plain"
    source.mkdir()
    copy.mkdir()
    tensors = random_checkpoint(source, config, seed=3, shards=2)
    return open_checkpoint(source, ModelConfig.from_folder(source)), tensors, copy


@pytest.mark.parametrize("block", [[16, 16], [128, 128], [10, 24]])
def test_transformers_computes_with_the_copy_what_the_engine_does_with_the_original(
    tmp_path: Path, block: list[int]
) -> None:
    config = TINY_FP8 | {"quantization_config": FP8 | {"weight_block_size": block}}
    checkpoint, _, copy = written(tmp_path, config)
    assert write_plain_copy(checkpoint, copy, "float32") == copy
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")  # the others want sizes that are multiples of 16 bytes
    llm = LLM(checkpoint.folder, dtype="float32")
    outputs = llm.generate(
        prompts_for(TINY["vocab_size"], (2, 23)), greedy(TINY["vocab_size"], 8, prompt=True)
    )
    check_outputs(Pair(Reference(model), copy, TINY["vocab_size"]), outputs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_of_the_main_model_and_no_other(tmp_path: Path, dtype: str) -> None:
    """Without scales and without layers for multi-token prediction; what decides the routing is never rounded."""
    checkpoint, tensors, copy = written(tmp_path)
    write_plain_copy(checkpoint, copy, dtype)
    expected = {n: t for n, t in dequantised(tensors, BLOCK).items() if not n.startswith("model.layers.2.")}
    found = load_file(copy / "model.safetensors")
    assert found.keys() == expected.keys() and len(found) < len(dequantised(tensors, BLOCK))
    for name, tensor in found.items():
        bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if bias else getattr(torch, dtype)), name
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_copy_says_what_it_is(tmp_path: Path, dtype: str) -> None:
    checkpoint, _, copy = written(tmp_path)
    write_plain_copy(checkpoint, copy, dtype)
    config = json.loads((copy / "config.json").read_text())
    # Both names of the field, for older and newer readers.
    said = {"torch_dtype": dtype, "dtype": dtype}
    assert config == {k: v for k, v in TINY_FP8.items() if k != "quantization_config"} | said
    prompts, params = prompts_for(TINY["vocab_size"], (3, 9)), greedy(1, 8)
    given, original = (
        LLM(folder, dtype="auto" if folder == copy else dtype).generate(prompts, params)
        for folder in (copy, checkpoint.folder)
    )
    assert [output.token_ids for output in given] == [output.token_ids for output in original]


def test_what_it_needs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, _, copy = written(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="needs `pip install safetensors`"):
        write_plain_copy(checkpoint, copy, "float32")
    assert not list(copy.iterdir())
