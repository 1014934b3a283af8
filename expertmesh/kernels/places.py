"""Where a loader puts the rows of a checkpoint's tensor, where kernels want them in another order."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor in an order of their own: row i of what is copied becomes row places_X[i] of `tensor`."""

    tensor: Tensor
    places_X: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.places_X.shape[0], *self.tensor.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self.tensor.element_size()

    def data_ptr(self) -> int:
        return self.tensor.data_ptr()

    def __getitem__(self, rows: slice) -> "Rows":
        return Rows(self.tensor, self.places_X[rows])

    def copy_(self, values: Tensor) -> None:
        self.tensor[self.places_X.to(self.tensor.device)] = values.to(self.tensor)


def de_interleaved(tensor: Tensor, rope: int, heads: int = 1) -> Rows:
    """For a weight [heads * (... + rope), Y], or a bias, whose heads end with rows of rotary parts: of the pairs that
    lie side by side in a checkpoint, all first rows before all second ones."""
    width = tensor.shape[0] // heads
    pairs = torch.arange(rope).view(2, -1).t().flatten()
    order = torch.cat((torch.arange(width - rope), width - rope + pairs))
    return Rows(tensor, (torch.arange(heads)[:, None] * width + order).flatten())
