"""DWF: clean, FGSM and PGD experts under a soft gate, pre-trained alone and then trained together.

Meymani and Razavi-Far, "Divided We Fall: Defending Against Adversarial Attacks via Soft-Gated Fractional
Mixture-of-Experts with Randomized Adversarial Training" (arXiv 2512.20821). All experts answer every image,

    F(x) = sum_i a_i(x) f_i(x),    a = softmax of the gate,

one of them pre-trained on clean images, half of the others on FGSM of a random radius, half on PGD of a random number
of iterations. Then gate and experts are trained together on batches of clean, FGSM and PGD images.

No code is published, and the text that we had leaves open: the gate (here two convolutions, pooling and a linear
layer), what is mixed (here the logits), the images of the joint phase (here attacks on the whole MoE, of the same
random strengths), optimiser and rates. Radii are in the units of [0, 1] pixels, relative to the threat model's, because
the paper's are for 8/255. The digits have nine of the dense baseline's small networks instead of nine ResNet-18, Adam,
and a fifth of the iterations. The paper's nine ResNet-18 on CIFAR-10, with the rates that are common for them:

    moebench train --model dwf --dataset cifar10 --device cuda --set epochs=250 --set batch_size=128 --set pgd_unit=10
        --set optimizer=sgd --set schedule=cosine --set lr_high=0.1 --set lr_low=0.0 --set joint_rate=0.1
        --set weight_decay=5e-4 --set translate=4 --set flip=True
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.errors import UsageError
from moebench.models._base import Adversary, Forward, Normalize, Phase, Recipe, Shape, evaluating, register_model
from moebench.models._image_moe import NetworkMoE
from moebench.models._moe import MoELayer
from moebench.models._resnet import classifier
from moebench.schema import PaperCard

MEYMANI_2025 = PaperCard(
    title=(
        "Divided We Fall: Defending Against Adversarial Attacks via Soft-Gated Fractional Mixture-of-Experts with "
        "Randomized Adversarial Training"
    ),
    authors="Mohammad Meymani, Roozbeh Razavi-Far",
    venue="arXiv",
    year=2025,
    arxiv="2512.20821",
    bibtex="""@article{meymani2025divided,
  title = {Divided We Fall: Defending Against Adversarial Attacks via Soft-Gated Fractional Mixture-of-Experts with
           Randomized Adversarial Training},
  author = {Meymani, Mohammad and Razavi-Far, Roozbeh},
  journal = {arXiv preprint arXiv:2512.20821},
  year = {2025}
}""",
)


@dataclass(frozen=True)
class DWFRecipe(Recipe):
    """What is drawn for each batch, and how fast the joint phase learns.

    Attributes:
        fgsm_unit, fgsm_levels: FGSM's radius is 1 to `fgsm_levels` times `fgsm_unit` of the threat model's eps; at
            8/255 these are the paper's 0.01, …, 0.09.
        pgd_unit, pgd_levels: PGD makes 1 to `pgd_levels` times `pgd_unit` iterations; the paper's unit is 10.
        joint_rate: learning rates of the second phase, as a share of the first's.
    """

    fgsm_unit: float = 0.31875
    fgsm_levels: int = 9
    pgd_unit: int = 2
    pgd_levels: int = 5
    joint_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("fgsm_levels", "pgd_unit", "pgd_levels"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UsageError(f"{name} of a recipe must be a whole number >= 1, got {value!r}")
        for name in ("fgsm_unit", "joint_rate"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise UsageError(f"{name} of a recipe must be a finite number > 0, got {value!r}")


class DWF(NetworkMoE):
    """Classifiers under a soft gate: the first is trained on clean images, then come the FGSM and the PGD experts.

    The gate is a convolution to 16 channels, one to 32 with stride 2, global pooling and a linear layer.
    """

    def __init__(self, num_classes: int, shape: Shape, *, experts: int) -> None:
        if type(experts) is not int or experts < 5 or experts % 2 == 0:
            raise UsageError(
                f"experts must be an odd number >= 5 (one for clean images, as many for FGSM as for PGD), got {experts}"
            )
        super().__init__()
        self.normalize = Normalize()
        networks: list[nn.Module] = [classifier(num_classes, shape) for _ in range(experts)]
        self.moe = MoELayer(networks, soft_gate(shape[0], experts), top_k=experts)
        half = (experts - 1) // 2
        self.kinds = ("clean", *["fgsm"] * half, *["pgd"] * half)


def soft_gate(in_channels: int, experts: int) -> nn.Module:
    """Gate logits (B, E) of normalised images (B, C, H, W)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, experts),
    )


def random_fgsm(forward: Forward, x: Tensor, y: Tensor, adversary: Adversary, recipe: DWFRecipe) -> Tensor:
    """FGSM, x + eps sign of the gradient of CE, with eps drawn once for the batch from torch's generator."""
    eps = recipe.fgsm_unit * _draw(recipe.fgsm_levels) * adversary.eps
    return adversary(forward, x, _cross_entropy(y), steps=1, eps=eps, step_size=eps, random_start=False)


def random_pgd(forward: Forward, x: Tensor, y: Tensor, adversary: Adversary, recipe: DWFRecipe) -> Tensor:
    """PGD within the threat model, its number of iterations drawn once for the batch from torch's generator."""
    return adversary(forward, x, _cross_entropy(y), steps=recipe.pgd_unit * _draw(recipe.pgd_levels))


def experts_alone_loss(model: DWF, x: Tensor, y: Tensor, adversary: Adversary, recipe: DWFRecipe) -> Tensor:
    """Sum of the experts' cross-entropies, each on its own kind of images made against itself.

    The experts share no parameter, so one optimiser for the sum trains each as if it were alone.
    """
    losses = []
    for expert, kind in zip(model.moe.experts, model.kinds, strict=True):

        def forward(z: Tensor, expert: nn.Module = expert) -> Tensor:
            logits: Tensor = expert(model.normalize(z))
            return logits

        images = x
        if kind == "fgsm":
            images = random_fgsm(forward, x, y, adversary, recipe)
        elif kind == "pgd":
            images = random_pgd(forward, x, y, adversary, recipe)
        losses.append(F.cross_entropy(forward(images), y))
    return torch.stack(losses).sum()


def mixed_batch(model: DWF, x: Tensor, y: Tensor, adversary: Adversary, recipe: DWFRecipe) -> tuple[Tensor, Tensor]:
    """Clean, FGSM and PGD images against the whole MoE, one behind the other, (3B, C, H, W), and their labels."""
    kinds = (x, random_fgsm(model, x, y, adversary, recipe), random_pgd(model, x, y, adversary, recipe))
    return torch.cat(kinds), y.repeat(3)


def joint_loss(model: DWF, x: Tensor, y: Tensor, adversary: Adversary, recipe: DWFRecipe) -> Tensor:
    """CE(F(x), y) over clean, FGSM and PGD images; gate and experts learn."""
    images, labels = mixed_batch(model, x, y, adversary, recipe)
    return F.cross_entropy(model(images), labels)


def gate_loss(model: DWF, x: Tensor, y: Tensor, adversary: Adversary, recipe: DWFRecipe) -> Tensor:
    """The joint loss with experts that stay what they are, BatchNorm's statistics included."""
    images, labels = mixed_batch(model, x, y, adversary, recipe)
    with torch.no_grad(), evaluating(model.moe.experts):
        outputs = model.expert_outputs(images)
    routing = model.moe.own_routing(model.normalize(images))
    return F.cross_entropy(model.mix(outputs, {"moe": routing}), labels)


def _draw(levels: int) -> int:
    """1 to `levels`; torch's generator is the training's, which a checkpoint keeps."""
    return int(torch.randint(1, levels + 1, ()))


def _cross_entropy(y: Tensor) -> Forward:
    return lambda logits: F.cross_entropy(logits, y, reduction="none")


def _joint_rate(recipe: DWFRecipe) -> float:
    return recipe.joint_rate


ALONE = Phase(experts_alone_loss, part="moe.experts", span=(0.0, 0.6))
JOINT = (ALONE, Phase(joint_loss, span=(0.6, 1.0), rate=_joint_rate))
FROZEN = (ALONE, Phase(gate_loss, part="moe.router", span=(0.6, 1.0)))
"""150 epochs alone, 100 together."""


@register_model(
    "dwf",
    summary="DWF: soft MoE of 9 experts for clean, FGSM and PGD images, then trained jointly",
    family="moe",
    training="dwf",
    routing="soft",
    paper=MEYMANI_2025,
    recipe=DWFRecipe(epochs=100, select="mean"),
    objective=JOINT,
)
@register_model(
    "dwf-frozen",
    summary="DWF whose experts stay as pre-trained; only the gate learns to mix them",
    family="moe",
    training="dwf-frozen",
    routing="soft",
    paper=MEYMANI_2025,
    recipe=DWFRecipe(epochs=100, select="mean"),
    objective=FROZEN,
)
def dwf(num_classes: int, shape: Shape, *, experts: int = 9) -> nn.Module:
    """One clean expert and equally many FGSM and PGD experts under a soft convolutional gate."""
    return DWF(num_classes, shape, experts=experts)
