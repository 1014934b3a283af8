"""`expertmesh doctor --accelerator`: everything that only a card can show, on the card at hand."""

import argparse
import json
import socket
from pathlib import Path
from typing import Any

from tqdm import tqdm

from expertmesh.bench.accelerator import report as reports
from expertmesh.bench.accelerator import sizes
from expertmesh.bench.accelerator.examine import examine, steps
from expertmesh.device import KINDS, Kind, find, found, problem
from expertmesh.errors import InputError

PROCESSES = 2  # that stand for cards on a CPU, where nobody says how many
# Files of a driver that is there, whatever torch knows of its cards.
DRIVERS = {"npu": "davinci[0-9]*", "cuda": "nvidia[0-9]*"}


def add_accelerator(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("of a card")
    add = group.add_argument
    add(
        "--accelerator", action="store_true",
        help="run every op on the card beside its reference, measure it and its links, and tick off what only a card "
        "can show (docs/accelerators.md); exits with 1 where something failed",
    )  # fmt: skip
    add("--device", choices=("auto", "cuda", "npu", "cpu"), default="auto", help="default: npu, else cuda")
    add("--cards", type=int, metavar="N", help="cards of this machine (default: all; processes on a CPU: 2)")
    add(
        "--out", type=Path, metavar="FOLDER",
        help="write report.md and report.json, to send, and card.toml, for --card of other commands",
    )  # fmt: skip
    add(
        "--identify",
        action="store_true",
        help="leave names, addresses and folders of this machine in the report",
    )


def run_accelerator(args: argparse.Namespace) -> int:
    kind = the_kind(args.device)
    cards = _cards(kind, args.cards)
    if args.out is not None:
        reports.check_out(args.out)
    amount = sizes.CPU if kind == "cpu" else sizes.CARD
    with tqdm(total=steps(kind, cards, amount), leave=False, disable=None) as bar:

        def tell(what: str) -> None:
            bar.set_description(what)
            bar.update()

        report = examine(kind, cards, amount, tell)
    report = report | {"host": socket.gethostname()} if args.identify else reports.anonymous(report)
    files = reports.write(args.out, report) if args.out is not None else []
    _show(args, report, files)
    return 0 if report["ok"] else 1


def the_kind(name: str, drivers: Path = Path("/dev")) -> Kind:
    """For "auto" the first kind of card that is there: a processor has to be named. InputError says why there is no
    such device. drivers: where these have their files."""
    if name != "auto":
        return find(name).kind
    problems = {kind: problem(kind) for kind in KINDS if kind != "cpu"}
    for kind, why in problems.items():
        if not why:
            return kind
    driven = [kind for kind in problems if any(drivers.glob(DRIVERS[kind]))]
    whys = "; ".join(f"{kind}: {problems[kind]}" for kind in driven or problems)
    there = f"there is a driver of {' and of '.join(driven)}, but no card" if driven else "no card"
    raise InputError(f"{there} that torch can use ({whys}); --device cpu shows here what is examined")


def _cards(kind: Kind, asked: int | None) -> int:
    there = PROCESSES if kind == "cpu" else len(found(kind))
    if asked is None:
        return there
    if asked < 1 or (kind != "cpu" and asked > there):
        raise InputError(f"--cards is {asked}, but must be from 1 to the {there} that are here")
    return asked


def _show(args: argparse.Namespace, report: dict[str, Any], files: list[str]) -> None:
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
        return
    print(reports.text(report))
    if args.out is None:
        print("with --out FOLDER it writes a report to send, and a profile for expertmesh plan --card")
        return
    print(f"written to {args.out}: {', '.join(files)}")
    if reports.CARD in files:
        print(f"expertmesh plan --model deepseek-v3 --card {args.out / reports.CARD} plans with this card")
