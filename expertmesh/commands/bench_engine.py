"""`expertmesh bench engine`: this engine's load, memory, prefill and decoding, and those of others, in turns."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from expertmesh.bench import peers
from expertmesh.bench.driver import PREFILL, prompts_of
from expertmesh.bench.peers import Peer, Source, Work
from expertmesh.commands.cluster import add_cluster, given_cluster, given_topology
from expertmesh.commands.options import add_precision
from expertmesh.config import EngineConfig, ModelConfig
from expertmesh.device import find
from expertmesh.engine.checkpoint import open_checkpoint
from expertmesh.errors import InputError
from expertmesh.kernels import kernels_for
from expertmesh.llm import demo_model
from expertmesh.mesh.layout import Layout

OURS = "expertmesh"


def add_engine(subparsers: Any) -> None:
    engine = subparsers.add_parser("engine", help="load, memory, prefill and decoding of one rank")
    engine.add_argument("model", nargs="?", help="folder in the Hugging Face layout; default: the demo model")
    add_precision(engine.add_argument)
    engine.add_argument(
        "--rounds", type=int, default=3, help="processes per engine, taken in turns (default: 3)"
    )
    engine.add_argument("--repeats", type=int, default=3, help="measurements in each process (default: 3)")
    engine.add_argument(
        "--device", default="auto", help="cpu, cuda, npu, or auto (default): a card if there is one"
    )
    engine.add_argument("--threads", type=int, default=0, help="default: as many as torch takes")
    others = engine.add_mutually_exclusive_group()
    others.add_argument(
        "--against",
        metavar="A,B",
        help=f"other engines: {', '.join(peers.NAMES)} (default: those that are set up, see {peers.SETUP})",
    )
    others.add_argument("--alone", action="store_true", help="measure this engine only")
    engine.add_argument(
        "--peers",
        type=Path,
        default=peers.FOLDER,
        metavar="DIR",
        help="the others' environments (default: %(default)s)",
    )
    engine.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    add_cluster(engine, machines=False)
    engine.set_defaults(measure=bench_engine, table=_table)


def bench_engine(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds; engines take turns, so that a change of the machine's speed meets all of them."""
    folder = Path(args.model) if args.model else demo_model()
    model = ModelConfig.from_folder(folder)
    checkpoint = open_checkpoint(folder, model)
    options = given_cluster(args)
    options |= {"quantise": args.quantise, "device": args.device}
    config = EngineConfig(dtype=args.dtype, **options)
    config.check_precision(model)
    dtype = config.dtype_of(model)
    kernels = kernels_for(find(config.device).kind, dtype)
    options["quantise"] = quantise = config.quantise_of(model, kernels.keeps)
    threads = args.threads or torch.get_num_threads()
    names = None if args.against is None else args.against.split(",")
    others = [] if args.alone else peers.choose(names, args.peers, threads)
    _check(args, model, folder)
    topology = Layout.of(model, given_topology(args), config.exchange, config.redundant).topology
    options |= {"topology": asdict(topology)}
    with tempfile.TemporaryDirectory(prefix="expertmesh-bench-") as scratch:
        (copy := Path(scratch) / "copy").mkdir()
        (prompts := Path(scratch) / "prompts").write_text(
            "\n".join(" ".join(map(str, tokens)) for tokens in prompts_of(model.vocab_size, args.repeats)),
            encoding="ascii",
        )
        work = Work(threads, args.repeats, prompts)
        own = [sys.executable, "-m", "expertmesh.bench.engine", str(folder), dtype, *work.words()]
        commands: dict[str, tuple[list[str], dict[str, str]]] = {OURS: ([*own, json.dumps(options)], {})}
        source = Source(checkpoint, dtype, copy)
        # Whichever way this engine quantises, others get 8 bits if they have such.
        precisions = {peer.name: peer.precision(source, quantise != "none") for peer in others}
        for peer in others:
            precision = precisions[peer.name]
            command = peer.command(peer.prepare(source, precision), precision, work)
            commands[peer.name] = (command, peer.environment)
        runs, failed = _in_turns(commands, args.rounds)
    report = {
        "model": folder.resolve().name,
        "dtype": dtype,
        "quantise": quantise,
        "threads": threads,
        "rounds": args.rounds,
    }
    ran = [peer for peer in others if peer.name not in failed]
    return (
        report | _compared(runs, ran, precisions) | {name: {"failed": said} for name, said in failed.items()}
    )


def _in_turns(
    commands: Mapping[str, tuple[list[str], dict[str, str]]], rounds: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """What the engines report, and what those say that fail: a model that another engine does not run is no reason not
    to compare with the rest, if there is a rest."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    failed: dict[str, str] = {}
    for name in tqdm([*commands] * rounds, desc="measuring", leave=False, disable=None):
        if name in failed:
            continue
        try:
            runs[name].append(_in_own_process(name, *commands[name]))
        except InputError as error:
            if name == OURS or len(commands) == 2:
                raise
            failed[name] = str(error).splitlines()[-1]
            del runs[name]
    return runs, failed


def _check(args: argparse.Namespace, model: ModelConfig, folder: Path) -> None:
    """InputError where measuring could not work."""
    if args.rounds < 1 or args.repeats < 1:
        raise InputError("--rounds and --repeats must be at least 1")
    if args.threads < 0:
        raise InputError("--threads must be at least 1")
    if model.max_position_embeddings <= PREFILL:
        raise InputError(
            f"{folder}: the model has {model.max_position_embeddings} positions; measuring takes {PREFILL + 1}"
        )


def _in_own_process(name: str, command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """What the engine's driver reports. InputError with the end of what it said where it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | environment
        )
    except OSError as error:
        raise InputError(
            f"measuring {name} failed: {error}; `{peers.SETUP} {name}` sets it up anew"
        ) from None
    if done.returncode:
        raise InputError(f"measuring {name} failed:\n{done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _compared(
    runs: dict[str, list[dict[str, Any]]], others: Sequence[Peer], precisions: dict[str, str]
) -> dict[str, Any]:
    """Medians of every engine; how many times better this one is than each other, and than the best of them.

    same_first_token: the share of prompts after which the engine chooses the token that this one does. Ties and
    rounding make a few differ; far below 1 the engine does not compute the same model.
    """
    chosen = {name: [run.pop("first_tokens") for run in found] for name, found in runs.items()}
    report: dict[str, Any] = {name: _median(found) for name, found in runs.items()}
    ratios = {peer.name: _ratios(report[OURS], report[peer.name]) for peer in others}
    for peer in others:
        same = [mine == theirs for mine, theirs in zip(chosen[OURS][0], chosen[peer.name][0], strict=True)]
        report[peer.name] |= {
            "version": peer.version,
            "precision": precisions[peer.name],
            "same_first_token": statistics.mean(same),
        }
    if ratios:
        rows = next(iter(ratios.values()))
        best = {row: min(ratios, key=lambda name: ratios[name][row]) for row in rows}
        report["ratios"] = ratios
        report["best_peer"] = {row: {"peer": name, "ratio": ratios[name][row]} for row, name in best.items()}
    return report


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


def _table(report: dict[str, Any]) -> str:
    names = [OURS, *report.get("ratios", {})]
    kept = "" if report["quantise"] == "none" else f" {report['quantise']}"
    title = (
        f"{report['model']}, {report['dtype']}{kept}, {report['threads']} threads, "
        f"median of {report['rounds']} rounds"
    )
    notes = [
        f"{n} in {report[n]['precision']}" for n in names[1:] if report[n]["precision"] != report["dtype"]
    ]
    head = "".join(f"{name:>14}" for name in names)
    notes += [
        f"{name} fails: {found['failed']}"
        for name, found in report.items()
        if isinstance(found, dict) and "failed" in found
    ]
    lines = [
        ", ".join([title, *notes]),
        f"{'':22}{head}{'times better':>14}" if names[1:] else f"{'':22}{head}",
    ]
    figures = {name: _figures(report[name]) for name in names}
    for row, (label, _) in figures[OURS].items():
        line = f"{label:22}" + "".join(f"{figures[name][row][1]:14.4g}" for name in names)
        if names[1:]:
            best = report["best_peer"][row]
            line += f"{best['ratio']:14.2f}" + (f" than {best['peer']}" if names[2:] else "")
        lines.append(line)
    return "\n".join(lines)


def _figures(found: dict[str, Any]) -> dict[str, tuple[str, float]]:
    """Row of the table -> what it is called, and its figure."""
    return {
        "load": ("load, s", found["load_seconds"]),
        "peak_rss": ("peak RSS, MB", found["peak_rss_bytes"] / 1e6),
        "prefill": (f"prefill {PREFILL}, tok/s", found["prefill_tokens_per_second"]),
        **{
            f"decode_{batch}": (f"decode batch {batch}, tok/s", speed)
            for batch, speed in found["decode_tokens_per_second"].items()
        },
    }
