"""Models whose attention and experts are kernels of accelerators (`model`)."""

from tests.kernels.triton.conftest import Found
from tests.kernels.triton.model import TOKENS, VARIANTS

OPS = {
    "matrix",
    "linear",
    "mla_prologue",
    "mla_down",
    "mla_up",
    "mla_attention",
    "router",
    "experts",
    "swiglu",
}


def test_greedy_tokens_are_those_of_the_reference(found: Found) -> None:
    lines = found("model")
    assert len(lines) == 1 + len(VARIANTS)
    for line in lines:
        assert set(line["ops"]) == OPS
        assert [len(tokens) for tokens in line["found"]] == [TOKENS, TOKENS]
        assert line["found"] == line["expected"] and line["far"] < 1e-4, line


def test_prompts_do_not_all_end_alike(found: Found) -> None:
    """Else nothing would be compared."""
    assert all(len({token for tokens in line["found"] for token in tokens}) > 2 for line in found("model"))
