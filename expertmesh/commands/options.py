"""Options that several commands share, in the names of the library."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from expertmesh.comm.base import PURPOSES
from expertmesh.llm import LLM
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import ALGORITHMS
from expertmesh.request import SamplingParams

# Beginnings in each domain of the demo model.
PROMPTS = {
    "a tale": "Once upon a time there was a poor woodcutter who",
    "Tang poetry": "春望\n杜甫\n",
    "Song poetry": "浣溪沙\n晏殊\n",
    "Python": "class Stack:\n    def __init__(self):\n",
}
ENGINE_OPTIONS = (
    ("max_context", int, "longest request in tokens, prompt and output together"),
    ("max_batch_tokens", int, "token rows of one step"),
    ("max_batch_requests", int, "requests that run at the same time"),
    ("chunk", int, "most prompt tokens of one request in one step"),
    ("page_size", int, "tokens in a page of the latent cache"),
    ("cache_tokens", int, "tokens that the latent cache holds"),
)
TOPOLOGY_OPTIONS = (
    ("nodes", int, "nodes of the cluster (default: 1)"),
    ("cards", int, "cards of each node (default: 1)"),
    ("attention_tp", int, "cards of a node that share one attention (default: as many as the model allows)"),
)
CLUSTER_OPTIONS = (
    ("ranks", str, "threads of this process (default) or processes of this machine"),
    ("exchange", str, f"how rows reach their experts: {', '.join(ALGORITHMS)} (default: two_tier)"),
    ("redundant", int, "slots of a layer for replicas of experts (default: 0)"),
    ("timeout", float, "seconds after which a rank that does not answer has failed (default: 30)"),
)
SAMPLING_OPTIONS = (
    ("max_tokens", int, "most tokens to generate"),
    ("temperature", float, "0 takes the most likely token"),
    ("top_p", float, "smallest set of tokens with this probability"),
    ("top_k", int, "this many most likely tokens; 0 for all"),
    ("min_p", float, "drop tokens less likely than this times the most likely"),
    ("seed", int, "makes the output repeatable"),
    ("logprobs", int, "report this many most likely tokens at each position (with --json)"),
    ("presence_penalty", float, "against tokens that are in the output"),
    ("frequency_penalty", float, "against tokens, by their count in the output"),
    ("repetition_penalty", float, "against tokens of prompt and output; 1 for none"),
)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        help="folder in the Hugging Face layout; without it, the demo model that ships with this",
    )
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32 or bfloat16")
    group = parser.add_argument_group("engine (worked out where not given)")
    add_options(group.add_argument, ENGINE_OPTIONS)
    group.add_argument("--no-prefix-cache", action="store_true", help="compute equal beginnings anew")
    group.add_argument("--strict", action="store_true", help="refuse to run an op on its reference")
    add_cluster(parser)


def add_cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster (one rank where not given)")
    add_options(group.add_argument, TOPOLOGY_OPTIONS)
    add_options(group.add_argument, CLUSTER_OPTIONS)


def given_cluster(args: argparse.Namespace) -> dict[str, Any]:
    """The cluster's engine options that were given."""
    return _given(args, CLUSTER_OPTIONS)


def given_topology(args: argparse.Namespace) -> Topology:
    named = {"nodes": args.nodes, "cards_per_node": args.cards, "attention_tp": args.attention_tp}
    return Topology(**{name: value for name, value in named.items() if value is not None})


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (defaults: the checkpoint's generation_config.json)")
    add_options(group.add_argument, SAMPLING_OPTIONS)
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends the output; repeatable")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")


def add_options(add: Callable[..., Any], options: Sequence[tuple[str, type, str]]) -> None:
    for name, kind, text in options:
        add("--" + name.replace("_", "-"), type=kind, metavar=kind.__name__.upper(), help=text)


def load_llm(args: argparse.Namespace, progress: bool = True) -> LLM:
    llm = LLM(
        args.model,
        dtype=args.dtype,
        topology=given_topology(args),
        progress=progress,
        prefix_cache=not args.no_prefix_cache,
        strict=args.strict,
        **_given(args, (*ENGINE_OPTIONS, *CLUSTER_OPTIONS)),
    )
    if llm.engine.layout.topology.ranks > 1:
        print(f"{describe_layout(llm)}\n{describe_memory(llm)}", file=sys.stderr)
    return llm


def describe_layout(llm: LLM) -> str:
    """What runs where, in a line."""
    layout, config = llm.engine.layout, llm.engine.config
    topology, slots = layout.topology, layout.placement.slots_per_rank
    if topology.ranks == 1:
        return f"1 node x 1 card, {config.dtype}, {torch.get_num_threads()} threads"
    return (
        f"{topology.nodes} nodes x {topology.cards_per_node} cards as {config.ranks}, {config.dtype}; "
        f"attention TP {topology.tp} x DP {topology.groups}; {slots} expert slots a card and layer, "
        f"{layout.how.name} exchange"
    )


def describe_memory(llm: LLM) -> str:
    """Static memory of a rank by kind, in a line."""
    memory = llm.engine.ranks.memory
    kinds = ", ".join(f"{kind} {size / 1e6:.2f}" for kind, size in sorted(memory.kinds.items()) if size)
    tokens, context = llm.engine.config.cache_tokens, llm.engine.config.max_context
    return (
        f"MB a rank: weights {memory.weights / 1e6:.2f} ({kinds}), "
        f"cache {memory.cache / 1e6:.1f} ({tokens} tokens, a request up to {context})"
    )


def describe_traffic(llm: LLM) -> str:
    """What the ranks have sent so far, in a line."""
    sent = llm.engine.ranks.sent()
    parts = [
        f"{purpose} {sum(s.across(purpose) for s in sent) / 1e6:.2f} across nodes "
        f"+ {sum(s.in_node(purpose) for s in sent) / 1e6:.2f} inside"
        for purpose in PURPOSES
    ]
    return f"MB sent: {', '.join(parts)}"


def _given(args: argparse.Namespace, options: Sequence[tuple[str, type, str]]) -> dict[str, Any]:
    return {name: getattr(args, name) for name, _, _ in options if getattr(args, name) is not None}


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given. InputError where one is wrong, before a model is loaded."""
    given = _given(args, SAMPLING_OPTIONS)
    given |= {"stop": tuple(args.stop or ()), "ignore_eos": args.ignore_eos}
    SamplingParams(**given)
    return given
