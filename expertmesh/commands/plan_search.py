"""`expertmesh plan` without a word after it: the best layout under limits, or the best for each latency."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

from expertmesh.balancer.formats import read_loads
from expertmesh.commands.plan_simulate import report_text
from expertmesh.commands.plan_text import front_text, plan_text
from expertmesh.config import ModelConfig
from expertmesh.errors import InputError
from expertmesh.mesh.traffic import ALGORITHMS, FORMATS
from expertmesh.planner.advice import advise
from expertmesh.planner.arrivals import parse_arrivals
from expertmesh.planner.cards import card
from expertmesh.planner.deployment import BALANCES, COLLECTIVE
from expertmesh.planner.formats import CACHES, WEIGHTS, weights
from expertmesh.planner.loaded import judged
from expertmesh.planner.models import model
from expertmesh.planner.nearest import refusal
from expertmesh.planner.page import page
from expertmesh.planner.plans import Limits, Plan, front, knee
from expertmesh.planner.report import report
from expertmesh.planner.search import Search, search
from expertmesh.planner.serving import Workload
from expertmesh.planner.simulate import Report, simulate
from expertmesh.planner.space import MODES, MOST_DRAFTS, Cluster, Space, byte_format

# Limits on TPOT of the points of a front, ms, and none.
FRONT_MS = (5.0, 8.0, 12.0, 18.0, 27.0, 40.0, 60.0, 90.0, 135.0)
MOST_MS = 1e7
SIMULATED = 1000  # requests that come by chance
PINNED = (
    "attention_tp", "redundant", "weights", "cache", "exchange", "dispatch", "combine", "drafts", "accepted", "balance",
)  # fmt: skip
ENGINE_ONLY = {"mode": "together", "drafts": 0, "cache": "bf16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is planned").add_argument
    add(
        "--model",
        metavar="NAME",
        help="a known model (deepseek-v3, ...), a config.json, or a folder with one",
    )
    add(
        "--card",
        metavar="NAME",
        help="a known card (ascend-910b, h800, ...), or a file of your own: card.toml",
    )
    add("--nodes", type=int, metavar="INT", help="nodes of the cluster")
    add("--cards", type=int, metavar="INT", help="cards of each node; without --nodes: of the cluster")
    add("--input", type=float, metavar="TOKENS", help="tokens of a prompt")
    add("--output", type=float, metavar="TOKENS", help="tokens of an answer")
    add(
        "--cached",
        type=float,
        default=0.0,
        metavar="TOKENS",
        help="of these, found in the prefix cache (default: 0)",
    )
    add(
        "--tpot",
        type=float,
        metavar="MS",
        help="most time for each token of an answer, the mean; default: the front",
    )
    add("--ttft", type=float, metavar="MS", help="most time to the first token, the mean")
    _add_choices(
        parser.add_argument_group("choices that are made already (default: all are tried)").add_argument
    )
    add = parser.add_argument_group("what is shown").add_argument
    add("--top", type=int, default=3, metavar="INT", help="plans to compare (default: 3)")
    add("--json", action="store_true", help="print JSON, and nothing else")
    add(
        "--plot",
        type=Path,
        metavar="FILE.html",
        help="and a page: the front, the step by part, memory by kind",
    )
    add(
        "--simulate",
        metavar="poisson[:RATE]|TRACE.jsonl",
        help="and percentiles of the first plan under arrivals, by chance (default rate: what it serves) or as a file "
        "says; `plan simulate` has more to choose",
    )
    parser.set_defaults(plan=run)


def _add_choices(add: Callable[..., Any]) -> None:
    add(
        "--prefill",
        choices=MODES,
        help="together with decoding, apart on nodes of its own, or elsewhere: not planned",
    )
    add("--attention-tp", type=int, metavar="INT", help="cards of a node that share one attention")
    add("--redundant", type=int, metavar="INT", help="slots of a layer for replicas of experts")
    add(
        "--weights",
        metavar="NAME",
        help=f"{', '.join(WEIGHTS)} (default: the 8 bits that the card multiplies)",
    )
    add("--cache", metavar="NAME", help=f"{', '.join(CACHES)} (default: the card's 8 bits)")
    add("--exchange", metavar="NAME", help=f"{', '.join(ALGORITHMS)}, {COLLECTIVE}")
    add("--dispatch", metavar="NAME", help=f"rows to experts: {', '.join(FORMATS)}")
    add("--combine", metavar="NAME", help="rows back, as --dispatch")
    add("--drafts", type=int, metavar="INT", help=f"MTP drafts of a step, 0 to {MOST_DRAFTS}")
    add(
        "--accepted",
        type=float,
        metavar="TOKENS",
        help="tokens that a step with these drafts gives (default: usual)",
    )
    add(
        "--overlap",
        choices=("on", "off"),
        help="two micro-batches: one computes while the other's rows travel",
    )
    add("--balance", choices=BALANCES, default="known",
        help="of experts: none (in order), known (default; placed by loads), perfect (forced)")  # fmt: skip
    add(
        "--loads",
        metavar="FILE",
        help="recorded loads of experts, as for `expertmesh balance`: placements are by these",
    )
    add("--engine-only", action="store_true", help="only what this engine does today")


def run(args: argparse.Namespace) -> int:
    """Check, search, show."""
    config, space, work, limits = _asked(args)
    loads = None if args.loads is None else read_loads(args.loads, config.n_routed_experts)
    points = _front(space, work, limits) if limits.tpot == inf or args.plot else []
    # Without a limit on TPOT, one point of the front is looked at as if its TPOT were asked for.
    held = (
        replace(limits, tpot=knee(points).outcome.tpot * 1.001) if limits.tpot == inf and points else limits
    )
    plans = search(space, work, held) if held.tpot < inf else []
    if not plans:
        raise refusal(space, work, limits)
    if loads is not None and not (plans := judged(plans, loads, held)):
        raise InputError(
            f"--loads {args.loads}: no layout is within the limits so; allow more, or take more cards"
        )
    folder = args.model if Path(args.model).is_dir() else "MODEL"
    document: dict[str, Any] = {
        "model": args.model,
        "card": space.cluster.card.name,
        "nodes": space.cluster.nodes,
        "cards_per_node": space.cluster.cards,
        "input": work.input,
        "output": work.output,
        "cached": work.cached,
        "limits": {"tpot_ms": _ms(limits.tpot), "ttft_ms": _ms(limits.ttft)},
        "plans": [report(plan, held, folder) for plan in plans[: args.top]],
        "next": [vars(advice) for advice in advise(plans, held)],
        "front": [report(plan, Limits(ttft=limits.ttft), folder) for plan in points],
    }
    document["title"] = title(document, space)
    replayed = None if args.simulate is None else _simulated(plans[0], args.simulate)
    document["simulation"] = replayed and asdict(replayed)
    if args.plot:
        write(args.plot, page(document))
    print(json.dumps(document) if args.json else _text(document))
    if replayed and not args.json:
        print(f"\nRequests that come as {args.simulate} says, one by one:\n{report_text(replayed)}")
    return 0


def _simulated(plan: Plan, arrivals: str) -> Report:
    if plan.mode == "elsewhere":
        raise InputError("--simulate replays prefill too; leave out --prefill elsewhere")
    rate = plan.outcome.tokens / plan.work.output
    return simulate(plan.service, parse_arrivals(arrivals, plan.work, SIMULATED, rate))


def _front(space: Space, work: Workload, limits: Limits) -> list[Plan]:
    return front(Search(space, work, [ms / 1e3 for ms in FRONT_MS] + [inf], limits.ttft).plans())


def title(document: dict[str, Any], space: Space) -> str:
    card, cluster = space.cluster.card, space.cluster
    limits = [
        f"{name} at most {value:g} ms"
        for name, key in (("TPOT", "tpot_ms"), ("TTFT", "ttft_ms"))
        if (value := document["limits"][key]) is not None
    ]
    cached = f" ({document['cached']:g} of them cached)" if document["cached"] else ""
    return "; ".join(
        [
            f"{document['model']} on {cluster.nodes} nodes x {cluster.cards} {card.title}",
            f"prompts of {document['input']:g} tokens{cached}, answers of {document['output']:g}",
            *limits,
        ]
    )


def _text(document: dict[str, Any]) -> str:
    parts = [document["title"], ""]
    if document["limits"]["tpot_ms"] is None:
        parts += [
            front_text(document["front"]),
            "",
            "The point of the front with most tokens/s per card x per user:",
        ]
    return "\n".join([*parts, plan_text(document)])


def _ms(seconds: float) -> float | None:
    return None if seconds == inf else seconds * 1e3


def _asked(args: argparse.Namespace) -> tuple[ModelConfig, Space, Workload, Limits]:
    """InputError for what is missing, or cannot be."""
    missing = [f"--{n}" for n in ("model", "card", "cards", "input", "output") if getattr(args, n) is None]
    if "--cards" in missing and args.nodes is not None:
        missing.remove("--cards")
    if missing:
        raise InputError(f"{', '.join(missing)} missing; say which model, on which cards, for which requests")
    for name in ("input", "output", "tpot", "ttft"):
        _positive(f"--{name}", getattr(args, name))
    if not isfinite(args.cached) or not 0 <= args.cached < args.input:
        raise InputError(
            f"--cached is {args.cached:g}; give from 0 to less than the {args.input:g} of --input"
        )
    if args.top < 1:
        raise InputError(f"--top is {args.top}; give at least 1")
    config, this = model(args.model), card(args.card)
    longest = args.input + args.output
    if longest > config.max_position_embeddings:
        raise InputError(
            f"{args.input:g} tokens and {args.output:g} more are over the {config.max_position_embeddings} positions "
            f"of {args.model}; give fewer"
        )
    space = Space(cluster_of(args, this.cards_per_node, this), config, **_pinned(args))
    limits = Limits((args.tpot or inf) / 1e3, (args.ttft or inf) / 1e3)
    return config, space, Workload(args.input, args.output, args.cached), limits


def _positive(name: str, value: float | None) -> None:
    if value is not None and not (isfinite(value) and 0 < value <= MOST_MS):
        raise InputError(f"{name} is {value:g}; give a number above 0, and {MOST_MS:g} at most")


def cluster_of(args: argparse.Namespace, usual: int, this: Any) -> Cluster:
    """Without --nodes, --cards are all of them, in nodes as the card comes."""
    if args.nodes is not None:
        return Cluster(this, args.nodes, usual if args.cards is None else args.cards)
    if args.cards > usual and args.cards % usual:
        raise InputError(
            f"{args.cards} cards are not whole nodes of {usual}; give --nodes and --cards of each"
        )
    per_node = min(usual, args.cards)
    return Cluster(this, args.cards // max(per_node, 1), per_node)


def _pinned(args: argparse.Namespace) -> dict[str, Any]:
    pinned = {name: getattr(args, name) for name in PINNED}
    pinned["overlap"] = None if args.overlap is None else args.overlap == "on"
    pinned["mode"] = args.prefill
    if not args.engine_only:
        return pinned
    for name, value in ENGINE_ONLY.items():
        if pinned[name] not in (None, value):
            raise InputError(f"--engine-only plans with {name} {value}; leave out one of the two")
        pinned[name] = value
    if pinned["exchange"] not in (None, *ALGORITHMS) or pinned["dispatch"] or pinned["combine"]:
        raise InputError(
            f"--engine-only plans with an --exchange of {', '.join(ALGORITHMS)}, formats included"
        )
    if args.weights is not None and weights(args.weights).engine is None:
        raise InputError(
            f"--engine-only: the engine has no kernels for {args.weights} weights; leave out one"
        )
    if pinned["exchange"] is None:
        pinned["exchange"] = f"two_tier_{byte_format(card(args.card))}_both"
    return pinned


def write(path: Path, text: str) -> None:
    """InputError where it cannot be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file that can be written") from None
