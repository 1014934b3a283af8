"""Whole models: what the demo model writes on a device, judged by the same model in float32 on the CPU."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from expertmesh.bench.accelerator.outcome import Wrong
from expertmesh.convert.run import convert, prepare
from expertmesh.llm import LLM, demo_model
from expertmesh.mesh.topology import Topology
from expertmesh.request import SamplingParams

PROMPTS = ("Once upon a time", "def fibonacci(n):", "床前明月光")
# How much less likely, as a logarithm, a token of bfloat16 may be than the likeliest of float32: two of the steps that
# bfloat16 has between logits of 16 and 32; rows in INT8 take half of it. What is wrong is off by whole numbers.
MARGIN = 0.25
SMALL: dict[str, Any] = {"cache_tokens": 1 << 12, "max_context": 256, "prefix_cache": False}


def check_converted(options: dict[str, Any], to: str, cards: int, tokens: int) -> dict[str, Any]:
    """The same of the demo model as `convert` writes it, read and computed with as it is."""
    with TemporaryDirectory() as folder:
        out = Path(folder, to)
        convert(prepare(demo_model(), to, out))
        return check_tokens(options | {"quantise": to}, cards, tokens, out)


def check_tokens(
    options: dict[str, Any], cards: int, tokens: int, model: Path | None = None
) -> dict[str, Any]:
    """Greedy tokens of a device, each given to the reference after those before it: the reference's own choice has to
    be the same, or as likely but for the margin. options: of the engine, such as its device; model: a checkpoint, or
    None for the demo model. different: tokens that are not the likeliest of the reference; margin: the most that one
    of these is less likely."""
    greedy = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    processes: dict[str, Any] = {"ranks": "processes"} if cards > 1 else {}
    with LLM(model, dtype="bfloat16", topology=Topology(1, cards), **SMALL, **processes, **options) as llm:
        written = [output.token_ids for output in llm.generate(PROMPTS, greedy)]
        asked = [llm.tokens(prompt) for prompt in PROMPTS]
    judged = SamplingParams(max_tokens=0, prompt_logprobs=1)
    texts = [[*prompt, *found] for prompt, found in zip(asked, written, strict=True)]
    with LLM(model, dtype="float32", device="cpu", **SMALL) as reference:
        outputs = reference.generate(texts, judged)
    gaps = [
        max(chances.values()) - chances[token]
        for text, prompt, output in zip(texts, asked, outputs, strict=True)
        for token, chances in list(zip(text, output.prompt_logprobs or [], strict=True))[len(prompt) :]
        if chances
    ]
    worst = max(gaps)
    if not worst <= MARGIN:
        raise Wrong(
            f"{sum(gap > MARGIN for gap in gaps)} of {len(gaps)} tokens are not the reference's, which finds the worst "
            f"exp({worst:.2f}) times less likely than its own"
        )
    return {"tokens": len(gaps), "different": sum(gap > 0 for gap in gaps), "margin": worst}
