"""Fit the planner's parameters on published results, and say how well it predicts them, and those left out.

python benchmarks/planner/fit.py            # the scores of expertmesh/planner/parameters.toml
python benchmarks/planner/fit.py --fit      # fit again, and write them
python benchmarks/planner/fit.py --rows     # every row beside its prediction
"""

import argparse
import csv
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path

import numpy as np

from expertmesh.errors import InputError
from expertmesh.planner.parameters import Parameters, bounds, parameters, parameters_file
from expertmesh.planner.predict import Answer, answer
from expertmesh.planner.rows import Case, Row, case, number

PUBLISHED, PAIRS = (Path(__file__).parent / name for name in ("published.csv", "pairs.csv"))
PULL = 1.5  # of the priors: this many rows' errors for one width
NOISE = 0.05  # errors below this count as squares, above as they are
UNSAID = 0.3  # weight of a row that leaves its batch open
ROUNDS = 12


@dataclass(frozen=True)
class Known:
    """A row, what it is taken for, and what was measured: (name, value)."""

    row: Row
    case: Case
    measured: tuple[tuple[str, float], ...]

    @property
    def open(self) -> bool:
        """Whether its batch was not published."""
        return any("not given" in text for text in self.case.assumed)

    @property
    def wide(self) -> bool:
        return self.case.phase != "prefill" and self.case.service.decode.ranks >= 32


def read(path: Path = PUBLISHED) -> tuple[list[Known], dict[str, str]]:
    """Rows that can be answered, and why others cannot."""
    known, refused = [], {}
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        names = ("tok_s_per_card",) if row["phase"] == "prefill" else ("tpot_ms", "tok_s_per_card")
        measured = [(name, value) for name in names if (value := number(row[name]))]
        try:
            found = case(row)
        except InputError as error:
            refused[row["id"]] = str(error)
            continue
        if not measured:
            continue
        measured += _saturated(row, found)
        known.append(Known(row, found, tuple(measured)))
    return known, refused


def _saturated(row: Row, found: Case) -> list[tuple[str, float]]:
    """Throughput of many requests that wait long for prefill, by Little's law: it tells what prefill can do."""
    ttft, tpot, work = number(row["ttft_ms"]), number(row["tpot_ms"]), found.work
    if not (ttft and tpot and work) or number(row["tok_s_per_card"]) or found.batch < 64:
        return []
    decoding = tpot * work.output
    if ttft < 0.3 * decoding:
        return []
    return [("tok_s_per_card", found.batch * work.output * 1e3 / (ttft + decoding) / found.cards)]


def ratios(item: Known, p: Parameters) -> list[float]:
    """Predicted over measured."""
    found = answer(item.case, p)
    return [getattr(found, name) / value for name, value in item.measured]


def error(item: Known, p: Parameters) -> float:
    """Absolute error of a row: of the time of a token where it was measured, else of the throughput."""
    return abs(ratios(item, p)[0] - 1)


# --- the fit: least squares of logarithms, robust, with priors (Gauss-Newton, reweighted)


def fit(items: Sequence[Known], start: Parameters | None = None, rounds: int = ROUNDS) -> Parameters:
    limits = bounds()
    names = list(limits)
    prior = np.array([log(limits[n].prior) for n in names])
    width = np.array([limits[n].width for n in names])
    low, high = (
        np.array([log(max(getattr(limits[n], side), 1e-3)) for n in names]) for side in ("low", "high")
    )
    sources = Counter(item.row["source"] for item in items)
    weight = np.array([
        (UNSAID if item.open else 1.0) / sources[item.row["source"]] ** 0.5 / len(item.measured) ** 0.5
        for item in items for _ in item.measured
    ])  # fmt: skip
    weight *= len(weight) / weight.sum()

    def residuals(x: np.ndarray) -> np.ndarray:
        p = Parameters(**dict(zip(names, np.exp(x).tolist(), strict=True)))
        return np.array([r - 1 for item in items for r in ratios(item, p)])

    def loss(x: np.ndarray, r: np.ndarray) -> float:
        return float(
            (weight * np.sqrt(r**2 + NOISE**2)).sum() + 0.5 * (((x - prior) / width) ** 2).sum() * PULL
        )

    x = prior.copy() if start is None else np.array([log(getattr(start, n)) for n in names])
    r = residuals(x)
    damping = 1e-2
    for _ in range(rounds):
        jacobian = np.stack([(residuals(x + 0.02 * e) - r) / 0.02 for e in np.eye(len(x))], axis=1)
        w = weight / np.sqrt(r**2 + NOISE**2)
        normal = jacobian.T @ (w[:, None] * jacobian) + np.diag(PULL / width**2)
        slope = jacobian.T @ (w * r) + PULL * (x - prior) / width**2
        before = loss(x, r)
        while damping < 1e4:
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), slope)
            trial = np.clip(x - step, low, high)
            there = residuals(trial)
            if loss(trial, there) < before:
                break
            damping *= 5
        else:
            break
        x, r, damping = trial, there, damping / 5
        if before - loss(x, r) < 1e-3 * before:
            break
    return Parameters(**dict(zip(names, np.exp(x).tolist(), strict=True)))


def left_out(
    items: Sequence[Known], key: Callable[[Known], str], start: Parameters
) -> dict[str, list[float]]:
    """Errors of each group of rows, predicted by a fit on all others."""
    groups: dict[str, list[Known]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    out = {}
    for name, mine in groups.items():
        p = fit([item for item in items if item not in mine], start, 4)
        out[name] = [error(item, p) for item in mine if not item.open] or [error(item, p) for item in mine]
    return out


# --- what is reported


def family(item: Known) -> str:
    return re.split(r"[\s]", item.row["engine"].strip())[0].lower()


KEYS: dict[str, Callable[[Known], str]] = {
    "source": lambda item: item.row["source"],
    "source and card": lambda item: f"{item.row['source']}, {item.row['hw']}",
    "engine": family,
}


def summary(errors: Sequence[float]) -> dict[str, float]:
    if not errors:
        return {"rows": 0}
    return {"rows": len(errors), "mean": round(100 * statistics.mean(errors), 1),
            "median": round(100 * statistics.median(errors), 1), "worst": round(100 * max(errors), 1)}  # fmt: skip


def pairs(items: Sequence[Known], p: Parameters) -> dict[str, str]:
    """Gain of the better of two published rows: as predicted and as measured."""
    cases = {item.row["id"]: item for item in items}
    out = {}
    for pair in csv.DictReader(PAIRS.read_text(encoding="utf-8").splitlines()):
        better, worse = cases[pair["better"]], cases[pair["worse"]]
        gain = (answer(better.case, p).tok_s_per_card or 0) / (answer(worse.case, p).tok_s_per_card or 1)
        known = float(better.row["tok_s_per_card"]) / float(worse.row["tok_s_per_card"])
        out[f"{pair['better']} against {pair['worse']}"] = f"{gain - 1:+.0%}, measured {known - 1:+.0%}"
    return out


def report(items: Sequence[Known], refused: dict[str, str], p: Parameters, cross: bool) -> dict[str, object]:
    said = [item for item in items if not item.open]
    out: dict[str, object] = {
        "parameters": {name: round(value, 4) for name, value in asdict(p).items()},
        "decode": summary([error(i, p) for i in said if i.case.phase != "prefill"]),
        "wide EP": summary([error(i, p) for i in said if i.wide]),
        "prefill": summary([error(i, p) for i in said if i.case.phase == "prefill"]),
        "batch not published": summary([error(i, p) for i in items if i.open]),
        "pairs": pairs(items, p),
        "refused": refused,
    }
    if cross:
        for label, key in KEYS.items():
            errors = left_out(items, key, p)
            out[f"left out: {label}"] = {name: summary(e) for name, e in errors.items()}
            every = [statistics.mean(e) for e in errors.values()]
            out[f"left out: {label}, mean of groups"] = round(100 * statistics.mean(every), 1)
            out[f"left out: {label}, all rows"] = summary([e for es in errors.values() for e in es])
    return out


def write(p: Parameters) -> None:
    path = parameters_file()
    text = path.read_text(encoding="utf-8")
    for name, value in asdict(p).items():
        text = re.sub(rf"(\[{name}\]\nvalue = )[^\n]*", rf"\g<1>{value:.4g}", text)
    path.write_text(text, encoding="utf-8")


def rows_table(items: Sequence[Known], p: Parameters) -> str:
    lines = []
    for item in items:
        said: Answer = answer(item.case, p)
        parts = [
            f"{n} {getattr(said, n):.1f}/{v:g} {100 * (getattr(said, n) / v - 1):+.0f}%"
            for n, v in item.measured
        ]
        r = item.row
        place = f"{r['hw'][:12]:12} {r['weight_prec']:5} {r['prefill_layout'][:16]:16} {r['decode_layout'][:19]:19}"
        sizes = f"{r['isl']:>5} {r['osl']:>5} {r['batch_per_rank'][:12] or r['global_batch'][:12]:>12}"
        mark = "*" if item.open else ""
        lines.append(
            f"{r['id'][:26]:26} {r['engine'][:10]:10} {place} {sizes} {'; '.join(parts)} {said.bound_by} {mark}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fit", action="store_true", help="fit, and write the parameters")
    parser.add_argument("--rows", action="store_true", help="print each row")
    parser.add_argument("--quick", action="store_true", help="leave nothing out")
    args = parser.parse_args()
    items, refused = read()
    p = fit(items) if args.fit else parameters()
    if args.fit:
        write(p)
    if args.rows:
        print(rows_table(items, p))
    print(json.dumps(report(items, refused, p, not args.quick), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
