"""torchvision's residual networks fitted to small images, and one of the same layout for the digits.

All have a stem (`conv1`, `bn1`), stages `layer1`, `layer2`, … of residual blocks, and a linear classifier `fc`.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from moebench.errors import UsageError

Backbone = Literal["auto", "small", "resnet18", "resnet50", "wide-resnet50"]

SMALL = 16
"""Largest side of the images that "auto" gives to the small network."""

CIFAR = 64
"""Largest side of the images that get a 3×3 stem without pooling, as is usual for CIFAR."""


class SmallResNet(nn.Module):
    """ResNet-12 for images such as the digits: three stages of 1, 2 and 2 blocks with 16, 16 and 32 channels.

    The last two stages have half the image's side: an 8×8 image ends in 4×4 maps.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks=1, stride=1)
        self.layer2 = _stage(16, 16, blocks=2, stride=2)
        self.layer3 = _stage(16, 32, blocks=2, stride=1)
        self.fc = nn.Linear(32, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of normalised images (B, C, H, W)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.fc(out.mean(dim=(2, 3)))
        return logits


def _stage(inputs: int, outputs: int, *, blocks: int, stride: int) -> nn.Sequential:
    from torchvision.models.resnet import BasicBlock  # type: ignore[import-untyped]

    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(
        BasicBlock(inputs, outputs, stride, shortcut), *(BasicBlock(outputs, outputs) for _ in range(blocks - 1))
    )


def initialise(module: nn.Module) -> None:
    """He's initialisation of convolutions by their outputs, BatchNorm as the identity; as torchvision does."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def make_backbone(name: Backbone, num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """A residual network that maps normalised images of a shape (C, H, W) to logits.

    "auto" is the small network up to 16 pixels and ResNet-18 above. torchvision's networks get a 3×3 stem of stride 1
    without pooling for images of up to 64 pixels, and keep their own for larger ones.

    Raises:
        UsageError: no such network.
    """
    if name not in get_args(Backbone):
        raise UsageError(f"backbone must be one of {', '.join(get_args(Backbone))}, got {name!r}")
    channels, height, width = shape
    if name == "small" or (name == "auto" and max(height, width) <= SMALL):
        return SmallResNet(num_classes, channels)
    from torchvision.models import resnet  # type: ignore[import-untyped]

    builders = {"resnet50": resnet.resnet50, "wide-resnet50": resnet.wide_resnet50_2}
    network: nn.Module = builders.get(name, resnet.resnet18)(num_classes=num_classes)
    if max(height, width) <= CIFAR:
        network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    initialise(network.get_submodule("conv1"))
    return network
