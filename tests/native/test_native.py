"""C++ that is compiled when it is needed; without a compiler everything works, only slower or less well."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from expertmesh import Topology, native
from expertmesh.mesh.balance import OBJECTIVES, balance, rooms
from expertmesh.mesh.loads import Loads
from expertmesh.mesh.placement import EMPTY, Placement
from expertmesh.mesh.split import Split

LOADS = Loads.of(np.random.default_rng(1).zipf(1.5, (2, 2, 12)).clip(1, 300))
TOPOLOGY = Topology(2, 2)


@pytest.fixture
def unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of sources that nothing was built of, and a home without anything."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(native.SOURCES / "balance.cpp", source)
    monkeypatch.setattr(native, "SOURCES", source)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    native._found.cache_clear()
    yield source
    native._found.cache_clear()


@pytest.fixture
def without_compiler(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.fixture
def broken_compiler(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Says two lines and fails; counts its calls."""
    compiler = unbuilt.parent / "c++"
    compiler.write_text(
        f"#!/bin/sh\necho >> {unbuilt.parent}/calls\necho 'no header' >&2\necho more >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(compiler))
    return unbuilt.parent / "calls"


@pytest.mark.usefixtures("without_compiler")
def test_what_to_do_without_a_compiler() -> None:
    with pytest.raises(
        native.NotBuilt, match=r"^no C\+\+ compiler is installed; install g\+\+ or clang\+\+$"
    ):
        native.library("balance")
    assert not native.available("balance")


def test_what_a_failing_compiler_says_is_one_line_and_asked_for_once(broken_compiler: Path) -> None:
    for _ in range(3):
        with pytest.raises(
            native.NotBuilt, match=r"fails on balance.cpp: no header; install g\+\+"
        ) as raised:
            native.library("balance")
        assert "\n" not in str(raised.value) and not native.available("balance")
    assert broken_compiler.read_text() == "\n"


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_placement_without_a_compiler(objective: str) -> None:
    made = balance(LOADS, TOPOLOGY, 5, objective=objective)
    used = (made.slots_LRS != EMPTY).sum(2)
    assert (used == rooms(12, TOPOLOGY, 5)).all()
    again = balance(LOADS, TOPOLOGY, 9, objective=objective, old=made)
    assert (again.slots_LRS != EMPTY).sum() == 2 * 21


@pytest.mark.usefixtures("without_compiler")
def test_a_split_without_a_compiler() -> None:
    made: Placement = balance(LOADS, TOPOLOGY, 4)
    split = Split(made.slots_LRS[0], 12, TOPOLOGY)
    experts_TK = np.array([[0, 3], [5, 1]])
    assert (split.slots_RS.ravel()[split.wish(experts_TK, 0).slots_TK] == experts_TK).all()


def test_it_is_built_once_beside_its_source(unbuilt: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="expertmesh.native")
    first = native.library("balance")
    (made,) = (unbuilt / "__pycache__").glob("*.so")
    stamp = made.stat().st_mtime_ns
    native._found.cache_clear()
    assert native.library("balance")._name == first._name == str(made)
    assert made.stat().st_mtime_ns == stamp and not Path.home().exists()
    assert caplog.messages == ["compiling balance for this processor, once: a few seconds"]


def test_another_source_is_another_library(unbuilt: Path) -> None:
    (unbuilt / "other.cpp").write_text('extern "C" int answer() { return 42; }\n')
    assert native.library("other").answer() == 42
    (unbuilt / "other.cpp").write_text('extern "C" int answer() { return 43; }\n')
    native._found.cache_clear()
    assert native.library("other").answer() == 43
    assert len(list((unbuilt / "__pycache__").glob("other-*.so"))) == 2


def test_the_cache_of_the_user_where_the_package_cannot_be_written_to(unbuilt: Path) -> None:
    (unbuilt / "__pycache__").write_text("in the way")
    (unbuilt / "other.cpp").write_text('extern "C" int answer() { return 42; }\n')
    assert native.library("other").answer() == 42
    assert Path(native.library("other")._name).parent == Path.home() / ".cache" / "expertmesh"


def test_a_library_that_cannot_be_loaded(unbuilt: Path) -> None:
    made = Path(native.library("balance")._name)
    (unbuilt / "other.cpp").write_bytes(b"")
    stem = made.name.replace("balance", "other").replace(
        native._fingerprint(unbuilt / "balance.cpp", native.FLAGS),
        native._fingerprint(unbuilt / "other.cpp", native.FLAGS),
    )
    (made.parent / stem).write_text("no library")
    with pytest.raises(native.NotBuilt, match=r"^other cannot be built or loaded: .*") as raised:
        native.library("other")
    assert "\n" not in str(raised.value) and not native.available("other")


def test_nowhere_to_write_to(unbuilt: Path) -> None:
    (unbuilt / "__pycache__").write_text("in the way")
    Path.home().write_text("in the way")
    with pytest.raises(native.NotBuilt, match=r"nowhere to write to: .*__pycache__, .*\.cache/expertmesh$"):
        native.library("balance")


def test_two_processes_build_at_the_same_time(unbuilt: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from expertmesh import native\n"
        "native.SOURCES = Path(sys.argv[1]); build = native._build\n"
        "native._build = lambda *given: (print('built'), build(*given))\n"
        "sys.stdin.readline(); print(native.library('balance')._name)"
    )
    command = [sys.executable, "-c", program, str(unbuilt)]
    both = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for one in both:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    said = [one.communicate()[0].split() for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert sum("built" in words for words in said) == 1, "the other one waits for it"
    names = {words[-1] for words in said}
    assert [str(path) for path in (unbuilt / "__pycache__").glob("*.so")] == list(names)


def test_of_what_a_compiler_says_the_error_is_shown(unbuilt: Path) -> None:
    (unbuilt / "wrong.h").write_text("int\n#error not for this machine\n")
    (unbuilt / "other.cpp").write_text('#include "wrong.h"\n')
    with pytest.raises(native.NotBuilt, match=r"fails on other.cpp: .*error: .*not for this machine"):
        native.library("other")


def test_a_user_without_a_home(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert native.available("balance")
