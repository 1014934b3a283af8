"""What a conversion has written, read again: the files against their checksums, every number against the source."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.linalg import vector_norm

from expertmesh.convert.files import checksum
from expertmesh.convert.journal import Journal
from expertmesh.convert.run import Conversion, converted, pieces
from expertmesh.errors import InputError


@dataclass
class Difference:
    """Of one kind of tensors. Of each, the relative error is the root of the mean square of its differences, over that
    of its numbers; of the kind here the worst, and the mean over all numbers. bound: how much of the error that the
    format may make is made at most."""

    tensors: int = 0
    numbers: int = 0
    worst: float = 0.0
    squares: float = 0.0
    differences: float = 0.0
    bound: float = 0.0

    @property
    def mean(self) -> float:
        return (self.differences / self.squares) ** 0.5 if self.squares else 0.0


def verify(
    c: Conversion, tell: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Difference]:
    """Differences by kind of tensor (`weights.Kind`). InputError where a file is not what was written, or a number is
    further from the source than its format explains."""
    _check_files(c)
    result = converted(c.out)
    found: dict[str, Difference] = {}
    weights = [weight for shard in c.shards for weight in shard.weights]
    total, done = sum(weight.numel for weight in weights), 0
    for weight in weights:
        form, kind = c.target.form(weight), found.setdefault(weight.kind, Difference())
        squares = differences = 0.0
        for before, after in zip(pieces(c.checkpoint, weight), pieces(result, weight), strict=True):
            off = (after - before).abs()
            bound = form.bound(before)
            if (off > bound).any():
                raise InputError(
                    f"{c.out}: {weight.name} is further from the source than {c.target.name} explains: "
                    f"{float(off.max()):.3g}; delete its shard and start again"
                )
            kind.bound = max(kind.bound, float((off / bound.clamp(min=1e-38)).max()))
            squares += float(vector_norm(before, dtype=torch.float64)) ** 2
            differences += float(vector_norm(off, dtype=torch.float64)) ** 2
            done += before.numel()
            tell(done, total)
        kind.tensors += 1
        kind.numbers += weight.numel
        kind.squares += squares
        kind.differences += differences
        kind.worst = max(kind.worst, (differences / squares) ** 0.5 if squares else 0.0)
    return found


def _check_files(c: Conversion) -> None:
    written = Journal.read(c.out).done
    for shard in c.shards:
        path, (size, digest) = c.out / shard.file, written[shard.file]
        if path.stat().st_size != size or checksum(path) != digest:
            raise InputError(
                f"{path}: is not what was written; delete it and start again: only it is made anew"
            )
