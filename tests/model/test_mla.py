"""Attention whose kernels want rotary rows of weights in halves, from checkpoints that have them interleaved."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from expertmesh import LLM, SamplingParams, Topology
from expertmesh.engine import engine
from expertmesh.kernels import Kernels, kernels_for
from expertmesh.request import Output
from tests.support.files import FP8, TINY, random_checkpoint

PLAIN = kernels_for("cpu")
# Library kernels take both orders.
HALVES = replace(PLAIN, de_interleaved=True)
# Blocks with one scale end within heads and within their rotary parts.
BLOCKS = {"quantization_config": FP8 | {"weight_block_size": [10, 10]}, "torch_dtype": "bfloat16"}


def generated(folder: Path, kernels: Kernels, topology: Topology) -> Sequence[Output]:
    params = SamplingParams(max_tokens=6, temperature=0, logprobs=2)
    with (
        mock.patch.object(engine, "kernels_for", lambda *_: kernels),
        LLM(folder, dtype="float32", topology=topology) as llm,
    ):
        return llm.generate([[5, 6, 7, 8, 9], [12]], params)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [{}, BLOCKS, {"attention_bias": True}, {"q_lora_rank": None}, {"rope_interleave": False}],
    ids=["plain", "FP8", "biased", "without a low rank", "in halves already"],
)
def test_the_order_of_rotary_rows_changes_nothing(tmp_path: Path, changes: dict[str, Any], tp: int) -> None:
    random_checkpoint(tmp_path, TINY | changes)
    found, expected = (generated(tmp_path, kernels, Topology(1, tp, tp)) for kernels in (HALVES, PLAIN))
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs is not None and other.logprobs is not None
        for mine, right in zip(one.logprobs, other.logprobs, strict=True):
            assert mine == pytest.approx(right, abs=1e-4)
