"""`expertmesh serve`: the OpenAI API over HTTP."""

import argparse

from expertmesh.commands.loading import add_model, load_llm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    parser.add_argument(
        "--name", action="append",
        help="the model's name in the API (default: its folder's); repeatable, for further names",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from expertmesh.server.run import check_port, serve

    check_port(args.host, args.port)
    with load_llm(args) as llm:
        name, *aliases = args.name or [llm.name]
        serve(llm, name, args.host, args.port, aliases)
    return 0
