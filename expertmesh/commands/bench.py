"""`expertmesh bench`: measurements, side by side with other engines where they are installed."""

import argparse
import json

from expertmesh.commands.bench_balance import add_balance, add_rebalance
from expertmesh.commands.bench_cluster import add_exchange, add_overlap, add_transport
from expertmesh.commands.bench_engine import add_engine
from expertmesh.commands.bench_kernels import add_kernels
from expertmesh.commands.bench_planning import add_machine, add_planner, add_scale
from expertmesh.commands.bench_precision import add_precision_bench
from expertmesh.commands.bench_serve import add_serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    add_engine(subparsers)
    add_serve(subparsers)
    add_kernels(subparsers)
    add_precision_bench(subparsers)
    add_balance(subparsers)
    add_rebalance(subparsers)
    add_exchange(subparsers)
    add_overlap(subparsers)
    add_transport(subparsers)
    add_scale(subparsers)
    add_machine(subparsers)
    add_planner(subparsers)


def run(args: argparse.Namespace) -> int:
    report = args.measure(args)
    print(json.dumps(report) if args.json else args.table(report))
    return 0
