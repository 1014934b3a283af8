"""A model loaded as the options say, and what is reported of it."""

import argparse
import sys
from collections.abc import Sequence

import torch

from expertmesh.comm.base import PURPOSES
from expertmesh.commands.cluster import CLUSTER_OPTIONS, given_topology, launching
from expertmesh.commands.options import ENGINE_OPTIONS, given
from expertmesh.engine.balancer import Balancer
from expertmesh.engine.checkpoint import Progress
from expertmesh.engine.processes import PRELOAD, ProcessRanks, tell_standings
from expertmesh.llm import LLM


def load_llm(args: argparse.Namespace, progress: bool | Progress = True, quiet: bool = False) -> LLM:
    """progress: see `LLM`. quiet: the caller says what has become of it."""
    with launching(args, PRELOAD) as launcher:
        llm = LLM(
            args.model,
            dtype=args.dtype,
            quantise=args.quantise,
            topology=given_topology(args),
            progress=progress,
            launcher=launcher,
            prefix_cache=not args.no_prefix_cache,
            strict=args.strict,
            **given(args, (*ENGINE_OPTIONS, *CLUSTER_OPTIONS)),
        )
    ranks = llm.engine.ranks
    if isinstance(ranks, ProcessRanks):
        tell_standings(ranks.crew)
    if launcher is not None and launcher.apart and isinstance(ranks, ProcessRanks):
        print(describe_machines(ranks), file=sys.stderr)
    if llm.engine.layout.topology.ranks > 1 and not quiet:
        print(f"{describe_layout(llm)}\n{describe_memory(llm)}", file=sys.stderr)
    return llm


def describe_machines(ranks: ProcessRanks) -> str:
    """Where the ranks are and how they are reached, in a line for each node."""
    topology = ranks.layout.topology
    rows: list[tuple[str, ...]] = [("node", "host", "interface", "address", "ports", "ranks", "TP groups")]
    for node in range(topology.nodes):
        numbers = topology.node_ranks(node * topology.cards_per_node)
        places = [ranks.places[rank] for rank in numbers]
        groups = [topology.group_of(rank) for rank in numbers]
        said = (
            ", ".join(dict.fromkeys(p[name] for p in places)) for name in ("host", "interface", "address")
        )
        spans = (_span(numbers) for numbers in ([p["port"] for p in places], numbers, groups))
        rows.append((str(node), *said, *spans))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _span(numbers: Sequence[int]) -> str:
    first, last = min(numbers), max(numbers)
    return str(first) if first == last else f"{first}-{last}"


def describe_layout(llm: LLM) -> str:
    """What runs where, in a line."""
    layout, config = llm.engine.layout, llm.engine.config
    topology, slots = layout.topology, layout.placement.slots_per_rank
    if topology.ranks == 1:
        on = f"{torch.get_num_threads()} threads" if config.device == "cpu" else f"on {llm.engine.device}"
        return f"1 node x 1 card, {config.dtype}, {on}"
    on = "" if config.device == "cpu" else f" on {config.device}"
    return (
        f"{topology.nodes} nodes x {topology.cards_per_node} cards as {config.ranks}{on}, {config.dtype}; "
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


def describe_served(llm: LLM, max_queue: int | None) -> dict[str, str]:
    """What was worked out for a server, by name."""
    engine, config = llm.engine, llm.engine.config
    layout, model = engine.layout, engine.model
    topology, kernels = layout.topology, engine.kernels
    capacity = config.max_batch_requests * topology.groups
    queue = "" if max_queue is None else f", {max_queue} wait"
    exchange = f"{layout.how.name} exchange" if topology.ranks > 1 else "no exchange"
    return {
        "model": f"{llm.name} ({llm.folder.resolve()})",
        "precision": f"{config.dtype}, weights {config.quantise if config.quantise != 'none' else config.dtype}",
        "layout": f"{describe_layout(llm)}, {exchange}" if topology.ranks == 1 else describe_layout(llm),
        "experts": f"{model.n_routed_experts} a layer in {layout.placement.slots_per_rank} slots a card",
        "kernels": f"torch's: {kernels.lacking}"
        if kernels.lacking
        else f"{'the CPU' if config.device == 'cpu' else config.device}'s own, where there are some",
        "memory": describe_memory(llm).removeprefix("MB a rank: ") + " MB a rank",
        "requests": f"{capacity} at a time{queue}, up to {config.max_context} tokens each",
    }


def describe_steps(llm: LLM) -> str:
    """How steps have been computed so far, and how long they took, in a line."""
    parts = [
        f"{spent.steps} {'halved' if way.micro_batches == 2 else 'whole'}, split {way.split}, "
        f"{1000 * spent.seconds / spent.steps:.1f} ms each"
        for way, spent in llm.engine.planner.spent.items()
    ]
    return f"steps: {'; '.join(parts)}"


def describe_balance(balancer: Balancer) -> str:
    """What the balancer has done so far, in a line."""
    state = balancer.state
    known = state.imbalance is not None
    fullest = (
        f"fullest card {state.imbalance:.3f} of the mean"
        if known
        else "too few rows to tell the fullest card"
    )
    said = (
        f"balance: {fullest}; {state.plans} plans, {state.refused} that would not "
        f"pay, {state.moved} experts moved in {state.swaps} rounds, {state.moved_bytes / 1e6:.1f} MB; {state.doing}"
    )
    return said + (f"; {state.failures} failures, last: {state.error}" if state.failures else "")


def describe_traffic(llm: LLM) -> str:
    """What the ranks have sent so far, in a line."""
    sent = llm.engine.ranks.sent()
    parts = [
        f"{purpose} {sum(s.across(purpose) for s in sent) / 1e6:.2f} across nodes "
        f"+ {sum(s.in_node(purpose) for s in sent) / 1e6:.2f} inside"
        for purpose in PURPOSES
    ]
    return f"MB sent: {', '.join(parts)}"
