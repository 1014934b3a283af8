"""Options of every command that loads a model. No torch: a command may have something to do before it."""

import argparse

from expertmesh.commands.cluster import add_cluster
from expertmesh.commands.options import ENGINE_OPTIONS, add_options, add_precision


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        help="folder in the Hugging Face layout; without it, the demo model that ships with this",
    )
    add_precision(parser.add_argument)
    group = parser.add_argument_group("engine (worked out where not given)")
    add_options(group.add_argument, ENGINE_OPTIONS)
    group.add_argument("--no-prefix-cache", action="store_true", help="compute equal beginnings anew")
    group.add_argument("--strict", action="store_true", help="refuse to run an op on its reference")
    add_cluster(parser)
