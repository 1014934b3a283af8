"""The cluster that a command runs on: the options say it, or whoever has started this process as a part of one."""

import argparse
import faulthandler
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from expertmesh.commands.options import JOIN, add_options, given, without_join
from expertmesh.config import EngineConfig, demo_model
from expertmesh.emulation.spread import Emulated
from expertmesh.errors import InputError
from expertmesh.launch.interfaces import interface_address
from expertmesh.launch.launcher import Here, Launcher
from expertmesh.launch.rollcall import Rendezvous
from expertmesh.launch.torchrun import Assignment, Torchrun, end_with_parent, leading, work
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import ALGORITHMS, NATIVE

TOPOLOGY_OPTIONS = (
    ("nodes", int, "nodes of the cluster (default: 1)"),
    ("cards", int, "cards of each node (default: 1)"),
    ("attention_tp", int, "cards of a node that share one attention (default: as many as the model allows)"),
)
CLUSTER_OPTIONS = (
    (
        "ranks",
        str,
        "threads of this process, or processes, as on several machines and on cards (default: the former elsewhere)",
    ),
    (
        "exchange",
        str,
        f"how rows reach their experts: {', '.join(ALGORITHMS)} (default: two_tier); between cards also "
        f"{', '.join(NATIVE)}",
    ),
    ("redundant", int, "slots of a layer for replicas of experts (default: 0)"),
    (
        "overlap",
        str,
        "compute one half of a step while rows of the other travel: on, off, auto (default: the faster one, by "
        "measuring; sums may then differ in their last bits from run to run)",
    ),
    (
        "split",
        str,
        "how the rows of a step are shared out to replicas: now (by this step's counts), last (by the last one's), "
        "even, auto (default: between nodes of processes the fastest, by measuring; elsewhere now)",
    ),
    ("rebalance", str, "move experts to where the loads want them: auto, off (default), every=STEPS"),
    ("timeout", float, "seconds after which a rank that does not come or answer has failed (default: 30)"),
)


def add_cluster(parser: argparse.ArgumentParser, machines: bool = True) -> None:
    """machines: whether the ranks may be on several."""
    group = parser.add_argument_group("cluster (one rank where not given)")
    add_options(group.add_argument, TOPOLOGY_OPTIONS)
    add_options(group.add_argument, CLUSTER_OPTIONS)
    if machines:
        add_machines(group.add_argument)
        parser.set_defaults(clustered=True)


def add_machines(add: Any) -> None:
    """Options of clusters of several machines."""
    add(
        "--interface",
        metavar="NAME",
        help="network interface to other machines, for ranks that are processes (default: the one that reaches them)",
    )
    add(
        JOIN,
        metavar="HOST:PORT",
        help="start the same line on --nodes machines: they meet at this address of one of them, at a free port, and "
        "start --cards ranks each with torch's elastic launcher. Only on a network that you trust: whoever reaches "
        "that port can read the token by which ranks know each other",
    )


def run(args: argparse.Namespace) -> int:
    """Run a command that may have its ranks on several machines: do what this process is there for, in its cluster."""
    faulthandler.register(signal.SIGUSR1, file=2)  # which must not end it, before there is more to say
    if args.join is not None:
        return _join(args)
    own = Assignment.of(os.environ)
    if own is None or Emulated.is_named(os.environ):
        return _run(args)
    if own.elastic:
        end_with_parent()
    if own.rank == 0:
        with leading(own):
            return _run(args)
    check_shape(args, own.topology.nodes, own.cards)
    # Of this machine: the driver's may have the model elsewhere, and so the demo model, which is in the package.
    local = {"folder": os.path.abspath(args.model or demo_model())} if hasattr(args, "model") else {}
    work(own, _timeout(args), args.interface, local)
    return 0


def _run(args: argparse.Namespace) -> int:
    code: int = args.run(args)
    return code


def _join(args: argparse.Namespace) -> int:
    """Be one of the machines that the same line was started on."""
    from expertmesh.launch.elastic import start  # takes its time

    where = Rendezvous.parse(args.join)
    if args.nodes is None or args.cards is None:
        raise InputError(
            "--join takes --nodes and --cards too: how many machines, and how many ranks of each"
        )
    Topology(args.nodes, args.cards)  # wrong values are refused before anybody waits
    words = without_join(args.arguments)
    return start(where, args.nodes, args.cards, _timeout(args), args.interface, words)


def _timeout(args: argparse.Namespace) -> float:
    """InputError where it is none."""
    return EngineConfig(
        **given(args, [option for option in CLUSTER_OPTIONS if option[0] == "timeout"])
    ).timeout


@contextmanager
def launching(args: argparse.Namespace, preload: Sequence[str]) -> Iterator[Launcher | None]:
    """What starts the ranks, where it is not the engine's own choice. The block starts them: the launcher is closed
    here only where it fails. InputError where the options say otherwise."""
    found: Launcher | None = Emulated.of(os.environ, preload, args.interface)
    if found is None and (own := Assignment.of(os.environ)) is not None:
        found = Torchrun(own, preload, args.interface)
    if found is None and args.interface is not None:
        address = interface_address(args.interface)
        if args.ranks != "processes":
            raise InputError("--interface is of ranks that are processes: say --ranks processes too")
        found = Here(preload, address=address)
    try:
        if found is not None and found.nodes is not None:
            check_shape(args, found.nodes, found.cards)
        yield found
    except BaseException:
        if found is not None:
            found.close()
        raise


def check_shape(args: argparse.Namespace, nodes: int | None, cards: int | None) -> None:
    """The options must not say otherwise; where they say nothing, they are filled in."""
    for name, there in (("nodes", nodes), ("cards", cards)):
        said = getattr(args, name)
        if said not in (None, there):
            raise InputError(f"--{name} {said}, but this process was started in a cluster with {there}")
        setattr(args, name, there)
    if args.ranks == "threads":
        raise InputError("--ranks threads, but in this cluster ranks are processes")
    args.ranks = "processes"


def given_cluster(args: argparse.Namespace) -> dict[str, Any]:
    """The cluster's engine options that were given."""
    return given(args, CLUSTER_OPTIONS)


def given_topology(args: argparse.Namespace) -> Topology:
    named = {"nodes": args.nodes, "cards_per_node": args.cards, "attention_tp": args.attention_tp}
    return Topology(**{name: value for name, value in named.items() if value is not None})


def parse_layout(text: str) -> Topology:
    if not re.fullmatch(r"\d+x\d+(x\d+)?", text):
        raise InputError(f"--layout {text!r}: not of the form 8x8 or 8x8x2 (nodes x cards x attention TP)")
    return Topology(*map(int, text.split("x")))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
