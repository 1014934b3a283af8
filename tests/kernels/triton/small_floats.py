"""What Triton's interpreter has wrong about small floating-point types, put right: it rounds float32 to bfloat16
towards zero, loses carries into the exponent when it rounds to FP8, and multiplies bfloat16 as if its bits were whole
numbers."""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TYPES = {
    tl.float16: torch.float16, tl.float32: torch.float32, tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}  # fmt: skip
CARRIERS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


def convert(values: Any, source: Any, target: Any, rounding: object = None) -> Any:
    """numpy bits of one type -> of another, by torch, rounded to even, which is all that is ever asked for."""
    bits = {1: np.uint8, 2: np.int16, 4: np.int32}[values.dtype.itemsize]
    given = torch.from_numpy(np.ascontiguousarray(values).view(bits)).view(TYPES[source])
    largest = torch.finfo(TYPES[target]).max
    if target == tl.float8e4nv:
        given = given.clamp(-largest, largest)
    made = given.to(TYPES[target]).view(CARRIERS[target.primitive_bitwidth]).numpy()
    return made.reshape(values.shape)


def dot(self: Any, a: Any, b: Any, d: Any, precision: object, imprecise: object) -> Any:
    """a times b plus d: whole numbers exactly, others in float32."""
    if a.dtype.scalar.is_floating():
        a_data, b_data = (
            convert(x.data, x.dtype.scalar, tl.float32).view(np.float32)
            if x.dtype.scalar != tl.float32
            else x.data
            for x in (a, b)
        )
    else:
        a_data, b_data = a.data.astype(np.int32), b.data.astype(np.int32)
    return interpreter.TensorHandle(np.matmul(a_data, b_data) + d.data, d.dtype.scalar)


def repair() -> None:
    """For the rest of this process."""
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
