"""Ops on torch_npu's, whose semantics are `published`, against the reference (`ops`)."""

from tests.kernels.npu.conftest import Found
from tests.kernels.npu.published import OPS

# Of bfloat16 a few of the last bits; of 8 bits what rows and weights lose, and rows again between two products.
TOLERANCES = {"float32": 2e-6, "bfloat16": 1.2e-2, "w8a8": 0.05}
PROLOG, DECODE = "npu_mla_prolog_v3", "npu_fused_infer_attention_score_v2"


def test_results_are_those_of_the_reference(found: Found) -> None:
    """Over ragged, odd, single and empty rows."""
    lines = [line for line in found("ops") if "errors" in line]
    assert len(lines) >= 200 and {line["kind"] for line in lines} == set(TOLERANCES)
    for line in lines:
        assert max(line["errors"].values()) <= TOLERANCES[line["kind"]], line


def test_fused_ops_are_taken_where_they_have_the_sizes(found: Found) -> None:
    """DeepSeek-V3's within a card's limits; smaller ones where there are none."""
    by = {line["example"]: set(line["ops"]) for line in found("ops") if "ops" in line}
    for setting in ("V3", "V3, w8a8"):
        assert {PROLOG, DECODE} <= by[f"attention, {setting}, both, whole"]
        assert PROLOG not in by[f"attention, {setting}, both, in halves"]
    assert {PROLOG, DECODE} <= by["attention, bfloat16, decoding, whole"]
    for name in ("float32", "bfloat16"):
        assert not {PROLOG, DECODE} & by[f"attention, within limits, {name}, both, whole"]
    assert PROLOG not in by["attention, rotary parts in halves, decoding, whole"]


def test_calls_are_those_of_the_schemas_and_shape_functions(found: Found) -> None:
    """torch's own check of every op that is called, with the arguments of our calls."""
    checked = {line["opcheck"] for line in found("ops") if "opcheck" in line}
    assert checked == {op.__name__ for op in OPS}
