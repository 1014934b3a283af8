"""Calls at DeepSeek-V3's sizes pass torch_npu's shape functions (`shapes`), and ours see what those miss (`faults`)."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from expertmesh.errors import KernelFailure
from expertmesh.kernels.npu.contracts import CONTRACTS, PUBLISHED, Limit
from tests.kernels.npu.conftest import Found
from tests.kernels.npu.faults import BAD, GOOD, GROUPED, PROLOG
from tests.kernels.npu.published import OPS

KNOWN = ("a cache mode that is none", "inner sizes that differ", "a bias that is too short")


def test_all_calls_of_a_layer_of_v3_give_what_is_gone_on_with(found: Found) -> None:
    lines = found("shapes")
    assert len(lines) == 18 and all(line["right"] for line in lines), lines
    assert {op for line in lines for op in line["ops"]} == {op.__name__ for op in OPS}


def test_what_is_right_passes(found: Found) -> None:
    lines = [line for line in found("faults") if "good" in line]
    assert len(lines) == len(GOOD) and all(line["said"] == "" and line["silent"] for line in lines), lines


def test_what_shape_functions_pass_our_contracts_tell(found: Found) -> None:
    lines = {line["bad"]: line for line in found("faults") if "bad" in line}
    assert set(lines) == set(BAD)
    for line in lines.values():
        assert line["said"].startswith(f"kernel {line['op'].partition(':')[0]} on npu: "), line
        assert " but must be " in line["said"], line
    for fault in KNOWN:
        assert lines[fault]["silent"], lines[fault]
    assert sum(line["silent"] for line in lines.values()) > len(BAD) // 2


# What follows needs no torch_npu.


def checked(op: str, given: Mapping[str, Any]) -> str:
    with pytest.raises(KernelFailure) as error:
        CONTRACTS[op].check(op, PUBLISHED.get(op, Limit()), given)
    return str(error.value)


def test_an_error_names_op_argument_what_was_given_and_what_is_allowed() -> None:
    start = "kernel npu_mla_prolog_v3 on npu: "
    assert checked("npu_mla_prolog_v3", PROLOG | {"cache_mode": "PA"}) == (
        f"{start}cache_mode is 'PA', but must be PA_BSND"
    )
    short = PROLOG | {"rope_cos": torch.empty(4, 32, dtype=torch.bfloat16, device="meta")}
    assert checked("npu_mla_prolog_v3", short) == f"{start}rope_cos is [4, 32], but must be [4, 64]"
    other = PROLOG | {"cache_index": torch.empty(4, dtype=torch.int32, device="meta")}
    assert (
        checked("npu_mla_prolog_v3", other)
        == f"{start}cache_index is of torch.int32, but must be torch.int64"
    )
    wide = [torch.empty(4, 64, 70_000, dtype=torch.bfloat16, device="meta")]
    assert checked("npu_grouped_matmul", GROUPED | {"weight": wide}) == (
        "kernel npu_grouped_matmul on npu: size N is 70000, but must be 1 to 65535"
    )


def test_every_limit_and_every_op_has_its_contract() -> None:
    assert set(PUBLISHED) <= set(CONTRACTS)
    assert {name.partition(":")[0] for name in CONTRACTS} == {op.__name__ for op in OPS}
