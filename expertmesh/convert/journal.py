"""What has been converted so far, of what, and to what: a file of the folder, written anew with each shard."""

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from expertmesh.config.model import read_object
from expertmesh.convert.files import write_json
from expertmesh.engine.checkpoint import Checkpoint
from expertmesh.errors import InputError

FILE = "conversion.json"
SAMPLES, SAMPLE = 16, 4096


@dataclass
class Journal:
    """source: as `fingerprint` has it; done: bytes and SHA-256 of every finished shard."""

    source: str
    target: str
    shard_size: int
    done: dict[str, tuple[int, str]] = field(default_factory=dict)

    @classmethod
    def open(cls, out: Path, source: str, target: str, shard_size: int) -> "Journal":
        """Of this folder, or a new one. InputError where it is of another conversion, or other things are in it."""
        new = cls(source, target, shard_size)
        path = out / FILE
        if not path.exists():
            others = sorted(p.name for p in out.iterdir() if not p.name.startswith(FILE))
            if others:
                raise InputError(
                    f"{out}: has {others[0]} in it, which is of no conversion; name another folder"
                )
            new.write(out)
            return new
        old = cls.read(out)
        for name, what in (("source", "another source"), ("target", "--to"), ("shard_size", "--shard-size")):
            if getattr(old, name) != getattr(new, name):
                given = "" if name == "source" else f" {getattr(old, name)}"
                raise InputError(
                    f"{out}: was begun with {what}{given}; go on with that, or name another folder"
                )
        return old

    @classmethod
    def read(cls, out: Path) -> "Journal":
        path = out / FILE
        try:
            data: dict[str, Any] = read_object(path)
            done = {str(name): (int(size), str(digest)) for name, (size, digest) in data["done"].items()}
            return cls(str(data["source"]), str(data["target"]), int(data["shard_size"]), done)
        except (InputError, KeyError, TypeError, ValueError, AttributeError):
            raise InputError(
                f"{path}: is no journal of a conversion, or damaged; delete the folder, or name another one"
            ) from None

    def write(self, out: Path) -> None:
        write_json(out / FILE, asdict(self))

    def has(self, out: Path, file: str) -> bool:
        """Whether this shard is finished and there."""
        if file not in self.done:
            return False
        try:
            return (out / file).stat().st_size == self.done[file][0]
        except OSError:
            return False


def fingerprint(checkpoint: Checkpoint) -> str:
    """Of a checkpoint, wherever it lies: its config.json, and of each file its size, its header and some of its bytes
    all over it. To read all of it would take as long as to convert it."""
    digest = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    first: dict[Path, int] = {}
    for entry in checkpoint.entries.values():
        first[entry.file] = min(entry.offset, first.get(entry.file, entry.offset))
    for file in sorted(first):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(first[file]))
            for i in range(SAMPLES):
                stream.seek(first[file] + (size - first[file]) * i // SAMPLES)
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()
