"""Engines that run on this machine, and where each of their ranks stands."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from expertmesh.emulation.namespaces import inside
from expertmesh.launch.inquiry import ask, drivers

OWN = Path("/proc/thread-self")


def running_engines() -> list[dict[str, Any]]:
    """Of this user, or for root of all: process of the driver, its command, and either what it does and where its ranks
    stand, or why that is not known. Also in other network namespaces, which it takes root to enter."""
    found = [(pid, name, home) for home in _networks() for name, pid in _drivers(home).items()]
    with ThreadPoolExecutor(max_workers=max(1, len(found))) as pool:  # who does not answer takes its time
        return list(pool.map(lambda each: _examine(*each), sorted(found)))


def describe(engines: list[dict[str, Any]]) -> str:
    """For people."""
    if not engines:
        return "no engine with ranks that are processes runs here"
    lines = []
    for engine in engines:
        head = f"process {engine['process']} ({engine['command']})"
        lines.append(f"{head}: {engine.get('problem') or engine['during']}")
        for rank in engine.get("ranks", ()):
            stands = rank["stands"].replace("\n", "\n    ")
            lines.append(f"  {rank['name']}, process {rank['process']}: {stands}")
    return "\n".join(lines)


def _networks() -> Iterator[Path]:
    """For each network namespace with processes that may be looked at, the folder in /proc of one of them."""
    yield OWN
    seen = {os.stat(OWN / "ns/net").st_ino}
    for pid in psutil.pids():
        home = Path("/proc", str(pid))
        with suppress(OSError):
            inode = os.stat(home / "ns/net").st_ino
            if inode not in seen:
                seen.add(inode)
                yield home


def _drivers(home: Path) -> dict[str, int]:
    try:
        return drivers(home / "net/unix")
    except OSError:  # the process has ended
        return {}


def _examine(pid: int, name: str, home: Path) -> dict[str, Any]:
    engine: dict[str, Any] = {"process": pid, "command": _command(pid)}
    try:
        return engine | (ask(name) if home == OWN else _ask_in(home, name))
    except (OSError, ValueError) as error:
        return engine | {
            "problem": f"the driver does not answer: {getattr(error, 'strerror', None) or error}"
        }


def _ask_in(home: Path, name: str) -> dict[str, Any]:
    """In another network namespace."""
    descriptor = os.open(home / "ns/net", os.O_RDONLY)
    try:
        return inside(descriptor, lambda: ask(name))
    finally:
        os.close(descriptor)


def _command(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return "?"
