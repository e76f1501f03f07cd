"""ResNet-18, 34 and 50: dense baselines of a given depth at every image size, narrow on small images.

He et al., 2016 (arXiv 1512.03385), trained in the ways of `_training_papers`. Where a summary says "eps grown by
steps", the narrow networks need it (see `_curriculum`); `--recipe at`, `trades` or `fast-at` is the training of those
papers as it is, for networks of 64 channels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck  # type: ignore[import-untyped]

from moebench.errors import UsageError
from moebench.models._base import NormalizedClassifier, Recipe, Shape, register_model
from moebench.models._curriculum import from_clean_to_adversarial, from_clean_to_trades
from moebench.models._objectives import ADVERSARIAL, FAST, STANDARD, TRADES, standard_loss
from moebench.models._training_papers import MADRY_2018, WONG_2020, ZHANG_2019
from moebench.models.resnet import HE_2016

BLOCKS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}
"""Depth -> block and blocks per stage (He et al., 2016, table 1)."""

NARROW = {18: 8, 34: 6, 50: 6}
"""Channels of the first stage for images of up to 16 pixels, instead of 64: a megabyte of weights at most."""


class DeepResNet(nn.Module):
    """ResNet-18, 34 or 50 of torchvision's blocks.

    Images of up to 64 pixels get the CIFAR stem (3×3, stride 1, no pooling), larger ones that of ImageNet (7×7, stride
    2, max-pooling).

    Args:
        depth: 18, 34 or 50.
        width: channels of the first stage; 64 is the paper's, the later stages have 2, 4 and 8 times as many.
        side: pixels of the images' shorter side.
        num_classes: K.
        in_channels: image channels.
    """

    def __init__(self, depth: int, width: int, side: int, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        block, counts = BLOCKS[depth]
        large = side > 64
        kernel, stride = (7, 2) if large else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.pool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        blocks: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(counts):
            planes = width * 2**stage
            for number in range(count):
                step = 2 if stage > 0 and number == 0 else 1
                out = planes * block.expansion
                shortcut = None
                if step != 1 or channels != out:
                    shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=step, bias=False), nn.BatchNorm2d(out))
                blocks.append(block(channels, planes, step, shortcut))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of normalised images (B, C, H, W)."""
        out = self.blocks(self.pool(self.relu(self.bn1(self.conv1(x)))))
        logits: Tensor = self.fc(out.mean(dim=(2, 3)))
        return logits


@register_model(
    "resnet18-st",
    summary="one ResNet-18 (narrow on small images), standard training",
    family="dense",
    training="standard",
    paper=HE_2016,
    settings={"depth": 18},
    recipe=Recipe(epochs=200, select="clean"),
    objective=STANDARD,
)
@register_model(
    "resnet18-at",
    summary="one ResNet-18 (narrow on small images), PGD adversarial training",
    family="dense",
    training="adversarial",
    paper=MADRY_2018,
    settings={"depth": 18},
    recipe=Recipe(epochs=200),
    objective=ADVERSARIAL,
)
@register_model(
    "resnet18-trades",
    summary="one ResNet-18 (narrow on small images), TRADES with weight 6",
    family="dense",
    training="trades",
    paper=ZHANG_2019,
    settings={"depth": 18},
    recipe=Recipe(epochs=200, beta=6.0),
    objective=TRADES,
)
@register_model(
    "resnet18-fast-at",
    summary="one ResNet-18 (narrow on small images), Fast AT",
    family="dense",
    training="fast-at",
    paper=WONG_2020,
    settings={"depth": 18},
    recipe=Recipe(epochs=200),
    objective=FAST,
)
@register_model(
    "resnet34-st",
    summary="one ResNet-34 (narrow on small images), standard training",
    family="dense",
    training="standard",
    paper=HE_2016,
    settings={"depth": 34},
    recipe=Recipe(epochs=150, select="clean"),
    objective=STANDARD,
)
@register_model(
    "resnet34-at",
    summary="one ResNet-34 (narrow on small images), PGD adversarial training, eps grown by steps",
    family="dense",
    training="adversarial",
    paper=MADRY_2018,
    settings={"depth": 34},
    recipe=Recipe(epochs=150),
    objective=from_clean_to_adversarial(standard_loss),
)
@register_model(
    "resnet34-trades",
    summary="one ResNet-34 (narrow on small images), TRADES with weight 6",
    family="dense",
    training="trades",
    paper=ZHANG_2019,
    settings={"depth": 34},
    recipe=Recipe(epochs=150, beta=6.0),
    objective=TRADES,
)
@register_model(
    "resnet34-fast-at",
    summary="one ResNet-34 (narrow on small images), Fast AT, eps grown by steps",
    family="dense",
    training="fast-at",
    paper=WONG_2020,
    settings={"depth": 34},
    recipe=Recipe(epochs=150),
    objective=from_clean_to_adversarial(standard_loss, "fast"),
)
@register_model(
    "resnet50-st",
    summary="one ResNet-50 (narrow on small images), standard training",
    family="dense",
    training="standard",
    paper=HE_2016,
    settings={"depth": 50},
    recipe=Recipe(epochs=90, select="clean"),
    objective=STANDARD,
)
@register_model(
    "resnet50-at",
    summary="one ResNet-50 (narrow on small images), PGD adversarial training, eps grown by steps",
    family="dense",
    training="adversarial",
    paper=MADRY_2018,
    settings={"depth": 50},
    recipe=Recipe(epochs=90),
    objective=from_clean_to_adversarial(standard_loss),
)
@register_model(
    "resnet50-trades",
    summary="one ResNet-50 (narrow on small images), TRADES with weight 6, eps grown by steps",
    family="dense",
    training="trades",
    paper=ZHANG_2019,
    settings={"depth": 50},
    recipe=Recipe(epochs=90, beta=6.0),
    objective=from_clean_to_trades(),
)
@register_model(
    "resnet50-fast-at",
    summary="one ResNet-50 (narrow on small images), Fast AT, eps grown by steps",
    family="dense",
    training="fast-at",
    paper=WONG_2020,
    settings={"depth": 50},
    recipe=Recipe(epochs=90),
    objective=from_clean_to_adversarial(standard_loss, "fast"),
)
def deep_resnet(num_classes: int, shape: Shape, *, depth: int = 18, width: int | None = None) -> nn.Module:
    """A ResNet of a given depth, 64 channels in its first stage (8 or 6 for images of up to 16 pixels)."""
    if depth not in BLOCKS:
        raise UsageError(f"the depth of a ResNet must be 18, 34 or 50, got {depth!r}")
    channels, height, broad = shape
    own = NARROW[depth] if height <= 16 else 64
    chosen = own if width is None else width
    if chosen < 1:
        raise UsageError(f"the width of a ResNet must be at least 1 channel, got {chosen}")
    network = DeepResNet(depth, chosen, min(height, broad), num_classes=num_classes, in_channels=channels)
    return NormalizedClassifier(network)
