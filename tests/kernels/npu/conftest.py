"""What each check finds is found once. Where torch_npu is not there its tests are skipped, in CI they fail."""

import os
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import pytest

from tests.kernels.npu import toolchain

Found: TypeAlias = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def found() -> Found:
    @cache
    def of(check: str) -> list[dict[str, Any]]:
        if absent := toolchain.missing():
            said = f"not installed: {', '.join(absent)} ({toolchain.ADVICE})"
            if os.environ.get("CI") == "true":
                pytest.fail(said)
            pytest.skip(said)
        return toolchain.found(check)

    return of
