"""What attention finds in each split of a selection, before it is merged."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Parts:
    """What splits found: means float32 [T, H, splits, latent], and for their merging maxima and sums [T, H, splits]."""

    means: torch.Tensor
    maxima: torch.Tensor
    sums: torch.Tensor
