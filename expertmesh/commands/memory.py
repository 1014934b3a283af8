"""`expertmesh memory`: what a rank holds, from the description of the weights alone. Nothing is loaded."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertmesh.commands.cluster import TOPOLOGY_OPTIONS, given_topology, parse_layout
from expertmesh.commands.options import add_options, add_precision
from expertmesh.config import EngineConfig, ModelConfig, cache_bytes_per_token
from expertmesh.errors import InputError
from expertmesh.llm import demo_model
from expertmesh.mesh.layout import Layout
from expertmesh.mesh.topology import Topology
from expertmesh.weights import Shard, expert_bytes, moves_experts, static_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="folder with a config.json; default: the demo model")
    add_options(parser.add_argument, TOPOLOGY_OPTIONS)
    parser.add_argument(
        "--layout", action="append", metavar="NODESxCARDS[xTP]",
        help="instead of --nodes and --cards; repeatable, to compare: --layout 2x8 --layout 8x8",
    )  # fmt: skip
    parser.add_argument("--redundant", type=int, default=0, help="slots of a layer for replicas")
    parser.add_argument(
        "--rebalance", default="off",
        help="with anything but off (default) a rank has spare memory for an expert that is coming",
    )  # fmt: skip
    add_precision(parser.add_argument)
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")


def run(args: argparse.Namespace) -> int:
    folder = Path(args.model) if args.model else demo_model()
    model = ModelConfig.from_folder(folder)
    config = EngineConfig(
        dtype=args.dtype, quantise=args.quantise, redundant=args.redundant, rebalance=args.rebalance
    )
    config.check_precision(model)
    config = replace(config, quantise=config.quantise_of(model))
    dtype = config.dtype_of(model)
    if args.layout and (args.nodes or args.cards or args.attention_tp):
        raise InputError(
            "--layout takes the place of --nodes, --cards and --attention-tp; give one or the other"
        )
    topologies = [parse_layout(text) for text in args.layout or ()] or [given_topology(args)]
    layouts = [_examine(model, dtype, topology, config) for topology in topologies]
    report = {
        "model": folder.resolve().name,
        "dtype": dtype,
        "quantise": config.quantise,
        "cache_bytes_per_token": cache_bytes_per_token(model, dtype),
        "layouts": layouts,
    }
    print(json.dumps(report) if args.json else _table(report))
    return 0


def _examine(model: ModelConfig, dtype: str, topology: Topology, config: EngineConfig) -> dict[str, Any]:
    layout, kept = Layout.of(model, topology, config.exchange, config.redundant), config.quantise
    # All ranks hold the same but for their experts, whose slots are as many on each.
    kinds = static_bytes(model, dtype, Shard.of(0, layout.topology, layout.placement), kept)
    if config.rebalance != "off":  # in a table of several layouts also where it is nothing
        moves = moves_experts(model, layout.topology, config.rebalance)
        kinds["spare"] = moves * expert_bytes(model, dtype, kept)
    return {
        "nodes": topology.nodes,
        "cards": topology.cards_per_node,
        "attention_tp": layout.topology.tp,
        "slots_per_rank": layout.placement.slots_per_rank,
        "bytes": dict(sorted(kinds.items())),
        "total": sum(kinds.values()),
    }


def _precision(report: dict[str, Any]) -> str:
    kept = report["quantise"]
    return str(report["dtype"]) if kept == "none" else f"{report['dtype']}, {kept}"


def _table(report: dict[str, Any]) -> str:
    layouts = report["layouts"]
    names = [f"{x['nodes']}x{x['cards']} TP{x['attention_tp']}" for x in layouts]
    lines = [
        f"{report['model']}, {_precision(report)}: GB a rank; a token of cache takes "
        f"{report['cache_bytes_per_token']:,} bytes on each",
        f"{'':12}" + "".join(f"{name:>14}" for name in names),
    ]
    for kind in [*layouts[0]["bytes"], "total"]:
        values = [x["total"] if kind == "total" else x["bytes"][kind] for x in layouts]
        ratio = f"   x {values[-1] / values[0]:.4f}" if len(values) > 1 and values[0] else ""
        lines.append(f"{kind:12}" + "".join(f"{v / 1e9:14.4f}" for v in values) + ratio)
    return "\n".join(lines)
