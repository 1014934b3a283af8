"""`expertmesh demo`: the demo model writes in each of its domains, and what ran is told."""

import argparse
import sys
import time
from dataclasses import dataclass

import psutil
import torch

from expertmesh.commands.arguments import add_model
from expertmesh.commands.loading import describe_layout, load_llm
from expertmesh.commands.options import PROMPTS
from expertmesh.errors import InputError
from expertmesh.llm import LLM
from expertmesh.request import SamplingParams

CHAT = "Please tell me a short fairy tale."
BARS = " ▁▂▃▄▅▆▇█"


@dataclass
class Part:
    """What one domain's text took: tokens, seconds, and rows per expert of each layer that has any."""

    tokens: int
    seconds: float
    loads: list[torch.Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--max-tokens", type=int, default=96, metavar="INT", help="of each text (default: 96)"
    )
    parser.add_argument("--seed", type=int, default=7, metavar="INT")


def run(args: argparse.Namespace) -> int:
    SamplingParams(
        max_tokens=args.max_tokens, seed=args.seed
    )  # wrong values are refused before anything is loaded
    start = time.perf_counter()
    with load_llm(args) as llm:
        _show(llm, time.perf_counter() - start, args)
    return 0


def _show(llm: LLM, loaded: float, args: argparse.Namespace) -> None:
    if llm.engine.intake.tokenizer is None:
        raise InputError(f"{llm.folder}: has no tokenizer.json, so it cannot write")
    parts = {name: _write(llm, name, prompt, args) for name, prompt in PROMPTS.items()}
    if llm.engine.intake.tokenizer.has_chat_template:
        parts["chat"] = _write(llm, "chat", CHAT, args)
    _report(llm, loaded, parts)


def _write(llm: LLM, name: str, prompt: str, args: argparse.Namespace) -> Part:
    print(f"--- {name}\n{prompt}", end="\n" if name == "chat" else "", flush=True)
    message = [{"role": "user", "content": prompt}] if name == "chat" else prompt
    params = llm.default_params(max_tokens=args.max_tokens, seed=args.seed)
    llm.engine.ranks.reset()
    start, tokens = time.perf_counter(), 0
    for output in llm.stream([message], params):
        print(output.delta, end="", flush=True)
        tokens = len(output.token_ids)
    print("\n")
    seconds = time.perf_counter() - start
    return Part(tokens, seconds, list(llm.engine.ranks.loads().values()))


def _report(llm: LLM, loaded: float, parts: dict[str, Part]) -> None:
    engine, config = llm.engine, llm.engine.model
    memory = engine.ranks.memory
    tokens, seconds = sum(p.tokens for p in parts.values()), sum(p.seconds for p in parts.values())
    rss = psutil.Process().memory_info().rss
    out = sys.stdout
    print("--- what ran", file=out)
    print(
        f"model    {llm.name}: {config.num_hidden_layers} layers, {config.n_routed_experts} routed experts,",
        end=" ",
    )
    print(f"{config.num_experts_per_tok} a token in {config.topk_group} of {config.n_group} groups")
    print(f"layout   {describe_layout(llm)}")
    print(
        f"speed    loaded in {loaded:.2f} s; {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s"
    )
    print(
        f"memory   weights {memory.weights / 1e6:.1f} MB, cache {memory.cache / 1e6:.1f} MB "
        f"({engine.config.cache_tokens} tokens), process {rss / 1e6:.0f} MB"
    )
    if config.moe_layers:
        print("experts  rows per expert, summed over layers; max/mean of a layer, averaged over layers")
    for name, part in parts.items():
        if part.loads:
            load_LE = torch.stack(part.loads)
            skew = (load_LE.amax(1) / load_LE.float().mean(1)).mean()
            print(f"  {name:12} {_sparkline(load_LE.sum(0))} {skew:.2f}")


def _sparkline(values: torch.Tensor) -> str:
    top = max(int(values.max()), 1)
    return "".join(BARS[-(-int(v) * (len(BARS) - 1) // top)] for v in values)
