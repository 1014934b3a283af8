"""`expertmesh bench kernels`: ops on weights that no cache holds, against PyTorch and against the machine."""

import argparse
from typing import Any

import torch
from tqdm import tqdm

from expertmesh.bench.kernels import COLD, PRECISIONS, Ceilings, bench, median
from expertmesh.bench.ops import OPS, Setting
from expertmesh.device import free_memory
from expertmesh.errors import InputError
from expertmesh.kernels.cpu import Cpu
from expertmesh.kernels.table import kernels_of, native
from expertmesh.native import NotBuilt

NEEDS = 6 << 30  # bytes: three ways to keep weights that no cache holds, and the memory that is read


def add_kernels(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "kernels", help="ops on cold weights, against PyTorch and the machine's limits"
    )
    parser.add_argument("--ops", default=",".join(OPS), metavar="A,B", help="which (default: %(default)s)")
    parser.add_argument(
        "--precisions",
        default=",".join(PRECISIONS),
        metavar="A,B",
        help="of our weights (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=0, help="default: as many as torch takes")
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="measurements of each (default: 5)"
    )
    parser.add_argument("--quick", action="store_true", help="two sizes of each op")
    parser.add_argument(
        "--compile", action="store_true", help="measure torch.compile too, which takes its time"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    parser.set_defaults(measure=bench_kernels, table=_table)


def bench_kernels(args: argparse.Namespace) -> dict[str, Any]:
    ops, precisions = args.ops.split(","), args.precisions.split(",")
    for option, given, known in (("ops", ops, OPS), ("precisions", precisions, PRECISIONS)):
        for name in given:
            if name not in known:
                raise InputError(f"--{option} {name!r} is not one of {', '.join(known)}")
    if args.rounds < 1:
        raise InputError("--rounds must be at least 1")
    if args.threads < 0:
        raise InputError("--threads must be at least 1")
    check_kernel_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    graph = own_kernels()
    setting = Setting(kernels_of(graph), precisions, COLD, args.quick, args.compile)
    cases = (case for op in ops for case in OPS[op](setting))
    found = bench(cases, Ceilings(graph, COLD), args.rounds)
    rows = list(tqdm(found, desc="measuring", leave=False, disable=None))
    ceilings = median([row.pop("ceilings") for row in rows])
    return {
        "kernels": graph.variant.name,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "ceilings": ceilings,
        "rows": rows,
    }


def check_kernel_memory() -> None:
    """InputError where it is too small to measure without caches."""
    if (free := free_memory()) < NEEDS and COLD >= 1 << 30:
        raise InputError(
            f"measuring needs {NEEDS / 1e9:.0f} GB of memory, and {free / 1e9:.1f} GB are free here"
        )


def own_kernels() -> Cpu:
    """InputError where there are none."""
    try:
        return native()
    except NotBuilt as error:
        raise InputError(f"there are no kernels to measure: {error}") from None


def _table(report: dict[str, Any]) -> str:
    limits = report["ceilings"]
    products = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in limits.items() if name != "read")
    lines = [
        f"{report['kernels']}, {report['threads']} threads, ms, median of {report['rounds']} rounds",
        f"ceilings: reading {limits['read'] / 1e9:.1f} GB/s; products, GFLOP/s: {products}",
        f"{'op':19}{'size':17}{'tokens':>7}{'':>6}{'ms':>9}{'ratio':>7}{'bar':>6}{'limit':>7}{'of ceiling':>12}"
        "  others, ms",
    ]
    for row in report["rows"]:
        others = ", ".join(f"{name} {1000 * seconds:.3g}" for name, seconds in row["others"].items())
        bar = f"{row['bar']:6.2f}" if row["bar"] else f"{'':6}"
        lines.append(
            f"{row['op']:19}{row['size']:17}{row['tokens']:7}{row['precision']:>6}{1000 * row['seconds']:9.3f}"
            f"{row['ratio']:7.2f}{bar}{row['limit']:7.2f}{row['of_ceiling']:12.0%}  {others}"
        )
    return "\n".join(lines)
