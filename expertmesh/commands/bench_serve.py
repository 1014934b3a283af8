"""`expertmesh bench serve`: a server under load, ours or any that speaks OpenAI's API."""

import argparse
import asyncio
import json
import os
import resource
import shlex
from math import inf
from pathlib import Path
from typing import Any

from expertmesh.bench.client import Client
from expertmesh.bench.interference import compared, interference
from expertmesh.bench.latency import MEASURES, PERCENTILES, Limits
from expertmesh.bench.load import FORMS, Lengths, Load, parse_rate, read_load_trace
from expertmesh.bench.serve import APIS, Form, Session, measure
from expertmesh.bench.started import started
from expertmesh.config import ModelConfig
from expertmesh.errors import InputError
from expertmesh.llm import demo_model

NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "inter-token", "e2e": "end to end"}
CHUNK = 256  # tokens, of `--interference` where --serve does not say
REQUESTS = 100
FILES = 1 << 16


def add_serve(subparsers: Any) -> None:
    parser = subparsers.add_parser("serve", help="latency, throughput and goodput of a server under load")
    add = parser.add_argument
    add(
        "target", nargs="?", metavar="URL|MODEL",
        help="a server, such as http://127.0.0.1:8000; or a folder in the Hugging Face layout, for which one is "
        "started (default: the demo model)",
    )  # fmt: skip
    add("--serve", default="", metavar="OPTIONS", dest="options",
        help='of `expertmesh serve` for a server that is started, such as "--nodes 2 --cards 4"')  # fmt: skip
    _add_load(parser.add_argument_group("load").add_argument)
    _add_form(parser.add_argument_group("requests").add_argument)
    limits = parser.add_argument_group("goodput: requests within limits, in milliseconds").add_argument
    limits("--ttft", type=float, metavar="MS", help="to the first text")
    limits("--tpot", type=float, metavar="MS", help="for each further token, the mean of an answer")
    limits("--e2e", type=float, metavar="MS", help="for the whole answer")
    other = parser.add_mutually_exclusive_group().add_argument
    other("--offline", action="store_true", help="also the same requests in the engine without a server")
    other("--interference", type=int, metavar="TOKENS",
          help="instead of a load: how long short prompts (--input) wait beside one of so many tokens, with and "
          "without chunks")  # fmt: skip
    add("--rounds", type=int, default=9, help="of --interference (default: 9)")
    add("--json", action="store_true", help="print JSON, and nothing else")
    parser.set_defaults(measure=bench_serve, table=_table)


def _add_load(add: Any) -> None:
    add("--rate", default="inf", metavar="PER_S",
        help="requests a second, such as 2/s, or inf for all at once (default)")  # fmt: skip
    add("--burstiness", type=float, default=1.0, metavar="SHAPE",
        help="of the gaps: 1 by chance (Poisson, default), less in bursts, more regular")  # fmt: skip
    add("--concurrency", type=int, metavar="N",
        help="at most so many at the same time; without --rate always so many")  # fmt: skip
    add("--requests", type=int, metavar="N",
        help=f"default: {REQUESTS}, or all of a trace, or as many as --duration takes")  # fmt: skip
    add("--duration", type=float, metavar="S",
        help="send for so long; answers that are on their way are waited for")  # fmt: skip
    add("--input", default="512", metavar="TOKENS", help=f"of a prompt: {FORMS} (default: 512)")
    add("--output", default="128", metavar="TOKENS", help="of an answer, likewise (default: 128)")
    add("--prefix", type=int, default=0, metavar="N",
        help="more tokens, with which all prompts begin (default: 0)")  # fmt: skip
    add("--trace", type=Path, metavar="JSONL",
        help='times and lengths from lines {"time": seconds, "input": tokens, "output": tokens}')  # fmt: skip
    add("--seed", type=int, default=0, help="of times, lengths and prompts (default: 0)")


def _add_form(add: Any) -> None:
    add("--api", choices=APIS, default="completions",
        help="completions with prompts of token ids (default), or chat with words that are a token each")  # fmt: skip
    add("--stream", action=argparse.BooleanOptionalAction, default=True, help="answers in pieces (default)")
    add("--eos", action="store_true",
        help="let answers end by themselves, and send no ignore_eos, which is no field of OpenAI's")  # fmt: skip
    add("--name", help="of the model (default: the first that the server lists)")
    add("--key", metavar="KEY", help="of the API (default: OPENAI_API_KEY of the environment)")
    add("--vocabulary", type=int, metavar="N",
        help="token ids are below it (default: the model's; 4096 for a URL)")  # fmt: skip
    add("--fields", type=json.loads, default={}, metavar="JSON", help="more of every request's body")
    add("--timeout", type=float, default=600.0, metavar="S", help="for an answer (default: 600)")
    add("--warmup", type=int, default=1, metavar="N", help="requests that do not count (default: 1)")


def bench_serve(args: argparse.Namespace) -> dict[str, Any]:
    """As the options say. InputError before anything starts where they are wrong."""
    load, served = _load(args), args.target is None or "://" not in args.target
    form = _form(args, served)
    _check(args, load, served)
    _allow_connections()
    if args.interference is not None:
        return _interference(args, form, served)
    if not served:
        return asyncio.run(_measure(args, args.target, form, load))
    words = shlex.split(args.options)
    with started([*_model(args), *words], echo=not args.json) as server:
        report = asyncio.run(_measure(args, server.url, form, load))
    return report | (_offline(args, words, form, load, report) if args.offline else {})


def _load(args: argparse.Namespace) -> Load:
    requests = args.requests
    if requests is None and args.duration is None and args.trace is None:
        requests = REQUESTS
    return Load(
        input=Lengths.parse("--input", args.input),
        output=Lengths.parse("--output", args.output),
        rate=parse_rate(args.rate),
        burstiness=args.burstiness,
        concurrency=args.concurrency,
        requests=requests,
        duration=args.duration,
        prefix=args.prefix,
        seed=args.seed,
        trace=read_load_trace(args.trace),
    )


def _form(args: argparse.Namespace, served: bool) -> Form:
    vocabulary = args.vocabulary
    if vocabulary is None:
        vocabulary = _config(args).vocab_size if served else 4096
    if vocabulary < 4:
        raise InputError(f"--vocabulary {vocabulary}: it must be at least 4")
    if not isinstance(args.fields, dict):
        raise InputError('--fields is no JSON object; give one like {"top_p": 0.9}')
    return Form(args.name, args.api, args.stream, args.eos, vocabulary, args.warmup, args.fields)


def _check(args: argparse.Namespace, load: Load, served: bool) -> None:
    if args.options and not served:
        raise InputError("--serve is of a server that is started here; with a URL it has no meaning")
    for name in ("rounds", "timeout"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name} {getattr(args, name)}: it must be above 0")
    for name in ("ttft", "tpot", "e2e"):
        if (limit := getattr(args, name)) is not None and not limit > 0:
            raise InputError(f"--{name} {limit:g}: it must be above 0 milliseconds")
    if args.warmup < 0:
        raise InputError(f"--warmup {args.warmup}: it must be at least 0")
    if args.offline and (not served or load.rate < inf or load.requests is None or load.trace or args.eos):
        raise InputError("--offline compares a MODEL with --requests and without --rate, --trace and --eos")
    if args.offline and args.api == "chat":
        raise InputError("--offline compares prompts of token ids; leave out --api chat")
    if args.interference is not None and not (args.interference > 1 and args.input.isdecimal()):
        raise InputError("--interference takes a number of tokens, and --input is one for the short prompts")


def _allow_connections() -> None:
    """Each request on its way is an open file: raise the limit of this process as far as it may."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if most == resource.RLIM_INFINITY else min(FILES, most)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig.from_folder(Path(args.target or demo_model()))


def _model(args: argparse.Namespace) -> list[str]:
    return [] if args.target is None else [args.target]


def _client(args: argparse.Namespace, url: str) -> Client:
    return Client(url, args.key or os.environ.get("OPENAI_API_KEY"), args.timeout)


async def _measure(args: argparse.Namespace, url: str, form: Form, load: Load) -> dict[str, Any]:
    async with _client(args, url) as client:
        return await measure(client, form, load, Limits(args.ttft, args.tpot, args.e2e), not args.json)


def _offline(
    args: argparse.Namespace, words: list[str], form: Form, load: Load, report: dict[str, Any]
) -> dict[str, Any]:
    """The engine as the server had it, which has ended, with as many requests at a time."""
    from expertmesh.bench.offline import offline
    from expertmesh.commands import serve
    from expertmesh.commands.cluster import given_topology
    from expertmesh.commands.loading import load_llm

    parser = argparse.ArgumentParser(prog="expertmesh serve")
    serve.add_arguments(parser)
    options = parser.parse_args([*_model(args), *words])
    if load.concurrency is not None:
        # Of each TP group: a cluster runs as many times more.
        topology = given_topology(options).resolve(_config(args))
        each = -(-load.concurrency // topology.groups)
        options.max_batch_requests = min(each, options.max_batch_requests or each)
    with load_llm(options, progress=False) as llm:
        found = offline(llm, load, form.vocabulary)
    return {"offline": found | {
        "ratio": report["output_tokens_per_second"] / found["output_tokens_per_second"]
    }}  # fmt: skip


def _interference(args: argparse.Namespace, form: Form, served: bool) -> dict[str, Any]:
    """Of a server as it is; of a model, with chunks and without."""
    long, short = args.interference, int(args.input)

    async def probe(url: str) -> dict[str, float]:
        async with _client(args, url) as client:
            session = await Session.begin(client, form, seed=args.seed)
            return await interference(session, long, short, args.rounds)

    head = {"long": long, "short": short, "rounds": args.rounds}
    if not served:
        return head | {"as it is": asyncio.run(probe(args.target))}
    words = shlex.split(args.options)
    whole = ["--chunk", f"{long}", "--max-batch-tokens", f"{2 * long + 64}"]
    chunked = [] if "--chunk" in words else ["--chunk", f"{CHUNK}"]
    found = {}
    for name, more in (("whole", [*words, *whole]), ("chunked", [*chunked, *words])):
        with started([*_model(args), *more], echo=not args.json) as server:
            found[name] = asyncio.run(probe(server.url))
    return head | compared(found)


def _table(report: dict[str, Any]) -> str:
    if "rounds" in report:
        return _interference_table(report)
    lines = [
        f"{report['model']} at {report['url']}, {report['api']}: {report['load']}",
        f"{report['completed']} of {report['requests']} requests completed in {report['seconds']:.1f} s; "
        f"{report['input_tokens']} tokens in ({report['cached_tokens']} cached), {report['output_tokens']} out",
        f"{report['requests_per_second']:.2f} requests/s, {report['output_tokens_per_second']:.1f} output tokens/s, "
        f"{report['tokens_per_second']:.1f} tokens/s in all",
        f"{'ms':14}" + "".join(f"{name:>10}" for name in ("mean", *(f"p{p}" for p in PERCENTILES), "max")),
    ]
    for name in MEASURES:
        if found := report["latency_ms"][name]:
            lines.append(f"{NAMES[name]:14}" + "".join(f"{value:10.1f}" for value in found.values()))
    if good := report.get("goodput"):
        said = ", ".join(f"{NAMES[n]} {good[n]:g} ms" for n in ("ttft", "tpot", "e2e") if good[n] is not None)
        lines.append(
            f"within {said}: {good['requests_per_second']:.2f} requests/s, {good['share']:.1%} of all"
        )
    if offline := report.get("offline"):
        lines.append(
            f"engine without a server: {offline['output_tokens_per_second']:.1f} output tokens/s; "
            f"the server gives {offline['ratio']:.3f} of it"
        )
    for kind, found in report["errors"].items():
        lines.append(f"failed, {kind}: {found['requests']} requests; the first: {found['first']}")
    if report["other_lengths"]:
        lines.append(
            f"{report['other_lengths']} requests had other lengths than asked for, as the server counts"
        )
    return "\n".join([*lines, _client_line(report["client"])])


def _client_line(client: dict[str, Any]) -> str:
    late, event = client["late_ms"], client["us_per_event"]
    said = f"this client took {client['cores']:.2f} of a core"
    said += "" if event is None else f", {event:.0f} us for each event"
    return said + ("" if late is None else f", and sent {late['p50']:.1f} ms late (p99 {late['p99']:.1f})")


def _interference_table(report: dict[str, Any]) -> str:
    ways = [name for name in ("whole", "chunked", "as it is") if name in report]
    rows = {
        "long_alone_ms": f"prompt of {report['long']}, alone",
        "long_beside_ms": "the same beside a short one",
        "short_alone_ms": f"prompt of {report['short']}, alone",
        "short_beside_ms": "the same beside the long one",
        "short_beside_worst_ms": "the slowest of these",
        "pause_ms": "longest pause of an answer meanwhile",
    }
    lines = [f"{'ms to the first token, medians':40}" + "".join(f"{way:>12}" for way in ways)]
    for name, label in rows.items():
        lines.append(f"{label:40}" + "".join(f"{report[way][name]:12.1f}" for way in ways))
    if times := report.get("times_shorter"):
        lines.append(
            "shorter with chunks: " + ", ".join(f"{rows[n]} {v:.2f} times" for n, v in times.items())
        )
    return "\n".join(lines)
