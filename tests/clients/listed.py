"""A pytest plugin for suites that others wrote for a mock server: which of their tests do not apply here is in a file.

It is loaded in the environment of a suite, and imports nothing of this project. The file (TOML) has [[unfit]] with
tests = patterns, reason = "...": they are expected to fail. One that passes is named, and is no failure.
"""

import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("listed")
    group.addoption("--listed", type=Path, required=True, help="the file")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    with config.option.listed.open("rb") as file:
        listed = tomllib.load(file)
    unused = []
    for entry in listed.get("unfit", ()):
        for pattern in entry["tests"]:
            found = list(_matching(items, [pattern]))
            unused += [] if found else [pattern]
            for item in found:
                item.add_marker(pytest.mark.xfail(reason=entry["reason"], strict=False))
    if unused:
        raise pytest.UsageError(f"{config.option.listed}: there are no tests like {', '.join(unused)}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tests that pass although they are listed: the list could be shorter."""
    passed = [report.nodeid for report in terminalreporter.stats.get("xpassed", ())]
    if passed:
        terminalreporter.write_line("listed as not applicable, but they pass:\n  " + "\n  ".join(passed))


def _matching(items: list[pytest.Item], patterns: list[str]) -> Iterator[pytest.Item]:
    """A pattern is of the file's name, the class, the test and its parameters, as in test_models.py::*::test_list*."""
    for item in items:
        name = item.nodeid.rpartition("/")[2].replace("[", "(").replace("]", ")")
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            yield item
