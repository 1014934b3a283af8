"""What the engine's own kernels and its steps reach on this machine: parameters of the planner's cost model that need
not be those that were fitted on the engines of others (`planner.parameters`)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from expertmesh.bench.kernels import BF16, PRECISIONS, keep, random_numbers, seconds_of
from expertmesh.engine.engine import Engine
from expertmesh.engine.ranks import ThreadRanks
from expertmesh.kernels import AttentionRows, Queries
from expertmesh.kernels.cpu import Cpu
from expertmesh.kernels.memory import Kept
from expertmesh.kernels.tape import Pool, Tape
from expertmesh.request import SamplingParams

# Inputs and outputs of a product that is read from memory, and how many are cycled over; rows of one that is computed.
WIDE, COPIES, ROWS = 4096, 16, 256
# Of an attention layer: DeepSeek-V3's, on one of eight ranks.
HEADS, NOPE, ROPE, VALUE, LATENT = 16, 128, 64, 128, 512
SEQUENCES, CONTEXT, PAGE = 16, 1024, 64
OPS = 64  # on a tape
LAYER_OPS = 10  # on the tape of a layer with experts
NORMS, SUMS = 2, 3  # of these
FEW, SOME = 1, 16  # requests whose steps tell what is between steps


def reached(
    kernels: Cpu, ceilings: dict[str, float], small: dict[str, float], demo: Engine, rounds: int
) -> dict[str, tuple[float, str]]:
    """By name, with how it was found. small: seconds of ops, as `tape_seconds` finds them. demo: an engine of one rank
    whose steps of decoding run from tapes."""
    peak = max(ceilings["bf16"], ceilings["torch bf16"])
    memory = min(1.0, streaming(kernels, rounds) / ceilings["read"])
    bytes_of_rows = 2 * ROWS * WIDE / (ceilings["read"] * memory)
    moved = NORMS * small["rms_norm"] + SUMS * small["add"]
    between, request = _between(demo, rounds)
    how = "measured by `expertmesh bench machine`"
    return {
        "memory_efficiency": (memory, f"{how}: a row times matrices of 32 MB, against plain reading"),
        "matmul_efficiency": (
            min(1.0, multiplying(kernels, rounds) / peak),
            f"{how}: {ROWS} rows, against a large product",
        ),
        "attention_efficiency": (
            min(1.0, attending(kernels, rounds) / peak),
            f"{how}: {SEQUENCES} rows over {CONTEXT} latents each",
        ),
        "tile_rows": (16.0, "rows of a tile register"),
        "layer_kernels": (float(LAYER_OPS), "ops of a layer on a tape"),
        "passes": (moved / bytes_of_rows, f"{how}: norms and sums of {ROWS} rows"),
        "decode_passes": (0.0, "a few rows stay in cache"),
        "step_us": (1e6 * between, f"{how}: a step of the demo model, less the ops on its tape"),
        "request_us": (1e6 * request, f"{how}: of {SOME} requests, as the step"),
    }


def streaming(kernels: Cpu, rounds: int) -> float:
    """Bytes/s of weights that one row is multiplied with."""
    x, weight = random_numbers(1, WIDE), random_numbers(WIDE, WIDE)
    kept = [keep(kernels, PRECISIONS["bf16"], weight) for _ in range(COPIES)]

    def all_of_them() -> None:
        for matrix in kept:
            kernels.linear(x, matrix)

    return COPIES * 2 * WIDE * WIDE / _best(all_of_them, rounds)


def multiplying(kernels: Cpu, rounds: int) -> float:
    """Operations/s of a product of some rows."""
    x, kept = random_numbers(ROWS, WIDE), keep(kernels, PRECISIONS["bf16"], random_numbers(WIDE, WIDE))
    return 2 * ROWS * WIDE * WIDE / _best(partial(kernels.linear, x, kept), rounds)


def attending(kernels: Cpu, rounds: int) -> float:
    """Operations/s of scores and weighted sums, absorbed, in decoding."""
    pages = CONTEXT // PAGE
    cache = random_numbers(SEQUENCES * pages, PAGE, LATENT + ROPE)
    up = kernels.latent_up(HEADS, NOPE, VALUE, LATENT, Kept(BF16, torch.device("cpu")))
    queries = Queries(
        torch.empty(0, HEADS, NOPE + ROPE, dtype=BF16), random_numbers(SEQUENCES, HEADS, LATENT + ROPE)
    )
    rows = AttentionRows(
        torch.arange(SEQUENCES), SEQUENCES, torch.arange(SEQUENCES * pages).view(SEQUENCES, pages),
        torch.full((SEQUENCES,), CONTEXT), (),
    )  # fmt: skip
    seconds = _best(lambda: kernels.mla_attention(queries, rows, cache, up, 0.1, VALUE), rounds)
    return 2 * SEQUENCES * CONTEXT * HEADS * (2 * LATENT + ROPE) / seconds


def tape_seconds(kernels: Cpu, rounds: int) -> dict[str, float]:
    """Of ops of which many stand on a tape: "swiglu" with next to nothing to compute, "rms_norm" and "add" of many
    rows."""
    one, many, norm = random_numbers(1, 64), random_numbers(ROWS, WIDE), random_numbers(WIDE)
    up, down = (
        keep(kernels, PRECISIONS["bf16"], random_numbers(rows, 64), s) for rows, s in ((128, 2), (64, 1))
    )
    ops: dict[str, Callable[[], Any]] = {
        "swiglu": lambda: kernels.swiglu(one, up, down),
        "rms_norm": lambda: kernels.rms_norm(many, norm, 1e-6),
        "add": lambda: kernels.add(many, many),
    }
    found = {}
    for name, op in ops.items():
        tape = Tape(Pool())
        with kernels.recording(tape):
            for _ in range(OPS):
                op()
        kernels.replay(tape)
        found[name] = _best(partial(kernels.replay, tape), 20 * rounds) / OPS
    return found


def _between(engine: Engine, rounds: int) -> tuple[float, float]:
    """Seconds of a step without its ops: of any, and for each request more."""
    few, some = (_around(engine, count, rounds) for count in (FEW, SOME))
    request = max(0.0, some - few) / (SOME - FEW)
    return max(0.0, few - FEW * request), request


def _around(engine: Engine, requests: int, rounds: int) -> float:
    ranks = engine.ranks
    assert isinstance(ranks, ThreadRanks)
    replay = ranks.runners[0].replay
    assert replay is not None
    params = SamplingParams(max_tokens=20 * rounds + 8, temperature=0, ignore_eos=True)
    for number in range(requests):
        engine.submit([5 + number, 6, 7], params)
    for _ in range(4):
        engine.step()
    whole = min(seconds_of(engine.step) for _ in range(20 * rounds))
    ops = min(seconds_of(partial(replay.again, requests)) for _ in range(20 * rounds))
    engine.abort_all()
    return max(0.0, whole - ops)


def _best(call: Callable[[], Any], rounds: int) -> float:
    call()
    return min(seconds_of(call) for _ in range(rounds))
