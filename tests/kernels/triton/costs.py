"""`python -m tests.kernels.triton.costs`: what comes before attention in one layer, and the expert layer, as one kernel
for each operation and as the fused kernels: launches, bytes and operations, and the time that a card of the planner
would take.

The fused prologue's figures are read off its kernels' compiled forms; those of its single operations are the planner's
(`planner.news.prologue`), DeepSeek-V3 in bfloat16 in a TP group of 8. Those of the expert layer are in `expert_costs`.

Bytes of a launch are those of its arguments, each once: what programs load again comes from the card's cache. Its time
is the start of a kernel, and the longer of these bytes at the bandwidth and the operations at the peak that the
planner's cost model takes a card to reach. What programs of one launch do at the same time is not modelled beyond that.
"""

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from expertmesh.mesh.topology import Topology
from expertmesh.planner.cards import card
from expertmesh.planner.deployment import Deployment
from expertmesh.planner.models import model
from expertmesh.planner.news.prologue import operators
from expertmesh.planner.work import Rates
from tests.kernels.triton import expert_costs
from tests.kernels.triton.launch import Launch, size
from tests.kernels.triton.toolchain import ROOT, command, environment

CARDS = {
    "ascend-910b": "Ascend910B1",
    "ascend-910c": "Ascend910_9391",
    "a100": "sm_80",
    "h100": "sm_90",
    "b200": "sm_100",
}
ROWS = (8, 128, 1024)
TP = 8


def unfused(rows: int) -> list[Launch]:
    deployment = Deployment(
        model("deepseek-v3"), card("ascend-910b"), Topology(8, TP, TP), weight_precision="bf16"
    )
    return [Launch(o.name, o.weights + o.reads + o.writes, o.flops) for o in operators(deployment, rows)]


def fused(rows: int, target: str) -> Iterator[Launch]:
    """In the environment of the target's compiler."""
    from expertmesh.kernels.triton.table import KERNELS
    from tests.kernels.triton.attention_examples import V3, down, up
    from tests.kernels.triton.example import Maker
    from tests.kernels.triton.fit import compiler
    from tests.kernels.triton.traffic import traffic

    s, make = replace(V3, T=rows), Maker("meta")
    for name, arguments in (("mla_down", down(s, False, make)), ("mla_up", up(s, True, True, make))):
        kernel = KERNELS[name]
        every = kernel.complete(arguments, target)
        one, programs = traffic(compiler(target)[0](kernel, every, target)), math.prod(kernel.grid(every))
        # Of the cache only the rows that are written; of kv_b only the keys' part.
        spared = size([arguments.get("cache_SX")]) - rows * (s.C + s.P) * 2 + s.H * s.V * s.C * 2
        moved = size(list(arguments.values())) - (spared if name == "mla_up" else 0)
        yield Launch(name, moved, one.flops * programs, (one.loaded + one.stored) * programs, programs)


def compiled(rows: int, target: str) -> list[Launch]:
    """What `fused` says, from that environment."""
    with tempfile.TemporaryDirectory() as cache:
        found = environment("cubins" if target.startswith("sm_") else "bishengir", cache)
        asked = command("costs", "--fused", target, "--rows", str(rows))
        done = subprocess.run(asked, env=found, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return [Launch(**json.loads(line)) for line in done.stdout.splitlines()]


def seconds(launches: Sequence[Launch], name: str) -> float:
    rates = Rates(card(name), card(name).reached)
    return sum(rates.compute("", x.flops, x.flops, "bf16", x.bytes, launches=1.0).seconds for x in launches)


def summary(launches: Sequence[Launch], name: str) -> str:
    moved, flops = sum(x.bytes for x in launches), sum(x.flops for x in launches)
    time = seconds(launches, name) * 1e6
    return f"{len(launches):2} launches  {moved / 1e6:7.2f} MB  {flops / 1e9:7.2f} GFLOP  {time:6.1f} us"


def report(name: str, rows: int, detail: bool) -> Iterator[str]:
    yield from compared(f"prologue, {rows} rows", unfused(rows), compiled(rows, CARDS[name]), name, detail)
    apart, together = expert_costs.unfused(rows), list(expert_costs.fused(rows))
    yield from compared(f"expert layer, {rows} rows of each card", apart, together, name, detail)


def compared(
    title: str, apart: Sequence[Launch], together: Sequence[Launch], name: str, detail: bool
) -> Iterator[str]:
    change = seconds(together, name) / seconds(apart, name) - 1
    yield f"{name}, {title}, bfloat16"
    yield f"  one by one  {summary(apart, name)}"
    yield from arithmetic(apart, name) if detail else ()
    yield f"  fused       {summary(together, name)}  {change:+.0%}"
    yield from arithmetic(together, name) if detail else ()


def arithmetic(launches: Sequence[Launch], name: str) -> Iterator[str]:
    it = card(name)
    for x in launches:
        memory = x.bytes / it.memory_gbs / it.reached.memory_efficiency / 1e3
        products = x.flops / it.bf16_tflops / it.reached.matmul_efficiency / 1e6
        loaded = f", {x.programs} programs load and store {x.loaded / 1e6:.2f} MB" if x.programs else ""
        yield (
            f"    {x.name}: {it.launch_us:g} + max({x.bytes / 1e6:.3f} MB: {memory:.2f}, {x.flops / 1e9:.2f} GFLOP: "
            f"{products:.2f}) us{loaded}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--card", action="append", choices=sorted(CARDS), help="(default: all)")
    parser.add_argument("--rows", action="append", type=int, help=f"of a TP group (default: {ROWS})")
    parser.add_argument("--detail", action="store_true", help="the arithmetic of every launch")
    parser.add_argument("--fused", metavar="TARGET", help=argparse.SUPPRESS)
    said = parser.parse_args()
    for rows in said.rows or ROWS:
        if said.fused:
            for launch in fused(rows, said.fused):
                print(json.dumps(asdict(launch)))
            continue
        for name in said.card or CARDS:
            print("\n".join(report(name, rows, said.detail)), flush=True)


if __name__ == "__main__":
    main()
