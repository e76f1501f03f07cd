"""VGG with BatchNorm (Simonyan and Zisserman, 2015, arXiv 1409.1556): plain convolutions, no shortcuts at all.

Where a summary says "eps grown by steps", the narrow network needs it (see `_curriculum`); `--recipe at` or `fast-at`
is the training of those papers as it is.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.vgg import cfgs as CONFIGURATIONS  # type: ignore[import-untyped]
from torchvision.models.vgg import vgg16_bn

from moebench.errors import UsageError
from moebench.models._base import NormalizedClassifier, Recipe, Shape, register_model
from moebench.models._curriculum import from_clean_to_adversarial
from moebench.models._objectives import STANDARD, TRADES, standard_loss
from moebench.models._training_papers import MADRY_2018, WONG_2020, ZHANG_2019
from moebench.schema import PaperCard

SIMONYAN_2015 = PaperCard(
    title="Very Deep Convolutional Networks for Large-Scale Image Recognition",
    authors="Karen Simonyan, Andrew Zisserman",
    venue="ICLR",
    year=2015,
    arxiv="1409.1556",
    bibtex="""@inproceedings{simonyan2015very,
  title = {Very Deep Convolutional Networks for Large-Scale Image Recognition},
  author = {Simonyan, Karen and Zisserman, Andrew},
  booktitle = {International Conference on Learning Representations},
  year = {2015}
}""",
)

LETTERS = {11: "A", 13: "B", 16: "D", 19: "E"}
"""Depth -> configuration (table 1)."""

FULL_WIDTH = 64
"""Channels of the first stage in the paper; the others are multiples of it."""


class VGG(nn.Module):
    """The convolutions of a VGG and one linear layer on their mean, as is usual on CIFAR.

    The paper's three fully connected layers are made for 7×7 feature maps, which small images do not have. A map of
    2×2 is not pooled further, except where all five poolings fit (32 pixels and more).

    Args:
        depth: 11, 13, 16 or 19, the paper's count of layers with weights.
        width: channels of the first stage; 64 is the paper's.
        side: pixels of the images' shorter side.
        num_classes: K.
        in_channels: image channels.
    """

    def __init__(self, depth: int, width: int, side: int, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        if depth not in LETTERS:
            raise UsageError(f"the depth of a VGG must be 11, 13, 16 or 19, got {depth!r}")
        if width < 1:
            raise UsageError(f"the width of a VGG must be at least 1 channel, got {width}")
        layers: list[nn.Module] = []
        channels = in_channels
        smallest = 1 if side >= 32 else 2
        for item in CONFIGURATIONS[LETTERS[depth]]:
            if item == "M":
                if side > smallest:
                    layers.append(nn.MaxPool2d(2))
                    side //= 2
                continue
            out = item * width // FULL_WIDTH
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            channels = out
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of normalised images (B, C, H, W)."""
        logits: Tensor = self.fc(self.features(x).mean(dim=(2, 3)))
        return logits


@register_model(
    "vgg-st",
    summary="one VGG-16 with BatchNorm (VGG-11, narrow, on small images), standard training",
    family="dense",
    training="standard",
    paper=SIMONYAN_2015,
    recipe=Recipe(epochs=200, select="clean"),
    objective=STANDARD,
)
@register_model(
    "vgg-at",
    summary="one VGG-16 with BatchNorm (VGG-11, narrow, on small images), PGD adversarial training, eps grown by steps",
    family="dense",
    training="adversarial",
    paper=MADRY_2018,
    recipe=Recipe(epochs=200),
    objective=from_clean_to_adversarial(standard_loss),
)
@register_model(
    "vgg-trades",
    summary="one VGG-16 with BatchNorm (VGG-11, narrow, on small images), TRADES with weight 6",
    family="dense",
    training="trades",
    paper=ZHANG_2019,
    recipe=Recipe(epochs=200, beta=6.0),
    objective=TRADES,
)
@register_model(
    "vgg-fast-at",
    summary="one VGG-16 with BatchNorm (VGG-11, narrow, on small images), Fast AT, eps grown by steps",
    family="dense",
    training="fast-at",
    paper=WONG_2020,
    recipe=Recipe(epochs=200),
    objective=from_clean_to_adversarial(standard_loss, "fast"),
)
def vgg(num_classes: int, shape: Shape, *, depth: int | None = None, width: int | None = None) -> nn.Module:
    """VGG-16 with BatchNorm, its CIFAR version up to 64 pixels; a VGG-11 of an eighth of the channels up to 16."""
    channels, height, broad = shape
    if height > 64 and channels == 3 and depth is None and width is None:
        return NormalizedClassifier(vgg16_bn(num_classes=num_classes))
    own = (11, FULL_WIDTH // 8) if height <= 16 else (16, FULL_WIDTH)
    network = VGG(
        own[0] if depth is None else depth,
        own[1] if width is None else width,
        min(height, broad),
        num_classes=num_classes,
        in_channels=channels,
    )
    return NormalizedClassifier(network)
