"""`expertmesh bench`: measurements, side by side with other engines where they are installed."""

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from expertmesh.bench.engine import PREFILL
from expertmesh.bench.exchange import PRELOAD, bench_exchange
from expertmesh.bench.gloo import NAME as PLAIN_COLLECTIVE
from expertmesh.bench.perplexity import perplexities
from expertmesh.bench.plain import write_plain_copy
from expertmesh.bench.workload import Workload
from expertmesh.commands.cluster import add_cluster, add_machines, given_cluster, given_topology, launcher_of
from expertmesh.commands.options import PROMPTS
from expertmesh.config import EngineConfig, ModelConfig
from expertmesh.engine.checkpoint import open_checkpoint
from expertmesh.errors import InputError
from expertmesh.launch.launcher import Here
from expertmesh.llm import demo_model
from expertmesh.mesh.layout import Layout
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import ALGORITHMS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    engine = subparsers.add_parser("engine", help="load, memory, prefill and decoding of one rank")
    engine.add_argument("model", nargs="?", help="folder in the Hugging Face layout; default: the demo model")
    engine.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32 or bfloat16")
    engine.add_argument(
        "--rounds", type=int, default=3, help="processes per engine, taken in turns (default: 3)"
    )
    engine.add_argument("--repeats", type=int, default=3, help="measurements in each process (default: 3)")
    engine.add_argument("--threads", type=int, default=0, help="default: as many as torch takes")
    engine.add_argument("--alone", action="store_true", help="measure this engine only")
    engine.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    add_cluster(engine, machines=False)
    engine.set_defaults(measure=bench_engine, table=_engine_table)
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
    exchange.set_defaults(measure=_measure_exchange, table=_exchange_table, clustered=True)


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
DEFAULT = ("two_tier", "two_tier_int8", "two_tier_int8_both")


def run(args: argparse.Namespace) -> int:
    report = args.measure(args)
    print(json.dumps(report) if args.json else args.table(report))
    return 0


def _measure_exchange(args: argparse.Namespace) -> dict[str, Any]:
    if args.ranks not in (None, "threads", "processes"):
        raise InputError(f"--ranks {args.ranks!r} is not one of threads, processes")
    launcher = launcher_of(args, PRELOAD)
    processes = args.ranks == "processes"
    names = args.algorithms.split(",") if args.algorithms else [*DEFAULT, *[PLAIN_COLLECTIVE] * processes]
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
        report["perplexity"] = perplexities(
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


def bench_engine(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds; engines take turns, so that a change of the machine's speed meets all of them."""
    folder = Path(args.model) if args.model else demo_model()
    model = ModelConfig.from_folder(folder)
    checkpoint = open_checkpoint(folder, model)
    options = given_cluster(args)
    config = EngineConfig(dtype=args.dtype, **options)
    dtype = config.dtype_of(model)
    threads = args.threads or torch.get_num_threads()
    _check_engine(args, model, folder)
    engines = ["expertmesh"]
    topology = Layout.of(model, given_topology(args), config.exchange, config.redundant).topology
    options |= {"topology": asdict(topology)}
    if not args.alone and importlib.util.find_spec("transformers") is not None:
        engines.append("transformers")
    with tempfile.TemporaryDirectory(prefix="expertmesh-bench-") as scratch:
        folders = dict.fromkeys(engines, folder)
        if model.fp8_block and "transformers" in engines:
            # transformers does not compute with FP8 blocks on a CPU: it gets the same weights in the type that
            # this engine computes in too.
            folders["transformers"] = write_plain_copy(checkpoint, Path(scratch), dtype)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
        turns = [name for _ in range(args.rounds) for name in engines]
        for name in tqdm(turns, desc="measuring", leave=False, disable=None):
            fields = [
                name,
                folders[name],
                dtype,
                model.vocab_size,
                args.repeats,
                threads,
                json.dumps(options),
            ]
            runs[name].append(_in_own_process(list(map(str, fields))))
    medians = {name: _median(found) for name, found in runs.items()}
    report = {
        "model": folder.resolve().name,
        "dtype": dtype,
        "threads": threads,
        "rounds": args.rounds,
        **medians,
    }
    if "transformers" in medians:
        report["ratios"] = _ratios(medians["expertmesh"], medians["transformers"])
    return report


def _check_engine(args: argparse.Namespace, model: ModelConfig, folder: Path) -> None:
    """InputError where measuring could not work."""
    if args.rounds < 1 or args.repeats < 1:
        raise InputError("--rounds and --repeats must be at least 1")
    if args.threads < 0:
        raise InputError("--threads must be at least 1")
    if model.max_position_embeddings <= PREFILL:
        raise InputError(
            f"{folder}: the model has {model.max_position_embeddings} positions; measuring takes {PREFILL + 1}"
        )


def _in_own_process(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "expertmesh.bench.engine", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"measuring {arguments[0]} failed:\n{done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    first = runs[0]
    out: dict[str, Any] = {}
    for key in first:
        values = [run[key] for run in runs]
        out[key] = _median(values) if isinstance(first[key], dict) else statistics.median(values)
    return out


def _ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """How many times better: above 1 this engine is ahead, of time and memory too."""
    return {
        "load": theirs["load_seconds"] / ours["load_seconds"],
        "peak_rss": theirs["peak_rss_bytes"] / ours["peak_rss_bytes"],
        "prefill": ours["prefill_tokens_per_second"] / theirs["prefill_tokens_per_second"],
        **{
            f"decode_{batch}": speed / theirs["decode_tokens_per_second"][batch]
            for batch, speed in ours["decode_tokens_per_second"].items()
        },
    }


def _engine_table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['model']}, {report['dtype']}, {report['threads']} threads, median of {report['rounds']} rounds"
    ]
    rows = [("load, s", "load_seconds", 1.0), ("peak RSS, MB", "peak_rss_bytes", 1e6)]
    rows += [("prefill 512, tok/s", "prefill_tokens_per_second", 1.0)]
    names = [name for name in ("expertmesh", "transformers") if name in report]
    lines.append(f"{'':22}" + "".join(f"{name:>14}" for name in names) + f"{'times better':>14}")
    ratios = list(report.get("ratios", {}).values())
    for number, (label, key, unit) in enumerate(rows):
        lines.append(_row(label, [report[name][key] / unit for name in names], ratios[number : number + 1]))
    for number, batch in enumerate(report["expertmesh"]["decode_tokens_per_second"]):
        values = [report[name]["decode_tokens_per_second"][batch] for name in names]
        place = number + len(rows)
        lines.append(_row(f"decode batch {batch}, tok/s", values, ratios[place : place + 1]))
    return "\n".join(lines)


def _row(label: str, values: list[float], ratio: list[float]) -> str:
    return f"{label:22}" + "".join(f"{v:14.4g}" for v in values) + "".join(f"{r:14.2f}" for r in ratio)
