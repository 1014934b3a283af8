"""`expertmesh generate`: texts after prompts."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from expertmesh.balancer.formats import loads_document
from expertmesh.commands.arguments import add_model
from expertmesh.commands.loading import (
    describe_balance,
    describe_steps,
    describe_traffic,
    load_llm,
)
from expertmesh.commands.options import add_sampling, given_sampling
from expertmesh.engine.intake import Prompt
from expertmesh.errors import InputError
from expertmesh.llm import LLM
from expertmesh.mesh.loads import Loads
from expertmesh.request import Output, SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "-p", "--prompt", action="append", metavar="TEXT", help="repeatable; - reads standard input"
    )
    parser.add_argument(
        "--token-ids",
        action="append",
        metavar="1,2,3",
        help="a prompt as token ids; repeatable, no tokenizer needed",
    )
    parser.add_argument("--chat", action="store_true", help="send each prompt as a user's message")
    parser.add_argument(
        "--json", action="store_true", help="print a list of outputs as JSON, and nothing else"
    )
    parser.add_argument(
        "--loads", metavar="FILE", help="write how many rows each expert got, for `expertmesh balance`"
    )
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    prompts, sampling = _prompts(args), given_sampling(args)
    if args.loads and not Path(args.loads).absolute().parent.is_dir():
        raise InputError(f"--loads {args.loads}: there is no folder {Path(args.loads).parent} to write it to")
    with load_llm(args) as llm:
        _generate(llm, args, prompts, llm.default_params(**sampling))
    return 0


def _generate(llm: LLM, args: argparse.Namespace, prompts: list[Prompt], params: SamplingParams) -> None:
    start = time.perf_counter()
    if args.json:
        outputs = llm.generate(prompts, params)
        shown = [
            _as_json(given, output) for given, output in zip(_shown(args, prompts), outputs, strict=True)
        ]
        print(json.dumps(shown, ensure_ascii=False))
    else:
        outputs = _print_as_it_comes(llm, prompts, params)
    seconds = time.perf_counter() - start
    tokens = sum(len(o.token_ids) for o in outputs)
    print(f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.0f} tokens/s)", file=sys.stderr)
    if llm.engine.layout.topology.ranks > 1:
        print(f"{describe_traffic(llm)}\n{describe_steps(llm)}", file=sys.stderr)
        if llm.engine.balancer is not None:
            print(describe_balance(llm.engine.balancer), file=sys.stderr)
    if args.loads:
        _write_loads(llm, Path(args.loads))


def _write_loads(llm: LLM, path: Path) -> None:
    model, counts = llm.engine.model, llm.engine.ranks.loads()
    if not counts:
        raise InputError(f"--loads {path}: no row was routed to an expert; nothing is written")
    counts_LE = torch.zeros(model.num_hidden_layers, model.n_routed_experts, dtype=torch.int64)
    for layer, rows in counts.items():
        counts_LE[layer] = rows
    loads = Loads.of(counts_LE.numpy(), groups=model.n_group if model.n_group > 1 else None)
    try:
        path.write_text(json.dumps(loads_document(loads)))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def _prompts(args: argparse.Namespace) -> list[Prompt]:
    prompts: list[Prompt] = []
    for text in args.prompt or ():
        given = _standard_input() if text == "-" else text
        prompts.append([{"role": "user", "content": given}] if args.chat else given)
    for ids in args.token_ids or ():
        try:
            prompts.append([int(i) for i in ids.split(",")])
        except ValueError:
            raise InputError(f"--token-ids {ids!r}: not a list of numbers like 1,2,3") from None
    if not prompts:
        raise InputError("no prompt: give -p TEXT (repeatable, - for standard input) or --token-ids 1,2,3")
    return prompts


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not a text in {error.encoding}: {error.reason}") from None


def _shown(args: argparse.Namespace, prompts: list[Prompt]) -> list[Any]:
    return [p[0]["content"] if args.chat and isinstance(p[0], dict) else p for p in prompts]


def _as_json(prompt: Any, output: Output) -> dict[str, Any]:
    item = {
        "prompt": prompt,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
    }
    if output.logprobs is not None:
        item["logprobs"] = output.logprobs
    return item


def _print_as_it_comes(llm: LLM, prompts: list[Prompt], params: SamplingParams) -> list[Output]:
    """One prompt streams; several are printed whole, in their order, as each is complete."""
    if len(prompts) > 1:
        outputs = llm.generate(prompts, params)
        for number, output in enumerate(outputs):
            print(f"[{number}] {output.text if output.text else output.token_ids}")
        return outputs
    last: list[Output] = []
    for output in llm.stream(prompts, params):
        last = [output]
        if llm.engine.intake.tokenizer is None:
            print(output.token_ids[-1] if output.token_ids else "", end=" ", flush=True)
        else:
            print(output.delta, end="", flush=True)
    print()
    return last
