"""Calls of torch_npu's fused ops, each checked against its contract the first time that its shapes come."""

from collections.abc import Mapping
from typing import Any

import torch
import torch_npu
from torch import Tensor

from expertmesh.kernels.npu.contracts import CONTRACTS, PUBLISHED, Limit

# Shapes that are remembered as checked. Rows of prompts come in any number, so there is no end to them.
MOST_SEEN = 1 << 16


class Ops:
    """The fused ops of a card with these limits."""

    def __init__(self, limits: Mapping[str, Limit] = PUBLISHED) -> None:
        self._limits = limits
        self._seen: set[tuple[Any, ...]] = set()

    def allows(self, op: str, dtype: torch.dtype, **sizes: int) -> bool:
        """Whether the op takes numbers of this type and these sizes, by the letters of its contract."""
        return self._limit(op).allows(dtype, sizes)

    def call(self, op: str, *arguments: Any, **options: Any) -> Any:
        """op: the name of a contract: the op's own, or with the way to call it behind a colon. Arguments by position
        are the first of the contract. KernelFailure where the contract is broken."""
        key = (op, *map(_signature, arguments), *options, *map(_signature, options.values()))
        if key not in self._seen:
            contract = CONTRACTS[op]
            name = op.partition(":")[0]
            contract.check(
                name, self._limit(op), {**dict(zip(contract.tensors, arguments, strict=False)), **options}
            )
            if len(self._seen) >= MOST_SEEN:
                self._seen.clear()
            self._seen.add(key)
        return getattr(torch_npu, op.partition(":")[0])(*arguments, **options)

    def _limit(self, op: str) -> Limit:
        return self._limits.get(op, Limit())


def _signature(argument: Any) -> Any:
    """What a contract is about: not the numbers in tensors, nor how long sequences are just now."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype
    if isinstance(argument, list):
        return len(argument), _signature(argument[0]) if argument and isinstance(argument[0], Tensor) else 0
    return argument
