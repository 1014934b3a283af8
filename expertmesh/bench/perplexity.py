"""What an exchange's format costs: perplexity of the model on texts that it wrote itself, by algorithm."""

import math
from collections.abc import Sequence
from pathlib import Path

from expertmesh.llm import LLM
from expertmesh.mesh.topology import Topology
from expertmesh.request import SamplingParams

TOKENS = 256  # of each text


def perplexities(
    model: Path | None, prompts: Sequence[str], names: Sequence[str], topology: Topology
) -> dict[str, float]:
    """By algorithm, over all tokens of texts that one rank continued from the prompts at temperature 0.7 (seeded);
    the prompts themselves are not judged."""
    with LLM(model) as llm:
        params = SamplingParams(max_tokens=TOKENS, temperature=0.7, seed=0, ignore_eos=True)
        written = llm.generate(list(prompts), params)
    texts = [(output.prompt_token_ids, output.token_ids) for output in written]
    return {name: _perplexity(model, texts, name, topology) for name in names}


def _perplexity(
    model: Path | None, texts: Sequence[tuple[list[int], list[int]]], name: str, topology: Topology
) -> float:
    judge = SamplingParams(max_tokens=0, prompt_logprobs=0)
    total, count = 0.0, 0
    with LLM(model, topology=topology, exchange=name) as llm:
        outputs = llm.generate([prompt + text for prompt, text in texts], judge)
    for (prompt, text), output in zip(texts, outputs, strict=True):
        reports = (output.prompt_logprobs or [])[len(prompt) :]
        for token, report in zip(text, reports, strict=True):
            assert report is not None
            total -= report[token]
            count += 1
    return math.exp(total / count)
