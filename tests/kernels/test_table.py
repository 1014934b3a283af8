"""Which implementation runs on a device."""

import subprocess
import sys

import pytest

from expertmesh.errors import InputError
from expertmesh.kernels import kernels_for
from expertmesh.kernels.table import ACCELERATORS, accelerated
from expertmesh.native import NotBuilt


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)


@pytest.mark.usefixtures("no_triton")
@pytest.mark.parametrize(("device", "package"), ACCELERATORS.items())
def test_without_triton_library_kernels_run_and_say_what_is_lacking(device: str, package: str) -> None:
    kernels = kernels_for(device, "bfloat16")
    assert kernels.lacking == f"{package} is not installed; pip install {package}"
    assert not kernels.de_interleaved and set(kernels.origin.values()) == {"eager", "reference"}
    with pytest.raises(
        InputError, match=f"^strict: kernels of our own for {device} .*{package} is not installed"
    ):
        kernels_for(device, strict=True)


@pytest.mark.usefixtures("no_triton")
def test_the_table_itself_is_refused() -> None:
    with pytest.raises(NotBuilt, match="triton-ascend"):
        accelerated("npu")


def test_a_cpu_needs_no_triton() -> None:
    program = (
        "import sys; from expertmesh.kernels import kernels_for; kernels_for('cpu'); kernels_for('cpu', 'bfloat16')\n"
        "sys.exit('triton' in sys.modules or 'expertmesh.kernels.triton' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
