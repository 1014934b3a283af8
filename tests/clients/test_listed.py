"""The plugin that says which tests of others count, on a suite and a server of three lines each."""

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

SUITE = """
def test_right(): pass
def test_of_a_route(): assert False
def test_of_a_field(): assert False
def test_unfit(): assert False
def test_unfit_but_right(): pass
"""
LIST = """
[[needs]]
asks = "POST /v1/there"
tests = ["test_suite.py::test_of_a_route"]
[[needs]]
name = "a field"
asks = "POST /v1/there"
tests = ["*test_of_a_field"]
body = {{ field = 1 }}
[[unfit]]
reason = "it does not apply"
tests = {unfit}
"""
UNFIT = '["*test_unfit*"]'


class Handler(http.server.BaseHTTPRequestHandler):
    """Knows one route, and refuses every body."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(400 if self.path == "/v1/there" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def outcome(folder: Path, server: str, listed: str) -> tuple[int, str]:
    (folder / "test_suite.py").write_text(SUITE)
    (folder / "listed.toml").write_text(listed)
    (folder / "pytest.ini").write_text("[pytest]\nxfail_strict = true\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "listed",
        "-c",
        "pytest.ini",
    ]
    command += ["--listed=listed.toml", f"--server={server}", "test_suite.py"]
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_what_is_served_counts_and_what_is_listed_does_not(tmp_path: Path, server: str) -> None:
    code, said = outcome(tmp_path, server, LIST.format(unfit=UNFIT))
    assert code == 1 and "1 failed, 1 passed, 1 skipped, 1 xfailed, 1 xpassed" in said
    assert "FAILED test_suite.py::test_of_a_route" in said
    assert "listed as not applicable, but they pass:\n  test_suite.py::test_unfit_but_right" in said


def test_a_route_that_is_not_served_is_skipped(tmp_path: Path, server: str) -> None:
    code, said = outcome(tmp_path, server, LIST.format(unfit=UNFIT).replace("/v1/there", "/v1/other"))
    assert code == 0 and "1 passed, 2 skipped" in said


def test_a_list_with_tests_that_are_not_there_is_refused(tmp_path: Path, server: str) -> None:
    code, said = outcome(tmp_path, server, LIST.format(unfit='["*test_gone*"]'))
    assert code == 4 and "there are no tests like *test_gone*" in said
