"""AdvMoE: router and network, each made robust in turn while the other holds still.

Zhang, Cai, Chen, Zhang, Zhang, Chen, Chang, Wang and Liu, "Robust Mixture-of-Expert Training for Convolutional Neural
Networks", ICCV 2023 (arXiv 2308.10110). Every batch takes two steps, each on adversarial images of its own:

    network:  CE(F(x), y) + beta KL(p(x) || p(x_adv)), the router as it is
    router:   the same loss, the network as it is
    x_adv:    two steps of 0.625 eps that raise KL(p(x) || p(x_adv)) + KL(a(x) || a(x_adv))

with p the prediction and a the router's softmax. `router_target=label-mod` is the router's step of the published code
(revision a614547): CE(g(x), y mod E) + beta KL(a(x) || a(x_adv)) for router logits g, so that the label picks the
expert; `label_weight` weighs the first term. That code has beta = 6 in both steps, as here.

`adv-moe-cnn` is the paper's network: in every 3×3 convolution of the residual blocks each expert has filters of its
own, one decision per image holds for all layers, and the rest (stem, shortcuts, BatchNorm, classifier) is shared.
`adv-moe` trains the MoE of whole classifiers of RT-ER's paper (arXiv 2502.06832) in this way, which that paper calls
AdvMoE.

Differs from the published code: images are normalised, for network and router alike; the two passes of a step share
BatchNorm's statistics; the epoch is chosen on validation images instead of the test set; the digits' recipes balance
the load of the experts (balance=0 for the paper's losses).

The paper's ResNet-18 with ratio 0.5 and two experts on CIFAR-10, and the same training for four ResNet-18:

    moebench train --model adv-moe-cnn --dataset cifar10 --device cuda --set epochs=100 --set batch_size=128
        --set optimizer=sgd --set schedule=cosine --set lr_high=0.1 --set lr_low=0.0 --set weight_decay=5e-4
        --set translate=4 --set flip=True --set balance=0.0
    moebench train --model adv-moe --dataset cifar10 --device cuda --set epochs=100 --set batch_size=128
        --set optimizer=sgd --set schedule=cosine --set lr_high=0.1 --set lr_low=0.0 --set weight_decay=5e-4
        --set translate=4 --set flip=True --set balance=0.0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from moebench.errors import UsageError
from moebench.models._balancing import balanced
from moebench.models._base import Adversary, Normalize, Phase, Recipe, Shape, evaluating, register_model
from moebench.models._image_moe import ImageMoE
from moebench.models._moe import MoELayer, Routing, combine, replay, route, routed_by
from moebench.models._objectives import kl_divergence
from moebench.models._resnet import ResNet, make_shortcut, resnet20
from moebench.models.rt_er import ClassifierMoE
from moebench.schema import PaperCard

ZHANG_2023 = PaperCard(
    title="Robust Mixture-of-Expert Training for Convolutional Neural Networks",
    authors=(
        "Yihua Zhang, Ruisi Cai, Tianlong Chen, Guanhua Zhang, Huan Zhang, Pin-Yu Chen, Shiyu Chang, Zhangyang Wang, "
        "Sijia Liu"
    ),
    venue="ICCV",
    year=2023,
    arxiv="2308.10110",
    bibtex="""@inproceedings{zhang2023robust,
  title = {Robust Mixture-of-Expert Training for Convolutional Neural Networks},
  author = {Zhang, Yihua and Cai, Ruisi and Chen, Tianlong and Zhang, Guanhua and Zhang, Huan and Chen, Pin-Yu
            and Chang, Shiyu and Wang, Zhangyang and Liu, Sijia},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year = {2023}
}""",
)

RouterTarget = Literal["none", "label-mod"]

RESNET_18 = ((64, 64, 128, 128, 256, 256, 512, 512), (1, 1, 2, 1, 2, 1, 2, 1), 64)
SMALL = ((32, 32, 64), (1, 2, 2), 16)
"""Channels of the blocks of the dense network, their strides, and channels of the stem, which is dense."""

NOISE = 0.001
"""Standard deviation of the noise at which the attack starts: at x itself the divergence has no gradient."""


@dataclass(frozen=True)
class AdvMoERecipe(Recipe):
    """`attack_steps` and `step_fraction` are those of the validation; training has its own.

    Attributes:
        inner_steps, inner_fraction: steps of the attack in training, of so much of eps each.
        router_target: what the router's step lowers: the loss of the whole model ("none"), or cross-entropy towards
            expert y mod E ("label-mod").
        label_weight: weight of that cross-entropy.
    """

    inner_steps: int = 2
    inner_fraction: float = 0.625
    router_target: RouterTarget = "none"
    label_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.inner_steps) is not int or self.inner_steps < 0:
            raise UsageError(f"inner_steps of a recipe must be a whole number >= 0, got {self.inner_steps!r}")
        for name in ("inner_fraction", "label_weight"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise UsageError(f"{name} of a recipe must be a finite number >= 0, got {value!r}")
        if self.router_target not in ("none", "label-mod"):
            raise UsageError(f"router_target of a recipe must be none or label-mod, got {self.router_target!r}")


class SharedPart(nn.Module):
    """What all experts of the network share: stem, BatchNorm, shortcuts and classifier (section 3).

    Args:
        widths: channels of the blocks' outputs, one per block.
        strides: strides of the blocks.
        stem: channels of the first convolution.
        in_channels: image channels.
        num_classes: K.
    """

    def __init__(
        self, widths: Sequence[int], strides: Sequence[int], *, stem: int, in_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for width in widths for _ in range(2)])
        self.shortcuts = nn.ModuleList(
            [make_shortcut(*planes, stride) for planes, stride in zip(pairwise((stem, *widths)), strides, strict=True)]
        )
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor, convolve: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Logits (B, K) of normalised images; `convolve` applies the experts' convolution of that number."""
        out = F.relu(self.bn1(self.conv1(x)))
        for number, shortcut in enumerate(self.shortcuts):
            first, second = 2 * number, 2 * number + 1
            inner = F.relu(self.norms[first](convolve(first, out)))
            out = F.relu(self.norms[second](convolve(second, inner)) + shortcut(out))
        logits: Tensor = self.fc(out.mean(dim=(2, 3)))
        return logits


class Pathway(nn.Module):
    """The network that one expert's filters make with the shared part."""

    def __init__(self, shared: SharedPart, convolutions: nn.ModuleList) -> None:
        super().__init__()
        self.shared = shared
        self.convolutions = convolutions

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of normalised images."""
        logits: Tensor = self.shared(x, lambda number, features: self.convolutions[number](features))
        return logits


class PathwayLayer(MoELayer):
    """A residual network as one MoE layer: an expert is its filters in all 3×3 convolutions of the blocks.

    There is one routing decision per image; recorded, replayed and forced it holds for all convolutions. Soft routing
    mixes what the experts' filters give in every convolution, before BatchNorm.

    Args:
        widths: channels of the blocks' outputs, one per block: w of the E · w filters of a convolution.
        strides: strides of the blocks.
        stem: channels of the first convolution.
        in_channels: image channels.
        num_classes: K.
        experts: E.
        router: from normalised images to logits (B, E).
    """

    def __init__(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        *,
        stem: int,
        in_channels: int,
        num_classes: int,
        experts: int,
        router: nn.Module,
    ) -> None:
        shapes = [
            (*planes, stride)
            for (before, width), block in zip(pairwise((stem, *widths)), strides, strict=True)
            for planes, stride in (((before, width), block), ((width, width), 1))
        ]
        filters: list[nn.Module] = [
            nn.ModuleList([nn.Conv2d(i, o, 3, stride=stride, padding=1, bias=False) for i, o, stride in shapes])
            for _ in range(experts)
        ]
        super().__init__(filters, router, top_k=1)
        self.shared = SharedPart(widths, strides, stem=stem, in_channels=in_channels, num_classes=num_classes)

    @override
    def run(self, x: Tensor, routing: Routing) -> Tensor:
        def convolve(number: int, features: Tensor) -> Tensor:
            convolutions = [self._filters(expert)[number] for expert in range(len(self.experts))]
            return combine(nn.ModuleList(convolutions), features, routing)

        logits: Tensor = self.shared(x, convolve)
        return logits

    @override
    def alone(self, expert: int) -> nn.Module:
        return Pathway(self.shared, self._filters(expert))

    def _filters(self, expert: int) -> nn.ModuleList:
        filters = self.experts[expert]
        assert isinstance(filters, nn.ModuleList)
        return filters


class AdvMoECNN(ImageMoE):
    """The network of the paper behind a normalisation."""

    def __init__(self, moe: PathwayLayer) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.moe = moe


def logits_and_gate(model: ImageMoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, K) and router logits (B, E) of images, the router run once.

    The selection is hard; the gradient passes through the winner's weight also in eval mode, as in the published code.
    """
    found: list[Tensor] = []

    def policy(layer: MoELayer, features: Tensor) -> Routing:
        gate: Tensor = layer.router(features)
        found.append(gate)
        probs = gate.softmax(dim=1)
        selected = F.one_hot(probs.argmax(dim=1), probs.shape[1]).bool()
        winner = probs * selected
        return Routing(selected + winner - winner.detach(), selected)

    with routed_by(model, {"moe": policy}):
        logits = model(x)
    return logits, found[0]


def divergence_adversary(model: ImageMoE, x: Tensor, adversary: Adversary, recipe: AdvMoERecipe) -> Tensor:
    """Images near x that raise KL(p(x) || p(x_adv)) + KL(a(x) || a(x_adv))."""
    with torch.no_grad(), evaluating(model):
        clean, clean_gate = logits_and_gate(model, x)
    # Drawn from torch's generator, which is the training's.
    noise = NOISE * torch.randn(x.shape).to(x)

    def forward(z: Tensor) -> Tensor:
        return torch.cat(logits_and_gate(model, z + noise), dim=1)

    def loss(both: Tensor) -> Tensor:
        logits, gate = both[:, : clean.shape[1]], both[:, clean.shape[1] :]
        return kl_divergence(clean, logits) + kl_divergence(clean_gate, gate)

    step_size = recipe.inner_fraction * adversary.eps
    return adversary(forward, x, loss, steps=recipe.inner_steps, step_size=step_size, random_start=False)


def _trades(logits: Tensor, y: Tensor, beta: float) -> Tensor:
    clean, adv = logits.chunk(2)
    return F.cross_entropy(clean, y) + beta * kl_divergence(clean, adv).mean()


def network_loss(model: ImageMoE, x: Tensor, y: Tensor, adversary: Adversary, recipe: AdvMoERecipe) -> Tensor:
    """CE(F(x), y) + beta KL(p(x) || p(x_adv)); the routing is taken as it is."""
    images = torch.cat((x, divergence_adversary(model, x, adversary, recipe)))
    with torch.no_grad():
        tape = route(model, images)
    return _trades(replay(model, images, tape), y, recipe.beta)


def router_loss(model: ImageMoE, x: Tensor, y: Tensor, adversary: Adversary, recipe: AdvMoERecipe) -> Tensor:
    """The same loss through the routing weights, or the published code's CE(g(x), y mod E) + beta KL(a(x) || a(x_adv)).

    The gradient to the network's parameters is not used.
    """
    images = torch.cat((x, divergence_adversary(model, x, adversary, recipe)))
    if recipe.router_target == "none":
        return _trades(model(images), y, recipe.beta)
    clean, adv = model.moe.router(model.normalize(images)).chunk(2)
    target = y % len(model.moe.experts)
    return recipe.label_weight * F.cross_entropy(clean, target) + recipe.beta * kl_divergence(clean, adv).mean()


ALTERNATING = (
    Phase(network_loss, part="moe", without="moe.router"),
    *balanced((Phase(router_loss, part="moe.router"),)),
)
"""Each batch first steps the network, then the router, each on adversarial images of its own."""


@register_model(
    "adv-moe",
    summary="top-1 MoE of 4 classifiers, network and router made robust in turn (AdvMoE)",
    family="moe",
    training="adv-moe",
    routing="top-1",
    paper=ZHANG_2023,
    recipe=AdvMoERecipe(epochs=150, balance=0.1),
    objective=ALTERNATING,
)
def adv_moe(num_classes: int, shape: Shape, *, experts: int = 4) -> nn.Module:
    """A top-1 MoE of whole classifiers, each of the architecture of the dense baseline."""
    return ClassifierMoE(num_classes, shape, experts=experts, top_k=1, router="trained")


@register_model(
    "adv-moe-cnn",
    summary="AdvMoE's CNN: one decision per image picks the filters of all convolutions",
    family="moe",
    training="adv-moe",
    routing="top-1, one decision for all layers",
    paper=ZHANG_2023,
    recipe=AdvMoERecipe(epochs=150, balance=0.1),
    objective=ALTERNATING,
)
def adv_moe_cnn(num_classes: int, shape: Shape, *, experts: int = 2, ratio: float = 0.5) -> nn.Module:
    """A residual network whose experts have filters of their own: ResNet-8 up to 16 pixels, ResNet-18 above.

    An expert has `ratio` of the dense network's filters: ratio = 1/E keeps the parameters and divides the work. The
    small network is twice as wide as the dense baseline, so that an expert at ratio 0.5 is as wide as that.
    """
    channels, height, _ = shape
    small = height <= 16
    dense, strides, stem = SMALL if small else RESNET_18
    widths = [int(ratio * width) for width in dense]
    if min(widths) < 1:
        raise UsageError(f"ratio must leave at least one filter of {min(dense)}, got {ratio!r}")
    layer = PathwayLayer(
        widths,
        strides,
        stem=stem,
        in_channels=channels,
        num_classes=num_classes,
        experts=experts,
        router=_small_router(experts, channels) if small else resnet20(experts, channels, shortcut="pad"),
    )
    return AdvMoECNN(layer)


def _small_router(experts: int, in_channels: int) -> ResNet:
    return ResNet((4, 4, 8), (1, 1, 1), (1, 2, 2), num_classes=experts, in_channels=in_channels, shortcut="pad")
