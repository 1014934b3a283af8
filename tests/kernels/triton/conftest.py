"""What each checker finds is found once. Where one has no tools its tests are skipped, in CI they fail."""

import os
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import pytest

from tests.kernels.triton import toolchain

Found: TypeAlias = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def found() -> Found:
    """Of a checker, what it says of all examples."""

    @cache
    def of(check: str) -> list[dict[str, Any]]:
        needed(check)
        return toolchain.found(check)

    return of


def needed(check: str) -> None:
    if toolchain.missing(check):
        # The same of all checks: reports fold what is skipped for one reason into one line.
        every = dict.fromkeys(tool for one in toolchain.CHECKS for tool in toolchain.missing(one))
        said = f"not installed: {', '.join(every)} ({toolchain.ADVICE})"
        if os.environ.get("CI") == "true":
            pytest.fail(said)
        pytest.skip(said)
