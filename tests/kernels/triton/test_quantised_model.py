"""Models whose weights kernels in Triton keep in 8 bits (`quantised_model`)."""

import math
from dataclasses import replace
from typing import Any

import pytest

from expertmesh import ModelConfig
from expertmesh.kernels.triton.weights import PRECISIONS
from expertmesh.llm import demo_model
from expertmesh.weights import Shard, static_bytes
from tests.kernels.triton.conftest import Found

# Of a token's logarithm, and of the mean of all. By bytes of FP8 weights alone are rounded, on both sides the same, and
# results to bfloat16 in other places. Rows of 8 bits are rounded in other places too, in FP8 on one side.
BOUNDS = {
    "fp8 by its bytes": ("fp8", 0.2, 0.05), "fp8, two ranks": ("fp8", 0.3, 0.05),
    "w8a8": ("w8a8", 0.2, 0.05), "w8a8, a checkpoint": ("w8a8", 0.2, 0.05),
}  # fmt: skip


@pytest.fixture(scope="module")
def by(found: Found) -> dict[str, dict[str, Any]]:
    return {line.pop("example"): line for line in found("quantised_model")}


@pytest.mark.parametrize("name", BOUNDS)
def test_it_thinks_of_a_text_as_the_cpus_does(name: str, by: dict[str, dict[str, Any]]) -> None:
    kept, most, mean = BOUNDS[name]
    mine, cpu = by[name], by[f"cpu {kept}"]
    # Without a word a checkpoint stays as it is.
    assert mine["kept"] == kept and mine["tokens"] == cpu["tokens"]
    chances = mine["chances"], cpu["chances"]
    assert len(chances[0]) == len(chances[1]) > 3
    apart = [abs(a - b) for a, b in zip(*chances, strict=True)]
    means = [math.fsum(each) / len(each) for each in chances]
    assert 0 < max(apart) < most and abs(means[0] - means[1]) < mean, (max(apart), means)


def test_memory_is_counted_as_it_is_kept(by: dict[str, dict[str, Any]]) -> None:
    model = replace(ModelConfig.from_folder(demo_model()), num_hidden_layers=2, num_nextn_predict_layers=0)
    for name in ("w8a8", "fp8 by its bytes"):
        formula = static_bytes(model, "bfloat16", Shard.whole(model), PRECISIONS[by[name]["kept"]])
        assert by[name]["bytes"] == formula


def test_a_precision_that_there_are_no_kernels_for(by: dict[str, dict[str, Any]]) -> None:
    assert by["refused"]["said"] == (
        "quantise experts_int4 is not for the kernels of this device; say none, w8a8, fp8"
    )
