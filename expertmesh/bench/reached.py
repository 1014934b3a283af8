"""What the engine's own kernels and its steps reach on this machine: parameters of the planner's cost model that need
not be those that were fitted on the engines of others (`planner.parameters`)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from expertmesh.bench.kernels import BF16, PRECISIONS, keep, random_numbers, seconds_of
from expertmesh.engine.engine import Engine
from expertmesh.engine.ranks import ThreadRanks
from expertmesh.engine.runner import Runner
from expertmesh.kernels import AttentionRows, Queries
from expertmesh.kernels.cpu import Cpu
from expertmesh.kernels.memory import Kept
from expertmesh.kernels.tape import Pool, Tape
from expertmesh.request import SamplingParams

# Inputs and outputs of a product that is read from memory, and how many are cycled over; rows of one that is computed.
WIDE, COPIES, ROWS = 2048, 16, 256
# Inputs and outputs of products that a cache holds and that are through before they are disturbed; rows of one that
# fills a tile in part.
MIDDLE, NARROW, PART = 512, 128, 4
# Of an attention layer: DeepSeek-V3's, on one of eight ranks; and how wide latents are that weigh a score more.
HEADS, NOPE, ROPE, VALUE, LATENT, SLIM = 16, 128, 64, 128, 512, 64
SEQUENCES, CONTEXT, PAGE = 4, 1024, 64
OPS = 64  # on a tape, of those that take next to no time
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
    moved = NORMS * small["rms_norm"] + SUMS * small["add"]
    bytes_of_rows = 2 * ROWS * WIDE / (ceilings["read"] * memory)
    per_input = (small["middle"] - small["narrow"]) / (MIDDLE - NARROW)
    rate = min(peak, 2 * ROWS * MIDDLE / max(per_input, 1e-12))
    depth = max(0.0, small["narrow"] / per_input - NARROW)
    part = max(0.0, small["part"] * ROWS / small["middle"] - PART)
    attention, softmax = attending(kernels, max(HEADS, 2 * part), rounds)
    between, request = _between(demo, rounds)
    how = "measured by `expertmesh bench machine`"
    return {
        "memory_efficiency": (
            memory,
            f"{how}: a row times matrices of {2 * WIDE * WIDE >> 20} MiB, against plain reading",
        ),
        "matmul_efficiency": (
            rate / peak,
            f"{how}: {ROWS} rows, {MIDDLE} inputs against {NARROW}, against a large product",
        ),
        "attention_efficiency": (
            min(1.0, attention / peak),
            f"{how}: {SEQUENCES} rows over {CONTEXT} latents each, of {LATENT} and of {SLIM} numbers",
        ),
        "softmax_flops": (softmax, f"{how}: what latents of {SLIM} numbers take more than their share"),
        "tile_rows": (2 * part, f"{how}: {PART} rows, against {ROWS}"),
        "tile_depth": (depth, f"{how}: {NARROW} inputs, against {MIDDLE}"),
        "layer_kernels": (float(LAYER_OPS), "ops of a layer on a tape"),
        "eager_us": (1e6 * _eager(demo, rounds), f"{how}: a step of the demo model without its tape, by op"),
        "passes": (moved / bytes_of_rows, f"{how}: norms and sums of {ROWS} rows"),
        "decode_passes": (0.0, "a few rows stay in cache"),
        "step_us": (1e6 * between, f"{how}: a step of the demo model, less the ops on its tape"),
        "request_us": (1e6 * request, f"{how}: of {SOME} requests, as the step"),
    }


def streaming(kernels: Cpu, rounds: int) -> float:
    """Bytes/s of weights that one row is multiplied with: of each matrix the best of all rounds."""
    x, weight = random_numbers(1, WIDE), random_numbers(WIDE, WIDE)
    kept = [keep(kernels, PRECISIONS["bf16"], weight) for _ in range(COPIES)]
    best = [float("inf")] * COPIES
    for _ in range(4 * rounds):
        for i, matrix in enumerate(kept):
            best[i] = min(best[i], seconds_of(partial(kernels.linear, x, matrix)))
    return COPIES * 2 * WIDE * WIDE / sum(best)


def attending(kernels: Cpu, rows: float, rounds: int) -> tuple[float, float]:
    """Of scores and weighted sums, absorbed, in decoding: operations/s, and how many a score takes beside its products.
    Of two widths of latents: a score's time is in proportion to its products, and a constant more. rows: of the tiles
    that the heads take."""
    wide, slim = (_score(kernels, latent, rounds) for latent in (LATENT, SLIM))
    rate = rows / HEADS * (_products(LATENT) - _products(SLIM)) / max(wide - slim, 1e-3 * wide)
    return rate, max(0.0, rate * slim - rows / HEADS * _products(SLIM))


def _products(latent: int) -> float:
    """Operations of a score's products."""
    return 2.0 * (2 * latent + ROPE)


def _score(kernels: Cpu, latent: int, rounds: int) -> float:
    """Seconds of one."""
    pages = CONTEXT // PAGE
    cache = random_numbers(SEQUENCES * pages, PAGE, latent + ROPE)
    up = kernels.latent_up(HEADS, NOPE, VALUE, latent, Kept(BF16, torch.device("cpu")))
    queries = Queries(
        torch.empty(0, HEADS, NOPE + ROPE, dtype=BF16), random_numbers(SEQUENCES, HEADS, latent + ROPE)
    )
    rows = AttentionRows(
        torch.arange(SEQUENCES), SEQUENCES, torch.arange(SEQUENCES * pages).view(SEQUENCES, pages),
        torch.full((SEQUENCES,), CONTEXT), (),
    )  # fmt: skip
    seconds = _best(lambda: kernels.mla_attention(queries, rows, cache, up, 0.1, VALUE), 10 * rounds)
    return seconds / (SEQUENCES * CONTEXT * HEADS)


def tape_seconds(kernels: Cpu, rounds: int) -> dict[str, float]:
    """Of ops on a tape: "swiglu" with next to nothing to compute, "rms_norm" and "add" of many
    rows, and products: of few inputs ("narrow"), of more ("middle"), and of "part" of a tile's rows."""
    one, many, norm = random_numbers(1, 64), random_numbers(ROWS, WIDE), random_numbers(WIDE)
    x, few = random_numbers(ROWS, MIDDLE), random_numbers(PART, MIDDLE)
    up, down, narrow, middle = (
        keep(kernels, PRECISIONS["bf16"], random_numbers(rows, width), split)
        for rows, width, split in ((128, 64, 2), (64, 64, 1), (MIDDLE, NARROW, 1), (MIDDLE, MIDDLE, 1))
    )
    ops: dict[str, Callable[[], Any]] = {
        "swiglu": lambda: kernels.swiglu(one, up, down),
        "rms_norm": lambda: kernels.rms_norm(many, norm, 1e-6),
        "add": lambda: kernels.add(many, many),
        "narrow": lambda: kernels.linear(x[:, :NARROW], narrow),
        "middle": lambda: kernels.linear(x, middle),
        "part": lambda: kernels.linear(few, middle),
    }
    return {name: _taped(kernels, op, OPS if name == "swiglu" else 1, rounds) for name, op in ops.items()}


def _taped(kernels: Cpu, op: Callable[[], Any], count: int, rounds: int) -> float:
    tape = Tape(Pool())
    with kernels.recording(tape):
        for _ in range(count):
            op()
    kernels.replay(tape)
    return _best(partial(kernels.replay, tape), 40 * rounds) / count


def _between(engine: Engine, rounds: int) -> tuple[float, float]:
    """Seconds of a step without its ops: of any, and for each request more."""
    few, some = (_around(engine, count, rounds) for count in (FEW, SOME))
    request = max(0.0, some - few) / (SOME - FEW)
    return max(0.0, few - FEW * request), request


def _around(engine: Engine, requests: int, rounds: int) -> float:
    replay = _runner(engine).replay
    assert replay is not None
    _submit(engine, requests, 20 * rounds)
    whole = min(seconds_of(engine.step) for _ in range(20 * rounds))
    ops = min(seconds_of(partial(replay.again, requests)) for _ in range(20 * rounds))
    engine.abort_all()
    return max(0.0, whole - ops)


def _eager(engine: Engine, rounds: int) -> float:
    """Seconds that an op takes more where Python starts it."""
    runner = _runner(engine)
    _submit(engine, FEW, 40 * rounds)
    taped = min(seconds_of(engine.step) for _ in range(20 * rounds))
    replay, runner.replay = runner.replay, None
    plain = min(seconds_of(engine.step) for _ in range(20 * rounds))
    runner.replay = replay
    engine.abort_all()
    return max(0.0, plain - taped) / (LAYER_OPS * runner.model.config.num_hidden_layers)


def _runner(engine: Engine) -> Runner:
    assert isinstance(engine.ranks, ThreadRanks)
    return engine.ranks.runners[0]


def _submit(engine: Engine, requests: int, steps: int) -> None:
    """Requests that decode for so many steps and are through with their prompts."""
    params = SamplingParams(max_tokens=steps + 8, temperature=0, ignore_eos=True)
    for number in range(requests):
        engine.submit([5 + number, 6, 7], params)
    for _ in range(4):
        engine.step()


def _best(call: Callable[[], Any], rounds: int) -> float:
    call()
    return min(seconds_of(call) for _ in range(rounds))
