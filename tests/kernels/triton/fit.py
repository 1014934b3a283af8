"""`python -m tests.kernels.triton.fit TARGET KERNEL`, in the environment of the target's compiler: of the candidates
the one with which a card would be done first, if it had nothing but its memory's bandwidth and its products to wait
for, among those that fit on the chip.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from typing import Any

from expertmesh.errors import KernelFailure
from expertmesh.kernels.triton.kernel import OPTIONS, Kernel
from expertmesh.kernels.triton.table import KERNELS
from expertmesh.kernels.triton.tiles import CUDA, TARGETS
from expertmesh.planner.cards import card
from tests.kernels.triton import moe_candidates
from tests.kernels.triton.candidates import candidates
from tests.kernels.triton.example import Maker
from tests.kernels.triton.examples import EXAMPLES
from tests.kernels.triton.traffic import traffic

# Card of the planner, and its cores: streaming multiprocessors, and cores with a matrix unit.
CARDS = {
    "sm_80": ("a100", 108), "sm_90": ("h100", 132), "sm_100": ("b200", 148), "Ascend910B1": ("ascend-910b", 24),
    "Ascend910_9391": ("ascend-910c", 24),
}  # fmt: skip
# Turns of loops over pages, splits and rows, which no constant bounds.
TURNS = 16


def seconds(kernel: Kernel, every: dict[str, Any], ttir: str, target: str) -> float:
    """Programs share the cores evenly, and each core has its part of bandwidth and products."""
    name, cores = CARDS[target]
    turns, one, it = math.ceil(math.prod(kernel.grid(every)) / cores), traffic(ttir, TURNS), card(name)
    bytes_per_second, products_per_second = it.memory_gbs * 1e9 / cores, it.bf16_tflops * 1e12 / cores
    return turns * max((one.loaded + one.stored) / bytes_per_second, one.flops / products_per_second)


def compiler(target: str) -> tuple[Callable[..., str], Callable[..., str]]:
    """(to Triton's IR; to the last step, and what is wrong with it)."""
    if target in CUDA:
        from tests.kernels.triton import cubins

        return cubins.ttir, cubins.misfit
    from tests.kernels.triton import bishengir

    return bishengir.ttir, bishengir.misfit


def fitting(kernel: Kernel, target: str) -> dict[str, int]:
    examples = [e for e in EXAMPLES if e.kernel == kernel.name and e.full and target in e.targets]
    calls, (lowered, misfit) = [e.arguments(Maker("meta")) for e in examples], compiler(target)
    if kernel.name in moe_candidates.TILES:
        return moe_candidates.first_fitting(kernel, target, calls, misfit)
    said = ""
    ranked: list[tuple[tuple[float, ...], dict[str, int]]] = []
    known: dict[str, float] = {}
    for chosen in candidates(kernel.name, target):
        every = kernel.complete(calls[0], target, chosen)
        tiles = str({name: value for name, value in chosen.items() if name not in OPTIONS})
        if tiles not in known:
            ir = lowered(kernel, every, target)
            known[tiles] = seconds(kernel, every, ir, target) if ir else math.inf
        # Of the same time: the most stages, then the fewest turns of loops and the fewest warps.
        large = -math.prod(value for name, value in chosen.items() if name not in OPTIONS)
        rank = known[tiles], -chosen.get("num_stages", 0), large, chosen.get("num_warps", 0)
        ranked.append((rank, chosen))
    for (time, *_), chosen in sorted(ranked, key=lambda pair: pair[0]):
        if not math.isfinite(time):
            continue
        tried = (misfit(kernel, kernel.complete(call, target, chosen), target) for call in calls)
        if not (said := next(filter(None, tried), "")):
            return chosen
    raise KernelFailure(kernel.name, target, f"no candidate fits; of the last one: {said or 'no tiles'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS[1:])
    parser.add_argument("kernel", choices=sorted(KERNELS))
    said = parser.parse_args()
    try:
        print(json.dumps(fitting(KERNELS[said.kernel], said.target)))
    except KernelFailure as error:
        # Who has asked for it names kernel and target.
        sys.exit(str(error).removeprefix(f"kernel {said.kernel} on {said.target}: "))


if __name__ == "__main__":
    main()
