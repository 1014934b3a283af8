"""Whole models by the ops of torch_npu on the published semantics, from a checkpoint to greedy tokens, against the same
with the reference of every op: on one rank, on eight without and with TP groups; and W8A8 against that of the CPU."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from expertmesh import LLM, SamplingParams, Topology
from expertmesh.comm import local
from expertmesh.engine import engine
from expertmesh.errors import InputError
from expertmesh.kernels import Kernels
from expertmesh.kernels.table import accelerated, fused_by_ascend, kernels_for, reference_kernels
from expertmesh.llm import demo_model
from tests.kernels.npu.published import registered
from tests.support.files import TINY, random_checkpoint

# Of different lengths, so that a step has rows that decode and, at first, rows of prompts.
PROMPTS = [[5, 60, 7, 19, 200], [9], [3, 4] * 20]
TOKENS = 4
LAYOUTS = {
    "one rank": Topology(),
    "8 ranks": Topology(2, 4, 1),
    "8 ranks, TP groups of 2": Topology(2, 4, 2),
}
TEXT = (
    "Once upon a time there was a poor woodcutter who lived with his wife and his two children at the edge of a "
    "forest."
)


def llm(folder: Path, kernels: Kernels, topology: Topology = Topology(), **options: Any) -> LLM:  # noqa: B008 (frozen)
    with (
        mock.patch.object(engine, "kernels_for", lambda *_: kernels),
        mock.patch.object(local, "cores", lambda: 1),
    ):
        return LLM(folder, topology=topology, **options)


def generated(folder: Path, kernels: Kernels, topology: Topology) -> tuple[list[list[int]], list[float]]:
    """Tokens of each prompt, and the logarithm of the probability of each."""
    params = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=0, ignore_eos=True)
    with llm(folder, kernels, topology, dtype="float32") as running:
        outputs = running.generate(PROMPTS, params)
    chances = [
        step[token] for o in outputs for token, step in zip(o.token_ids, o.logprobs or [], strict=True)
    ]
    return [o.token_ids for o in outputs], chances


def line(name: str, folder: Path, kernels: Kernels, topology: Topology) -> dict[str, Any]:
    found, chances = generated(folder, kernels, topology)
    expected, right = generated(folder, reference_kernels(), topology)
    far = max(abs(a - b) for a, b in zip(chances, right, strict=True))
    return {"example": name, "found": found, "expected": expected, "far": far}


def judged(kernels: Kernels) -> list[float]:
    """What the demo model in W8A8 thinks of each token of a text: the logarithm of its probability."""
    with llm(demo_model(), kernels, quantise="w8a8") as running:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        (output,) = running.generate([TEXT], params)
    return [next(iter(step.values())) for step in output.prompt_logprobs or [] if step]


def refused(kernels: Kernels) -> str:
    try:
        llm(demo_model(), kernels, page_size=32).close()
    except InputError as error:
        return str(error)
    return ""


def check() -> Iterator[dict[str, Any]]:
    import torch_npu  # noqa: F401

    torch.set_num_threads(1)
    library = registered()
    free, bound = fused_by_ascend({}), accelerated("npu")
    yield {"origin": bound.origin, "free": free.origin}
    for name, topology in LAYOUTS.items():
        yield line(f"the demo model, {name}", demo_model(), free, topology)
    yield line("the demo model within a card's limits", demo_model(), bound, Topology())
    with tempfile.TemporaryDirectory() as folder:
        for changes in ({"attention_bias": True}, {"q_lora_rank": None}, {"rope_interleave": False}):
            random_checkpoint(Path(folder), TINY | changes)
            yield line(f"random, {changes}", Path(folder), free, Topology(1, 2, 2))
    by = {"npu": judged(free), "bound": judged(bound), "cpu": judged(kernels_for("cpu", "bfloat16"))}
    yield {"w8a8": by}
    yield {"refused": refused(free)}
    del library
