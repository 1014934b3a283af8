"""Options that several commands share, in the names of the library."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from expertmesh.config.precision import PRECISIONS
from expertmesh.errors import InputError
from expertmesh.request import SamplingParams

# Beginnings in each domain of the demo model.
PROMPTS = {
    "a tale": "Once upon a time there was a poor woodcutter who",
    "Tang poetry": "春望\n杜甫\n",
    "Song poetry": "浣溪沙\n晏殊\n",
    "Python": "class Stack:\n    def __init__(self):\n",
}
JOIN = "--join"
ENGINE_OPTIONS = (
    ("device", str, "what computes: cpu, cuda, npu, or auto (default): a card where there is one"),
    ("max_context", int, "longest request in tokens, prompt and output together"),
    ("max_batch_tokens", int, "token rows of one step"),
    ("max_batch_requests", int, "requests that run at the same time"),
    ("chunk", int, "most prompt tokens of one request in one step"),
    ("page_size", int, "tokens in a page of the latent cache (default: what the kernels are fastest with)"),
    ("cache_tokens", int, "tokens that the latent cache holds"),
    (
        "memory_per_rank",
        str,
        "of weights and cache, such as 64GB or 512MiB: the cache takes what weights leave",
    ),
)
SAMPLING_OPTIONS = (
    ("max_tokens", int, "most tokens to generate"),
    ("temperature", float, "0 takes the most likely token"),
    ("top_p", float, "smallest set of tokens with this probability"),
    ("top_k", int, "this many most likely tokens; 0 for all"),
    ("min_p", float, "drop tokens less likely than this times the most likely"),
    (
        "seed",
        int,
        "makes the output repeatable, bit for bit where nothing goes by time: with --overlap off or on, and where "
        "experts have replicas with --split now, last or even and --rebalance off",
    ),
    ("logprobs", int, "report this many most likely tokens at each position (with --json)"),
    ("presence_penalty", float, "against tokens that are in the output"),
    ("frequency_penalty", float, "against tokens, by their count in the output"),
    ("repetition_penalty", float, "against tokens of prompt and output; 1 for none"),
    ("min_tokens", int, "so many come before the end-of-text token may"),
)


def add_precision(add: Callable[..., Any]) -> None:
    add("--dtype", default="auto", help="auto (the checkpoint's), float32 or bfloat16")
    add(
        "--quantise", default="auto",
        help=f"weights: auto (as the checkpoint has them where kernels keep that, else none), {', '.join(PRECISIONS)}",
    )  # fmt: skip


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (defaults: the checkpoint's generation_config.json)")
    add_options(group.add_argument, SAMPLING_OPTIONS)
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends the output; repeatable")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")
    group.add_argument("--bad-words", action="append", metavar="TEXT", help="never in the output; repeatable")
    forms = parser.add_argument_group("what the output has to be; one of").add_mutually_exclusive_group()
    forms.add_argument("--json-schema", metavar="FILE|TEXT", help="JSON that a schema allows")
    forms.add_argument("--regex", metavar="PATTERN", help="a text that all of a regular expression matches")
    forms.add_argument("--choice", action="append", metavar="TEXT", help="one of these texts; repeatable")
    forms.add_argument("--grammar", metavar="FILE|JSON", help="any other kind: see docs/constraints.md")


def add_options(add: Callable[..., Any], options: Sequence[tuple[str, type, str]]) -> None:
    for name, kind, text in options:
        add("--" + name.replace("_", "-"), type=kind, metavar=kind.__name__.upper(), help=text)


def given(args: argparse.Namespace, options: Sequence[tuple[str, type, str]]) -> dict[str, Any]:
    """Those of the options that were given."""
    return {name: getattr(args, name) for name, _, _ in options if getattr(args, name) is not None}


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given. InputError where one is wrong, before a model is loaded."""
    params = given(args, SAMPLING_OPTIONS)
    params |= {"stop": tuple(args.stop or ()), "ignore_eos": args.ignore_eos}
    params |= {"bad_words": tuple(args.bad_words or ()), "grammar": _grammar(args)}
    SamplingParams(**params)
    return params


def _grammar(args: argparse.Namespace) -> str | None:
    """What the output has to be, in the form of `SamplingParams.grammar`."""
    if args.json_schema is not None:
        text = _file_or_text("--json-schema", args.json_schema)
        try:
            return json.dumps({"type": "json_schema", "schema": json.loads(text)})
        except (ValueError, RecursionError) as error:
            raise InputError(f"--json-schema {args.json_schema}: not valid JSON: {error}") from None
    if args.regex is not None:
        return json.dumps({"type": "regex", "pattern": args.regex})
    if args.choice is not None:
        return json.dumps({"type": "choice", "choices": args.choice})
    return None if args.grammar is None else _file_or_text("--grammar", args.grammar)


def _file_or_text(option: str, given: str) -> str:
    """What is in a file, or JSON text as it is: that begins with a brace, or is true or false."""
    if given.lstrip().startswith("{") or given in ("true", "false"):
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{option} {given}: neither JSON text nor a file ({error.strerror})") from None
    except ValueError:
        raise InputError(f"{option} {given}: the file is not a text in UTF-8") from None


def without_join(words: Sequence[str]) -> list[str]:
    """Words of a command without --join and its value, which may be one word or two. argparse takes beginnings of
    options too."""
    rest: list[str] = []
    value = False
    for word in words:
        name, equals, _ = word.partition("=")
        if value:
            value = False
        elif JOIN.startswith(name) and len(name) > len("--"):
            value = not equals
        else:
            rest.append(word)
    return rest
