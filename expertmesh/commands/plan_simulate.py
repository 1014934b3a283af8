"""`expertmesh plan simulate`: requests replayed, one by one, against a deployment that nobody has to have."""

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

from expertmesh.errors import InputError
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import ALGORITHMS
from expertmesh.planner.arrivals import parse_arrivals
from expertmesh.planner.cards import Card, card
from expertmesh.planner.deployment import Deployment
from expertmesh.planner.formats import CACHES, WEIGHTS
from expertmesh.planner.models import model
from expertmesh.planner.serving import Service, Workload
from expertmesh.planner.simulate import PAGE, Percentiles, Report, simulate


def add_simulate(subparsers: Any) -> None:
    parser = subparsers.add_parser("simulate", help="percentiles of latency under arrivals, event by event")
    add = parser.add_argument
    add("--model", default="deepseek-v3", help="name, or the path of a config.json (default: deepseek-v3)")
    add("--card", required=True, help="name of a card, or the path of a profile (*.toml)")
    add("--nodes", type=int, default=1, help="nodes that decode (default: 1)")
    add("--cards", type=int, default=8, help="of each node (default: 8)")
    add("--attention-tp", type=int, metavar="N", help="cards of one attention (default: as many as can be)")
    add("--weights", choices=list(WEIGHTS), help="precision (default: fp8 where the card has it, else int8)")
    add("--cache", choices=list(CACHES), default="bf16", help="precision (default: bf16)")
    add("--exchange", choices=list(ALGORITHMS), default="two_tier", help="default: two_tier")
    add("--redundant", type=int, default=0, metavar="N", help="slots of a layer for replicas (default: 0)")
    add(
        "--overlap", action="store_true", help="two micro-batches, of which one computes as the other travels"
    )
    add("--drafts", type=int, default=0, metavar="N", help="MTP drafts of a step (default: 0)")
    add("--prefill-nodes", type=int, metavar="N",
        help="prefill on so many nodes of their own (default: on the same cards, between steps)")  # fmt: skip
    add("--input", type=float, default=3500, metavar="TOKENS", help="of a request (default: 3500)")
    add("--output", type=float, default=1500, metavar="TOKENS", help="of a request (default: 1500)")
    add("--arrivals", default="poisson", metavar="poisson[:RATE]|TRACE.jsonl",
        help='by chance at a rate, or from lines {"time": seconds, "input": tokens, "output": tokens}')  # fmt: skip
    add_arrivals(add)
    add("--json", action="store_true", help="print JSON, and nothing else")
    parser.set_defaults(plan=_run)


def add_arrivals(add: Any) -> None:
    """Options of a simulation, for commands that have a deployment already; see `simulated`."""
    add("--rate", type=float, metavar="PER_S", help="requests a second that come by chance")
    add("--requests", type=int, default=1000, metavar="N", help="that come by chance (default: 1000)")
    add("--concurrency", type=int, metavar="N", help="so many at any time, whenever they come")
    add(
        "--chunk", type=float, metavar="TOKENS", help="of prompts that a TP group computes in a step, at most"
    )
    add("--gather", type=float, default=0.0, metavar="S",
        help="seconds that prompts wait for further ones while others are decoded (default: 0)")  # fmt: skip
    add("--page", type=int, default=PAGE, metavar="TOKENS", help=f"of the cache (default: {PAGE})")
    add("--seed", type=int, default=0, help="of arrivals, and of which drafts are accepted (default: 0)")


def simulated(args: argparse.Namespace, service: Service, work: Workload, arrivals: str) -> Report:
    """As the options of `add_arrivals` say. InputError where they are wrong."""
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}; it must be at least 0")
    rate = 1.0 if args.rate is None and args.concurrency is not None else args.rate  # then times do not count
    coming = parse_arrivals(arrivals, work, args.requests, rate, args.seed)
    return simulate(
        service, coming, concurrency=args.concurrency, chunk=args.chunk, gather=args.gather, page=args.page,
        seed=args.seed,
    )  # fmt: skip


def report_text(report: Report) -> str:
    """A report as lines."""
    lines = [
        f"{report.finished:,} requests in {report.seconds:,.1f} s: {report.tokens:,.1f} tokens/s; {report.rejected:,} "
        f"rejected, {report.preemptions:,} preemptions",
        f"on average {report.present:,.1f} in the service, {report.batch:,.1f} decoded by a TP group, "
        f"{report.queue:,.1f} in queues; at most {report.pages:.0%} of a TP group's pages in use",
        f"{'':10}{'mean':>12}{'p50':>12}{'p90':>12}{'p99':>12}",
    ]
    rows = (("TTFT, ms", report.ttft), ("TPOT, ms", report.tpot), ("total, ms", report.total))
    lines += [f"{name:10}{_columns(found)}" for name, found in rows if found]
    return "\n".join(lines)


def _columns(found: Percentiles) -> str:
    return "".join(f"{value * 1e3:12,.1f}" for value in asdict(found).values())


def _run(args: argparse.Namespace) -> int:
    service = _service(args)
    report = simulated(args, service, Workload(args.input, args.output), args.arrivals)
    if args.json:
        print(
            json.dumps(asdict(report) | {"tokens_per_card": report.tokens / service.ranks * _dies(service)})
        )
        return 0
    d = service.decode
    where = (
        f"prefill on {args.prefill_nodes} nodes of their own" if service.prefill else "prefill between steps"
    )
    cards, layout = service.ranks // _dies(service), f"TP{d.topology.tp} x DP{d.topology.groups}"
    print(f"{args.model} on {cards} cards {d.card.title}: {layout}, {where}")
    print(report_text(report))
    return 0


def _service(args: argparse.Namespace) -> Service:
    kind = card(args.card)
    decode = Deployment(
        model(args.model), kind, _topology(kind, args.nodes, args.cards, args.attention_tp),
        redundant=args.redundant, weight_precision=args.weights or ("fp8" if kind.fp8_tflops else "int8"),
        cache_precision=args.cache, exchange=args.exchange, drafts=args.drafts, overlap=args.overlap,
    )  # fmt: skip
    if args.prefill_nodes is None:
        return Service(decode)
    topology = _topology(kind, args.prefill_nodes, args.cards, args.attention_tp)
    return Service(decode, 1, replace(decode, topology=topology))


def _topology(kind: Card, nodes: int, cards: int, tp: int | None) -> Topology:
    """Ranks are dies."""
    return Topology(nodes, cards * kind.dies_per_card, tp)


def _dies(service: Service) -> int:
    return service.decode.card.dies_per_card
