"""ViT-small, the experts of RT-ER on large images, from torchvision's parts (Dosovitskiy et al., 2021)."""

from __future__ import annotations

from torch import nn
from torchvision.models.vision_transformer import VisionTransformer  # type: ignore[import-untyped]

from moebench.errors import UsageError

SIZES = {
    # largest side: (patch, layers, heads, hidden); the MLP is four times as wide as the hidden layer
    16: (2, 2, 4, 32),
    64: (4, 6, 4, 128),
}
"""Smaller siblings for images on which 16-pixel patches would leave a few tokens only."""

VIT_S_16 = (16, 12, 6, 384)
"""ViT-S/16 (Touvron et al., 2021, arXiv 2012.12877, table 1): 21.7 million parameters for 200 classes at 224 pixels."""


def vit_small(num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """A vision transformer by image size: ViT-S/16 above 64 pixels, smaller ones with finer patches below.

    Its weights are drawn anew: the paper starts from weights trained on ImageNet, which are not fetched here.

    Args:
        num_classes: K.
        shape: (C, H, W), square, the side a multiple of the patch (16, 4 up to 64 pixels, 2 up to 16).

    Raises:
        UsageError: images of another shape.
    """
    channels, height, width = shape
    patch, layers, heads, hidden = next((SIZES[side] for side in SIZES if height <= side), VIT_S_16)
    if height != width or height % patch != 0:
        raise UsageError(
            f"a ViT needs square images whose side is a multiple of its patch of {patch} pixels, "
            f"got {channels}×{height}×{width}"
        )
    network: nn.Module = VisionTransformer(height, patch, layers, heads, hidden, 4 * hidden, num_classes=num_classes)
    if channels != 3:
        # torchvision's patch embedding is for colour images.
        network.conv_proj = nn.Conv2d(channels, hidden, patch, stride=patch)
    return network
