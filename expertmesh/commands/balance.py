"""`expertmesh balance`: which expert goes on which card, from recorded loads; and what that is worth."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertmesh.balancer.figures import Figures, node_traffic
from expertmesh.balancer.formats import read_loads
from expertmesh.balancer.placements import PLACEMENT_FORMAT, WRITERS, every_row, read_placement, write_text
from expertmesh.balancer.plans import Plan, in_order, published, timed
from expertmesh.balancer.plot import Map, page, png
from expertmesh.errors import InputError
from expertmesh.mesh.balance import OBJECTIVES, balance, moves
from expertmesh.mesh.loads import MOST, Loads, check_fit, join
from expertmesh.mesh.locality import cross_node_copies
from expertmesh.mesh.topology import Topology

# Windows that are planned for: recorders write one for each of thousands of steps.
WINDOWS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("loads", nargs="+", metavar="LOADS",
        help="loads that SGLang, vLLM, vllm-ascend, TensorRT-LLM or ExpertMesh recorded, or [layers][experts] as JSON, "
        "CSV, .npy, .npz or .pt; several files are several windows, FILE:WEIGHT counts a file that often")  # fmt: skip
    add("--nodes", type=int, default=1, metavar="INT", help="nodes of the cluster (default: 1)")
    add("--cards", type=int, default=1, metavar="INT", help="cards of each node (default: 1)")
    add("--redundant", type=int, default=0, metavar="INT", help="slots of a layer for replicas (default: 0)")
    add("--experts", type=int, metavar="INT", help="experts of a layer, where a record may not name all")
    add("--groups", type=int, metavar="INT", help="routing groups of the model")
    add("--objective", default="robust", metavar="NAME",
        help="robust (default): for loads like these, split anew at each step; known: for exactly these; local: for "
        "few copies to other nodes")  # fmt: skip
    add("--from", dest="old", metavar="FILE", help="placement to start from: of --json or another engine")
    add("--budget", type=int, metavar="INT", help="with --from: most experts to move, over all layers")
    add("--eval", dest="other", metavar="LOADS", help="judge the placement by these loads too")
    add("--compare", action="store_true", help="and EPLB, and experts in order, on the same loads")
    add("--plot", metavar="FILE", help="heat maps of cards and of traffic between nodes: .png or .html")
    add("--write", action="append", default=[], metavar="FORMAT:FILE", help=f"as {', '.join(WRITERS)}")
    add("--json", action="store_true", help="print JSON, and nothing else")


def run(args: argparse.Namespace) -> int:
    outputs = _outputs(args)
    topology = Topology(args.nodes, args.cards)
    loads = _given_loads(args)
    check_fit(loads, topology, args.redundant)
    other = _other_loads(args, loads)
    before = _before(args, loads, topology)
    old = before.placement if args.old else None
    plan = timed(
        lambda: balance(
            loads, topology, args.redundant, old=old, budget=args.budget, objective=args.objective
        )
    )
    report = _report(args, loads, topology, before, plan, other)
    texts = [write_text(kind, plan.placement, loads.rows) for kind, _ in outputs]
    for (_, path), text in zip(outputs, texts, strict=True):
        _write(path, text.encode())
    if args.plot:
        _plot(Path(args.plot), _summary(report), loads, topology, before, plan)
    print(
        json.dumps(report)
        if args.json
        else "\n".join([*_layer_table(loads, before, plan), *_summary(report)])
    )
    return 0


def _outputs(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Files to write and their kinds. InputError for whatever would be found out too late otherwise."""
    if args.objective not in OBJECTIVES:
        raise InputError(f"--objective {args.objective}: not one of {', '.join(OBJECTIVES)}")
    if args.budget is not None and (args.old is None or args.budget < 0):
        raise InputError("--budget takes a number of moves, at least 0, and the placement to start --from")
    if args.plot and Path(args.plot).suffix not in (".png", ".html"):
        raise InputError(f"--plot {args.plot}: not a name that ends in .png or .html")
    outputs = []
    for text in args.write:
        kind, colon, name = text.partition(":")
        if kind not in WRITERS or not colon or not name:
            raise InputError(f"--write {text}: not FORMAT:FILE with a format of {', '.join(WRITERS)}")
        outputs.append((kind, Path(name)))
    for path in [*(path for _, path in outputs), *([Path(args.plot)] if args.plot else [])]:
        if not path.absolute().parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.parent} to write it to")
    return outputs


def _given_loads(args: argparse.Namespace) -> Loads:
    names = [_file_and_weight(text) for text in args.loads]
    parts = [read_loads(name, args.experts).merged(WINDOWS) for name, _ in names]
    odd = next(
        (i for i, p in enumerate(parts) if (p.rows, p.experts) != (parts[0].rows, parts[0].experts)), None
    )
    if odd is not None:
        shapes = [f"{names[i][0]} has {parts[i].rows} layers of {parts[i].experts} experts" for i in (odd, 0)]
        raise InputError(", but ".join(shapes))
    loads = join(parts, [weight for _, weight in names]) if len(parts) > 1 or names[0][1] != 1 else parts[0]
    return loads if args.groups is None else replace(loads, groups=args.groups)


def _file_and_weight(text: str) -> tuple[str, float]:
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        return text, 1.0
    if not 0 < value <= MOST:
        raise InputError(f"{text}: the weight of a file must be a number above 0, {MOST:.0e} at most")
    return name, value


def _other_loads(args: argparse.Namespace, loads: Loads) -> Loads | None:
    if args.other is None:
        return None
    other = read_loads(args.other, args.experts)
    if (other.rows, other.experts) != (loads.rows, loads.experts):
        raise InputError(
            f"{args.other}: has {other.rows} layers of {other.experts} experts, but the loads that are planned for "
            f"{loads.rows} of {loads.experts}"
        )
    if surplus := sorted(set(other.layers) - set(loads.layers)):
        raise InputError(
            f"{args.other}: layer {surplus[0]} has experts there, but not in the loads that are planned for"
        )
    return other


def _before(args: argparse.Namespace, loads: Loads, topology: Topology) -> Plan:
    """What is there: the placement to start from, or experts in order."""
    if args.old is None:
        return in_order(loads, topology)
    return timed(lambda: read_placement(args.old, loads, topology))


def _report(
    args: argparse.Namespace, loads: Loads, topology: Topology, before: Plan, plan: Plan, other: Loads | None
) -> dict[str, Any]:
    figures = Figures.of(plan.even(loads.total_LE))
    measures = zip(loads.layers, figures.max_over_mean_L.tolist(), figures.spread_L.tolist(), strict=True)
    report = {
        "format": PLACEMENT_FORMAT,
        "nodes": topology.nodes,
        "cards": topology.cards_per_node,
        "experts": loads.experts,
        "redundant": args.redundant,
        "objective": args.objective,
        "windows": len(loads.weights_W),
        "layers": [{"layer": layer, "max_over_mean": m, "spread": s} for layer, m, s in measures],
        **_worth(plan, loads, topology),
        "moves": moves(before.placement, plan.placement),
        "before": {"name": args.old or "in order", **_worth(before, loads, topology)},
        "placement": every_row(plan.placement, loads.rows).tolist(),
    }
    del report["before"]["seconds"]
    if other is not None:
        report["eval"] = plan.judged(other)
    if args.compare:
        report["compare"] = _compared(args, loads, topology, plan, other)
    return report


def _worth(plan: Plan, loads: Loads, topology: Topology) -> dict[str, float]:
    copies = cross_node_copies(plan.placement, loads, topology)
    return {
        **Figures.of(plan.even(loads.total_LE)).means(),
        "cross_node_copies": copies,
        "seconds": plan.seconds,
    }


def _compared(
    args: argparse.Namespace, loads: Loads, topology: Topology, plan: Plan, other: Loads | None
) -> list[dict[str, Any]]:
    groups = loads.groups or topology.nodes
    makers: dict[str, Callable[[], Plan]] = {
        f"expertmesh {args.objective}": lambda: plan,
        "EPLB hierarchical": lambda: published(loads, topology, args.redundant, groups),
        "EPLB global": lambda: published(loads, topology, args.redundant),
        "in order, no replicas": lambda: in_order(loads, topology),
    }
    rows: list[dict[str, Any]] = []
    for name, make in makers.items():
        try:
            made = make()
        except InputError as error:
            rows.append({"name": name, "impossible": str(error)})
            continue
        row = {"name": name, **_worth(made, loads, topology)}
        rows.append(row if other is None else {**row, "eval": made.judged(other)})
    return rows


def _layer_table(loads: Loads, before: Plan, plan: Plan) -> list[str]:
    lines = [f"{'':>6}{'max/mean':>20}{'spread':>20}", f"{'layer':>6}" + f"{'before':>11}{'after':>9}" * 2]
    was, now = (Figures.of(p.even(loads.total_LE)) for p in (before, plan))
    columns = (was.max_over_mean_L, now.max_over_mean_L, was.spread_L, now.spread_L)
    for layer, *values in zip(loads.layers, *columns, strict=True):
        lines.append(f"{layer:6}" + "".join(f"{v:{11 - 2 * (i % 2)}.3f}" for i, v in enumerate(values)))
    return [*lines, ""]


def _summary(report: dict[str, Any]) -> list[str]:
    before = report["before"]
    slots = sum(expert >= 0 for row in report["placement"] for rank in row for expert in rank)
    windows = f"{report['windows']} window{'s' * (report['windows'] > 1)}"
    shape = f"{report['nodes']} x {report['cards']} cards"
    lines = [
        f"{len(report['layers'])} layers of {report['experts']} experts on {shape}, "
        f"{report['redundant']} redundant slots a layer; {report['objective']}, {windows}",
        f"before: {before['name']}",
        f"{'mean over layers':34}{'before':>10}{'after':>10}",
    ]
    for label, key in (
        ("load of the fullest card, max/mean", "mean_max_over_mean"),
        ("spread, (max-min)/mean", "mean_spread"),
        ("copies of a token to other nodes", "cross_node_copies"),
    ):
        lines.append(f"{label:34}{before[key]:10.3f}{report[key]:10.3f}")
    lines.append(f"moves: {report['moves']:,} of {slots:,} slots; planned in {report['seconds']:.2f} s")
    for name, label in (("split", "split at each step"), ("even", "even shares")):
        if "eval" in report:
            found = report["eval"][name]
            lines.append(
                f"other loads, {label}: max/mean {found['mean_max_over_mean']:.3f}, spread {found['mean_spread']:.3f}"
            )
    return [*lines, *_compare_table(report)]


def _compare_table(report: dict[str, Any]) -> list[str]:
    if "compare" not in report:
        return []
    judged = "eval" in report
    head = ["max/mean", "spread", "copies", "seconds", *(["other, split", "other, even"] if judged else [])]
    lines = ["", f"{'even shares':24}" + "".join(f"{name:>14}" for name in head)]
    for row in report["compare"]:
        if "impossible" in row:
            lines.append(f"{row['name']:24}  {row['impossible']}")
            continue
        values = [row[k] for k in ("mean_max_over_mean", "mean_spread", "cross_node_copies", "seconds")]
        if judged:
            values += [row["eval"][k]["mean_max_over_mean"] for k in ("split", "even")]
        lines.append(f"{row['name']:24}" + "".join(f"{value:14.3f}" for value in values))
    return lines


def _plot(path: Path, lines: list[str], loads: Loads, topology: Topology, before: Plan, plan: Plan) -> None:
    cards = ("layer", loads.layers), ("card", topology.all_ranks())
    nodes = ("node", range(topology.nodes)), ("node", range(topology.nodes))
    plans = (("before", before), ("after", plan))
    traffic = [100 * node_traffic(p.placement, loads.total_LE, topology) for _, p in plans]
    most = max(float(t.max()) for t in traffic)
    maps = []
    for name, one in plans:
        loads_LR = one.even(loads.total_LE)
        shares_LR = loads_LR / loads_LR.mean(axis=1, keepdims=True)
        maps.append(Map(f"load of cards {name}, of the mean", shares_LR, *cards, 1, 2))
    maps += [
        Map(f"rows from node to node {name}", shares, *nodes, 0, most, "%")
        for (name, _), shares in zip(plans, traffic, strict=True)
    ]
    title = "Balance of experts"
    _write(path, png(maps) if path.suffix == ".png" else page(title, lines, maps).encode())


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
