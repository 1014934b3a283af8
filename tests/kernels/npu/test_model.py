"""Models on torch_npu's ops (`model`)."""

import math

from tests.kernels.npu.conftest import Found
from tests.kernels.npu.model import LAYOUTS, PROMPTS, TOKENS


def test_greedy_tokens_are_those_of_the_reference(found: Found) -> None:
    lines = [line for line in found("model") if "found" in line]
    assert len(lines) == len(LAYOUTS) + 1 + 3
    for line in lines:
        assert [len(tokens) for tokens in line["found"]] == [TOKENS] * len(PROMPTS)
        assert line["found"] == line["expected"] and line["far"] < 1e-4, line


def test_prompts_do_not_all_end_alike(found: Found) -> None:
    """Else nothing would be compared."""
    lines = [line for line in found("model") if "found" in line]
    assert all(len({token for tokens in line["found"] for token in tokens}) > 2 for line in lines)


def test_every_op_is_torch_npus(found: Found) -> None:
    (line,) = [line for line in found("model") if "origin" in line]
    assert set(line["origin"].values()) == {"torch_npu"} and line["origin"] == line["free"]


def test_w8a8_thinks_of_a_text_as_the_cpus_does(found: Found) -> None:
    """Rounded in other places, so the logarithm of a token's probability is not the same, but near, and so is the mean
    of all."""
    (by,) = [line["w8a8"] for line in found("model") if "w8a8" in line]
    for name in ("npu", "bound"):
        assert len(by[name]) == len(by["cpu"]) > 20
        apart = [abs(a - b) for a, b in zip(by[name], by["cpu"], strict=True)]
        means = [math.fsum(by[way]) / len(by[way]) for way in (name, "cpu")]
        assert abs(means[0] - means[1]) < 0.03 and max(apart) < 0.4, (name, means, max(apart))
        assert max(apart) > 0


def test_a_page_size_of_no_kernel_is_told_before_anything_is_loaded(found: Found) -> None:
    (said,) = [line["refused"] for line in found("model") if "refused" in line]
    assert said == "page_size is 32, but kernels here read pages of 128 or 16 tokens alone"
