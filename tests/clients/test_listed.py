"""The plugin that says which tests of others count, on a suite of a few lines."""

import subprocess
import sys
from pathlib import Path

SUITE = """
def test_right(): pass
def test_wrong(): assert False
def test_unfit(): assert False
def test_unfit_but_right(): pass
"""
LIST = """
[[unfit]]
reason = "it does not apply"
tests = {unfit}
"""
UNFIT = '["*test_unfit*"]'


def outcome(folder: Path, listed: str) -> tuple[int, str]:
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
    command += ["--listed=listed.toml", "test_suite.py"]
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_what_is_listed_does_not_count(tmp_path: Path) -> None:
    code, said = outcome(tmp_path, LIST.format(unfit=UNFIT))
    assert code == 1 and "1 failed, 1 passed, 1 xfailed, 1 xpassed" in said
    assert "FAILED test_suite.py::test_wrong" in said
    assert "listed as not applicable, but they pass:\n  test_suite.py::test_unfit_but_right" in said


def test_a_list_with_tests_that_are_not_there_is_refused(tmp_path: Path) -> None:
    code, said = outcome(tmp_path, LIST.format(unfit='["*test_gone*"]'))
    assert code == 4 and "there are no tests like *test_gone*" in said
