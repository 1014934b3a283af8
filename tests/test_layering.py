"""Who may import whom is what docs/map.md says; and what no module of expertmesh may touch."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import expertmesh

ROOT = Path(expertmesh.__file__).parent
MAP = Path(__file__).parents[1] / "docs" / "map.md"
SOURCES = {
    ".".join(file.relative_to(ROOT.parent).with_suffix("").parts): file.read_text(encoding="utf-8")
    for file in sorted(ROOT.rglob("*.py"))
}
TOP = {name.split(".")[1] for name in SOURCES if name.count(".") > 0} - {"__init__", "__main__"}
PLANNING = [
    "engine.intake",
    "engine.scheduler",
    "engine.cache",
    "engine.groups",
    "engine.text",
    "engine.tally",
    "engine.arrays",
    "request",
    "config.model",
    "config.engine",
    "weights",
]
WITHOUT_TORCH = [f"expertmesh.{name}" for name in PLANNING]
WITHOUT_TORCH += [name for name in SOURCES if name.startswith(("expertmesh.mesh.", "expertmesh.planner."))]
ENVIRONMENT = ("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv")
EXECUTION = (
    "eval", "exec", "builtins", "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve",
    "torch.load", "torch.serialization", "torch.package", "numpy.load",
)  # fmt: skip
# Imports that a search for import statements does not see.
DYNAMIC = ("importlib.import_module", "__import__", "runpy", "importlib.util.module_from_spec")


def in_the_map() -> dict[str, int]:
    """Name of each entry -> the row of the table that it is in, the top one first."""
    cells = re.findall(r"^\| (`[^|]*) \|", MAP.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: row for row, cell in enumerate(cells) for name in re.findall(r"`([^`]+)`", cell)}


# errors.py is below everything; the package itself, which imports everything, above.
LEVELS = {name.rstrip("/").removesuffix(".py"): row for name, row in in_the_map().items()}
LEVELS |= {"errors": len(LEVELS), "": -1}


def imports(name: str, source: str) -> Iterator[tuple[str, str]]:
    """(module, name taken from it or "") of every import, also inside functions."""
    package = name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((module, alias.name) for alias in node.names)


def targets(name: str, source: str) -> set[str]:
    """Packages and modules right below expertmesh that this one imports; "" for expertmesh itself."""
    found = set()
    for module, member in imports(name, source):
        parts = module.split(".")
        if parts[0] == "expertmesh":
            found.add(parts[1] if len(parts) > 1 else member if member in TOP else "")
    return found


def upward(name: str, source: str) -> list[str]:
    own = name.split(".")[1]
    if own in ("__init__", "__main__"):
        return []
    return [f"{name} imports {t or 'all'}" for t in targets(name, source) - {own} if LEVELS[t] <= LEVELS[own]]


def uses(name: str, source: str, forbidden: tuple[str, ...]) -> list[str]:
    """Dotted names in a module that are, or begin with, a forbidden one; other names for the same thing count."""
    known: dict[str, str] = {}
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name | ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            found.append(known.get(first, first) + dot + rest)
    return [f"{name}: {f}" for f in found if any(f"{f}.".startswith(f"{word}.") for word in forbidden)]


def test_the_map_names_everything_and_nothing_else() -> None:
    """Apart from errors.py, which anybody may import, and the package's own two files."""
    named = in_the_map()
    assert all((ROOT / name).is_dir() if name.endswith("/") else (ROOT / name).is_file() for name in named)
    assert {name.rstrip("/").removesuffix(".py") for name in named if name != "demo/"} == TOP - {"errors"}
    assert "demo/" in named and not list((ROOT / "demo").glob("*.py"))
    assert max(named.values()) > 5


def test_imports_go_down_the_map_only() -> None:
    assert [line for name, source in SOURCES.items() for line in upward(name, source)] == []


def test_no_import_is_hidden_from_the_search() -> None:
    """Four import by name: the package what it is asked for, the command line the command that runs, a process that was
    forked its program, and one that has joined a driver one of a few."""
    found = {name for name, source in SOURCES.items() if uses(name, source, DYNAMIC)}
    modules = {"__init__", "cli", "launch.forkserver", "launch.joining"}
    assert found == {f"expertmesh.{name}" for name in modules}


def test_the_command_line_starts_without_torch() -> None:
    program = "import sys; from expertmesh.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", program + "sys.exit('torch' in sys.modules)"], capture_output=True, check=False
    )
    assert done.returncode == 0 and b"generate" in done.stdout


@pytest.mark.parametrize("name", expertmesh.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(expertmesh, name).__name__ == name


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_no_torch_where_the_work_is_planned(name: str) -> None:
    assert not [module for module, _ in imports(name, SOURCES[name]) if module.split(".")[0] == "torch"]


def test_the_http_process_and_what_starts_it_have_no_torch() -> None:
    """Neither in what they import: it answers while the engine is still loading torch."""
    program = (
        "import sys, expertmesh.server.front, expertmesh.commands.serve; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_only_the_command_line_reads_the_environment() -> None:
    """And processes that are started get their own."""
    own = ("cli", "commands", "launch", "emulation")
    sources = {n: s for n, s in SOURCES.items() if n.split(".")[1] not in own}
    assert [line for name, source in sources.items() for line in uses(name, source, ENVIRONMENT)] == []


def test_nothing_is_unpickled_or_evaluated() -> None:
    """But for torch's files of recorded loads, which are read as plain data."""
    found = [line for name, source in SOURCES.items() for line in uses(name, source, EXECUTION)]
    reader = "expertmesh.balancer.files"
    assert found == [f"{reader}: torch.load"]
    calls = [node for node in ast.walk(ast.parse(SOURCES[reader])) if isinstance(node, ast.Call)]
    (load,) = (call for call in calls if ast.unparse(call.func) == "torch.load")
    assert "weights_only=True" in ast.unparse(load)


@pytest.mark.parametrize(
    "source",
    [
        "from expertmesh.llm import LLM", "import expertmesh.llm as x", "from expertmesh import llm",
        "from expertmesh import LLM", "import expertmesh", "def f():\n    from expertmesh.llm import LLM",
        "from ..llm import LLM", "from .. import LLM", "if 0:\n    import expertmesh.server.app",
    ],
)  # fmt: skip
def test_the_search_finds_every_form_of_import(source: str) -> None:
    assert upward("expertmesh.engine.x", source)


def test_neighbours_are_found_and_ways_down_are_not() -> None:
    assert upward("expertmesh.server.x", "from expertmesh.bench.plain import write_plain_copy")
    assert upward("expertmesh.errors", "from expertmesh.mesh import topology")
    assert not upward("expertmesh.server.x", "from expertmesh.server.app import app\nfrom .errors import E")
    assert not upward("expertmesh.mesh.x", "from expertmesh.errors import InputError\nimport torch")


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['A']", "import os as o\nx = o.getenv('A')", "from os import environ",
        "from os import getenv as g\ng('A')", "def f():\n    import os\n    return os.environ.get('A')",
    ],
)  # fmt: skip
def test_the_search_finds_every_form_of_reading_the_environment(source: str) -> None:
    assert uses("x", source, ENVIRONMENT)
    assert not uses("x", source.replace("environ", "path").replace("getenv", "getcwd"), ENVIRONMENT)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch as t\nt.load('x')", "from torch import load",
        "eval('1')", "def f(x):\n    return [exec(y) for y in x]", "import builtins", "run = eval",
    ],
)  # fmt: skip
def test_the_search_finds_every_form_of_execution(source: str) -> None:
    assert uses("x", source, EXECUTION)
    assert not uses("x", "from x import load\nmodel.eval()\nself.load(evaluate, executor)", EXECUTION)
