"""The command line: parse, run a command, turn an InputError into one line and exit code 2."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "generate": "generate texts after prompts",
    "chat": "talk with a model in the terminal",
    "serve": "serve the OpenAI API",
    "demo": "let the demo model write in each of its domains",
    "bench": "measure speed, memory, traffic and balance",
    "convert": "write a checkpoint anew in another precision",
    "memory": "static memory of a rank by kind, for one layout or several",
    "plan": "predict memory, throughput and latency of deployments",
    "balance": "place experts on cards by recorded loads",
    "emulate": "run a command on a cluster of machines emulated on this one",
    "doctor": "show devices, kernels, compiler and network",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0, 2 for bad input, 1 where a rank failed, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("expertmesh.native").setLevel(logging.INFO)
    parser = argparse.ArgumentParser(
        prog="expertmesh", description="Inference for DeepSeek-V3-class mixture-of-experts models."
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        command = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if arguments[:1] == [name]:  # importing a command imports torch: only the one that runs
            if name != "emulate":  # which passes its environment on to any program
                # Read at that import. What torch logs of its sockets, with stack traces, our errors say in a line.
                os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
            module = importlib.import_module(f"expertmesh.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run, commands=tuple(COMMANDS), arguments=arguments)
    args = parser.parse_args(arguments)
    from expertmesh.errors import InputError, RankFailure

    try:
        if getattr(args, "clustered", False):
            code: int = importlib.import_module("expertmesh.commands.cluster").run(args)
        else:
            code = args.run(args)
        sys.stdout.flush()
        return code
    except InputError as error:
        _say(error)
        return 2
    except RankFailure as error:
        _say(error)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _say(error: Exception) -> None:
    """In one piece, also where nothing is buffered: ranks speak at the same time."""
    print(f"expertmesh: {error}\n", end="", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
