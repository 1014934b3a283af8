"""The report as a user sees it and sends it: in the terminal, as Markdown and as JSON, with nothing that tells whose
machine it was."""

import getpass
import json
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from expertmesh.bench.accelerator.ticks import named
from expertmesh.bench.machine import write_card
from expertmesh.errors import InputError

CARD, JSON, MARKDOWN = "card.toml", "report.json", "report.md"
SHOWN = {"none": "-"}  # how states are written where it is not as they are called
FREE = ("why", "lacking")  # fields with words of libraries: the others are ours
FEW = 12  # words of a reason in a table
# A path with two folders or more: what it ends with says enough.
FOLDERS = re.compile(r"(?<![\w./])(?:~|/)(?:[\w.+@-]+/){1,}(?=[\w.+@-])")

Report = Mapping[str, Any]


def anonymous(report: Report) -> dict[str, Any]:
    """Without the machine's names and addresses, the user's, and folders."""
    words = [socket.gethostname(), socket.getfqdn()]
    with suppress(KeyError, OSError):  # of a user without a name
        words.append(getpass.getuser())
    for addresses in psutil.net_if_addrs().values():
        words += [a.address.split("%")[0] for a in addresses if a.address not in ("127.0.0.1", "::1", "")]
    known = sorted({w for w in words if w not in ("", "localhost", "root")}, key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(w)}(?!\w)" for w in known) or "(?!)")

    def clean(value: Any, free: bool = False) -> Any:
        if isinstance(value, str) and free:
            return pattern.sub("***", FOLDERS.sub(".../", value))
        if isinstance(value, dict):
            return {key: clean(each, key in FREE) for key, each in value.items()}
        return [clean(each) for each in value] if isinstance(value, list) else value

    cleaned: dict[str, Any] = clean(dict(report))
    return cleaned


def check_out(folder: Path) -> None:
    """InputError where nothing can be written there: before anything is examined."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{JSON}"
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {folder}: {error.strerror}; give a folder that can be written to") from None


def write(folder: Path, report: Report) -> list[str]:
    """Names of the files."""
    (folder / JSON).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / MARKDOWN).write_text(markdown(report), encoding="utf-8")
    if report["profile"] is None:
        return [JSON, MARKDOWN]
    title = f"{report['device']['name']}, as measured"
    write_card(folder / CARD, {"title": title, "numbers": report["profile"], "parameters": {}})
    return [JSON, MARKDOWN, CARD]


def markdown(report: Report) -> str:
    """All of it but the profile, which is a file of its own."""
    device, software = report["device"], report["device"].get("software", {})
    lines = [
        f"# {_title(report)}",
        "",
        f"{report['date']}; {', '.join(f'{k} {v}' for k, v in software.items())}",
        "",
    ]
    if device["state"] != "ok":
        lines += [f"The card could not be used: {device['why']}", ""]
    for heading, header, rows in _tables(report):
        cells = [[_cell(each) for each in row] for row in rows]
        lines += [f"## {heading}", "", _line(header), _line(["---"] * len(header)), *map(_line, cells), ""]
    return "\n".join(lines)


def text(report: Report) -> str:
    """For a terminal: what was shown and what was measured, the ops that were slowest to err, then what failed."""
    lines = [_title(report)]
    ticks, *rest = _tables(report)
    for heading, header, rows in (ticks, *rest):
        if heading == "Ops":
            header, rows = _by_op(report)
        if rows:
            lines += ["", heading.lower(), *_columns([header, *rows])]
    failed = [tick for tick in report["ticks"] if tick["state"] not in ("ok", "none")]
    lines.append("")
    for tick in failed:
        lines += [f"{tick['id']} {tick['state']}: {tick['why']}"]
        lines += [f"  what to do: {tick['advice']}"] if tick["advice"] else []
    count = sum(tick["state"] == "ok" for tick in report["ticks"])
    apply = sum(tick["state"] != "none" for tick in report["ticks"])
    lines.append(f"{count} of {apply} things that apply here are ok")
    return "\n".join(lines)


def _title(report: Report) -> str:
    device = report["device"]
    name = device.get("name", "a card that could not be used")
    memory = f", {device['memory_bytes'] / 1e9:.0f} GB" if "memory_bytes" in device else ""
    cards = f"{report['cards']} processes" if report["kind"] == "cpu" else f"{report['cards']} card(s)"
    return f"{name} ({report['kind']}), {cards}{memory}"


Table = tuple[str, Sequence[str], Sequence[Sequence[Any]]]


def _tables(report: Report) -> Iterable[Table]:
    yield (
        "Ticked off",
        ("id", "what", "", "how"),
        [(t["id"], t["what"], _shown(t["state"]), t["why"]) for t in report["ticks"]],
    )
    yield (
        "Speeds",
        ("what", "", "value", "unit", "why"),
        [(r["name"], _shown(r["state"]), r.get("value"), r.get("unit"), r["why"]) for r in report["speeds"]],
    )
    yield (
        "Links",
        ("kind", "bytes to each", "", "us", "GB/s", "why"),
        [
            (r["kind"], r["bytes"], _shown(r["state"]), r.get("us"), r.get("gbs"), r["why"])
            for r in report["links"]
        ],
    )
    header = ("op", "origin", "", "error", "bound", "runs", "us", "GB/s", "TFLOPS", "of its limit", "why")
    yield "Ops", header, [_op(named(r), r) for r in report["ops"]]


def _op(name: str, row: Mapping[str, Any]) -> tuple[Any, ...]:
    seconds, share = row.get("seconds"), row.get("share")
    return (
        name, row.get("origin"), _shown(row["state"]), row.get("error"), row.get("bound"), row.get("runs"),
        1e6 * seconds if seconds else None, row.get("gbs"), row.get("tflops"),
        f"{share:.0%}" if share else None, row["why"],
    )  # fmt: skip


def _by_op(report: Report) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
    """A line for each op and precision: what failed of it, else the numbers of its largest batch."""
    best: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in report["ops"]:
        key = row["op"], row["precision"]
        if row["state"] != "none" and best.get(key, {"state": "ok"})["state"] == "ok":
            best[key] = row
    header = ("op", "origin", "", "error", "bound", "runs", "us", "GB/s", "TFLOPS", "of its limit", "why")
    return header, [_op(f"{op}, {precision}", row) for (op, precision), row in best.items()]


def _shown(state: str) -> str:
    return SHOWN.get(state, state)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return " ".join(str(value).split()).replace("|", "\\|") if value is not None else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _columns(rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[_cell(each) for each in row] for row in rows]
    shortened = [[*row[:-1], _short(row[-1])] for row in cells]
    widths = [max(map(len, column)) for column in zip(*shortened, strict=True)]
    return [
        "  " + "  ".join(f"{each:{width}}" for each, width in zip(row, widths, strict=True)).rstrip()
        for row in shortened
    ]


def _short(reason: str) -> str:
    words = reason.split(" ")
    return " ".join(words[:FEW]) + (" ..." if len(words) > FEW else "")
