"""Every kernel of accelerators in five ways, as far as these go without a card (docs/accelerators.md)."""

import subprocess
import sys
from typing import Any

import pytest

from expertmesh.kernels.triton.tiles import ASCEND, CPU, CUDA, table
from tests.kernels.triton.conftest import Found
from tests.kernels.triton.examples import targets_of

KERNELS = sorted(table())
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
# Of bfloat16 the last bit of the largest number, and what sums of rounded numbers add to it.
TOLERANCES = {"torch.float32": 2e-6, "torch.bfloat16": 1.2e-2}
# Vector work goes on while matrix units compute.
MIXED = (
    "gate_up", "gate_up_int8", "gate_up_bytes", "down_int8", "down_bytes",
    "mla_down", "mla_up", "mla_decode", "mla_merge", "mla_prefill",
)  # fmt: skip


def of(kernel: str, lines: list[dict[str, Any]], targets: tuple[str, ...]) -> list[dict[str, Any]]:
    """What was found of a kernel. There is something if it is for any of these targets."""
    mine = [line for line in lines if line["example"].startswith(f"{kernel}-")]
    assert bool(mine) == bool(targets_of(kernel) & set(targets)), (
        f"{kernel} has {len(mine)} examples for {targets}"
    )
    return mine


@each_kernel
def test_tiles_are_there_for_every_target(kernel: str) -> None:
    assert set(table()[kernel]) == targets_of(kernel)


@each_kernel
@pytest.mark.parametrize("check", ["interpreter", "linalg"])
def test_results_are_those_of_the_reference(kernel: str, check: str, found: Found) -> None:
    """As Triton's interpreter runs it, and as it is lowered for Ascend, on this processor."""
    lines = of(kernel, found(check), {"interpreter": (CPU,), "linalg": ASCEND}[check])
    assert len(lines) >= 4 or not lines
    for line in lines:
        assert line["errors"] and max(line["errors"].values()) <= TOLERANCES[line["dtype"]], line


def test_ops_are_those_of_the_reference(found: Found) -> None:
    """Prologues, whole and in halves around the gather, and attention on what they give."""
    lines = [line for line in found("ops") if "errors" in line]
    assert len(lines) >= 20
    for line in lines:
        assert set(line["errors"]) == {"out", "cache"}
        assert max(line["errors"].values()) <= TOLERANCES[line["dtype"]], line


def test_decoding_does_not_depend_on_the_batch_and_interleaved_rows_are_refused(found: Found) -> None:
    lines = [line for line in found("ops") if "holds" in line]
    assert len(lines) == 2 and all(line["holds"] for line in lines), lines


@each_kernel
def test_cubins_fit_and_use_matrix_units(kernel: str, found: Found) -> None:
    lines = of(kernel, found("cubins"), CUDA)
    assert {line["target"] for line in lines} == set(CUDA) & targets_of(kernel)
    assert all(line["wrong"] == "" and line["registers"] > 0 for line in lines), lines


@each_kernel
def test_ascend_has_room_and_its_parts_wait_for_each_other(kernel: str, found: Found) -> None:
    lines = of(kernel, found("bishengir"), ASCEND)
    assert {line["target"] for line in lines} == set(ASCEND) & targets_of(kernel)
    for line in lines:
        assert line["wrong"] == "" and sum(line["bytes"].values()) > 0, line
        if kernel in MIXED:
            assert [part[-3:] for part in line["parts"]] == ["aic", "aiv"] and line["signals"], line


def test_nothing_needs_triton_where_it_is_not_installed() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import expertmesh.kernels, expertmesh.kernels.triton, expertmesh.kernels.triton.tiles\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
