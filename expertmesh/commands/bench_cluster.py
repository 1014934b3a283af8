"""`expertmesh bench` on clusters: the exchange, whole steps with and without overlap, the transport inside a node."""

import argparse
import math
import re
from typing import Any

from expertmesh.bench.exchange import PRELOAD, bench_exchange
from expertmesh.bench.gloo import NAME as PLAIN_COLLECTIVE
from expertmesh.bench.overlap import Load, bench_overlap
from expertmesh.bench.perplexity import by_exchange
from expertmesh.bench.transport import bench_transport
from expertmesh.bench.workload import Workload
from expertmesh.commands.cluster import (
    CLUSTER_OPTIONS,
    add_cluster,
    add_machines,
    given_topology,
    launching,
)
from expertmesh.commands.options import PROMPTS, add_precision, given
from expertmesh.engine.processes import PRELOAD as ENGINE
from expertmesh.engine.processes import ProcessRanks, tell_standings
from expertmesh.errors import InputError
from expertmesh.launch.launcher import Here
from expertmesh.llm import LLM
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import ALGORITHMS, algorithm

WORKLOAD_OPTIONS = {
    "nodes": "nodes of the cluster",
    "cards": "cards of each node",
    "tokens": "rows of each rank",
    "hidden": "numbers in a row",
    "experts": "routed experts",
    "groups": "routing groups",
    "groups_per_token": "groups that a token may choose from",
    "experts_per_token": "experts of a token",
    "redundant": "slots for replicas",
    "seed": "of routing and rows",
    "rounds": "measurements of each algorithm",
    "pieces": "in which the rows of a rank travel; 0: as the engine does it",
    "timeout": "seconds after which a rank that does not come or answer has failed",
}
TOKENS = 512  # that a request may decode in a measurement
DEFAULT = ("two_tier", "two_tier_int8", "two_tier_int8_both")


def add_exchange(subparsers: Any) -> None:
    exchange = subparsers.add_parser(
        "exchange", help="bytes, messages and time of rows on their way to experts"
    )
    for field, text in WORKLOAD_OPTIONS.items():
        default = Workload.__dataclass_fields__[field].default
        name = "--" + field.replace("_", "-")
        exchange.add_argument(name, type=type(default), metavar="N", help=f"{text} (default: {default})")
    exchange.add_argument(
        "--algorithms", metavar="A,B",
        help=f"besides flat: {', '.join(ALGORITHMS)}, and with processes {PLAIN_COLLECTIVE}, which is flat over "
        f"torch.distributed and gloo (default: {', '.join(DEFAULT)}, and that)",
    )  # fmt: skip
    exchange.add_argument("--ranks", help="threads (default) or processes")
    add_machines(exchange.add_argument)
    exchange.add_argument("--no-perplexity", action="store_true", help="do not measure what the formats cost")
    exchange.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    exchange.set_defaults(
        measure=_measure_exchange, table=_exchange_table, clustered=True,
        timeout=Workload.timeout,  # of whoever may wait here: also machines for each other
    )  # fmt: skip


def add_overlap(subparsers: Any) -> None:
    overlap = subparsers.add_parser(
        "overlap", help="whole steps with and without overlap, on a cluster of processes"
    )
    overlap.add_argument(
        "model", nargs="?", help="folder in the Hugging Face layout; default: the demo model"
    )
    add_precision(overlap.add_argument)
    overlap.add_argument(
        "--loads", default="16x1,256x1,1x512", metavar="NxROWS,...",
        help="steps of every TP group: so many requests, of so many rows (1: decoding) (default: 16x1,256x1,1x512)",
    )  # fmt: skip
    overlap.add_argument("--steps", type=int, default=15, metavar="N", help="of each kind (default: 15)")
    overlap.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    add_cluster(overlap)
    overlap.set_defaults(measure=_measure_overlap, table=_overlap_table)


def add_transport(subparsers: Any) -> None:
    transport = subparsers.add_parser("transport", help="exchange inside a node, against gloo over loopback")
    transport.add_argument("--ranks", type=int, default=16, metavar="N", help="of the node (default: 16)")
    transport.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="measurements of each (default: 3)"
    )
    transport.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    transport.set_defaults(measure=_measure_transport, table=_transport_table)


def _measure_exchange(args: argparse.Namespace) -> dict[str, Any]:
    if args.ranks not in (None, "threads", "processes"):
        raise InputError(f"--ranks {args.ranks!r} is not one of threads, processes")
    names = args.algorithms.split(",") if args.algorithms else []
    for name in names:
        if name != PLAIN_COLLECTIVE:
            algorithm(name)  # refuses others before anything is started
    with launching(args, PRELOAD) as launcher:
        processes = args.ranks == "processes"
        names = names or [*DEFAULT, *[PLAIN_COLLECTIVE] * processes]
        if PLAIN_COLLECTIVE in names and not processes:
            raise InputError(f"{PLAIN_COLLECTIVE} needs ranks that are processes: --ranks processes")
        sizes = {field: getattr(args, field) for field in WORKLOAD_OPTIONS}
        workload = Workload(**{field: size for field, size in sizes.items() if size is not None})
        workload.check()
        if processes and launcher is None:
            launcher = Here(PRELOAD)
        report = bench_exchange(workload, names, launcher)
    if not args.no_perplexity:
        # Two nodes of two cards: what crosses is quantised, and that is all that the layout changes.
        report["perplexity"] = by_exchange(
            None,
            list(PROMPTS.values()),
            [name for name in report["reduction"] if name in ALGORITHMS],
            Topology(2, 2),
        )
    return report


def _exchange_table(report: dict[str, Any]) -> str:
    rate, interface = report["link_bits_per_second"], report["interface_bytes"]
    link = f", links of {rate / 1e6:g} Mbit/s" if rate else ""
    lines = [
        f"{report['nodes']} nodes x {report['cards']} cards as {report['ranks']}{link}, {report['tokens_per_rank']} "
        f"rows of {report['hidden']} each; busiest card {report['card_imbalance']:.3f} of the mean",
        f"{'':20}{'MB across':>10}{'predicted':>10}{'on wire':>9}{'less':>8}{'messages':>10}{'seconds':>9}{'less':>8}"
        f"{'error':>9}" + (f"{'perplexity':>12}" if "perplexity" in report else ""),
    ]
    for name, counted in report["cross_node_bytes"].items():
        law = report["predicted_cross_node_bytes"][name]["total"]
        wire = interface[name]["total"] if interface else math.nan
        perplexity = report.get("perplexity", {}).get(name)
        lines.append(
            f"{name:20}{counted['total'] / 1e6:10.2f}{law / 1e6:10.2f}{wire / 1e6:9.2f}{report['reduction'][name]:8.1%}"
            f"{report['messages'][name]['total']:10}{report['seconds'][name]['total']:9.3f}"
            f"{report['time_reduction'][name]:8.1%}{report['relative_error'][name]:9.4f}"
            + (f"{perplexity:12.4f}" if perplexity else "")
        )
    if ideal := report["ideal_seconds"]:
        lines += [
            "",
            f"{'seconds':20}{'dispatch':>10}{'ideal':>10}{'combine':>10}{'ideal':>10}{'of ideal':>10}",
        ]
        for name, best in ideal.items():
            took = report["seconds"][name]
            lines.append(
                f"{name:20}{took['dispatch']:10.3f}{best['dispatch']:10.3f}{took['combine']:10.3f}"
                f"{best['combine']:10.3f}{took['combine'] / best['combine']:10.2f}"
            )
    return "\n".join(lines)


def _measure_overlap(args: argparse.Namespace) -> dict[str, Any]:
    if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}(,[1-9]\d{0,4}x[1-9]\d{0,4})*", args.loads):
        raise InputError(f"--loads {args.loads!r}: not of the form 16x1,1x512 (requests x rows of each)")
    if args.steps < 1:
        raise InputError("--steps must be at least 1")
    if args.ranks not in (None, "processes"):
        raise InputError(f"--ranks {args.ranks}: overlap hides what processes send each other; leave it out")
    args.ranks = "processes"
    loads = [Load(*map(int, text.split("x"))) for text in args.loads.split(",")]
    with launching(args, ENGINE) as launcher:
        llm = LLM(
            args.model,
            dtype=args.dtype,
            quantise=args.quantise,
            topology=given_topology(args),
            launcher=launcher,
            prefix_cache=False,
            max_batch_requests=max(load.requests for load in loads),
            max_batch_tokens=max(2048, *(load.requests * load.rows for load in loads)),
            cache_tokens=max(load.requests * (load.rows + TOKENS) for load in loads),
            **given(args, [option for option in CLUSTER_OPTIONS if option[0] != "overlap"]),
        )
    with llm:
        if isinstance(llm.engine.ranks, ProcessRanks):
            tell_standings(llm.engine.ranks.crew)
        rate = launcher.rate if launcher else None
        topology = llm.engine.layout.topology
        found = bench_overlap(llm.engine, loads, args.steps, rate)
        return {
            "model": llm.name,
            "nodes": topology.nodes,
            "cards": topology.cards_per_node,
            "attention_tp": topology.tp,
            "link_bits_per_second": rate,
            "steps": args.steps,
            "loads": found,
        }


def _overlap_table(report: dict[str, Any]) -> str:
    rate = report["link_bits_per_second"]
    link = f", links of {rate / 1e6:g} Mbit/s" if rate else ""
    lines = [
        f"{report['model']} on {report['nodes']} nodes x {report['cards']} cards{link}; ms a step, median of "
        f"{report['steps']}",
        f"{'each TP group':16}{'off':>9}{'on':>9}{'auto':>9}{'wire':>9}{'on: faster':>12}{'hidden':>9}"
        f"{'auto / best':>13}",
    ]
    for name, found in report["loads"].items():
        seconds = found["seconds"]
        wire, hidden = found.get("wire_seconds"), found.get("hidden")
        lines.append(
            f"{name:16}" + "".join(f"{1000 * seconds[mode]:9.1f}" for mode in ("off", "on", "auto"))
            + (f"{1000 * wire:9.1f}" if wire is not None else f"{'':9}") + f"{found['on']:12.2f}"
            + (f"{hidden:9.0%}" if hidden is not None else f"{'':9}") + f"{found['auto']:13.2f}"
        )  # fmt: skip
    return "\n".join(lines)


def _measure_transport(args: argparse.Namespace) -> dict[str, Any]:
    if not 2 <= args.ranks <= 64:
        raise InputError(f"--ranks is {args.ranks}, but must be from 2 to 64")
    if args.rounds < 1:
        raise InputError("--rounds must be at least 1")
    return bench_transport(args.ranks, args.rounds)


def _transport_table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['ranks']} ranks of one node, everyone to everyone; ms, median of {report['rounds']} rounds",
        f"{'bytes a pair':>12}{'in place':>10}{'copied':>10}{'gloo':>10}{'in place: faster':>18}{'copied: faster':>16}",
    ]
    for size, seconds in report["seconds"].items():
        times = report["times_faster_than_gloo"][size]
        lines.append(
            f"{size:>12}" + "".join(f"{1000 * seconds[kind]:10.2f}" for kind in ("in place", "copied", "gloo"))
            + f"{times['in place']:18.2f}{times['copied']:16.2f}"
        )  # fmt: skip
    return "\n".join(lines)
