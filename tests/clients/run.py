"""`python -m tests.clients.run openai anthropic langchain schemathesis`: official clients' own tests against a server.

The packages and their tests come from PyPI into an environment of their own, which is kept for the next time.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tomllib
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from expertmesh.bench.started import started

HERE = Path(__file__).parent
ENVIRONMENT = Path("~/.cache/expertmesh/clients").expanduser()
MODEL = "gpt-4o"
SPECIFIED = ("/chat/completions", "/completions", "/models", "/models/{model}")
CHECKS = ("not_a_server_error", "content_type_conformance", "response_schema_conformance")


@dataclass(frozen=True)
class Environment:
    """Where the clients are installed."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def make(self) -> None:
        """Install what requirements.txt says, unless it is there."""
        wanted, there = (HERE / "requirements.txt").read_text(), self.folder / "installed.txt"
        if there.exists() and there.read_text() == wanted:
            return
        venv.create(self.folder, with_pip=True, clear=True)
        self.pip("install", "--requirement", str(HERE / "requirements.txt"))
        there.write_text(wanted)

    def pip(self, *words: str) -> None:
        subprocess.run([self.python, "-m", "pip", "--quiet", *words], check=True)

    def sources(self, package: str) -> Path:
        """Folder of a package's source distribution, such as openai==1.0."""
        folder = self.folder / package.replace("==", "-")
        if not folder.exists():
            self.pip("download", "--no-deps", "--no-binary", ":all:", "--dest", str(self.folder), package)
            with tarfile.open(f"{folder}.tar.gz") as archive:
                archive.extractall(self.folder, filter="data")
        return folder


def listed(name: str) -> dict[str, Any]:
    with (HERE / f"{name}.toml").open("rb") as file:
        return tomllib.load(file)


def official(name: str, environment: Environment) -> bool:
    """The tests of a package that are listed in NAME.toml, with a server of their own. context: tokens of a request
    there, where answers without a limit end."""
    suite = listed(name)
    folder = environment.sources(suite["sdist"]) if "sdist" in suite else HERE
    plugins = [word for plugin in ("listed", *suite.get("plugins", ())) for word in ("-p", plugin)]
    with serving(suite["names"], suite["context"]) as server:
        command = [
            *(environment.python, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"),
            *("--tb=short", "--show-capture=no", "-k", suite["keyword"], *plugins),
            *("-c", str(folder / suite["config"]), f"--confcutdir={folder}", f"--rootdir={folder}"),
            *(f"--listed={HERE / name}.toml", *suite["tests"]),
        ]
        variables = {"PYTHONPATH": str(HERE), "TEST_API_BASE_URL": server + suite["base"]}
        return subprocess.run(command, cwd=folder, env=os.environ | variables, check=False).returncode == 0


def schemathesis(environment: Environment) -> bool:
    """Requests made from OpenAI's specification, right ones and wrong ones: none may end in an error of the server's
    own, and every answer is as the specification says."""
    specification = environment.folder / "specification.json"
    command = [environment.python, str(HERE / "specification.py"), str(specification), MODEL, *SPECIFIED]
    subprocess.run(command, check=True)
    with serving([MODEL], 64) as server:
        command = [
            *(
                environment.python,
                "-m",
                "schemathesis.cli",
                "run",
                str(specification),
                "--url",
                f"{server}/v1",
            ),
            *("--checks", ",".join(CHECKS), "--phases", "examples,fuzzing", "--max-examples", "30"),
            *(
                "--seed",
                "0",
                "--generation-database",
                "none",
                "--request-timeout",
                "60",
                "--continue-on-failure",
            ),
        ]
        return subprocess.run(command, cwd=environment.folder, check=False).returncode == 0


@contextmanager
def serving(names: Sequence[str], context: int) -> Iterator[str]:
    """A server of the demo model under these names; its URL without a path."""
    options = [word for name in names for word in ("--name", name)]
    with started([*options, "--max-context", str(context)]) as server:
        yield server.url.removesuffix("/v1")


SUITES: dict[str, Callable[[Environment], bool]] = {
    **{name: partial(official, name) for name in ("openai", "anthropic", "langchain")},
    "schemathesis": schemathesis,
}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="+", choices=list(SUITES), metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--env", type=Path, default=ENVIRONMENT, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(words)
    environment = Environment(args.env.resolve())
    environment.make()
    failed = []
    for name in args.suites:
        print(f"--- {name}", flush=True)
        if not SUITES[name](environment):
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all suites pass")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
