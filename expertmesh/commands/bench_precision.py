"""`expertmesh bench precision`: what every way to keep weights takes, and what it costs."""

import argparse
from pathlib import Path
from typing import Any

from expertmesh.bench.perplexity import Text, cut, perplexity, written
from expertmesh.commands.options import PROMPTS
from expertmesh.config.precision import PRECISIONS
from expertmesh.errors import InputError
from expertmesh.llm import LLM

TIMES = 8  # texts that the model writes from each beginning


def add_precision_bench(subparsers: Any) -> None:
    parser = subparsers.add_parser("precision", help="memory and perplexity of every way to keep weights")
    parser.add_argument("model", nargs="?", help="folder in the Hugging Face layout; default: the demo model")
    parser.add_argument(
        "--quantise", default=",".join(PRECISIONS), metavar="A,B", help="which (default: %(default)s)"
    )
    parser.add_argument(
        "--converted", type=Path, action="append", default=[], metavar="FOLDER",
        help="the same model as `expertmesh convert` has written it, judged on the same texts; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--text", type=Path, action="append", metavar="FILE",
        help="to judge, in UTF-8; repeatable (default: what the model itself writes in each domain of the demo model)",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=12_288, help="of each text (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    parser.set_defaults(measure=bench_precision, table=_table)


def bench_precision(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes of the weights of one rank, and perplexity by text. "float32" is the yardstick: nothing is rounded but what
    the checkpoint has rounded."""
    model = Path(args.model) if args.model else None
    names = args.quantise.split(",")
    for name in names:
        if name and name not in PRECISIONS:
            raise InputError(f"--quantise {name!r} is not one of {', '.join(PRECISIONS)}")
    if args.tokens < 2:
        raise InputError("--tokens must be at least 2")
    texts = _texts(model, args)
    report: dict[str, Any] = {}
    ways: dict[str, tuple[Path | None, dict[str, Any]]] = {"float32": (model, {"dtype": "float32"})}
    ways |= {name: (model, {"dtype": "bfloat16", "quantise": name}) for name in names if name}
    ways |= {str(folder): (folder, {}) for folder in args.converted}
    for name, (folder, given) in ways.items():
        try:
            llm = LLM(folder, **given)
        except InputError as error:
            report[name] = {"refused": str(error)}
            continue
        with llm:
            found = {text: perplexity(llm, rows) for text, rows in texts.items()}
            report[name] = {"weight_bytes": llm.engine.ranks.memory.weights, "perplexity": found}
    return report


def _texts(model: Path | None, args: argparse.Namespace) -> dict[str, list[Text]]:
    if not args.text:
        return {domain: written(model, [prompt], TIMES) for domain, prompt in PROMPTS.items()}
    with LLM(model) as llm:
        return {file.name: _read(llm, file, args.tokens) for file in args.text}


def _read(llm: LLM, file: Path, tokens: int) -> list[Text]:
    try:
        rows = cut(llm, file.read_text(encoding="utf-8"), tokens)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as a text in UTF-8 ({error})") from None
    if not rows:
        raise InputError(f"{file}: has too few tokens to judge, or the model has no tokenizer")
    return rows


def _table(report: dict[str, Any]) -> str:
    texts = next((list(found["perplexity"]) for found in report.values() if "perplexity" in found), [])
    width = max(14, *(len(text) + 2 for text in texts))
    first = max(14, *(len(name) + 2 for name in report))
    lines = [f"{'':{first}}{'weights, MB':>14}" + "".join(f"{text:>{width}}" for text in texts)]
    for name, found in report.items():
        if "refused" in found:
            lines.append(f"{name:{first}}{found['refused']}")
            continue
        values = "".join(f"{found['perplexity'][text]:{width}.3f}" for text in texts)
        lines.append(f"{name:{first}}{found['weight_bytes'] / 1e6:14.1f}{values}")
    return "\n".join(lines)
