"""`expertmesh convert`: a checkpoint written anew in another precision."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from expertmesh.config.engine import parse_size
from expertmesh.convert.formats import TARGETS, format_of
from expertmesh.convert.run import MEMORY, SHARD_SIZE, convert, prepare
from expertmesh.convert.verify import Difference, verify
from expertmesh.llm import demo_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        f"Takes {MEMORY >> 20} MiB of memory at most, whatever the model. Interrupted in whatever way, the same line "
        "goes on where it was. docs/precisions.md has the layouts."
    )
    parser.add_argument("model", nargs="?", help="folder in the Hugging Face layout; default: the demo model")
    parser.add_argument("--to", required=True, metavar="PRECISION", help=", ".join(TARGETS))
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new one, or one to go on in")
    parser.add_argument(
        "--shard-size", default=str(SHARD_SIZE), metavar="SIZE", help="of a file at most (default: 4GB)"
    )
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True,
        help="read all again: checksums, and every number against the source (default: yes)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")


def run(args: argparse.Namespace) -> int:
    folder = Path(args.model) if args.model else demo_model()
    start = time.perf_counter()
    c = prepare(folder, args.to, Path(args.out), parse_size("--shard-size", args.shard_size))
    with _bar("converting", "B") as tell:
        convert(c, tell)
    found = None
    if args.verify:
        with _bar("verifying", "") as tell:
            found = verify(c, tell)
    report = {
        "model": folder.resolve().name,
        "from": format_of(c.checkpoint.config),
        "to": c.target.name,
        "out": str(c.out),
        "source_bytes": c.checkpoint.bytes,
        "bytes": sum(shard.nbytes for shard in c.shards),
        "shards": len(c.shards),
        "seconds": time.perf_counter() - start,
        "errors": None
        if found is None
        else {kind: asdict(d) | {"mean": d.mean} for kind, d in found.items()},
    }
    print(json.dumps(report) if args.json else _text(report, found))
    return 0


@contextmanager
def _bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal: what is called says how much is done, and of how much."""
    with tqdm(unit=unit, unit_scale=True, desc=what, leave=False, disable=None) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tell


def _text(report: dict[str, Any], found: dict[str, Difference] | None) -> str:
    lines = [
        f"{report['model']}, {report['from']} -> {report['to']}: {report['source_bytes'] / 1e9:.3f} GB -> "
        f"{report['bytes'] / 1e9:.3f} GB in {report['shards']} files in {report['out']}, {report['seconds']:.1f} s"
    ]
    if found is None:
        return "\n".join([*lines, "not verified"])
    lines += [
        "verified: checksums, and every number within what its format rounds. Relative errors:",
        f"{'':12}{'tensors':>9}{'mean':>12}{'worst':>12}{'of bound':>10}",
    ]
    for kind, d in found.items():
        lines.append(f"{kind:12}{d.tensors:9}{d.mean:12.2e}{d.worst:12.2e}{d.bound:10.2f}")
    return "\n".join(lines)
