"""Which implementation runs on a device."""

import subprocess
import sys
from pathlib import Path

import pytest

from expertmesh.errors import InputError
from expertmesh.kernels import kernels_for
from expertmesh.kernels.table import ACCELERATORS, accelerated
from expertmesh.native import NotBuilt


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor torch_npu."""
    for name in ("triton", "torch_npu"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("no_triton")
@pytest.mark.parametrize(("device", "package"), ACCELERATORS.items())
def test_without_triton_library_kernels_run_and_say_what_is_lacking(device: str, package: str) -> None:
    kernels = kernels_for(device, "bfloat16")
    assert kernels.lacking == f"{package} is not installed; pip install {package}"
    assert not kernels.de_interleaved and set(kernels.origin.values()) == {"grouped", "eager", "reference"}
    assert kernels.uncaptured
    with pytest.raises(
        InputError, match=f"^strict: kernels of our own for {device} .*{package} is not installed"
    ):
        kernels_for(device, strict=True)


@pytest.mark.usefixtures("no_triton")
def test_the_table_itself_is_refused() -> None:
    with pytest.raises(NotBuilt, match="torch-npu"):
        accelerated("npu")


def test_torch_npu_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch_npu.py").write_text(
        "raise ImportError('libhccl.so: cannot open shared object file')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        NotBuilt, match=r"^torch_npu does not load \(libhccl.so: .*\); set up CANN \(set_env.sh\)$"
    ):
        accelerated("npu")


def test_a_cpu_needs_no_accelerator() -> None:
    program = (
        "import sys; from expertmesh.kernels import kernels_for; kernels_for('cpu'); kernels_for('cpu', 'bfloat16')\n"
        "sys.exit(bool({'triton', 'expertmesh.kernels.triton', 'torch_npu'} & set(sys.modules)))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
