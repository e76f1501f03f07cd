"""SoE: sub-models that say how sure they are, of which the surest alone answers.

Cui, Zhang, Liang, Han, Sugiyama and Zhang, "Synergy-of-Experts: Collaborate to Improve Adversarial Robustness", NeurIPS
2022. Sub-model i gives probabilities p_i(x) and a confidence A_i(x) in [0, 1]; with the rectified confidence

    R_i(x) = A_i(x) max_c p_i,c(x)

the logits are those of sub-model argmax_i R_i(x). As a MoE layer: top-1 routing by softmax_i(T R_i), where the experts
themselves are the router. Attacks on the selected output, on the mixture by softmax_i(T R_i) and on each sub-model are
the views `whole`, `smooth` and `expert[i]`.

In training, with f_i the logits, w = softmax_i(T R_i) without a gradient and lambda = 1,

    L(x, y) = mean sum_i w_i CE(f_i(x), y) + lambda mean_i BCE(R_i(x), p_i,y(x)),    total L(x, y) + L(x_adv, y)

where p_i,y has no gradient, nor has max_c p_i,c where f_i is right. A_i is a linear map of f_i's pooled features, or
comes from a second trunk on the same stem (`confidence=complex`).

Differs from the published code: adversarial images are made in eval mode; clean and adversarial ones share BatchNorm's
statistics in one pass; pixels are normalised by 0.5 and 0.5; the epoch is chosen by validation. The code detaches the
selection from the gradient, so its attacks never push the selector; the views `smooth` and `straight-through` and the
region attack do.

The paper's three ResNet-20 on CIFAR-10, as its code trains them (the radius is the threat model's, 8/255; theirs 0.03):

    moebench train --model soe --dataset cifar10 --device cuda --set epochs=100 --set batch_size=128
        --set optimizer=sgd --set schedule=step --set lr_high=0.1 --set lr_low=0.0 --set weight_decay=1e-4
        --set translate=4 --set flip=True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from moebench.errors import UsageError
from moebench.models._base import Adversary, Forward, Normalize, Phase, Recipe, Shape, register_model
from moebench.models._image_moe import NetworkMoE
from moebench.models._moe import MoELayer, Routing, combine
from moebench.models._resnet import ResNet, resnet8, resnet20
from moebench.schema import PaperCard

CUI_2022 = PaperCard(
    title="Synergy-of-Experts: Collaborate to Improve Adversarial Robustness",
    authors="Sen Cui, Jingfeng Zhang, Jian Liang, Bo Han, Masashi Sugiyama, Changshui Zhang",
    venue="NeurIPS",
    year=2022,
    arxiv=None,
    bibtex="""@inproceedings{cui2022synergy,
  title = {Synergy-of-Experts: Collaborate to Improve Adversarial Robustness},
  author = {Cui, Sen and Zhang, Jingfeng and Liang, Jian and Han, Bo and Sugiyama, Masashi and Zhang, Changshui},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {35},
  pages = {32552--32567},
  year = {2022}
}""",
)

Confidence = Literal["simple", "complex"]


@dataclass(frozen=True)
class SoERecipe(Recipe):
    """`beta` is the weight of the confidences' loss, lambda in the paper.

    Attributes:
        adversary: what the adversarial images are made against: the selected output ("together"), or each sub-model in
            turn, M times as many images ("one-by-one").
        weights: what weighs the sub-models' losses: softmax(T R), the predicted best ("confidence"), or softmax(-CE),
            the true best ("loss").
    """

    adversary: Literal["together", "one-by-one"] = "together"
    weights: Literal["confidence", "loss"] = "confidence"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("adversary", ("together", "one-by-one")), ("weights", ("confidence", "loss"))):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} of a recipe must be {' or '.join(choices)}, got {getattr(self, name)!r}")


class TwoTrunks(nn.Module):
    """A residual classifier and, from the same stem, a second trunk that ends in the confidence.

    Args:
        classes: gives K logits.
        confidence: gives one number; of its stem nothing is used.
    """

    def __init__(self, classes: ResNet, confidence: ResNet) -> None:
        super().__init__()
        self.classes = classes
        self.stages = confidence.stages
        self.fc = confidence.fc

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes and of the confidence, (B, K + 1)."""
        stem = F.relu(self.classes.bn1(self.classes.conv1(x)))
        logits = self.classes.fc(self.classes.stages(stem).mean(dim=(2, 3)))
        sure = self.fc(self.stages(stem).mean(dim=(2, 3)))
        return torch.cat((logits, sure), dim=1)


def sub_model(num_classes: int, shape: Shape, confidence: Confidence) -> nn.Module:
    """A network with K + 1 outputs, the last the logit of its confidence: ResNet-8 up to 16 pixels, ResNet-20 above.

    Raises:
        UsageError: no such kind of confidence.
    """
    channels, height, _ = shape
    make: Callable[[int, int], ResNet] = resnet8 if height <= 16 else resnet20
    if confidence == "simple":
        # A head of its own on the pooled features is one more row of the last layer.
        return make(num_classes + 1, channels)
    if confidence == "complex":
        return TwoTrunks(make(num_classes, channels), make(1, channels))
    raise UsageError(f"confidence must be 'simple' or 'complex', got {confidence!r}")


class RectifiedConfidence(nn.Module):
    """The logits T R_i of the routing, R = A max_c p_c; it has no parameters of its own.

    Args:
        temperature: T, > 0; it changes soft weights, not the selection.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise UsageError(f"temperature must be a finite number > 0, got {temperature!r}")
        self.temperature = temperature

    def forward(self, answers: Tensor) -> Tensor:
        """(B, M), from what the sub-models say, (B, M, K + 1)."""
        return self.temperature * answers[..., -1].sigmoid() * answers[..., :-1].softmax(dim=2).amax(dim=2)


class ConfidenceLayer(MoELayer):
    """Top-1 of softmax_i(T R_i): every expert runs on every image, and the surest answers alone.

    Args:
        experts: from normalised images to (B, K + 1), the last column the confidence's logit.
        temperature: T, see `RectifiedConfidence`.
    """

    def __init__(self, experts: list[nn.Module], temperature: float) -> None:
        super().__init__(experts, RectifiedConfidence(temperature), top_k=1)
        self.temperature = temperature
        # Answers of the forward pass that is under way, so that the experts run once for routing and output.
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    @override
    def forward(self, x: Tensor) -> Tensor:
        """The answer (B, K + 1) of the selected expert for each normalised image."""
        self._kept = []
        try:
            return super().forward(x)
        finally:
            self._kept = None

    def answers(self, x: Tensor) -> Tensor:
        """What every expert says, (B, M, K + 1)."""
        for seen, found in self._kept or ():
            if seen is x:
                return found
        found = torch.stack([expert(x) for expert in self.experts], dim=1)
        if self._kept is not None:
            self._kept.append((x, found))
        return found

    @override
    def probabilities(self, x: Tensor) -> Tensor:
        return super().probabilities(self.answers(x))

    @override
    def run(self, x: Tensor, routing: Routing) -> Tensor:
        if not self._kept:
            return combine(self.experts, x, routing)
        weights = routing.weights * routing.selected
        return (weights.unsqueeze(2) * self.answers(x)).sum(dim=1)

    @property
    @override
    def active(self) -> int:
        return len(self.experts)


class SoE(NetworkMoE):
    """Sub-models behind a normalisation; the logits are those of the one with the largest rectified confidence."""

    moe: ConfidenceLayer

    def __init__(self, experts: list[nn.Module], temperature: float) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.moe = ConfidenceLayer(experts, temperature)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :-1]

    @override
    def expert_outputs(self, x: Tensor) -> dict[str, Tensor]:
        return {"moe": self.answers(x)[..., :-1]}

    def answers(self, x: Tensor) -> Tensor:
        """What every sub-model says of [0, 1] images, (B, M, K + 1)."""
        return self.moe.answers(self.normalize(x))


def synergy_loss(answers: Tensor, y: Tensor, temperature: float, recipe: SoERecipe) -> Tensor:
    """L(x, y) = mean sum_i w_i CE(f_i(x), y) + beta mean_i BCE(R_i(x), p_i,y(x)).

    w = softmax_i(T R_i) and the target p_i,y carry no gradient. Where sub-model i is right, R_i has a gradient through
    its confidence only: being surer of the right class is left to the first term.

    Args:
        answers: (B, M, K + 1).
        y: labels (B,).
        temperature: T.
        recipe: `beta` and the kind of weights.
    """
    answers = answers.float()
    logits, sure = answers[..., :-1], answers[..., -1].sigmoid()
    probs = logits.softmax(dim=2)
    labels = y.unsqueeze(1).expand(-1, answers.shape[1])
    largest = probs.amax(dim=2)
    rectified = sure * torch.where(logits.argmax(dim=2) == labels, largest.detach(), largest)
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    scores = temperature * rectified if recipe.weights == "confidence" else -losses
    weights = scores.detach().softmax(dim=1)
    truth = probs.gather(2, labels.unsqueeze(2)).squeeze(2).detach()
    # Autocast on a GPU refuses this function, whatever the type of its arguments.
    with torch.autocast(answers.device.type, enabled=False):
        confidence = F.binary_cross_entropy(rectified, truth)
    return (weights * losses).sum(dim=1).mean() + recipe.beta * confidence


def soe_loss(model: SoE, x: Tensor, y: Tensor, adversary: Adversary, recipe: SoERecipe) -> Tensor:
    """L(x, y) + L(x_adv, y), x_adv by PGD without a random start on the selected output or on each sub-model."""
    forwards: list[Forward] = [model]
    if recipe.adversary == "one-by-one":
        forwards = [lambda z, e=e: e(model.normalize(z))[:, :-1] for e in model.moe.experts]  # type: ignore[misc]
    attacked = [
        adversary(forward, x, lambda logits: F.cross_entropy(logits, y, reduction="none"), random_start=False)
        for forward in forwards
    ]
    # One pass for all images, so that BatchNorm's statistics fit both kinds.
    answers = model.answers(torch.cat((x, *attacked)))
    clean, adv = answers[: len(x)], answers[len(x) :]
    temperature = model.moe.temperature
    return synergy_loss(clean, y, temperature, recipe) + synergy_loss(adv, y.repeat(len(attacked)), temperature, recipe)


@register_model(
    "soe",
    summary="Synergy-of-Experts: 3 sub-models, the one with the largest confidence answers",
    family="moe",
    training="soe",
    routing="top-1 by confidence",
    paper=CUI_2022,
    recipe=SoERecipe(epochs=150, beta=1.0, step_fraction=0.31875),
    objective=(Phase(soe_loss),),
)
def soe(
    num_classes: int, shape: Shape, *, experts: int = 3, confidence: Confidence = "simple", temperature: float = 1.0
) -> nn.Module:
    """Sub-models with confidence heads; ResNet-8 for images of up to 16 pixels, ResNet-20 above."""
    return SoE([sub_model(num_classes, shape, confidence) for _ in range(experts)], temperature)
