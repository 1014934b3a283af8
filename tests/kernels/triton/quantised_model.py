"""The first layers of the demo model with weights of 8 bits on Triton's interpreter: what they think of a text, and
go on with, against the same by the CPU's own kernels."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from shutil import copyfile
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertmesh import LLM, SamplingParams, Topology
from expertmesh.comm import local
from expertmesh.engine import engine
from expertmesh.errors import InputError
from expertmesh.kernels import Kernels, kernels_for
from expertmesh.kernels.table import accelerated
from expertmesh.kernels.triton import tiles
from expertmesh.kernels.triton.tiles import CPU
from expertmesh.llm import demo_model
from tests.convert.checkpoints import made
from tests.kernels.triton import small_floats
from tests.kernels.triton.example import Example
from tests.kernels.triton.model import PAIR, large

TEXT = "Once upon a time there"
LAYERS = 2
Table = Mapping[str, Mapping[str, Mapping[str, int]]]


def judged(folder: Path, kernels: Kernels, topology: Topology = Topology(), **options: Any) -> dict[str, Any]:  # noqa: B008 (frozen)
    """kept: in which precision; chances: the logarithm of the probability of each token of the text; tokens: the one
    that follows; bytes: of a rank's weights by kind."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True)
    with (
        mock.patch.object(engine, "kernels_for", lambda *_: kernels),
        mock.patch.object(local, "cores", lambda: 1),
        LLM(folder, topology=topology, cache_tokens=64, **options) as llm,
    ):
        (output,) = llm.generate([TEXT], params)
        chances = [next(iter(step.values())) for step in output.prompt_logprobs or [] if step]
        kept, memory = llm.engine.config.quantise, llm.engine.ranks.memory
    return {"kept": kept, "chances": chances, "tokens": output.token_ids, "bytes": memory.kinds}


def lines(kernels: Kernels, scratch: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    demo, cpu = first_layers(scratch / "fp8"), kernels_for("cpu", "bfloat16")
    made(demo, "w8a8", scratch / "w8a8", 1 << 30)
    yield "cpu fp8", judged(demo, cpu, quantise="fp8")
    yield "cpu w8a8", judged(demo, cpu, quantise="w8a8")
    older = without_fp8(tiles.table())
    with mock.patch.object(tiles, "table", lambda: older):
        yield "fp8 by its bytes", judged(demo, kernels)
    yield "fp8, two ranks", judged(demo, kernels, PAIR)
    yield "w8a8", judged(demo, kernels, quantise="w8a8")
    yield "w8a8, a checkpoint", judged(scratch / "w8a8", kernels)


def first_layers(folder: Path) -> Path:
    """The dense layer and one of experts, as the checkpoint has them."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for file in demo_model().iterdir():
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        elif file.name.startswith("tokenizer"):
            copyfile(file, folder / file.name)
    config = json.loads((demo_model() / "config.json").read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    others = tuple(f"model.layers.{layer}." for layer in range(LAYERS, 16))
    save_file({n: t for n, t in tensors.items() if not n.startswith(others)}, folder / "model.safetensors")
    return folder


def groups() -> Table:
    """Tiles for few steps of the interpreter, as large as the groups that share a scale."""
    table = large()
    for kernel in table:
        if kernel.startswith(("gate_up", "down", "quantise")):
            table[kernel][CPU] |= {name: 128 for name in ("BLOCK_I", "BLOCK_D") if name in table[kernel][CPU]}
    return table


def without_fp8(table: Table) -> Table:
    """As of a card that has none."""
    return {name: {} if name.endswith("_fp8") else targets for name, targets in table.items()}


def refused(kernels: Kernels) -> str:
    try:
        judged(demo_model(), kernels, quantise="experts_int4")
    except InputError as error:
        return str(error)
    return ""


def check(examples: list[Example]) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    small_floats.repair()
    kernels, table = accelerated("cuda"), groups()
    with mock.patch.object(tiles, "table", lambda: table), tempfile.TemporaryDirectory() as folder:
        for name, found in lines(kernels, Path(folder)):
            yield {"example": name, **found}
        yield {"example": "refused", "said": refused(kernels)}
