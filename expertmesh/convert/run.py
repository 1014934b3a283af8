"""A conversion from its first check to the index, which is written last; begun again, it goes on where it was."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from expertmesh.config import ModelConfig
from expertmesh.config.model import DESCRIPTIONS, read_object
from expertmesh.convert.files import PART, Tensors, alone_in, checksum, copy, told, whole, write_json
from expertmesh.convert.formats import Target, target_of
from expertmesh.convert.journal import FILE, Journal, fingerprint
from expertmesh.convert.shards import Shard, plan
from expertmesh.engine.checkpoint import Checkpoint, open_checkpoint
from expertmesh.errors import InputError
from expertmesh.weights import Weight

DESCRIPTION = "quant_model_description.json"
SHARD_SIZE = 4_000_000_000
# Numbers of a tensor that are in memory at a time. What is made of them on the way takes as much several times over,
# all together less than MEMORY bytes, whatever the size of the model and of its tensors.
NUMBERS = 1 << 21
MEMORY = 256 << 20
ROWS = 128  # rows come in multiples of so many: the blocks of FP8
# Of the source: weights, what is written anew, and what only its own weights need.
LEFT = (
    "*.safetensors",
    "*.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "config.json",
    DESCRIPTIONS,
    FILE,
    f"*{PART}",
)
Told: TypeAlias = Callable[[int, int], None]  # bytes written so far, and in all


@dataclass(frozen=True)
class Conversion:
    """What is to be done, checked: see `prepare`."""

    checkpoint: Checkpoint
    target: Target
    out: Path
    shard_size: int
    shards: list[Shard]

    @property
    def others(self) -> list[Path]:
        """Files of the source that come along as they are: tokenizer, generation_config.json, model card."""
        files = sorted(p for p in self.checkpoint.folder.iterdir() if p.is_file())
        return [p for p in files if not p.name.startswith(".") and not any(p.match(left) for left in LEFT)]

    @property
    def rest(self) -> list[str]:
        """The files that come after the shards. The index is the last: without it nobody takes the folder for a
        checkpoint."""
        described = [] if self.target.type is None else [DESCRIPTION]
        return [*(p.name for p in self.others), "config.json", *described, self.target.index]


def prepare(folder: Path, to: str, out: Path, shard_size: int = SHARD_SIZE) -> Conversion:
    """Check what can be checked before anything is written. InputError where the conversion cannot be."""
    model = ModelConfig.from_folder(folder)
    target = target_of(to, model)
    source, place = folder.resolve(), out.resolve()
    if place == source or source in place.parents:
        raise InputError(f"--out {out}: is inside of the source, which stays as it is; name another folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file, not a folder")
    checkpoint = open_checkpoint(folder, model)
    return Conversion(checkpoint, target, out, shard_size, plan(checkpoint, target, shard_size))


def convert(c: Conversion, tell: Told = lambda done, total: None) -> None:
    """Write what is not there yet. InputError where there is no room, or the folder holds something else."""
    with told(c.out):
        c.out.mkdir(parents=True, exist_ok=True)
        with alone_in(c.out):
            source = fingerprint(c.checkpoint)
            journal = Journal.open(c.out, source, c.target.name, c.shard_size)
            left = [shard for shard in c.shards if not journal.has(c.out, shard.file)]
            if not left and all((c.out / name).is_file() for name in c.rest):
                return
            for part in c.out.glob(f"*{PART}"):  # of one that was killed; it takes room
                part.unlink()
            _check_room(c, left)
            total, done = sum(shard.nbytes for shard in left), 0
            for shard in left:
                size = _write(c, shard, lambda count, done=done: tell(done + count, total))  # type: ignore[misc]
                done += shard.nbytes
                journal.done[shard.file] = size, checksum(c.out / shard.file)
                journal.write(c.out)
            if fingerprint(c.checkpoint) != source:
                raise InputError(
                    f"{c.checkpoint.folder}: has been changed meanwhile; begin again in another folder"
                )
            _finish(c)


def _check_room(c: Conversion, left: list[Shard]) -> None:
    wanted = sum(shard.nbytes for shard in left) + sum(p.stat().st_size for p in c.others)
    free = shutil.disk_usage(c.out).free
    if wanted > free:
        raise InputError(
            f"{c.out}: {wanted / 1e6:,.1f} MB are to be written, and the disk has {free / 1e6:,.1f} MB free; make "
            "room, or name a folder of another disk"
        )


def _write(c: Conversion, shard: Shard, tell: Callable[[int], None]) -> int:
    """Returns the size of the file."""
    path = c.out / shard.file
    count = 0
    with whole(path) as handle:
        tensors = Tensors(handle, shard.tensors)
        for weight in shard.weights:
            form = c.target.form(weight)
            names = [t for t in form.tensors(weight) if t.constant is None]
            for rows in pieces(c.checkpoint, weight):
                for tensor, values in zip(names, form.encode(rows), strict=True):
                    tensors.append(tensor.name, values)
                    count += values.nbytes
                tell(count)
            for tensor in form.tensors(weight):
                if tensor.constant is not None:
                    tensors.append(tensor.name, Tensor(tensor.constant).to(tensor.dtype))
    return path.stat().st_size


def pieces(checkpoint: Checkpoint, weight: Weight) -> Iterator[Tensor]:
    """All rows of a weight as float32, a few at a time. InputError where numbers are not finite."""
    count = weight.shape[0]
    step = max(1, NUMBERS * count // max(1, weight.numel) // ROWS) * ROWS
    for first in range(0, count, step):
        rows = checkpoint.stored[weight.name].rows(first, min(first + step, count))
        if not rows.sum().isfinite():  # what is not finite shows in a sum
            raise InputError(f"{checkpoint.folder}: {weight.name} holds numbers that are not finite")
        yield rows


def _finish(c: Conversion) -> None:
    """All that is no weight, in the order of `Conversion.rest`."""
    for path in c.others:
        copy(path, c.out / path.name)
    fields = read_object(c.checkpoint.folder / "config.json")
    write_json(c.out / "config.json", c.target.config(fields, c.checkpoint.config))
    if c.target.type is not None:
        write_json(c.out / DESCRIPTION, _description(c))
    places = {tensor.name: shard.file for shard in c.shards for tensor in shard.tensors}
    size = sum(shard.nbytes for shard in c.shards)
    write_json(c.out / c.target.index, {"metadata": {"total_size": size}, "weight_map": places})


def _description(c: Conversion) -> dict[str, object]:
    """ModelSlim's: the type of every tensor, and of the whole."""
    names: dict[str, object] = {
        tensor.name: c.target.type if c.target.form(weight) is c.target.quantised else "FLOAT"
        for shard in c.shards
        for weight in shard.weights
        for tensor in c.target.form(weight).tensors(weight)
    }
    about: dict[str, object] = {
        "model_quant_type": c.target.type,
        "version": "1.0.0",
        "group_size": 0,
        "metadata": {},
        "optional": {},
    }
    return about | names


def converted(out: Path) -> Checkpoint:
    """What was written, read as any other checkpoint."""
    return open_checkpoint(out, ModelConfig.from_folder(out))
