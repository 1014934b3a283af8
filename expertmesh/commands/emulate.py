"""`expertmesh emulate`: a cluster of machines on one machine, and a command on it."""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict

from expertmesh.commands.options import without_join
from expertmesh.emulation.cluster import LARGEST, Node, require
from expertmesh.emulation.front import Emulation, EmulationFailed, Event, Program
from expertmesh.emulation.links import parse_delay, parse_rate
from expertmesh.errors import InputError

USES = """
Machines are network namespaces with an interface of their own, eth0; they reach each other and nothing else. It
takes root and iproute2. When the command ends, or this one in whatever way, all that was made is gone.

These are started once, on node 0, and their ranks are on all nodes: {spread}:
  expertmesh emulate --nodes 8 --cards 8 --link 50mbit -- generate -p "Once upon a time" --max-tokens 20
Alone on node 0, without ranks to kill, is doctor. Other commands of expertmesh are refused: they know one machine only.
Any other program, and a command of expertmesh with --join, is started on each node, with the environment that
torchrun needs, or programs that torchrun would start, one on each node:
  expertmesh emulate --nodes 2 --cards 2 -- torchrun script.py
"""
# The commands with `commands.cluster.add_machines`, which are imported only to run: that takes its time.
SPREAD = ("generate", "chat", "serve", "demo", "bench exchange", "bench overlap")
ELSEWHERE = (
    "bench engine", "bench kernels", "bench precision", "bench transport", "bench balance", "bench rebalance",
    "bench scale", "bench machine", "bench planner", "bench serve", "balance", "convert", "memory", "plan",
    "plan predict", "plan replay-news", "plan simulate", "emulate",
)  # fmt: skip
RENDEZVOUS, MASTER = (
    29400,
    29500,
)  # ports on node 0: where torchruns meet, and what they start or others like them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = USES.format(spread=", ".join(SPREAD))
    parser.add_argument("--nodes", type=int, required=True, metavar="INT", help="machines of the cluster")
    parser.add_argument("--cards", type=int, default=1, metavar="INT", help="cards of each (default: 1)")
    parser.add_argument(
        "--link", metavar="RATE", help="of each machine, in each direction: 50mbit (default: no limit)"
    )
    parser.add_argument(
        "--delay", metavar="TIME",
        help="from one machine to another: 0.2ms (default: none). Where the kernel has no netem, a process forwards "
        "and holds the packets: it takes up to one processor, for 5 Gbit/s in all, and is 0.05 ms late",
    )  # fmt: skip
    parser.add_argument(
        "--cut", action="append", default=[], metavar="NODE@SECONDS",
        help="cut a node off, so many seconds after the start: connections hang; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--kill", action="append", default=[], metavar="RANK@SECONDS",
        help="kill a rank, or a node's program where there is one on each; repeatable",
    )  # fmt: skip
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the command")


def run(args: argparse.Namespace) -> int:
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    own = _own_command(words, args.commands)
    once = own is not None and without_join(own) == own
    if own is not None:
        _check_command(own, bool(args.kill) and once)
    for name, limit in (("nodes", LARGEST), ("cards", 1024)):
        if not 1 <= getattr(args, name) <= limit:
            raise InputError(f"--{name} is {getattr(args, name)}, but must be from 1 to {limit}")
    rate = parse_rate(args.link) if args.link else 0
    delay = parse_delay(args.delay) if args.delay else 0.0
    cuts = _events("cut", args.cut, "node", args.nodes)
    kills = _events("kill", args.kill, *(("rank", args.nodes * args.cards) if once else ("node", args.nodes)))
    command = _found(words) if own is None else [sys.executable, "-m", "expertmesh", *own]
    require()
    try:
        with Emulation(args.nodes, rate, delay, shared=once) as emulation:
            if once:
                return emulation.run([_alone(command, emulation.nodes, args.cards, rate, kills)], cuts)
            programs = [_one_of_many(command, node, emulation.nodes, args.cards) for node in emulation.nodes]
            return emulation.run(programs, cuts + kills)
    except EmulationFailed as error:
        print(f"expertmesh: {error}; all in it has been ended", file=sys.stderr)
        return 1


def _own_command(words: Sequence[str], names: Sequence[str]) -> list[str] | None:
    """The words of a command of expertmesh, without the program's name; None: it is another program's."""
    if not words:
        raise InputError("no command: give one behind --, such as -- generate -p TEXT")
    if words[0] in names:
        return list(words)
    if os.path.basename(words[0]) == "expertmesh":
        return list(words[1:])
    if re.fullmatch(r"python[\d.]*", os.path.basename(words[0])) and list(words[1:3]) == ["-m", "expertmesh"]:
        return list(words[3:])
    return None


def _check_command(words: Sequence[str], kills: bool) -> None:
    """InputError where a command of expertmesh has no use for machines, or no ranks that could be killed."""
    # Some commands have others of their own, and may go without them.
    name = next(
        (n for n in (" ".join(words[:2]), *words[:1]) if n in (*SPREAD, *ELSEWHERE)), " ".join(words[:1])
    )
    if name in ELSEWHERE:
        raise InputError(
            f"{name} knows one machine only: run it without emulate; on clusters run {', '.join(SPREAD)}"
        )
    if kills and name not in SPREAD:
        raise InputError(f"--kill: {name} has no ranks on nodes; {', '.join(SPREAD)} have")


def _found(words: Sequence[str]) -> list[str]:
    """With the program's path; one that is nowhere else may be beside this Python, as torchrun is."""
    path = shutil.which(words[0]) or shutil.which(words[0], path=os.path.dirname(sys.executable))
    if not path:
        raise InputError(f"{words[0]}: no such program, and no command of expertmesh")
    return [path, *words[1:]]


def _events(what: str, given: Sequence[str], kind: str, limit: int) -> list[Event]:
    events = []
    for text in given:
        found = re.fullmatch(r"(\d{1,9})@(\d{1,9}(?:\.\d+)?)", text)
        if not found:
            raise InputError(f"--{what} {text!r}: not of the form 1@2.5 ({kind} @ seconds after the start)")
        if int(found[1]) >= limit:
            raise InputError(f"--{what} {text!r}: there is no {kind} {found[1]}; the last one is {limit - 1}")
        events.append(Event(what, int(found[1]), float(found[2])))
    return events


def _alone(
    command: list[str], nodes: Sequence[Node], cards: int, rate: int, kills: Sequence[Event]
) -> Program:
    """One program on node 0, which puts its ranks on the nodes, and kills them, itself."""
    cluster = {
        "nodes": [asdict(node) for node in nodes],
        "cards": cards,
        "rate": rate or None,
        "kill": [[event.number, event.seconds] for event in kills],
    }
    return Program(0, command, {"EXPERTMESH_CLUSTER": json.dumps(cluster)})


def _one_of_many(command: list[str], node: Node, nodes: Sequence[Node], cards: int) -> Program:
    """A node's program, in the environment of a process that torchrun has started as the node's only one. It may
    also be torchrun itself: this takes its options from variables that begin with PET."""
    number, count, master = str(node.number), str(len(nodes)), nodes[0].address
    environment = {
        "RANK": number,
        "WORLD_SIZE": count,
        "GROUP_RANK": number,
        "NODE_RANK": number,
        "GROUP_WORLD_SIZE": count,
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": master,
        "MASTER_PORT": str(MASTER),
        "GLOO_SOCKET_IFNAME": node.interface,
        "PET_NNODES": count,
        "PET_NPROC_PER_NODE": str(cards),
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"{master}:{RENDEZVOUS}",
        "PET_RDZV_ID": "expertmesh",
        # By their host names torchruns would not find out which of them is to be the host.
        "PET_RDZV_CONF": f"is_host={int(node.number == 0)}",
        "PET_LOCAL_ADDR": node.address,
    }
    return Program(node.number, command, environment)
