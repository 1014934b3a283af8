"""What docs/accelerators.md says of the chips is what compilers say now."""

import pytest

from tests.kernels.triton import chip
from tests.kernels.triton.conftest import Found, needed


@pytest.mark.parametrize("name", chip.BLOCKS)
def test_tables_are_those_that_are_measured(name: str, found: Found) -> None:
    needed("bishengir")
    has = chip.written(name, chip.DOCUMENT.read_text(encoding="utf-8"))
    assert has == chip.BLOCKS[name](found), "python -m tests.kernels.triton.chip writes them again"
