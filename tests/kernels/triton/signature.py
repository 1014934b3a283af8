"""What a compiler is told of a kernel's arguments before there are any."""

from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels.triton.kernel import Kernel

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
    torch.int8: "*i8", torch.uint8: "*u8", torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip


def signature(kernel: Kernel, every: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Types by name, constants by name, and which arguments are divisible by 16, as a launch would have them."""
    types, constants, attributes = {}, {}, {}
    for place, (name, constant) in enumerate(kernel.parameters.items()):
        value = every[name]
        if constant or value is None:
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name] = TYPES[value.dtype]
        else:
            types[name] = "i32" if isinstance(value, int) else "fp32"
        if types[name][0] == "*" or (types[name] == "i32" and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return types, constants, attributes
