"""Checks of one card: an op beside its reference, the same bits again, a graph, streams, a layout of Ascend's own."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from expertmesh.bench.accelerator.cases import Case, Made, make, tensors
from expertmesh.bench.accelerator.outcome import NotApplicable, Wrong
from expertmesh.bench.accelerator.side import PRECISIONS, Side
from expertmesh.bench.accelerator.sizes import Sizes
from expertmesh.device import HOST, Device, free_memory
from expertmesh.kernels import Kernels
from expertmesh.kernels.capture import CardGraph
from expertmesh.kernels.npu.weights import FRACTAL_NZ
from expertmesh.kernels.table import reference_kernels
from expertmesh.kernels.tape import Graph, Taped

ROOM = 6 << 30  # bytes of the host for a large op beside its reference, in float32
LARGE = 1 << 12  # a hidden size from which an op is that
WARM = 3


def check_op(case: Case, kernels: Kernels, device: Device, sizes: Sizes) -> dict[str, Any]:
    """error: the largest difference from the reference, in its largest number; runs: how often it ran with the same
    input, and same: whether it always gave the same bits; seconds, bytes and flops of one run."""
    if case.shape.hidden >= LARGE and free_memory() < ROOM:
        free = f"{free_memory() / 2**30:.1f} are free"
        raise NotApplicable(f"{ROOM >> 30} GiB of the machine's memory are needed, {free}")

    precision = PRECISIONS[case.precision]
    side = Side(kernels, device.where, precision, precision.dtype, kernels.page, not kernels.de_interleaved)
    with torch.inference_mode():
        try:
            made = make(case, side)
        except torch.OutOfMemoryError:
            raise NotApplicable("the card's memory is too small") from None
        first = _copies(made.call())
        found = [t.float().cpu().clone() for t in made.seen(made.call())]
        far = _error(found, _expected(case, side))
        runs, same = _again(made.call, first, device, sizes)
        seconds = median_seconds(made.call, device, sizes) if made.timed else None
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


def _expected(case: Case, side: Side) -> list[Tensor]:
    oracle = replace(side, kernels=reference_kernels(), where=HOST, compute=torch.float32)
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


def _again(
    call: Callable[[], Any], first: Sequence[Tensor], device: Device, sizes: Sizes
) -> tuple[int, bool]:
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
    device.wait()
    return runs, same


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8) if t.numel() and t.dim() else t


def median_seconds(call: Callable[[], Any], device: Device, sizes: Sizes) -> float:
    """Of one run, by the card's clock where it has one; what takes long is run less often."""
    for _ in range(WARM):
        call()
    device.wait()
    end, taken = time.perf_counter() + sizes.seconds, list[float]()
    while len(taken) < sizes.rounds and (len(taken) < WARM or time.perf_counter() < end):
        if device.is_card:
            begun, ended = device.library.Event(enable_timing=True), device.library.Event(enable_timing=True)
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


def check_graph(kernels: Kernels, device: Device) -> dict[str, Any]:
    """Ops that were recorded give what they give one by one, also of an input that has changed."""
    x = torch.ones(8, 128, dtype=torch.bfloat16, device=device.where)
    weight = torch.linspace(0.5, 2, 128, dtype=torch.bfloat16, device=device.where)

    def call() -> Tensor:
        y = kernels.rms_norm(x, weight, 1e-6)
        return kernels.add(y, x)

    with torch.inference_mode():
        for _ in range(WARM):  # whatever is compiled is compiled now
            call()
        device.wait()
        recorded = _graph(kernels, device).record(call)
        if recorded.again is None:
            raise Wrong("these ops are not among those that can be recorded")
        for scale in (1.0, 3.0):
            x.copy_(torch.arange(8 * 128, device=device.where).view(8, 128) * scale)
            recorded.again()
            device.wait()
            if not torch.equal(recorded.out, call()):
                raise Wrong("what was recorded gives other numbers than the same ops one by one")
    return {}


def _graph(kernels: Kernels, device: Device) -> Graph:
    """As the engine records steps. Of a card also where its steps hold ops that it cannot record: these two it can."""
    if kernels.graph is not None:
        return Taped(kernels.graph)
    if not device.is_card:
        raise NotApplicable("these kernels are not recorded")
    return CardGraph(device.library)


def check_streams(kernels: Kernels, device: Device, size: int = 2048) -> dict[str, Any]:
    """Products on one stream while another one copies to the card and back: both right, and in less time than one
    after the other. gain: of that time, how much is saved."""
    if not device.is_card:
        raise NotApplicable("a CPU has no streams")
    x = torch.eye(size, dtype=torch.bfloat16, device=device.where)
    host = torch.arange(16 << 20, dtype=torch.int32).pin_memory()
    back, there = torch.empty_like(host).pin_memory(), torch.empty_like(host, device=device.where)
    side = device.library.Stream()

    def multiply() -> None:
        for _ in range(32):
            torch.mm(x, x, out=y)

    def copy() -> None:
        there.copy_(host, non_blocking=True)
        back.copy_(there, non_blocking=True)

    def both(together: bool) -> float:
        device.wait()
        start = time.perf_counter()
        multiply()
        if together:
            with device.library.stream(side):
                copy()
        else:
            copy()
        device.wait()
        return time.perf_counter() - start

    y = torch.empty_like(x)
    both(False), both(True)
    back.zero_()
    apart, together = (min(both(way) for _ in range(5)) for way in (False, True))
    if not (torch.equal(y, x) and torch.equal(back, host)):
        raise Wrong("numbers are damaged where a copy and a product run at the same time")
    return {"gain": 1 - together / apart}


def check_layout(kernels: Kernels, device: Device) -> dict[str, Any]:
    """A product with weights in Ascend's own layout is that with the same weights in rows."""
    if device.kind != "npu" or not device.is_card:
        raise NotApplicable("it is Ascend's")
    import torch_npu

    x, weight = (torch.randn(shape, device=device.where).bfloat16() for shape in ((48, 512), (512, 256)))
    laid = torch_npu.npu_format_cast(weight.clone(), FRACTAL_NZ)
    if torch_npu.get_npu_format(laid) != FRACTAL_NZ:
        raise Wrong("the card keeps weights in rows though FRACTAL_NZ was asked for")
    plain = torch.mm(x, weight).float()
    far = float((torch.mm(x, laid).float() - plain).abs().max() / plain.abs().max())
    if not far <= PRECISIONS["bfloat16"].bound or not torch.equal(laid.cpu(), weight.cpu()):
        raise Wrong(f"a product with weights in FRACTAL_NZ is {far:.2g} off")
    return {}


CHECKS: dict[str, Callable[[Kernels, Device], dict[str, Any]]] = {
    "graph": check_graph,
    "streams": check_streams,
    "layout": check_layout,
}
