"""Kernels on Triton's interpreter, against their references."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels.triton.table import KERNELS
from tests.kernels.triton import small_floats
from tests.kernels.triton.example import Example, Maker

DTYPES = (torch.float32, torch.bfloat16)


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of each output, the largest difference by the largest number; inf where one is not finite and the other is."""
    result = {}
    for name, right in expected.items():
        got, right = found[name].double(), right.double()
        same = torch.equal(got.isfinite(), right.isfinite()) and found[name].dtype == expected[name].dtype
        difference = (got - right).nan_to_num(0.0, 0.0, 0.0).abs()
        scale = max(float(right.nan_to_num(0.0, 0.0, 0.0).abs().max()), 1.0) if right.numel() else 1.0
        largest = float(difference.max()) / scale if right.numel() else 0.0
        result[name] = largest if same else float("inf")
    return result


def check(examples: list[Example]) -> Iterator[dict[str, Any]]:
    small_floats.repair()
    for example in examples:
        if not example.full:
            for dtype in DTYPES:
                arguments = example.arguments(Maker(dtype=dtype))
                expected = example.reference(arguments)
                KERNELS[example.kernel](**arguments)
                found = {name: arguments[name] for name in KERNELS[example.kernel].outputs}
                yield {"example": str(example), "dtype": str(dtype), "errors": errors(found, expected)}
