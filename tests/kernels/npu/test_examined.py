"""What `doctor --accelerator` would find of Ascend's own ops (`examined`)."""

from expertmesh.bench.accelerator.tokens import PROMPTS
from expertmesh.kernels.table import OPS
from tests.kernels.npu.conftest import Found
from tests.kernels.npu.examined import TOKENS
from tests.kernels.npu.published import OPS as PUBLISHED


def test_ops_that_do_as_published_are_found_right(found: Found) -> None:
    lines = [line for line in found("examined") if "error" in line]
    assert {line["op"] for line in lines} == set(OPS)
    assert {line["origin"] for line in lines} == {"torch_npu"}
    assert [line for line in lines if not (line["error"] <= line["bound"] and line["same"])] == []


def test_fused_ops_are_examined_within_a_cards_limits(found: Found) -> None:
    lines = [line for line in found("examined") if line.get("limits") and line["size"] == "like V3"]
    assert {op for line in lines for op in line.get("calls", ())} == {op.__name__ for op in PUBLISHED}


def test_only_a_format_that_ascend_has_not_does_not_apply(found: Found) -> None:
    none = [line for line in found("examined") if "none" in line]
    assert none and {line["precision"] for line in none} == {"fp8"}
    assert all("on Ascend" in line["none"] for line in none)


def test_models_in_bfloat16_and_as_converted_write_tokens_that_are_found_right(found: Found) -> None:
    """Wrong ones would have ended the check."""
    lines = {line["written"]: line for line in found("examined") if "written" in line}
    assert set(lines) == {"bf16", "w8a8"}
    assert {line["tokens"] for line in lines.values()} == {TOKENS * len(PROMPTS)}
