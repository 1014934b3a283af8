"""A pytest plugin for suites that others wrote for a mock server: which of their tests do not apply here is in a file.

It is loaded in the environment of a suite, and imports nothing of this project. The file (TOML) has
- [[needs]]: asks = "POST /v1/messages", tests = patterns: the tests count if the server knows that route; with a body,
  if it does not refuse it;
- [[unfit]]: tests = patterns, reason = "...": they are expected to fail. One that passes is named, and is no failure.
"""

import json
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("listed")
    group.addoption("--listed", type=Path, required=True, help="the file")
    group.addoption("--server", required=True, help="URL of the server, without a path")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    with config.option.listed.open("rb") as file:
        listed = tomllib.load(file)
    unused = []
    for need in listed.get("needs", ()):
        found = list(_matching(items, need["tests"]))
        unused += [] if found else need["tests"]
        if not _served(config.option.server, need["asks"], need.get("body")):
            for item in found:
                item.add_marker(pytest.mark.skip(reason=f"not served: {need.get('name', need['asks'])}"))
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


def _served(server: str, asks: str, body: dict[str, Any] | None) -> bool:
    """Whether the server has such a route, whatever it says to an empty body; with a body, whether it takes it."""
    method, _, path = asks.partition(" ")
    request = urllib.request.Request(
        server + path,
        data=json.dumps(body or {}).encode() if method == "POST" else None,
        headers={"Content-Type": "application/json", "Authorization": "Bearer none"},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=60):
            return True
    except urllib.error.HTTPError as error:
        return body is None and error.code not in (404, 405)
