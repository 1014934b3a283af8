"""`expertmesh plan`: what a deployment would give, before there is one. No weights, no accelerator."""

import argparse
import csv
import io
from pathlib import Path

from expertmesh.commands import plan_search
from expertmesh.commands.plan_news import add_news
from expertmesh.commands.plan_simulate import add_simulate
from expertmesh.errors import InputError
from expertmesh.planner.predict import COLUMNS, predict

# Of a row: a file without these has other rows.
ROW_COLUMNS = ("id", "model", "hw", "cards", "phase", "weight_prec")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    plan_search.add_arguments(parser)
    subparsers = parser.add_subparsers(dest="what", metavar="WHAT", title="instead of a search")
    rows = subparsers.add_parser("predict", help="results of published rows whose results are blank")
    rows.add_argument(
        "rows", type=Path, metavar="ROWS.csv", help="columns as benchmarks/planner/published.csv"
    )
    rows.add_argument("--out", type=Path, metavar="PRED.csv", help="default: standard output")
    rows.set_defaults(plan=_predict)
    add_news(subparsers)
    add_simulate(subparsers)


def run(args: argparse.Namespace) -> int:
    code: int = args.plan(args)
    return code


def _predict(args: argparse.Namespace) -> int:
    rows = _read(args.rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, ("id", *COLUMNS), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({"id": row["id"]} | predict(row).columns())
    if args.out is None:
        print(text.getvalue(), end="")
        return 0
    plan_search.write(args.out, text.getvalue())
    return 0


def _read(path: Path) -> list[dict[str, str]]:
    """Rows of a file, every field a string. InputError where it is no such file."""
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), restval="")
        missing = [name for name in ROW_COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise InputError(f"{path}: columns are missing: {', '.join(missing)}")
        return [{k: v for k, v in row.items() if k is not None} for row in reader]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a CSV file of rows") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8 ({error})") from None
