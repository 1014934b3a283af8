"""Which tensor is written to which file: settled from names and sizes, before anything is read."""

from dataclasses import dataclass

from expertmesh.convert.formats import Target, Written
from expertmesh.engine.checkpoint import Checkpoint
from expertmesh.weights import Weight


@dataclass(frozen=True)
class Shard:
    """One file. weights: of the model, in the order in which they are read."""

    file: str
    weights: tuple[Weight, ...]
    tensors: tuple[Written, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def plan(checkpoint: Checkpoint, target: Target, limit: int) -> list[Shard]:
    """Files of at most `limit` bytes of tensors each, or of one weight that is larger, in the order of the layers. What
    a weight is written as stays together."""
    groups: list[list[Weight]] = []
    room = 0
    for name in checkpoint.stored:
        weight = checkpoint.weights[name]
        size = sum(tensor.nbytes for tensor in target.form(weight).tensors(weight))
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(weight)
        room -= size
    return [
        Shard(
            f"{target.prefix}-{number:05}-of-{len(groups):05}.safetensors",
            tuple(group),
            tuple(tensor for weight in group for tensor in target.form(weight).tensors(weight)),
        )
        for number, group in enumerate(groups, 1)
    ]
