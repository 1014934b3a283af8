"""The cluster that a command runs on: the options say it, or whoever has started this process as a part of one."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from expertmesh.commands.options import add_options, given
from expertmesh.emulation.spread import Emulated
from expertmesh.errors import InputError
from expertmesh.launch.launcher import Launcher
from expertmesh.launch.torchrun import Place, Torchrun, work
from expertmesh.mesh.topology import Topology
from expertmesh.mesh.traffic import ALGORITHMS

TOPOLOGY_OPTIONS = (
    ("nodes", int, "nodes of the cluster (default: 1)"),
    ("cards", int, "cards of each node (default: 1)"),
    ("attention_tp", int, "cards of a node that share one attention (default: as many as the model allows)"),
)
CLUSTER_OPTIONS = (
    ("ranks", str, "threads of this process (default) or processes of this machine"),
    ("exchange", str, f"how rows reach their experts: {', '.join(ALGORITHMS)} (default: two_tier)"),
    ("redundant", int, "slots of a layer for replicas of experts (default: 0)"),
    ("overlap", str, "compute one half of a step while rows of the other travel: auto (default), on, off"),
    ("timeout", float, "seconds after which a rank that does not come or answer has failed (default: 30)"),
)
TIMEOUT = 30.0


def add_cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster (one rank where not given)")
    add_options(group.add_argument, TOPOLOGY_OPTIONS)
    add_options(group.add_argument, CLUSTER_OPTIONS)
    add_machines(group.add_argument)
    parser.set_defaults(clustered=True)


def add_machines(add: Any) -> None:
    """Options of clusters of several machines."""
    add(
        "--interface",
        metavar="NAME",
        help="network interface to other machines (default: the one that reaches them)",
    )


def take_part(args: argparse.Namespace) -> int | None:
    """Where this process is a rank of a cluster and not its driver: be that rank, and return the exit code."""
    if not getattr(args, "clustered", False):
        return None
    place = Place.of(os.environ)
    if place is None or place.rank == 0:
        return None
    check_shape(args, place.ranks // place.cards, place.cards)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver hears it too, and ends all
    local = {"folder": os.path.abspath(args.model)} if getattr(args, "model", None) else {}
    work(place, args.timeout or TIMEOUT, args.interface, local)
    return 0


def launcher_of(args: argparse.Namespace, preload: Sequence[str]) -> Launcher | None:
    """What starts the ranks, where it is not this process's own choice. InputError where the options say otherwise."""
    found: Launcher | None = Emulated.of(os.environ, preload)
    if found is None and (place := Place.of(os.environ)) is not None:
        found = Torchrun(place, preload, args.interface)
    if found is not None:
        check_shape(args, found.nodes, found.cards)
    return found


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


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
