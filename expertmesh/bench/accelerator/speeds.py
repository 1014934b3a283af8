"""What a card reads, multiplies, starts and copies at most: the ceilings of its ops, and numbers of its profile."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from expertmesh.bench.accelerator.checks import median_seconds
from expertmesh.bench.accelerator.outcome import NotApplicable
from expertmesh.bench.accelerator.sizes import Sizes
from expertmesh.bench.kernels import PRECISIONS, keep, random_numbers
from expertmesh.device import Device
from expertmesh.errors import InputError
from expertmesh.kernels import Kernels

STARTS, TRIES = 1000, 5  # of ops that have next to nothing to do; the best try is taken

Measured = dict[str, Any]


def copying(kernels: Kernels, device: Device, sizes: Sizes) -> Measured:
    """Bytes that are read and bytes that are written."""
    x = torch.ones(sizes.memory // 4, dtype=torch.float32, device=device.where)
    y = torch.empty_like(x)
    return {"value": 2 * x.nbytes / median_seconds(lambda: y.copy_(x), device, sizes) / 1e9, "unit": "GB/s"}


def reading(kernels: Kernels, device: Device, sizes: Sizes) -> Measured:
    x = torch.ones(sizes.memory // 4, dtype=torch.float32, device=device.where)
    return {"value": x.nbytes / median_seconds(x.sum, device, sizes) / 1e9, "unit": "GB/s"}


def multiplying(dtype: torch.dtype) -> Callable[[Kernels, Device, Sizes], Measured]:
    def measure(kernels: Kernels, device: Device, sizes: Sizes) -> Measured:
        x, weight = _factors(device, sizes)
        x, weight = x.to(dtype), weight.to(dtype)
        return _rate(lambda: x @ weight.t(), device, sizes)

    return measure


def int8(kernels: Kernels, device: Device, sizes: Sizes) -> Measured:
    """By torch, without scales."""
    x, weight = (t.mul(8).to(torch.int8) for t in _factors(device, sizes))
    if device.kind == "npu":
        import torch_npu

        scale = torch.ones(weight.shape[0], dtype=torch.float32, device=device.where)
        turned = weight.t().contiguous()
        return _rate(
            lambda: torch_npu.npu_quant_matmul(x, turned, scale, output_dtype=torch.bfloat16), device, sizes
        )
    return _rate(lambda: torch._int_mm(x, weight.t()), device, sizes)


def w8a8(kernels: Kernels, device: Device, sizes: Sizes) -> Measured:
    """By the op table: rows are quantised on the way."""
    x, weight = _factors(device, sizes)
    try:
        kept = keep(kernels, PRECISIONS["w8a8"], weight)
    except InputError as error:
        raise NotApplicable(str(error)) from None
    return _rate(lambda: kernels.linear(x, kept), device, sizes)


def fp8(kernels: Kernels, device: Device, sizes: Sizes) -> Measured:
    """By torch, one scale for all."""
    if device.kind != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        raise NotApplicable("no units for it, or none that torch multiplies with")
    x, weight = (t.to(torch.float8_e4m3fn) for t in _factors(device, sizes))
    one = torch.ones((), dtype=torch.float32, device=device.where)
    return _rate(
        lambda: torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16),
        device,
        sizes,
    )


def launching(kernels: Kernels, device: Device, sizes: Sizes) -> Measured:
    """Of an op that has next to nothing to do, one after the other, none waited for."""
    x = torch.zeros(1, dtype=torch.float32, device=device.where)
    best = math.inf
    for _ in range(TRIES):
        device.wait()
        start = time.perf_counter()
        for _ in range(STARTS):
            x.add_(1)
        device.wait()
        best = min(best, (time.perf_counter() - start) / STARTS)
    return {"value": 1e6 * best, "unit": "us"}


def between_host_and_card(to_card: bool) -> Callable[[Kernels, Device, Sizes], Measured]:
    def measure(kernels: Kernels, device: Device, sizes: Sizes) -> Measured:
        if not device.is_card:
            raise NotApplicable("the CPU's memory is the host's")
        host = torch.ones(sizes.memory // 4, dtype=torch.uint8).pin_memory()
        there = torch.empty_like(host, device=device.where)
        to, source = (there, host) if to_card else (host, there)
        seconds = median_seconds(lambda: to.copy_(source, non_blocking=True), device, sizes)
        return {"value": host.nbytes / seconds / 1e9, "unit": "GB/s"}

    return measure


def _factors(device: Device, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    rows, outputs, inputs = sizes.product
    x, weight = random_numbers(rows, inputs), random_numbers(outputs, inputs, scale=inputs**-0.5)
    return x.to(device.where), weight.to(device.where)


def _rate(call: Callable[[], Any], device: Device, sizes: Sizes) -> Measured:
    return {
        "value": 2 * math.prod(sizes.product) / median_seconds(call, device, sizes) / 1e12,
        "unit": "TFLOPS",
    }


SPEEDS: dict[str, Callable[[Kernels, Device, Sizes], Measured]] = {
    "memory, copied": copying,
    "memory, read": reading,
    "products, bfloat16": multiplying(torch.bfloat16),
    "products, float32": multiplying(torch.float32),
    "products, int8": int8,
    "products, w8a8": w8a8,
    "products, fp8": fp8,
    "start of an op": launching,
    "host to card": between_host_and_card(True),
    "card to host": between_host_and_card(False),
}
