"""From a folder in the Hugging Face layout to one rank's weights: check everything first, then read only my ranges."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from expertmesh.config import ModelConfig
from expertmesh.engine.quantised import FLOATS, claim
from expertmesh.engine.safetensors import Entry, read_header
from expertmesh.engine.storage import Fp8Blocks, Plain, Stored
from expertmesh.errors import InputError
from expertmesh.model.layers import Destinations
from expertmesh.weights import Shard, Weight, describe

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# As ModelSlim calls them, in several versions of it.
INDICES, SINGLES = "quant_model_weight*.safetensors.index.json", "quant_model_weight*.safetensors"
# Tables that some checkpoints carry and every engine computes.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
Progress: TypeAlias = Callable[[int, int], None]  # bytes so far, and in all


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are whole and whose tensors are those of the model.

    entries: the files' tensors; stored: of the model's tensors that are there, how the files keep them.
    """

    folder: Path
    config: ModelConfig
    weights: dict[str, Weight]
    entries: dict[str, Entry]
    stored: dict[str, Stored]

    @property
    def has_mtp(self) -> bool:
        return any(self.weights[name].layer == self.config.num_hidden_layers for name in self.stored)

    @property
    def bytes(self) -> int:
        return sum(entry.length for entry in self.entries.values())


def open_checkpoint(folder: Path, config: ModelConfig) -> Checkpoint:
    """Read all headers and compare them with the description of the model.

    Raises one InputError that names every missing, surplus and misshapen tensor. MTP layers may be absent as a
    whole: transformers writes checkpoints whose configuration names them without their tensors.
    """
    weights = {weight.name: weight for weight in describe(config)}
    entries: dict[str, Entry] = {}
    for file in _files(folder):
        entries |= read_header(file)
    entries = {n: e for n, e in entries.items() if not n.endswith(IGNORED_SUFFIXES)}
    if config.tie_word_embeddings:
        entries.pop("lm_head.weight", None)
    claims = claim(folder, config, weights, entries)
    found = {name: entry for name, entry in entries.items() if name not in claims.taken}
    there = found.keys() | claims.matrices
    # What belongs to the next-token prediction layers is all there or not there at all.
    mtp = {n for n, w in weights.items() if w.layer is not None and w.layer >= config.num_hidden_layers}
    expected = weights.keys() if mtp & there else weights.keys() - mtp
    problems = [f"missing: {name}" for name in weights if name in expected and name not in there]
    problems += [f"surplus: {name}" for name in found if name not in weights]
    problems += [problem for n, e in found.items() if n in weights for problem in _misfit(n, e, weights[n])]
    problems += claims.problems
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise InputError(
            f"{folder}: the tensors do not fit config.json ({len(problems)} problems):\n  "
            + "\n  ".join(shown)
        )
    stored = {
        name: claims.stored.get(name) or _stored(name, found, config)
        for name in weights
        if name in there and not name.endswith("_scale_inv")
    }
    return Checkpoint(folder, config, weights, entries, stored)


def _misfit(name: str, entry: Entry, weight: Weight) -> list[str]:
    """Floating-point numbers may be of any precision but FP8, which needs its scales."""
    if entry.shape != weight.shape:
        return [f"shape of {name}: {list(entry.shape)} in the file, {list(weight.shape)} in the model"]
    if entry.dtype not in ((torch.float8_e4m3fn,) if weight.dtype == "float8_e4m3fn" else FLOATS):
        return [f"type of {name}: {entry.dtype} in the file, {weight.dtype} by config.json"]
    return []


def _stored(name: str, entries: dict[str, Entry], config: ModelConfig) -> Stored:
    scale = entries.get(f"{name}_scale_inv")
    if scale is None:
        return Plain(entries[name])
    assert config.fp8_block is not None
    return Fp8Blocks(name, entries[name], scale, config.fp8_block)


def _files(folder: Path) -> list[Path]:
    index, single = _one(folder, INDEX, INDICES), _one(folder, SINGLE, SINGLES)
    if index.is_file():
        try:
            data = json.loads(index.read_text(encoding="utf-8"))
            names = sorted(set(data["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise InputError(f"{index}: cannot be read as an index of shards ({error})") from None
        outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise InputError(f"{index}: names files outside the folder: {', '.join(map(str, outside))}")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise InputError(_missing_shards(folder, names, absent, data.get("metadata") or {}))
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
    hint = f"; {others[0]} is of a format that is not read, convert it to safetensors" if others else ""
    raise InputError(f"{folder}: there is neither {SINGLE} nor {INDEX} in it{hint}")


def _one(folder: Path, official: str, others: str) -> Path:
    """The official file of this purpose, or the only one that ModelSlim would call so."""
    found = sorted(folder.glob(others))
    return found[0] if len(found) == 1 and not (folder / official).exists() else folder / official


def _missing_shards(folder: Path, names: list[str], absent: list[str], metadata: dict[str, object]) -> str:
    message = f"{folder}: {len(absent)} of {len(names)} shards are missing: {', '.join(absent[:5])}"
    if len(absent) > 5:
        message += f" and {len(absent) - 5} more"
    total = metadata.get("total_size")
    if isinstance(total, int):
        here = sum((folder / name).stat().st_size for name in names if name not in absent)
        free = shutil.disk_usage(folder).free
        left = max(0, total - here)
        message += f"; {_gb(left)} are still to come, and the disk has {_gb(free)} free"
        if left > free:
            message += ": too small for this model"
    return message


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def check_memory(folder: Path, wanted: int, free: int) -> None:
    """Say before loading that a model is too large, rather than be killed in the middle of it."""
    if wanted > free:
        raise InputError(
            f"{folder}: its weights take {_gb(wanted)} in memory and {_gb(free)} are free here; "
            "use a machine with more memory, or bfloat16 instead of float32"
        )


def load(
    checkpoint: Checkpoint, destinations: Destinations, shard: Shard, progress: bool | Progress = False
) -> int:
    """Fill one rank's destinations from the checkpoint. Returns the bytes read."""
    return load_ranks(checkpoint, [(destinations, shard)], progress)


def load_ranks(
    checkpoint: Checkpoint, ranks: Sequence[tuple[Destinations, Shard]], progress: bool | Progress = False
) -> int:
    """Fill the destinations of several ranks of this process, file by file in the order of the bytes; what ranks
    share is read once. Returns the bytes read.

    Each tensor is mapped, its range of a rank copied (as numbers, or as it is) and unmapped, so that memory holds the
    weights and at most one tensor of the file. progress: whether to show it on a terminal, or who is told instead.
    """
    seen: dict[tuple[str, int], tuple[Entry, str, Tensor, Shard]] = {}
    for destinations, shard in ranks:
        for name, target in destinations.items():
            seen.setdefault(
                (name, target.data_ptr()), (checkpoint.stored[name].entries[0], name, target, shard)
            )
    wanted = sorted(seen.values(), key=lambda item: (item[0].file, item[0].offset))
    for file in {entry.file for _, name, *_ in wanted for entry in checkpoint.stored[name].entries}:
        if not os.access(file, os.R_OK):
            raise InputError(f"{file}: cannot be read (permissions)")
    read = 0
    # No bar where standard error is no terminal: logs are not animated.
    total = sum(t.numel() * t.element_size() for _, _, t, _ in wanted)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="loading", leave=False,
        disable=None if progress is True else True,
    ) as bar:  # fmt: skip
        done = 0
        for _, name, target, shard in wanted:
            read += _load_one(checkpoint, name, target, shard)
            size = target.numel() * target.element_size()
            bar.update(size)
            done += size
            if callable(progress):
                progress(done, total)
    return read


def _load_one(checkpoint: Checkpoint, name: str, target: Tensor, shard: Shard) -> int:
    weight = checkpoint.weights[name]
    ranges = [
        shard.part(size, name) if weight.split == axis else range(size)
        for axis, size in enumerate(weight.shape)
    ]
    return checkpoint.stored[name].load(ranges, target)
