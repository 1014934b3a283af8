"""This machine as a card that the planner knows: what it reads, multiplies and sends, measured with the engine's own
kernels, transport and exchange. The best of several rounds: what disturbs one makes it longer, and a card's figures are
of what it can do."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertmesh.bench.exchange import PRELOAD, bench_exchange
from expertmesh.bench.kernels import Ceilings, seconds_of
from expertmesh.bench.reached import reached, tape_seconds
from expertmesh.bench.transport import exchange_seconds
from expertmesh.bench.workload import Workload
from expertmesh.comm.local import cores
from expertmesh.config import EngineConfig
from expertmesh.device import free_memory
from expertmesh.engine.engine import Engine
from expertmesh.errors import InputError
from expertmesh.kernels.cpu import Cpu
from expertmesh.launch.launcher import Here
from expertmesh.llm import demo_model
from expertmesh.mesh.topology import Topology
from expertmesh.planner.cards import NUMBERS, read_card

SMALL, LARGE = 64, 4 << 20  # bytes of a message
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
MANY = 512, 512  # rows of an exchange, and how wide they are
# What ceilings are measured on: as little as no cache holds, for what takes long is disturbed.
COLD, PRODUCT = 128 << 20, (256, 1024, 1024)


@dataclass(frozen=True)
class Setting:
    """cards: ranks that this machine is taken as, each with its share of cores and memory. across_gbs, across_us: of
    the network to other machines, which is not measured; None: there is none. rounds: of which the best is taken."""

    cards: int = 1
    across_gbs: float | None = None
    across_us: float | None = None
    rounds: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.cards <= cores():
            raise InputError(
                f"--cards is {self.cards}, but must be from 1 to the {cores()} cores that are here"
            )
        if self.rounds < 1:
            raise InputError("--rounds must be at least 1")
        for name in ("across_gbs", "across_us"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e6:
                raise InputError(f"--{name.replace('_', '-')} is {value}, but must be above 0")


def bench_machine(setting: Setting, kernels: Cpu) -> dict[str, Any]:
    """numbers: of a profile, each with its source (`planner.cards`); measured: what they are made of, in bytes/s,
    operations/s and seconds."""
    memory = free_memory()
    with torch.inference_mode():
        ceilings = Ceilings(kernels, COLD, PRODUCT)
        ceilings.measure()  # memory and threads are there now
        found = [ceilings.measure() for _ in range(10 * setting.rounds)]
        best = {name: max(each[name] for each in found) for name in found[0]}
        small = tape_seconds(kernels, setting.rounds)
        cache = last_cache()
        cached = reading(kernels, cache // 2, 40 * setting.rounds)
        parameters = _reached(kernels, best, small, setting.rounds)
    kinds = ("in place", "copied", "gathered")
    link = {
        ranks: exchange_seconds(ranks, (SMALL, LARGE), 4 * setting.rounds, kinds, min) for ranks in (2, 4)
    }
    how = "measured by `expertmesh bench machine`"
    found_of_ranks = {
        "collective_us": (1e6 * link[2][SMALL]["gathered"], f"{how}: {SMALL} bytes of each of two processes"),
        "ranks_us": (1e6 * asking(setting.rounds), f"{how}: two processes are asked, and answer"),
    }
    parameters |= _entries_of(found_of_ranks)
    measured = {
        "memory_bytes": memory,
        "cache_bytes": cache,
        "cached": cached,
        "ceilings": best,
        "launch": small["swiglu"],  # whose threads wait for each other as they do in a layer
        "in_place": link[2][SMALL]["in place"],
        "copied": link[2][LARGE]["copied"],
        "peer": max(0.0, (link[4][SMALL]["in place"] - link[2][SMALL]["in place"]) / 2),
        "exchange": exchanges(setting.rounds),
    }
    return {
        "title": f"this machine, {kernels.variant.name}, {torch.get_num_threads()} threads",
        "cards": setting.cards,
        "threads": torch.get_num_threads(),
        "kernels": kernels.variant.name,
        "measured": measured,
        "numbers": numbers(setting, measured),
        "parameters": parameters,
    }


def _reached(
    kernels: Cpu, ceilings: dict[str, float], small: dict[str, float], rounds: int
) -> dict[str, dict[str, Any]]:
    config = EngineConfig(
        dtype="bfloat16", device="cpu", prefix_cache=False, cache_tokens=1 << 14, max_context=1 << 9
    )
    demo = Engine(demo_model(), config)
    try:
        found = reached(kernels, ceilings, small, demo, rounds)
    finally:
        demo.close()
    return _entries_of(found)


def _entries_of(found: Mapping[str, tuple[float, str]]) -> dict[str, dict[str, Any]]:
    return {name: {"value": _rounded(value), "source": source} for name, (value, source) in found.items()}


def last_cache() -> int:
    """Bytes of the largest cache of this machine, 0 where the system does not say."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=0)


def reading(kernels: Cpu, size: int, rounds: int) -> float:
    """Bytes/s of reading so many bytes over and over, 0 of none."""
    if not size:
        return 0.0
    memory = torch.ones(size, dtype=torch.uint8)
    threads = torch.get_num_threads()
    read = partial(kernels.read_memory, memory.data_ptr(), size, threads)
    read()
    return size / min(seconds_of(read) for _ in range(rounds))


def asking(rounds: int) -> float:
    """Seconds in which two ranks that are processes answer their driver."""
    config = EngineConfig(device="cpu", ranks="processes", cache_tokens=1 << 10, max_context=1 << 9)
    engine = Engine(demo_model(), config, Topology(1, 2, 1))
    try:
        return min(seconds_of(engine.ranks.sent) for _ in range(20 * rounds))
    finally:
        engine.close()


def exchanges(rounds: int) -> dict[str, float]:
    """Of two ranks that are processes: seconds of dispatch and combine of one row of a few numbers, and bytes/s of the
    dispatch of many rows beyond that."""
    few, many = (
        Workload(
            nodes=1, cards=2, tokens=tokens, hidden=hidden, experts=8, groups=1, groups_per_token=1,
            experts_per_token=2, rounds=20 * rounds,
        )
        for tokens, hidden in ((1, 64), MANY)
    )  # fmt: skip
    name = "two_tier"
    empty, full = (bench_exchange(workload, [name], Here(PRELOAD), np.min) for workload in (few, many))
    seconds: dict[str, float] = empty["seconds"][name]
    more = full["seconds"][name]["dispatch"] - seconds["dispatch"]
    return seconds | {"rate": full["in_node_bytes"][name]["dispatch"] / 2 / max(more, 1e-6)}


def numbers(setting: Setting, measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the profile of one card of this machine."""
    limits, cards = measured["ceilings"], setting.cards
    how = f"measured {date.today()} by `expertmesh bench machine`"
    share = "" if cards == 1 else f", a {cards}th of the machine's"
    link = measured["copied"]
    node = (LARGE / link / 1e9, f"{how}: {LARGE >> 20} MiB between two processes, copied once")
    none = "not in hardware, or not used by the kernels"
    across_gbs, across_us = setting.across_gbs or node[0], setting.across_us or 1e6 * measured["in_place"]
    given = "given by whoever measured"
    alone = "no network measured: as inside the machine"
    bf16 = max(limits[name] for name in ("bf16", "torch bf16"))
    exchange = measured["exchange"]
    found: dict[str, tuple[float, str]] = {
        "memory_gb": (measured["memory_bytes"] / cards / 1e9, f"free when measured{share}"),
        "memory_gbs": (
            limits["read"] / cards / 1e9,
            f"{how}: reading {COLD >> 20} MiB by all threads{share}",
        ),
        "bf16_tflops": (
            bf16 / cards / 1e12,
            f"{how}: a large product, the faster of ours and torch's{share}",
        ),
        "fp8_tflops": (0, none),
        "int8_tflops": (limits["w8a8"] / cards / 1e12, f"{how}: a large product in W8A8{share}"),
        "fp4_tflops": (0, none),
        "cache_mb": (measured["cache_bytes"] / cards / 1e6, f"of the last level, as the system says{share}"),
        "cache_gbs": (measured["cached"] / cards / 1e9, f"{how}: reading half of it by all threads{share}"),
        "fp32_tflops": (limits["float32"] / cards / 1e12, f"{how}: a product in float32{share}"),
        "node_gbs": node,
        "bulk_gbs": (exchange["rate"] / 1e9, f"{how}: {MANY[0]} rows between two processes, beyond one"),
        "node_us": (1e6 * measured["in_place"], f"{how}: {SMALL} bytes between two processes, read in place"),
        "across_gbs": (across_gbs, given if setting.across_gbs else alone),
        "across_us": (across_us, given if setting.across_us else alone),
        "cards_per_node": (cards, "given by whoever measured: ranks of this machine"),
        "dies_per_card": (1, "a rank is a card"),
        "domain_ranks": (cards, "ranks of this machine share its memory"),
        "dispatch_us": (1e6 * exchange["dispatch"], f"{how}: one row between two processes"),
        "combine_us": (1e6 * exchange["combine"], f"{how}: one row between two processes"),
        "peer_us": (
            1e6 * measured["peer"],
            f"{how}: what two more processes add to a small exchange, halved",
        ),
        "launch_us": (
            1e6 * measured["launch"],
            f"{how}: an op on a tape that has next to nothing to do",
        ),
    }
    return {name: {"value": _rounded(found[name][0]), "source": found[name][1]} for name in NUMBERS}


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")


def check_out(path: Path) -> None:
    """InputError where no profile can be written there: before anything is measured."""
    if path.suffix != ".toml":
        raise InputError(f"--out {path}: a profile is a file that ends in .toml")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--out {path}: there is no folder {path.absolute().parent}")


def _entries(table: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} = {{ value = {entry['value']}, source = {json.dumps(entry['source'])} }}"
        for name, entry in table.items()
    ]


def write_card(path: Path, report: Mapping[str, Any]) -> None:
    """As a profile. InputError where it cannot be written there."""
    lines = [f"title = {json.dumps(report['title'])}", "", "# Of one rank: GB, GB/s, dense TFLOPS, us."]
    lines += _entries(report["numbers"])
    lines += ["", "# Of the planner's cost model.", "[parameters]", *_entries(report["parameters"])]
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {path}: {error.strerror}") from None
    read_card(path)
