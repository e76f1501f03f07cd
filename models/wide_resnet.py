"""Wide residual networks (Zagoruyko and Komodakis, 2016, arXiv 1605.07146): fewer layers, more channels.

WRN-28-10 is the dense network in which most published CIFAR defences are measured.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from moebench.errors import UsageError
from moebench.models._base import NormalizedClassifier, Recipe, Shape, register_model
from moebench.models._objectives import ADVERSARIAL, FAST, STANDARD, TRADES
from moebench.models._training_papers import MADRY_2018, WONG_2020, ZHANG_2019
from moebench.schema import PaperCard

ZAGORUYKO_2016 = PaperCard(
    title="Wide Residual Networks",
    authors="Sergey Zagoruyko, Nikos Komodakis",
    venue="BMVC",
    year=2016,
    arxiv="1605.07146",
    bibtex="""@inproceedings{zagoruyko2016wide,
  title = {Wide Residual Networks},
  author = {Zagoruyko, Sergey and Komodakis, Nikos},
  booktitle = {Proceedings of the British Machine Vision Conference},
  year = {2016}
}""",
)

SMALL_IMAGES = 16
"""Largest height in pixels of the images that get WRN-16-1; larger ones get WRN-28-10."""


class WideBlock(nn.Module):
    """Two 3×3 convolutions behind BatchNorm and ReLU (pre-activation), and a shortcut around them.

    Where the shape changes the shortcut is a 1×1 convolution of the activated input.
    """

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps (B, planes, H / stride, W / stride)."""
        activated = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """WRN-d-k (table 1): three stages of (d - 4) / 6 blocks with 16k, 32k and 64k channels.

    Args:
        depth: d, the number of convolutions counted as the paper does: 6n + 4.
        width: k, the widening factor.
        num_classes: K.
        in_channels: image channels.
    """

    def __init__(self, depth: int, width: int, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 != 0:
            raise UsageError(f"the depth of a WideResNet must be 6n + 4 (10, 16, 22, 28, …), got {depth}")
        if width < 1:
            raise UsageError(f"the widening factor of a WideResNet must be at least 1, got {width}")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        planes = 16
        for out, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for number in range((depth - 4) // 6):
                blocks.append(WideBlock(planes, out, stride if number == 0 else 1))
                planes = out
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(planes)
        self.fc = nn.Linear(planes, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of normalised images (B, C, H, W)."""
        out = F.relu(self.bn(self.blocks(self.conv1(x))))
        logits: Tensor = self.fc(out.mean(dim=(2, 3)))
        return logits


@register_model(
    "wrn-st",
    summary="one WideResNet (28-10; 16-1 on small images), standard training",
    family="dense",
    training="standard",
    paper=ZAGORUYKO_2016,
    recipe=Recipe(epochs=200, select="clean"),
    objective=STANDARD,
)
@register_model(
    "wrn-at",
    summary="one WideResNet (28-10; 16-1 on small images), PGD adversarial training",
    family="dense",
    training="adversarial",
    paper=MADRY_2018,
    recipe=Recipe(epochs=200),
    objective=ADVERSARIAL,
)
@register_model(
    "wrn-trades",
    summary="one WideResNet (28-10; 16-1 on small images), TRADES with weight 6",
    family="dense",
    training="trades",
    paper=ZHANG_2019,
    recipe=Recipe(epochs=200, beta=6.0),
    objective=TRADES,
)
@register_model(
    "wrn-fast-at",
    summary="one WideResNet (28-10; 16-1 on small images), Fast AT",
    family="dense",
    training="fast-at",
    paper=WONG_2020,
    recipe=Recipe(epochs=200),
    objective=FAST,
)
def wide_resnet(num_classes: int, shape: Shape, *, depth: int | None = None, width: int | None = None) -> nn.Module:
    """A WideResNet: WRN-28-10 (36.5 million parameters for CIFAR-10), WRN-16-1 for images of up to 16 pixels."""
    own = (16, 1) if shape[1] <= SMALL_IMAGES else (28, 10)
    network = WideResNet(
        own[0] if depth is None else depth,
        own[1] if width is None else width,
        num_classes=num_classes,
        in_channels=shape[0],
    )
    return NormalizedClassifier(network)
