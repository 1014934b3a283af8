"""A kernel that cannot be had is one error, which names the kernel, the target and the reason."""

import os
import subprocess

import pytest

from expertmesh.kernels.triton.tiles import ASCEND, CPU, CUDA
from tests.kernels.triton import toolchain
from tests.kernels.triton.conftest import Found, needed


def said(found: Found, check: str) -> dict[tuple[str, str], str]:
    return {(line["example"], line["target"]): line["wrong"] for line in found(check)}


def test_ascends_compilers_still_refuse_what_is_avoided(found: Found) -> None:
    wrong = said(found, "limits")
    for target in ASCEND:
        assert wrong["tiles that are too large", target].startswith(f"kernel mla_down on {target}: ")
        assert "overflow, requires" in wrong["tiles that are too large", target]
    assert "InterleaveOptimization" in wrong["a stride of two", ASCEND[0]]
    assert wrong["a stride of two", ASCEND[0]].startswith(f"kernel interleaved on {ASCEND[0]}: ")


def test_a_tool_that_is_missing_is_named(found: Found) -> None:
    wrong = said(found, "limits")
    for case, target, tool in (
        ("no BiShengIR", ASCEND[0], "bishengir-compile"),
        ("no MLIR", CPU, "mlir-opt-19"),
    ):
        start = f"kernel mla_down on {target}: {tool} is not installed"
        assert wrong[case, target] == f"{start} ({toolchain.ADVICE})"


@pytest.mark.parametrize("target", CUDA)
def test_cudas_compiler_says_why_and_which_memory_is_too_small(target: str, found: Found) -> None:
    wrong = said(found, "cuda_limits")
    assert (
        wrong["a kernel that is refused", target]
        == f"kernel uneven on {target}: arange's range must be a power of 2"
    )
    large = wrong["tiles that are too large", target]
    assert large.startswith(f"kernel mla_down on {target}: does not fit: ") and "shared" in large


def test_a_launch_that_fails_names_kernel_and_target(found: Found) -> None:
    wrong = {line["example"]: line["wrong"] for line in found("launches")}
    assert wrong["no tiles"].startswith("kernel gate_up_int8 on sm_100: it is for cpu, ")
    assert wrong["a failure"].startswith(f"kernel failing on {CPU}: ") and "16 and 32" in wrong["a failure"]


def test_tuning_says_what_is_missing_for_which_kernel(tmp_path: os.PathLike[str]) -> None:
    done = subprocess.run(
        toolchain.command("tune", "mla_norm"), env={**os.environ, "HOME": str(tmp_path)}, cwd=toolchain.ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip() == f"kernel mla_norm on sm_80: not installed: triton ({toolchain.ADVICE})"


def test_a_checker_ends_with_that_line(tmp_path: os.PathLike[str]) -> None:
    """Where a program has gone after it was found."""
    needed("linalg")
    environment = toolchain.environment("linalg", str(tmp_path)) | {"PATH": str(tmp_path)}
    done = subprocess.run(
        toolchain.command("worker", "linalg", "mla_norm"), env=environment, cwd=toolchain.ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        f"kernel mla_norm on {CPU}: mlir-opt-19 is not installed ({toolchain.ADVICE})"
    )
    assert "Traceback" not in done.stderr
