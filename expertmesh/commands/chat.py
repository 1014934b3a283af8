"""`expertmesh chat`: a conversation in the terminal."""

import argparse
import sys
from typing import Any

from expertmesh.commands.arguments import add_model
from expertmesh.commands.loading import load_llm
from expertmesh.commands.options import add_sampling, given_sampling
from expertmesh.errors import InputError
from expertmesh.llm import LLM
from expertmesh.request import SamplingParams

HELP = "/clear begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"
THINK_END = "</think>"
DIM, PLAIN = "\033[2m", "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message at the beginning")
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    sampling = given_sampling(args)
    with load_llm(args) as llm:
        return _talk(llm, args, sampling)


def _talk(llm: LLM, args: argparse.Namespace, sampling: dict[str, Any]) -> int:
    if llm.engine.intake.tokenizer is None or not llm.engine.intake.tokenizer.has_chat_template:
        raise InputError(f"{llm.folder}: has no chat template; use `expertmesh generate`")
    # An answer may be as long as the context allows.
    params = llm.default_params(**{"max_tokens": llm.engine.config.max_context, **sampling})
    beginning = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(beginning)
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        if line == "/exit":
            return 0
        if line == "/clear":
            messages = list(beginning)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": _answer(llm, messages, params)})
            except InputError as error:
                messages.pop()
                print(f"{error}; /clear begins anew", file=sys.stderr)


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Stream an answer; what the model thinks before it is shown dim and is not part of the conversation."""
    assert llm.engine.intake.tokenizer is not None
    color = sys.stdout.isatty()
    text = ""
    thinking = llm.engine.intake.tokenizer.render(messages).rstrip().endswith("<think>")
    print(DIM if color and thinking else "", end="")
    try:
        for output in llm.stream([messages], params):
            text = output.text
            print(output.delta, end="", flush=True)
            if thinking and THINK_END in text:
                thinking = False
                print(PLAIN if color else "", end="")
    except KeyboardInterrupt:
        pass
    print(PLAIN if color else "")
    return text.rpartition(THINK_END)[2].strip()
