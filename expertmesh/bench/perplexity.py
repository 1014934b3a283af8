"""What formats cost: perplexity of a model on texts, in one configuration or another."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from expertmesh.llm import LLM
from expertmesh.request import SamplingParams

TOKENS = 256  # of each text that a model writes
ROW = 512  # tokens of a text that are judged together
# The tokens of a text: those that come before what is judged, and those that are judged.
Text: TypeAlias = tuple[list[int], list[int]]


def written(model: Path | None, prompts: Sequence[str], times: int = 1) -> list[Text]:
    """Texts that the model continues from each prompt, so many times, at temperature 0.7 (seeded); the prompts
    themselves are not judged."""
    with LLM(model) as llm:
        params = [
            SamplingParams(max_tokens=TOKENS, temperature=0.7, seed=seed, ignore_eos=True)
            for seed in range(times)
            for _ in prompts
        ]
        outputs = llm.generate(list(prompts) * times, params)
    return [(list(output.prompt_token_ids), list(output.token_ids)) for output in outputs]


def cut(llm: LLM, text: str, most: int) -> list[Text]:
    """Rows of the first `most` tokens of a text; a row's first token is not judged."""
    tokens = llm.engine.intake.tokenizer.encode(text)[:most] if llm.engine.intake.tokenizer else []
    return [(row[:1], row[1:]) for i in range(0, len(tokens), ROW) if len(row := tokens[i : i + ROW]) > 1]


def perplexity(llm: LLM, texts: Sequence[Text]) -> float:
    """Over all tokens that are judged."""
    judge = SamplingParams(max_tokens=0, prompt_logprobs=0)
    total, count = 0.0, 0
    outputs = llm.generate([before + text for before, text in texts], judge)
    for (before, text), output in zip(texts, outputs, strict=True):
        reports = (output.prompt_logprobs or [])[len(before) :]
        for token, report in zip(text, reports, strict=True):
            assert report is not None
            total -= report[token]
            count += 1
    return math.exp(total / count)


def by_exchange(
    model: Path | None, prompts: Sequence[str], names: Sequence[str], topology: Any
) -> dict[str, float]:
    """By the algorithm that takes rows to their experts, on texts that one rank has written."""
    texts = written(model, prompts)
    found = {}
    for name in names:
        with LLM(model, topology=topology, exchange=name) as llm:
            found[name] = perplexity(llm, texts)
    return found
