"""`python benchmarks/serve/compare.py`: `expertmesh bench serve` and AIPerf with the same load on the same server, in
turns. AIPerf is NVIDIA's load client; it needs an environment of its own (README.md).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertmesh.bench.latency import MEASURES
from expertmesh.bench.started import started
from expertmesh.llm import demo_model

# What AIPerf calls the latencies of `expertmesh bench serve`.
THEIRS = {
    "ttft": "time_to_first_token",
    "tpot": "inter_token_latency",
    "itl": "inter_chunk_latency",
    "e2e": "request_latency",
}
POINTS = {"mean": "avg", "p50": "p50", "p90": "p90", "p99": "p99"}
RATES = {
    "requests_per_second": "request_throughput",
    "output_tokens_per_second": "output_token_throughput",
}


@dataclass(frozen=True)
class Server:
    """url: of its /v1. name: of the model."""

    name: str
    url: str


@contextmanager
def served(args: argparse.Namespace) -> Iterator[Server]:
    """The server that is given, or one of the demo model."""
    if args.url is not None:
        yield Server(args.name, args.url)
        return
    with started([]) as server:
        yield Server(server.name, server.url)


def ours(server: Server, args: argparse.Namespace, number: int) -> dict[str, float]:
    """seed: no prompt is asked twice, or its beginning would be in the server's cache."""
    rate = ["--rate", str(args.rate)] if args.rate else ["--concurrency", str(args.concurrency)]
    command = [
        *(sys.executable, "-m", "expertmesh", "bench", "serve", server.url, "--json", *rate),
        *("--requests", str(args.requests), "--input", str(args.input), "--output", str(args.output)),
        *("--seed", str(number), "--vocabulary", "8192"),
    ]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    latency = {f"{name} {point}": report["latency_ms"][name][point] for name in MEASURES for point in POINTS}
    return latency | {name: report[name] for name in RATES}


def theirs(server: Server, args: argparse.Namespace, number: int) -> dict[str, float]:
    rate = ["--request-rate", str(args.rate)] if args.rate else ["--concurrency", str(args.concurrency)]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(str(args.aiperf), "profile", "--model", server.name, "--url", server.url.removesuffix("/v1")),
            *("--endpoint-type", "completions", "--streaming", "--tokenizer", str(demo_model())),
            *("--use-server-token-count", "--use-legacy-max-tokens", "--ui", "none", *rate),
            *("--request-count", str(args.requests), "--random-seed", str(1000 + number)),
            *("--isl", str(args.input), "--isl-stddev", "0", "--osl", str(args.output), "--osl-stddev", "0"),
            *("--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0"),
        ]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        (file,) = Path(folder).rglob("profile_export_aiperf.json")
        report: dict[str, Any] = json.loads(file.read_text())
    latency = {
        f"{name} {point}": report[their][what]
        for name, their in THEIRS.items()
        for point, what in POINTS.items()
    }
    return latency | {name: report[their]["avg"] for name, their in RATES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--aiperf", type=Path, default=Path("~/.cache/expertmesh/aiperf/bin/aiperf").expanduser()
    )
    parser.add_argument("--url", help="of the /v1 of another server than one of the demo model")
    parser.add_argument("--name", default="timed", help="of the model there (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--rate", type=float, help="a second, by chance, instead of --concurrency")
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=32)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"expertmesh": [], "aiperf": []}
    with served(args) as server:
        for number in range(args.rounds):
            found["expertmesh"].append(ours(server, args, number))
            found["aiperf"].append(theirs(server, args, number))
    print(f"{'median of rounds':26}{'expertmesh':>12}{'aiperf':>12}{'ratio':>8}")
    for row in found["aiperf"][0]:
        mine, other = (statistics.median(run[row] for run in runs) for runs in found.values())
        print(f"{row:26}{mine:12.2f}{other:12.2f}{mine / other:8.3f}")


if __name__ == "__main__":
    main()
