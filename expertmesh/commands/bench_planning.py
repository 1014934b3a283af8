"""`expertmesh bench` for the planner: clusters of two sizes with the same memory for each rank, this machine as a card,
and steps of the engine on it beside what is predicted of them."""

import argparse
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from expertmesh.bench.counting import Trial
from expertmesh.bench.machine import Setting, bench_machine, check_out, write_card
from expertmesh.bench.planned import Grid, bench_planned, planner
from expertmesh.bench.scale import bench_scale
from expertmesh.comm.local import cores
from expertmesh.commands.bench_kernels import check_kernel_memory, own_kernels
from expertmesh.commands.cluster import parse_layout
from expertmesh.commands.options import add_precision
from expertmesh.config import EngineConfig, ModelConfig
from expertmesh.config.precision import Precision
from expertmesh.errors import InputError
from expertmesh.llm import demo_model
from expertmesh.planner.cards import Card, card, read_card

DEFAULT = Trial()
CROWDED = 4  # ranks that share a core at most


def add_scale(subparsers: Any) -> None:
    scale = subparsers.add_parser(
        "scale", help="16 ranks and 64 with the same memory each: what they hold, compute and send"
    )
    add = scale.add_argument
    add("model", nargs="?", help="folder in the Hugging Face layout; default: the demo model")
    add(
        "--layout", action="append", metavar="NODESxCARDS[xTP]",
        help="repeatable, the smallest first (default: 2x8 and 8x8)",
    )  # fmt: skip
    add(
        "--memory-per-rank", metavar="SIZE",
        help="of every rank, such as 5MB (default: such that weights take 72% of it in the first layout)",
    )  # fmt: skip
    add(
        "--context", type=int, default=DEFAULT.context, metavar="N", help="tokens of a request (default: 256)"
    )
    add(
        "--requests", type=int, default=DEFAULT.most, metavar="N",
        help="most of a TP group, whatever the room (default: 64)",
    )  # fmt: skip
    add("--steps", type=int, default=DEFAULT.steps, metavar="N", help="that are counted (default: 4)")
    add("--exchange", default=DEFAULT.exchange, help="how rows reach their experts (default: two_tier)")
    add("--redundant", type=int, default=DEFAULT.redundant, metavar="N", help="slots of a layer for replicas")
    add_precision(add)
    add(
        "--card", default="ascend-910b",
        help="for which the time of a step is modelled: a name, or a file of your own (default: ascend-910b)",
    )  # fmt: skip
    add("--json", action="store_true", help="print JSON, and nothing else")
    scale.set_defaults(measure=_measure_scale, table=_scale_table)


def add_machine(subparsers: Any) -> None:
    machine = subparsers.add_parser("machine", help="this machine as a card that the planner knows")
    add = machine.add_argument
    add("--cards", type=int, default=1, metavar="N", help="ranks that the machine is taken as (default: 1)")
    add(
        "--across-gbs", type=float, metavar="GB/s", help="of a card's link to other machines, if there is one"
    )
    add("--across-us", type=float, metavar="US", help="latency of that link")
    add("--rounds", type=int, default=5, metavar="N", help="of which the best is taken (default: 5)")
    add("--out", metavar="FILE.toml", help="write the profile, for --card of other commands")
    add("--json", action="store_true", help="print JSON, and nothing else")
    machine.set_defaults(measure=_measure_machine, table=_machine_table)


def add_planner(subparsers: Any) -> None:
    planner = subparsers.add_parser("planner", help="steps of this engine here, measured and predicted")
    add = planner.add_argument
    add(
        "models",
        nargs="*",
        metavar="MODEL",
        help="folders in the Hugging Face layout; default: the demo model",
    )
    add(
        "--card", metavar="FILE.toml",
        help="this machine as one card, as `bench machine --out` writes it (default: measured now)",
    )  # fmt: skip
    add(
        "--layout", action="append", metavar="NODESxCARDS[xTP]",
        help="repeatable (default: 1x1, 1x2x1 and 1x2x2 as far as there are cores)",
    )  # fmt: skip
    add("--quantise", default="none,w8a8", metavar="A,B", help="ways to keep weights (default: none,w8a8)")
    add("--batches", default="1,4,16,64", metavar="N,N", help="requests that decode (default: 1,4,16,64)")
    add("--contexts", default="128,1024", metavar="N,N", help="tokens of each of them (default: 128,1024)")
    add("--prompts", default="128,512", metavar="N,N", help="tokens of a prompt (default: 128,512)")
    add("--rounds", type=int, default=5, metavar="N", help="steps of each case in a turn (default: 5)")
    add(
        "--turns",
        type=int,
        default=2,
        metavar="N",
        help="through all cases; the fastest step counts (default: 2)",
    )
    add("--json", action="store_true", help="print JSON, and nothing else")
    planner.set_defaults(measure=_measure_planner, table=_planner_table)


def _measure_planner(args: argparse.Namespace) -> dict[str, Any]:
    default = [text for text in ("1x1x1", "1x2x1", "1x2x2") if parse_layout(text).ranks <= cores()]
    topologies = tuple(parse_layout(text) for text in args.layout or default)
    for topology in topologies:
        if topology.ranks > CROWDED * cores():
            raise InputError(f"--layout: {topology.ranks} ranks on {cores()} cores say nothing about speed")
    quantise = tuple(args.quantise.split(","))
    for kept in quantise:
        Precision.of(kept)
    batches, contexts, prompts = (_sizes(args, name) for name in ("batches", "contexts", "prompts"))
    grid = Grid(topologies, quantise, batches, contexts, prompts, args.rounds, args.turns)
    profile = card(args.card) if args.card else _here()
    folders = [Path(name) for name in args.models] or [demo_model()]
    return {"card": profile.name, **bench_planned(folders, grid, planner(profile))}


def _here() -> Card:
    """This machine as one card."""
    check_kernel_memory()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "here.toml"
        write_card(path, bench_machine(Setting(), own_kernels()))
        return read_card(path)


def _sizes(args: argparse.Namespace, name: str) -> tuple[int, ...]:
    text = getattr(args, name)
    if not re.fullmatch(r"(\d{1,7}(,\d{1,7})*)?", text):
        raise InputError(f"--{name} {text!r}: not of the form 1,16 (sizes)")
    return tuple(map(int, text.split(","))) if text else ()


def _planner_table(report: dict[str, Any]) -> str:
    lines = [
        f"{'model':16}{'layout':>8}{'weights':>8}{'step':>10}{'context':>9}{'measured, ms':>14}{'predicted':>11}"
        f"{'ratio':>8}"
    ]
    for row in report["rows"]:
        t = row["topology"]
        step = f"{row['requests']}x{row['rows']}"
        layout = f"{t['nodes']}x{t['cards_per_node']}" + (
            f"x{t['attention_tp']}" if t["attention_tp"] else ""
        )
        lines.append(
            f"{row['folder']:16}{layout:>8}{row['quantise']:>8}{step:>10}{row['context']:9}"
            f"{1000 * row['measured']:14.3f}{1000 * row['predicted']:11.3f}{row['predicted'] / row['measured']:8.2f}"
        )
    lines.append(
        f"error {report['error']:.1%}; predictions are {report['factor']:.2f} of what is measured, and without that "
        f"factor the error is {report['ratio_error']:.1%}; of ratios between two cases {report['pair_error']:.1%}; "
        f"turns of a case differ by a factor of {report['spread']:.2f}"
    )
    return "\n".join(lines)


def _measure_machine(args: argparse.Namespace) -> dict[str, Any]:
    setting = Setting(args.cards, args.across_gbs, args.across_us, args.rounds)
    if args.out is not None:
        check_out(Path(args.out))
    check_kernel_memory()
    report = bench_machine(setting, own_kernels())
    if args.out is not None:
        write_card(Path(args.out), report)
    return report | {"out": args.out}


def _machine_table(report: dict[str, Any]) -> str:
    lines = [f"{report['title']}; float32 {report['measured']['ceilings']['float32'] / 1e12:.3g} TFLOPS"]
    for name, entry in (*report["numbers"].items(), *report["parameters"].items()):
        lines.append(f"{name:21}{entry['value']:>12g}  {entry['source']}")
    if report["out"] is not None:
        lines.append(f"written to {report['out']}; use it with --card {report['out']}")
    return "\n".join(lines)


def _measure_scale(args: argparse.Namespace) -> dict[str, Any]:
    folder = Path(args.model) if args.model else demo_model()
    kept = EngineConfig(args.dtype, args.quantise).quantise_of(ModelConfig.from_folder(folder))
    trial = Trial(
        args.memory_per_rank,
        args.context,
        args.requests,
        args.steps,
        args.dtype,
        kept,
        args.exchange,
        args.redundant,
    )
    topologies = [parse_layout(text) for text in args.layout or ("2x8", "8x8")]
    if len(topologies) < 2:
        raise InputError("--layout is given once; a comparison takes two or more")
    return bench_scale(folder, topologies, trial, card(args.card))


# Of a load: what is shown, and how.
ROWS = (
    ("requests", "requests in flight", "{:.0f}"),
    ("requests_per_group", "  of a TP group", "{:.0f}"),
    ("tokens_per_card", "tokens of a card and step", "{:.3f}"),
    ("tokens_per_expert", "tokens of an expert and step", "{:.3f}"),
    ("busiest_rank", "fullest rank / mean", "{:.3f}"),
    ("across_per_token", "bytes across nodes a token", "{:.0f}"),
    ("inside_per_token", "bytes inside nodes a token", "{:.0f}"),
)


def _scale_table(report: dict[str, Any]) -> str:
    layouts = report["layouts"]
    lines = [
        f"{report['model']}, {report['memory_per_rank'] / 1e6:.2f} MB a rank, requests of {report['context']} tokens; "
        f"step times modelled for {report['card']}",
        f"{'':34}" + "".join(f"{_name(x):>24}" for x in layouts) + "       last / first",
        f"{'':34}" + f"{'counted':>12}{'predicted':>12}" * len(layouts) + f"{'counted':>12}",
    ]

    def add(title: str, pairs: list[tuple[float, float]], form: str, compared: bool = True) -> None:
        ratio = f"{pairs[-1][0] / pairs[0][0]:12.4f}" if compared and pairs[0][0] else ""
        shown = "".join(f"{form.format(value):>12}" for pair in pairs for value in pair)
        lines.append(f"{title:34}{shown}{ratio}")

    for kind in layouts[0]["memory"]["counted"]["kinds"]:
        add(f"MB of weights, {kind}", [_pair(x["memory"], "kinds", kind, 1e-6) for x in layouts], "{:.3f}")
    add("MB of weights", [_pair(x["memory"], "weights", None, 1e-6) for x in layouts], "{:.3f}")
    add("tokens in the cache", [_pair(x["memory"], "cache_tokens") for x in layouts], "{:.0f}")
    for load, title in (("full", "at full memory:"), ("equal", "as many requests a group as the first:")):
        lines.append(title)
        for name, text, form in ROWS:
            add(text, [_pair(x["loads"][load], name) for x in layouts], form)
        add("  less than flat would send", [_saved(x["loads"][load]) for x in layouts], "{:.1%}", False)
        add("step, us", [_pair(x["loads"][load], "seconds", "total", 1e6) for x in layouts], "{:.1f}")
        without = [_pair(x["loads"][load], "seconds", "total_without_starting", 1e6) for x in layouts]
        add("  without an exchange's start, us", without, "{:.3f}")
        add(
            "step by the planner, us",
            [_pair(x["loads"][load], "planner_seconds", None, 1e6) for x in layouts],
            "{:.1f}",
        )
    return "\n".join(lines)


def _name(layout: dict[str, Any]) -> str:
    return f"{layout['nodes']}x{layout['cards']} TP{layout['attention_tp']}"


def _pair(
    found: dict[str, Any], name: str, key: str | None = None, scale: float = 1.0
) -> tuple[float, float]:
    """Counted and predicted."""
    values = [found[which][name] for which in ("counted", "predicted")]
    counted, predicted = values if key is None else (value[key] for value in values)
    return counted * scale, predicted * scale


def _saved(load: dict[str, Any]) -> tuple[float, float]:
    """Of the bytes across nodes that the same rows would be by the flat exchange."""
    flat = load["across_per_token_flat"]
    counted, predicted = _pair(load, "across_per_token")
    return (1 - counted / flat, 1 - predicted / flat) if flat else (0.0, 0.0)
