"""What `doctor --accelerator` examines ops with, on torch_npu's with the published semantics: small ones
without limits, and within those of a card; DeepSeek-V3's within them; and tokens of models that run through them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from expertmesh.bench.accelerator.cases import cases
from expertmesh.bench.accelerator.checks import check_op
from expertmesh.bench.accelerator.outcome import NotApplicable
from expertmesh.bench.accelerator.sizes import MIXED, RAGGED, Batch, Sizes
from expertmesh.bench.accelerator.tokens import check_converted, check_tokens
from expertmesh.device import Device
from expertmesh.engine import engine
from expertmesh.kernels import Kernels, kernels_for
from expertmesh.kernels.npu.contracts import PUBLISHED
from expertmesh.kernels.table import fused_by_ascend
from tests.kernels.npu.published import registered
from tests.kernels.npu.recording import Recorder, name_of

# DeepSeek-V3's sizes where ops take no others, and few of the rest.
LIKE_V3 = replace(
    RAGGED, name="like V3", hidden=7168, heads=2, q_lora=1536, latent=512, rope=64, nope=128, value=128, inner=64,
    slots=2,
)  # fmt: skip
FEW = Batch("two decode, a prompt", ((130, 1), (7, 1), (9, 5)))
SMALL = Sizes(
    ((RAGGED, (MIXED,)),), {RAGGED.name: ("float32", "bfloat16", "w8a8")}, rounds=3, repeats=2, seconds=0.0
)  # fmt: skip
ALL = replace(
    SMALL, models=(*SMALL.models, (LIKE_V3, (FEW,))),
    precisions=SMALL.precisions | {LIKE_V3.name: ("bfloat16", "w8a8", "fp8")},
)  # fmt: skip
HERE = Device("npu")  # its kernels, and tensors on the processor
TOKENS = 4  # of each prompt


def of_type(kind: str, dtype: str, strict: bool) -> Kernels:
    """Ascend's, and the processor's for the reference."""
    return fused_by_ascend() if dtype == "bfloat16" else kernels_for(kind, dtype, strict)


def written() -> Iterator[dict[str, Any]]:
    with mock.patch.object(engine, "kernels_for", of_type):
        yield {"written": "bf16", **check_tokens({"device": "cpu"}, 1, TOKENS)}
        yield {"written": "w8a8", **check_converted({"device": "cpu"}, "w8a8", 1, TOKENS)}


def check() -> Iterator[dict[str, Any]]:
    import torch_npu  # noqa: F401

    torch.set_num_threads(1)
    library = registered()
    yield from written()
    for limits, sizes in (({}, SMALL), (PUBLISHED, ALL)):
        kernels = fused_by_ascend(limits)
        for case in cases(sizes):
            line = {
                "op": case.op,
                "size": case.shape.name,
                "precision": case.precision,
                "limits": bool(limits),
            }
            try:
                with Recorder() as recorder:
                    found = check_op(case, kernels, HERE, sizes)
                calls = sorted({name_of(func) for func, *_ in recorder.calls.values()})
                yield line | found | {"calls": calls}
            except NotApplicable as error:
                yield line | {"none": str(error)}
    del library
