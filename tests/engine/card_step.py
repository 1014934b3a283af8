"""A step of a model of DeepSeek-V3's shapes on a card that has no memory: torch's fake tensors, which know where they
are and refuse whatever mixes places. A program of its own, since torch has one name for such a card in a process.

Prints where the results lie, what was copied to the host, and the ops that copied numbers to the card.
"""

import json
import sys
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from expertmesh.comm.alone import Alone
from expertmesh.config import EngineConfig, ModelConfig
from expertmesh.device import Device
from expertmesh.engine.memory import new_weights
from expertmesh.engine.plan import Plan
from expertmesh.engine.runner import Runner
from expertmesh.kernels import kernels_for
from expertmesh.model.deepseek import DeepSeek
from expertmesh.request import Batch, Request, SamplingParams, Slice
from expertmesh.weights import Shard
from tests.support.files import official_config

LAYERS = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}


class Crossings(TorchDispatchMode):
    """Counts ops between the card and the host, by direction."""

    def __init__(self, where: torch.device) -> None:
        super().__init__()
        self.where, self.found = where, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {a.device.type for a in args if isinstance(a, Tensor) and a.dim()}
        if isinstance(out, Tensor) and given and out.device.type not in given:
            self.found[f"{func.overloadpacket.__name__} to {out.device.type}"] += 1
        return out


def requests() -> list[Slice]:
    """Two that decode, then a prompt, the rest of one whose beginning is known, and one with a tail."""
    params = SamplingParams(max_tokens=4, temperature=0)
    lengths, counts = (40, 7, 50, 90, 70), (1, 1, 50, 26, 33)
    slices = []
    for number, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        prompt = length - 1 if count == 1 else length
        request = Request(f"r{number}", list(range(length)), prompt, params, seed=0)
        request.pages.extend(range(number * 4, number * 4 + 4))
        slices.append(Slice(request, length - count, count))
    return slices


def main() -> None:
    _setup_privateuseone_for_python_backend("npu")
    model_config = ModelConfig.from_dict(official_config("deepseek-v3") | LAYERS)
    device = Device("npu", 0, torch.device("npu", 0))
    config = EngineConfig(dtype="bfloat16", page_size=32, cache_tokens=32 * 32, max_context=512).resolve(
        model_config, 0
    )
    sys.modules["triton"] = None  # type: ignore[assignment]  # library kernels, also where it is installed
    kernels = kernels_for("npu", "bfloat16")
    answers = []

    def to_list(tokens: Tensor) -> list[int]:
        answers.append([*tokens.shape, tokens.device.type])
        return [1] * len(tokens)

    crossings = Crossings(device.where)
    with (
        FakeTensorMode(),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        mock.patch.object(FakeTensor, "tolist", to_list),
    ):
        new = new_weights(config, "bfloat16", device.where, kernels)
        model = DeepSeek(model_config, Shard.whole(model_config), kernels, new)
        runner = Runner(model, config, Alone(), device)
        batch = Batch.of(requests())
        with crossings:
            result = runner.run(batch, Plan(1, 1, "even", batch.rows))
        loads = {layer: [*counts.shape, counts.device.type] for layer, counts in runner.loads.counts.items()}
    print(
        json.dumps(
            {
                "kernels": sorted(set(kernels.origin.values())),
                "answers": answers,
                "sampled": {key: chosen.token for key, chosen in result.sampled.items()},
                "crossings": crossings.found,
                "loads": loads,
            }
        )
    )


if __name__ == "__main__":
    main()
