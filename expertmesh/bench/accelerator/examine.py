"""The whole examination of a machine's cards, as one report of plain data."""

import math
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from expertmesh.bench.accelerator import links
from expertmesh.bench.accelerator.cases import Case, cases
from expertmesh.bench.accelerator.checks import CHECKS
from expertmesh.bench.accelerator.profile import known_card, peaks, profile
from expertmesh.bench.accelerator.sizes import Sizes
from expertmesh.bench.accelerator.speeds import SPEEDS
from expertmesh.bench.accelerator.ticks import OWN, PLAIN, QUANTISED, judge
from expertmesh.bench.accelerator.worker import PRELOAD, PROGRAM
from expertmesh.bench.accelerator.workers import Examiner, Workers, collectively
from expertmesh.device import Kind
from expertmesh.launch.forkserver import ForkServer

SCHEMA = 1  # of the report; another one where a field changes its meaning or goes

# Exchanges of the makers of cards, by the engine's names.
NATIVE: dict[Kind, tuple[str, ...]] = {"cpu": (), "cuda": ("deepep",), "npu": ("npu_distribute",)}

Report = dict[str, Any]


def examine(
    kind: Kind,
    cards: int,
    sizes: Sizes,
    tell: Callable[[str], None] = lambda text: None,
    program: str = PROGRAM,
) -> Report:
    """cards: ranks on as many cards, or processes on a CPU. tell: hears what is examined next."""
    with TemporaryDirectory() as folder, ForkServer(PRELOAD) as server:
        one = Examiner(server, program, kind, sizes, Path(folder))

        def ask(what: str, message: dict[str, Any]) -> dict[str, Any]:
            tell(what)
            return one.ask(message)

        try:
            report: Report = {"schema": SCHEMA, "date": str(date.today()), "kind": kind, "cards": cards}
            report["device"] = device = ask("the card", {"do": "identify"})
            if device["state"] != "ok":
                report |= {"known": None, "speeds": [], "ops": [], "checks": [], "tokens": [], "links": []}
                return _judged(report)
            report["known"] = known_card(device["name"])
            report["speeds"] = [{"name": n, **ask(n, {"do": "speed", "name": n})} for n in SPEEDS]
            report["checks"] = [{"name": n, **ask(n, {"do": "check", "name": n})} for n in CHECKS]
            limits = peaks(report)
            report["ops"] = [
                _row(case, ask(f"{case.op}, {case.shape.name}", _message(case)), limits)
                for case in cases(sizes)
            ]
            report["tokens"] = [
                how | ask(f"tokens, {how['cards']}", {"do": "tokens", **how}) for how in _models(kind, cards)
            ]
        finally:
            one.close()
        tell("links")
        report["links"] = _links(server, program, kind, cards, sizes, Path(folder)) if cards > 1 else []
    return _judged(report)


def steps(kind: Kind, cards: int, sizes: Sizes) -> int:
    """How many things are examined."""
    return 2 + len(SPEEDS) + len(CHECKS) + len(list(cases(sizes))) + len(_models(kind, cards))


def _judged(report: Report) -> Report:
    report["profile"] = profile(report)
    report["ticks"] = judge(report)
    report["ok"] = all(tick["state"] in ("ok", "none") for tick in report["ticks"])
    return report


def _models(kind: Kind, cards: int) -> list[dict[str, Any]]:
    """How many cards write together, how rows reach their experts, and how weights are kept."""
    ways = [(1, OWN, PLAIN), (1, OWN, QUANTISED)]
    ways += [(cards, name, PLAIN) for name in (OWN, *NATIVE[kind]) if cards > 1]
    return [dict(zip(("cards", "exchange", "weights"), way, strict=True)) for way in ways]


def _message(case: Case) -> dict[str, Any]:
    return {"do": "op", **asdict(case)}


def _row(case: Case, found: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """A line of the report. share: of what the card reads or multiplies at most, that it did."""
    row = {
        "op": case.op,
        "size": case.shape.name,
        "rows": case.batch.name,
        "precision": case.precision,
        **found,
    }
    if row["state"] != "ok":
        return row
    wrong = []
    if not row["error"] <= row["bound"]:
        wrong.append(f"its error of {row['error']:.2g} is above {row['bound']:g}")
    if not row["same"]:
        wrong.append(f"{row['runs']} runs with the same input gave different bits")
    if wrong:
        row |= {"state": "failed", "why": "; ".join(wrong)}
    if not math.isfinite(row["error"]):
        row["error"] = None  # which JSON has no number for
    if row["seconds"]:
        seconds, peak = row["seconds"], limits.get(case.precision)
        row |= {"gbs": row["bytes"] / seconds / 1e9, "tflops": row["flops"] / seconds / 1e12}
        floors = [
            row[what] / limit for what, limit in (("gbs", limits.get("memory")), ("tflops", peak)) if limit
        ]
        row["share"] = max(floors, default=None)
    return row


def _links(
    server: ForkServer, program: str, kind: Kind, cards: int, sizes: Sizes, folder: Path
) -> list[dict[str, Any]]:
    kinds = [(name, size) for name in links.KINDS for size in sizes.messages]
    messages: list[dict[str, Any]] = [{"do": "meet", "place": str(folder / "meeting")}]
    messages += [{"do": "link", "kind": name, "size": size} for name, size in kinds]
    workers = Workers(server, program, kind, cards, sizes, folder)
    (state, why, _), *answers = collectively(workers, messages)
    found = []
    for (name, size), (each, text, seconds) in zip(kinds, answers, strict=True):
        row: dict[str, Any] = {"kind": name, "bytes": size, "state": each, "why": text}
        if state != "ok":
            row |= {"state": state, "why": why}
        elif seconds:
            longest = max(seconds)
            row |= {"us": 1e6 * longest, "gbs": links.sent(name, cards, size) / longest / 1e9}
        found.append(row)
    return found
