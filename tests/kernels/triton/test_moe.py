"""Ops of the expert layer that are made of kernels (docs/accelerators.md)."""

from collections import Counter

from tests.kernels.triton.conftest import Found

ROUNDING = 2e-6


def test_ops_are_those_of_the_reference(found: Found) -> None:
    """Routers, experts and dense layers of every format, and rows quantised for an exchange."""
    lines = found("moe_ops")
    assert Counter(line["example"].split()[0] for line in lines) == {
        "router": 11, "experts": 12, "swiglu": 15, "linear": 3, "exchange": 6,
    }  # fmt: skip
    for line in lines:
        assert line["errors"] and max(line["errors"].values()) <= line["lost"] + ROUNDING, line


def test_eight_bits_are_seen_to_round(found: Found) -> None:
    """Else results would have been compared that never were quantised."""
    for kind in ("int8", "fp8"):
        lines = [line for line in found("moe_ops") if line["example"].startswith(f"experts {kind} 19")]
        assert len(lines) == 1 and lines[0]["errors"]["y"] > 1e-4


def test_no_core_writes_what_another_has_written(found: Found) -> None:
    """On Ascend, any kernel (`stores`)."""
    lines = found("stores")
    assert len(lines) > 100
    for line in lines:
        assert line["stores"] and not line["again"], line


def test_the_search_finds_a_block_that_is_written_again(found: Found) -> None:
    (line,) = found("gaps")
    assert line["again"]
