"""The model that ships with the package: the right architecture, trained, and the same in transformers."""

import inspect
import json.decoder
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from expertmesh import LLM, ModelConfig, SamplingParams
from expertmesh.bench.plain import write_plain_copy
from expertmesh.engine.checkpoint import open_checkpoint
from expertmesh.llm import demo_model
from tests.support.reference import TOLERANCE

PROMPTS = [
    "Once upon a time",
    "春望\n杜甫\n",
    "def read(path):\n",
    [{"role": "user", "content": "Tell me a tale."}],
]


def test_it_has_every_part_of_the_architecture() -> None:
    config = ModelConfig.from_folder(demo_model())
    checkpoint = open_checkpoint(demo_model(), config)
    assert checkpoint.has_mtp and config.fp8_block == (128, 128) and config.yarn is not None
    assert config.n_routed_experts >= 64 and (config.n_group, config.topk_group) == (8, 4)
    assert (
        config.num_experts_per_tok == 8 and config.n_shared_experts == 1 and config.first_k_dense_replace == 1
    )
    assert config.num_attention_heads % 8 == config.vocab_size % 8 == 0 and config.q_lora_rank
    assert checkpoint.bytes < 40e6


def test_transformers_says_the_same_in_float32(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(demo_model(), ModelConfig.from_folder(demo_model()))
    copy = write_plain_copy(checkpoint, tmp_path, "float32")
    reference = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    params = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True, logprobs=0)
    for output in LLM(dtype="float32").generate(PROMPTS, params):
        tokens = output.prompt_token_ids + output.token_ids
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens[:-1]])).logits[0, len(output.prompt_token_ids) - 1 :]
        expected = logits.log_softmax(-1)
        assert expected.argmax(-1).tolist() == output.token_ids
        own = torch.tensor(
            [report[t] for report, t in zip(output.logprobs or (), output.token_ids, strict=True)]
        )
        chosen = expected.gather(-1, torch.tensor(output.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(own, chosen, atol=TOLERANCE, rtol=0)


def test_it_has_learned_python() -> None:
    """The beginning of a module of its domain; chance would be the vocabulary's 8192."""
    text = inspect.getsource(json.decoder)[:5000]
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    (output,) = LLM().generate(text, params)
    pairs = zip(output.prompt_logprobs or (), output.prompt_token_ids, strict=True)
    found = [report[token] for report, token in pairs if report]
    assert len(found) > 1000 and math.exp(-sum(found) / len(found)) < 25
