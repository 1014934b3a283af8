"""Checks of one card: an op beside its reference, the same bits again, a graph, streams, a layout of Ascend's own."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from expertmesh.bench.accelerator.cases import Case, Made, make, tensors
from expertmesh.bench.accelerator.side import PRECISIONS, NotOffered, Precision, Side
from expertmesh.bench.accelerator.sizes import Sizes
from expertmesh.bench.accelerator.spot import NotApplicable, Spot, Wrong
from expertmesh.device import free_memory
from expertmesh.kernels import Kernels
from expertmesh.kernels.table import reference_kernels
from expertmesh.kernels.tape import Pool, Tape

ROOM = 6 << 30  # bytes of the host for a large op beside its reference, in float32
LARGE = 1 << 12  # a hidden size from which an op is that
NZ = 29  # torch_npu's number of the format FRACTAL_NZ
WARM = 3


def check_op(case: Case, kernels: Kernels, spot: Spot, sizes: Sizes) -> dict[str, Any]:
    """error: the largest difference from the reference, in its largest number; runs: how often it ran with the same
    input, and same: whether it always gave the same bits; seconds, bytes and flops of one run."""
    if case.shape.hidden >= LARGE and free_memory() < ROOM:
        free = f"{free_memory() / 2**30:.1f} are free"
        raise NotApplicable(f"{ROOM >> 30} GiB of the machine's memory are needed, {free}")

    precision = PRECISIONS[case.precision]
    side = Side(kernels, spot.where, precision, precision.dtype, not kernels.de_interleaved)
    with torch.inference_mode():
        try:
            made = make(case, side)
        except NotOffered as error:
            raise NotApplicable(str(error)) from None
        except torch.OutOfMemoryError:
            raise NotApplicable("the card's memory is too small") from None
        first = _copies(made.call())
        found = [t.float().cpu().clone() for t in made.seen(made.call())]
        far = _error(found, _expected(case, precision, side.interleaved))
        runs, same = _again(made.call, first, spot, sizes)
        seconds = median_seconds(made.call, spot, sizes) if made.timed else None
    return {
        "origin": kernels.origin[case.op],
        "error": far,
        "bound": precision.bound if made.bound is None else made.bound,
        "runs": runs,
        "same": same,
        "seconds": seconds,
        "bytes": side.taken + sum(t.nbytes for t in first),
        "flops": made.flops,
    }


def _expected(case: Case, precision: Precision, interleaved: bool) -> list[Tensor]:
    oracle = Side(reference_kernels(), torch.device("cpu"), precision, torch.float32, interleaved)
    made: Made = make(case, oracle)
    return [t.float() for t in made.seen(made.call())]


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """NaN where anything is: no bound is above that. Shapes that differ are as wrong as can be."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if other.numel():
            far = float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))
            worst = far if far != far else max(worst, far)
    return worst


def _copies(out: Any) -> list[Tensor]:
    return [t.clone() for t in tensors(out)]


def _again(call: Callable[[], Any], first: Sequence[Tensor], spot: Spot, sizes: Sizes) -> tuple[int, bool]:
    """How often it ran, and whether all runs gave the same bits, NaN being one like any other."""
    end, runs, same = time.perf_counter() + sizes.seconds, 0, True
    while runs < sizes.repeats and (runs < 2 or time.perf_counter() < end):
        same = (
            all(
                torch.equal(bits(one), bits(other)) for one, other in zip(tensors(call()), first, strict=True)
            )
            and same
        )
        runs += 1
    spot.synchronise()
    return runs, same


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8) if t.numel() and t.dim() else t


def median_seconds(call: Callable[[], Any], spot: Spot, sizes: Sizes) -> float:
    """Of one run, by the card's clock where it has one; what takes long is run less often."""
    for _ in range(WARM):
        call()
    spot.synchronise()
    end, taken = time.perf_counter() + sizes.seconds, list[float]()
    while len(taken) < sizes.rounds and (len(taken) < WARM or time.perf_counter() < end):
        if spot.card:
            begun, ended = spot.event(), spot.event()
            begun.record()
            call()
            ended.record()
            ended.synchronize()
            taken.append(begun.elapsed_time(ended) / 1e3)
        else:
            begun_at = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begun_at)
    return statistics.median(taken)


def check_graph(kernels: Kernels, spot: Spot) -> dict[str, Any]:
    """Ops that were recorded give what they give one by one, also of an input that has changed."""
    x = torch.ones(8, 128, dtype=torch.bfloat16, device=spot.where)
    weight = torch.linspace(0.5, 2, 128, dtype=torch.bfloat16, device=spot.where)

    def call() -> Tensor:
        y = kernels.rms_norm(x, weight, 1e-6)
        return kernels.add(y, x)

    with torch.inference_mode():
        for _ in range(WARM):  # whatever is compiled is compiled now
            call()
        spot.synchronise()
        again, out = _recorded(call, kernels, spot)
        for scale in (1.0, 3.0):
            x.copy_(torch.arange(8 * 128, device=spot.where).view(8, 128) * scale)
            again()
            spot.synchronise()
            if not torch.equal(out, call()):
                raise Wrong("what was recorded gives other numbers than the same ops one by one")
    return {}


def _recorded(call: Callable[[], Tensor], kernels: Kernels, spot: Spot) -> tuple[Callable[[], None], Tensor]:
    if spot.card:
        return spot.capture(call)
    graph = kernels.graph
    if graph is None:
        raise NotApplicable("these kernels are not recorded")
    tape = Tape(Pool())
    with graph.recording(tape):
        out = call()
    return lambda: graph.replay(tape), out


def check_streams(kernels: Kernels, spot: Spot, size: int = 2048) -> dict[str, Any]:
    """Products on one stream while another one copies to the card and back: both right, and in less time than one
    after the other. gain: of that time, how much is saved."""
    if not spot.card:
        raise NotApplicable("a CPU has no streams")
    x = torch.eye(size, dtype=torch.bfloat16, device=spot.where)
    host = torch.arange(16 << 20, dtype=torch.int32).pin_memory()
    back, there = torch.empty_like(host).pin_memory(), torch.empty_like(host, device=spot.where)
    side = spot.backend.Stream()

    def multiply() -> None:
        for _ in range(32):
            torch.mm(x, x, out=y)

    def copy() -> None:
        there.copy_(host, non_blocking=True)
        back.copy_(there, non_blocking=True)

    def both(together: bool) -> float:
        spot.synchronise()
        start = time.perf_counter()
        multiply()
        if together:
            with spot.backend.stream(side):
                copy()
        else:
            copy()
        spot.synchronise()
        return time.perf_counter() - start

    y = torch.empty_like(x)
    both(False), both(True)
    back.zero_()
    apart, together = (min(both(way) for _ in range(5)) for way in (False, True))
    if not (torch.equal(y, x) and torch.equal(back, host)):
        raise Wrong("numbers are damaged where a copy and a product run at the same time")
    return {"gain": 1 - together / apart}


def check_layout(kernels: Kernels, spot: Spot) -> dict[str, Any]:
    """A product with weights in Ascend's own layout is that with the same weights in rows."""
    if spot.kind != "npu" or not spot.card:
        raise NotApplicable("it is Ascend's")
    import torch_npu

    x, weight = (torch.randn(shape, device=spot.where).bfloat16() for shape in ((48, 512), (512, 256)))
    laid = torch_npu.npu_format_cast(weight.clone(), NZ)
    if torch_npu.get_npu_format(laid) != NZ:
        raise Wrong("the card keeps weights in rows though FRACTAL_NZ was asked for")
    plain = torch.mm(x, weight).float()
    far = float((torch.mm(x, laid).float() - plain).abs().max() / plain.abs().max())
    if not far <= PRECISIONS["bfloat16"].bound or not torch.equal(laid.cpu(), weight.cpu()):
        raise Wrong(f"a product with weights in FRACTAL_NZ is {far:.2g} off")
    return {}


CHECKS: dict[str, Callable[[Kernels, Spot], dict[str, Any]]] = {
    "graph": check_graph,
    "streams": check_streams,
    "layout": check_layout,
}
