"""Residual networks for small images (He et al., 2016, arXiv 1512.03385, section 4.2), shared by several papers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Shortcut = Literal["conv", "pad"]


class PadShortcut(nn.Module):
    """The shortcut without parameters: every `stride`-th pixel, zeros for the new channels (option A of the paper)."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (planes - in_planes) // 2
        self.after = planes - in_planes - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def make_shortcut(in_planes: int, planes: int, stride: int, kind: Shortcut = "conv") -> nn.Module:
    """What a residual block adds to its output: its input, by a 1×1 convolution or padded where the shape changes."""
    if stride == 1 and in_planes == planes:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(in_planes, planes, stride)
    return nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, which becomes a 1×1 convolution where the shape changes."""

    def __init__(self, in_planes: int, planes: int, stride: int, shortcut: Shortcut = "conv") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = make_shortcut(in_planes, planes, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A residual classifier with a 3×3 stem and no max-pooling.

    Args:
        widths: channels of each stage; the first is also the stem's.
        blocks: basic blocks per stage.
        strides: stride of each stage's first block.
        num_classes: K.
        in_channels: image channels.
        shortcut: what a block does where the shape changes, a 1×1 convolution or padding with zeros.
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[int],
        *,
        num_classes: int,
        in_channels: int,
        shortcut: Shortcut = "conv",
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        planes = widths[0]
        for width, depth, stride in zip(widths, blocks, strides, strict=True):
            for number in range(depth):
                stages.append(BasicBlock(planes, width, stride if number == 0 else 1, shortcut))
                planes = width
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of normalised images (B, C, H, W)."""
        out = self.stages(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(out.mean(dim=(2, 3)))
        return logits


def resnet18(num_classes: int, in_channels: int) -> ResNet:
    """ResNet-18 with the CIFAR stem: 11.17 million parameters for 3×32×32 and ten classes."""
    return ResNet((64, 128, 256, 512), (2, 2, 2, 2), (1, 2, 2, 2), num_classes=num_classes, in_channels=in_channels)


def resnet8(num_classes: int, in_channels: int) -> ResNet:
    """The small network for images of up to 16 pixels: three stages of one block, 16 to 32 channels."""
    return ResNet((16, 16, 32), (1, 1, 1), (1, 2, 2), num_classes=num_classes, in_channels=in_channels)


def resnet20(num_classes: int, in_channels: int, *, shortcut: Shortcut = "conv") -> ResNet:
    """ResNet-20 for 32×32 images: three stages of three blocks, 16 to 64 channels."""
    return ResNet(
        (16, 32, 64), (3, 3, 3), (1, 2, 2), num_classes=num_classes, in_channels=in_channels, shortcut=shortcut
    )


def classifier(num_classes: int, shape: tuple[int, int, int]) -> ResNet:
    """The residual network that fits the image size: ResNet-8 up to 16 pixels, ResNet-18 above."""
    channels, height, _ = shape
    return resnet8(num_classes, channels) if height <= 16 else resnet18(num_classes, channels)
