"""`expertmesh bench balance`: what placements of experts are worth, on recorded or synthetic loads."""

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

from expertmesh.balancer.formats import read_loads
from expertmesh.bench.balance import (
    DEMO,
    EPLB,
    FULL,
    NAMES,
    OURS,
    QUICK,
    bench_balance,
    demo_loads,
)
from expertmesh.bench.rebalance import Model, Traffic, bench_rebalance
from expertmesh.commands.options import PROMPTS
from expertmesh.errors import InputError
from expertmesh.mesh.loads import Loads, check_fit
from expertmesh.mesh.synthetic import synthetic
from expertmesh.mesh.topology import Topology


def add_balance(subparsers: Any) -> None:
    parser = subparsers.add_parser("balance", help="placements of experts, against EPLB and experts in order")
    add = parser.add_argument
    add("loads", nargs="*", metavar="FILE",
        help="recorded loads of one model, as for `expertmesh balance`, each of one workload; the first is planned "
        "for (default: synthetic ones of DeepSeek-V3's size, and the demo model's)")  # fmt: skip
    add("--nodes", type=int, default=8, metavar="N", help="nodes of the cluster (default: 8)")
    add("--cards", type=int, default=8, metavar="N", help="cards of each node (default: 8)")
    add("--redundant", type=int, default=64, metavar="N", help="slots of a layer for replicas (default: 64)")
    add("--experts", type=int, metavar="N", help="experts of a layer, where a record may not name all")
    add("--seed", type=int, default=0, metavar="N", help="of synthetic loads (default: 0)")
    add(
        "--quick",
        action="store_true",
        help="two layers, three workloads, few steps: shows that it works, not for quoting",
    )
    add("--json", action="store_true", help="print JSON, and nothing else")
    parser.set_defaults(measure=_measure, table=_table)


TRAFFIC_OPTIONS = {
    "nodes": "nodes of the cluster",
    "cards": "cards of each node",
    "redundant": "slots of a layer for replicas",
    "rows": "tokens of each card in a step",
    "steps": "steps of each of the six mixes of domains",
    "every": "steps between looks at the loads",
    "seed": "of the tokens that are drawn",
}
CARD_OPTIONS = {
    "row": "seconds that a card computes a row of an expert",
    "expert": "seconds in which a card takes an expert",
    "counts": "seconds of a layer's exchange of counts",
}


def add_rebalance(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "rebalance",
        help="throughput while domains come and go: the demo model's routing, cards' time modelled",
    )
    for kind, options in ((Traffic, TRAFFIC_OPTIONS), (Model, CARD_OPTIONS)):
        for field, text in options.items():
            default = kind.__dataclass_fields__[field].default
            parser.add_argument(
                f"--{field}",
                type=type(default),
                default=default,
                metavar="N",
                help=f"{text} (default: {default})",
            )
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    parser.set_defaults(measure=_rebalance, table=_rebalance_table)


def _rebalance(args: argparse.Namespace) -> dict[str, Any]:
    for name in (*TRAFFIC_OPTIONS, *CARD_OPTIONS):
        if getattr(args, name) < (0 if name in ("redundant", "seed", *CARD_OPTIONS) else 1):
            raise InputError(f"--{name} {getattr(args, name)} is too small")
    traffic = Traffic(**{name: getattr(args, name) for name in TRAFFIC_OPTIONS})
    return bench_rebalance(traffic, Model(**{name: getattr(args, name) for name in CARD_OPTIONS}))


def _rebalance_table(report: dict[str, Any]) -> str:
    head = ("max/mean", "computing", "moving", "counting", "throughput", "moved", "wall, s")
    lines = [
        f"{report['steps']} steps of {report['rows_per_card']} tokens a card, {report['layers']} layers; seconds as "
        "modelled",
        f"{'':28}" + "".join(f"{name:>11}" for name in head),
    ]
    for way in report["ways"]:
        values = [way[k] for k in ("max_over_mean", "computing", "moving", "counting", "throughput")]
        numbers = "".join(f"{value:11.3f}" for value in values)
        lines.append(f"{way['name']:28}{numbers}{way['moved']:11,}{way['wall_seconds']:11.1f}")
    return "\n".join(lines)


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    topology, size = Topology(args.nodes, args.cards), QUICK if args.quick else FULL
    if args.seed < 0:
        raise InputError("--seed must be at least 0")
    workloads = _given(args) if args.loads else synthetic(seed=args.seed)
    check_fit(next(iter(workloads.values())), topology, args.redundant)
    report = bench_balance(workloads, topology, args.redundant, size)
    if not args.loads and not args.quick:
        report["demo"] = bench_balance(demo_loads(PROMPTS), DEMO, DEMO.ranks, size)
    return report


def _given(args: argparse.Namespace) -> dict[str, Loads]:
    found: dict[str, Loads] = {}
    for name in args.loads:
        if name in found:
            raise InputError(f"{name}: is named twice")
        loads = found[name] = read_loads(name, args.experts)
        first = found[args.loads[0]]
        if (loads.layers, loads.experts) != (first.layers, first.experts):
            raise InputError(f"{name}: its layers or experts are not those of {args.loads[0]}")
    return found


def _table(report: dict[str, Any]) -> str:
    lines = list(_lines(report))
    if "demo" in report:
        lines += ["", "the demo model", *_lines(report["demo"])]
    return "\n".join(lines)


def _lines(report: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{report['layers']} layers of {report['experts']} experts on {report['nodes']} x {report['cards']} cards, "
        f"{report['redundant']} redundant slots a layer; planned for {report['workloads'][0]}"
    )
    yield _row("", NAMES)
    known, mean = report["known"], report["next"]["mean"]
    yield _row("known loads, max/mean", [_of(known[name], "mean_max_over_mean") for name in NAMES])
    yield _row("known loads, spread", [_of(known[name], "mean_spread") for name in NAMES])
    yield _row("planned in, s", [_of(known[name], "seconds") for name in NAMES])
    yield _row("replicas for a spread below 10%", [report["redundancy"][name] for name in NAMES])
    for how, label in (("split", "split at each step"), ("even", "even shares")):
        for pair in report["next"]["pairs"]:
            values = [_of(pair[name], how, "mean_max_over_mean") for name in NAMES]
            yield _row(f"{pair['planned']} > {pair['judged']}, {how}", values)
        yield _row(f"mean of these, {label}", [_of(mean[name], how, "mean_max_over_mean") for name in NAMES])
    for redundant, plans in report["steps"].items():
        for how in ("split", "even"):
            values = [_of(plans.get(name), how) for name in NAMES]
            yield _row(f"single steps, {redundant} replicas, {how}", values)
    yield from _shifts(report)
    yield from _copies(report)
    way = "compiled" if report["compiled"] else "not compiled"
    yield f"split of a step, of a layer and rank: {report['split_microseconds']:.0f} us ({way})"


def _shifts(report: dict[str, Any]) -> Iterator[str]:
    if not report["shifts"]:
        return
    yield _row("moved to come back", ("moves, %", "even before", "even after", "split after", "EPLB, %"))
    for row in report["shifts"]:
        ours = row[OURS]
        share, other = (None if r is None else 100 * r["share"] for r in (ours, row[EPLB]))
        levels = [_of(part, how, "mean_max_over_mean") for part, how in
                  ((row["before"], "even"), (ours, "even"), (ours, "split"))]  # fmt: skip
        yield _row(f"to {row['to']}", [share, *levels, other])


def _copies(report: dict[str, Any]) -> Iterator[str]:
    yield _row("copies to other nodes", ("copies", "even", "split", "int8, %", "both, %", "planned, s"))
    for name, row in report["copies"].items():
        shares = [_of(row, "bytes", form) for form in ("int8", "int8_both")]
        percent = [None if s is None else 100 * s for s in shares]
        levels = [_of(row, how, "mean_max_over_mean") for how in ("even", "split")]
        yield _row(name, [_of(row, "copies"), *levels, *percent, _of(row, "seconds")])


def _of(found: Any, *keys: str) -> Any:
    """None where anything on the way is."""
    for key in keys:
        found = None if found is None else found[key]
    return found


def _row(label: str, values: Iterable[Any]) -> str:
    said = [v if isinstance(v, str) else "-" if v is None else f"{v:.4g}" for v in values]
    return f"{label:40}" + "".join(f"{text:>13}" for text in said)
