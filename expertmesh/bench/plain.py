"""The same checkpoint without its FP8 blocks or whole numbers, for engines that cannot read them here."""

import json
from pathlib import Path

import torch
from torch import Tensor

from expertmesh.engine.checkpoint import Checkpoint, load
from expertmesh.errors import InputError
from expertmesh.weights import Shard


def write_plain_copy(checkpoint: Checkpoint, folder: Path, dtype: str) -> Path:
    """Write the main model (without MTP layers) in a plain type. Returns the folder."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise InputError("comparing on a quantised checkpoint needs `pip install safetensors`") from None
    config = checkpoint.config
    tensors: dict[str, Tensor] = {}
    for name in checkpoint.stored:
        weight = checkpoint.weights[name]
        mtp = weight.layer is not None and weight.layer >= config.num_hidden_layers
        if not mtp:
            kind = torch.float32 if weight.dtype == "float32" else getattr(torch, dtype)
            tensors[name] = torch.empty(weight.shape, dtype=kind)
    load(checkpoint, tensors, Shard.whole(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    data = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    data.pop("quantization_config", None)
    data["torch_dtype"] = data["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    return folder
