"""The latent cache as torch_npu's ops have it: latents and rotary keys in tensors of their own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from expertmesh.kernels.memory import zeros

# Tokens of a page that decoding takes, the one for long sequences first.
PAGE_SIZES = (128, 16)


@dataclass(frozen=True)
class Pages:
    """Of one layer: latents [pages, page, 1, C] and rotated keys [pages, page, 1, P]; 1 is the head that all share."""

    latents: Tensor
    keys: Tensor

    @property
    def nbytes(self) -> int:
        return self.latents.nbytes + self.keys.nbytes

    def by_head(self) -> tuple[Tensor, Tensor]:
        """[pages, 1, page, C] and [pages, 1, page, P], the same memory."""
        return self.latents.transpose(1, 2), self.keys.transpose(1, 2)

    def known(self, pages_M: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first tokens of these pages, [length, C] and [length, P]."""
        latents, keys = (t[pages_M].flatten(0, 2)[:length] for t in (self.latents, self.keys))
        return latents, keys


def latent_cache(
    pages: int, page: int, latent: int, rope: int, dtype: torch.dtype, device: torch.device
) -> Pages:
    return Pages(zeros((pages, page, 1, latent), dtype, device), zeros((pages, page, 1, rope), dtype, device))
