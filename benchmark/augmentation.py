"""Augmentation of training images; the random numbers are torch's, whose state a checkpoint keeps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moebench.models._base import Recipe


def augmented(x: Tensor, recipe: Recipe) -> Tensor:
    """Images (B, C, H, W), half of them flipped where the recipe asks, shifted by up to `translate`, filled with 0."""
    if recipe.flip:
        x = torch.where(torch.rand(len(x), 1, 1, 1).to(x.device) < 0.5, x.flip(3), x)
    reach = recipe.translate
    if reach == 0:
        return x
    height, width = x.shape[-2:]
    padded = F.pad(x, (reach, reach, reach, reach))
    shifts = torch.randint(0, 2 * reach + 1, (len(x), 2))
    return torch.stack([padded[i, :, dy : dy + height, dx : dx + width] for i, (dy, dx) in enumerate(shifts.tolist())])
