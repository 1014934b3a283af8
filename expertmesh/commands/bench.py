"""`expertmesh bench`: measurements, side by side with other engines where they are installed."""

import argparse
import importlib.util
import json
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
from expertmesh.bench.plain import write_plain_copy
from expertmesh.commands.bench_balance import add_balance, add_rebalance
from expertmesh.commands.bench_cluster import add_exchange, add_overlap, add_transport
from expertmesh.commands.cluster import add_cluster, given_cluster, given_topology
from expertmesh.commands.options import add_precision
from expertmesh.config import EngineConfig, ModelConfig
from expertmesh.engine.checkpoint import open_checkpoint
from expertmesh.errors import InputError
from expertmesh.llm import demo_model
from expertmesh.mesh.layout import Layout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    engine = subparsers.add_parser("engine", help="load, memory, prefill and decoding of one rank")
    engine.add_argument("model", nargs="?", help="folder in the Hugging Face layout; default: the demo model")
    add_precision(engine.add_argument)
    engine.add_argument(
        "--rounds", type=int, default=3, help="processes per engine, taken in turns (default: 3)"
    )
    engine.add_argument("--repeats", type=int, default=3, help="measurements in each process (default: 3)")
    engine.add_argument("--threads", type=int, default=0, help="default: as many as torch takes")
    engine.add_argument("--alone", action="store_true", help="measure this engine only")
    engine.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    add_cluster(engine, machines=False)
    engine.set_defaults(measure=bench_engine, table=_engine_table)
    add_balance(subparsers)
    add_rebalance(subparsers)
    add_exchange(subparsers)
    add_overlap(subparsers)
    add_transport(subparsers)


def run(args: argparse.Namespace) -> int:
    report = args.measure(args)
    print(json.dumps(report) if args.json else args.table(report))
    return 0


def bench_engine(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds; engines take turns, so that a change of the machine's speed meets all of them."""
    folder = Path(args.model) if args.model else demo_model()
    model = ModelConfig.from_folder(folder)
    checkpoint = open_checkpoint(folder, model)
    options = given_cluster(args)
    options["quantise"] = args.quantise
    config = EngineConfig(dtype=args.dtype, **options)
    config.check_precision(model)
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
        "quantise": args.quantise,
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
