"""Whole models on Triton's interpreter, from a checkpoint to greedy tokens, against the same with the reference of
every op: the demo model on one rank, small random ones on two that share heads and experts."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from expertmesh import LLM, SamplingParams, Topology
from expertmesh.comm import local
from expertmesh.engine import engine
from expertmesh.kernels import Kernels
from expertmesh.kernels.table import accelerated, reference_kernels
from expertmesh.kernels.triton import tiles
from expertmesh.kernels.triton.tiles import CPU
from expertmesh.llm import demo_model
from tests.kernels.triton.example import Example
from tests.support.files import TINY, random_checkpoint

# Of different lengths, so that a step has rows that decode and, at first, rows of prompts.
PROMPTS = [[5, 60, 7, 19, 200], [9]]
TOKENS = 3
PAIR = Topology(1, 2, 2)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"attention_bias": True},
    "without a low rank of queries": {"q_lora_rank": None},
    "rotary parts in halves": {"rope_interleave": False},
}


def generated(folder: Path, kernels: Kernels, topology: Topology) -> tuple[list[list[int]], list[float]]:
    """Tokens of each prompt, and the logarithm of the probability of each."""
    params = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=0, ignore_eos=True)
    # Ranks take turns: the interpreter is for one thread.
    with (
        mock.patch.object(engine, "kernels_for", lambda *_: kernels),
        mock.patch.object(local, "cores", lambda: 1),
    ):
        llm = LLM(folder, dtype="float32", topology=topology)
    with llm:
        outputs = llm.generate(PROMPTS, params)
    chances = [
        step[token] for o in outputs for token, step in zip(o.token_ids, o.logprobs or [], strict=True)
    ]
    return [o.token_ids for o in outputs], chances


def line(name: str, folder: Path, topology: Topology = Topology()) -> dict[str, Any]:  # noqa: B008 (frozen)
    """Which ops ran as kernels of Triton, what came out, and the largest difference of a logarithm."""
    own, oracle = accelerated("cuda"), reference_kernels()
    (found, chances), (expected, right) = (generated(folder, k, topology) for k in (own, oracle))
    far = max(abs(a - b) for a, b in zip(chances, right, strict=True))
    ops = [op for op, origin in own.origin.items() if origin == "triton"]
    return {"example": name, "ops": ops, "found": found, "expected": expected, "far": far}


def large() -> dict[str, dict[str, dict[str, int]]]:
    """Tiles for fewer steps of the interpreter than examples of single kernels want."""
    return {
        kernel: {CPU: {name: 64 if name.startswith("BLOCK_") else 1 for name in targets[CPU]}}
        for kernel, targets in tiles.table().items()
    }


def check(examples: list[Example]) -> Iterator[dict[str, Any]]:
    made = large()
    with mock.patch.object(tiles, "table", lambda: made), tempfile.TemporaryDirectory() as folder:
        yield line("the demo model", demo_model())
        for name, changes in VARIANTS.items():
            random_checkpoint(Path(folder), TINY | changes)
            yield line(f"{name}, two ranks", Path(folder), PAIR)
