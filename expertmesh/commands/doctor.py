"""`expertmesh doctor`: what this machine offers and what will run on it."""

import argparse
import json
import platform
import shutil
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from expertmesh.commands.doctor_accelerator import add_accelerator, run_accelerator
from expertmesh.commands.standings import describe, running_engines
from expertmesh.device import KINDS, Device, find, free_memory, problem
from expertmesh.device import found as found_devices
from expertmesh.kernels import kernels_for
from expertmesh.llm import demo_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    parser.add_argument(
        "--ranks", action="store_true",
        help="show instead where each rank of every engine that runs on this machine stands, with its stack; for "
        "engines of this user whose ranks are processes. SIGUSR1 makes a driver or a rank print the same",
    )  # fmt: skip
    add_accelerator(parser)


def run(args: argparse.Namespace) -> int:
    if args.accelerator:
        return run_accelerator(args)
    if args.ranks:
        engines = running_engines()
        print(json.dumps({"engines": engines}, ensure_ascii=False) if args.json else describe(engines))
        return 0
    report = examine()
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
        return 0
    for section, content in report.items():
        print(section)
        for key, value in content.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"  {key:16} {shown}")
    return 0


def examine() -> dict[str, dict[str, Any]]:
    """Everything that doctor reports, by section."""
    return {
        "machine": _machine(),
        "devices": _devices(),
        "kernels": _kernels(),
        "compiler": _compiler(),
        "network": _network(),
        "software": _software(),
    }


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB, {free_memory() / 1e9:.1f} GB free to this process",
    }


def _devices() -> dict[str, Any]:
    """Of each kind: what is there, and whether it is used where --device does not say."""
    taken = find("auto").kind
    found: dict[str, Any] = {}
    for kind in reversed(KINDS):
        shown = ", ".join(_device(device) for device in found_devices(kind))
        used = (
            "used"
            if kind == taken
            else f"not used: {problem(kind) or f'{taken} comes first; say --device {kind}'}"
        )
        found[kind] = f"{shown}; {used}" if shown else used
    return found


def _device(device: Device) -> str:
    room = device.room()
    count = f"card {device.index}" if device.is_card else f"{torch.get_num_threads()} threads"
    return f"{device.name}, {count}, {room.free / 1e9:.1f} of {room.total / 1e9:.1f} GB free"


def _kernels() -> dict[str, Any]:
    device = find("auto")
    kernels = kernels_for(device.kind, "bfloat16")
    table: dict[str, Any] = dict(kernels.origin)
    if kernels.lacking:
        table["lacking"] = kernels.lacking
    table["on reference"] = kernels.on_reference or "none"
    return table


def _compiler() -> dict[str, Any]:
    found = {}
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            done = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=10, check=False
            )
            found[name] = (done.stdout.splitlines() or ["?"])[0]
    return found or {"c++": "none: library kernels compute, and placements are greedy; install g++"}


def _network() -> dict[str, Any]:
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        address = f"does not resolve ({error})"
    found: dict[str, Any] = {"host name": f"{host}: {address}"}
    states = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        inet = [a.address for a in addresses if a.family == socket.AF_INET]
        state = states.get(name)
        speed = f", {state.speed} Mbit/s" if state and state.speed else ""
        found[name] = (
            f"{', '.join(inet) or 'no IPv4 address'}, {'up' if state and state.isup else 'down'}{speed}"
        )
    return found


def _software() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in ("expertmesh", "torch", "tokenizers", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    weights = sum(f.stat().st_size for f in demo_model().glob("*.safetensors"))
    found["demo model"] = f"{weights / 1e6:.1f} MB" if weights else "its weights are missing"
    return found
