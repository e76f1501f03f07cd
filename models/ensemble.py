"""Ensembles of the experts that the MoEs route between: all of them run, and no router chooses.

Strauss, Hanselmann, Junginger and Ulmer, 2017 (arXiv 1709.03423) proposed ensembles as a defence; here they are the
reference that shows what routing itself gains or costs, with the experts and the adversarial training of `at-moe`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moebench.errors import UsageError
from moebench.models._base import Normalize, Recipe, Shape, register_model
from moebench.models._objectives import ADVERSARIAL
from moebench.models._resnet import classifier
from moebench.schema import PaperCard

STRAUSS_2017 = PaperCard(
    title="Ensemble Methods as a Defense to Adversarial Perturbations Against Deep Neural Networks",
    authors="Thilo Strauss, Markus Hanselmann, Andrej Junginger, Holger Ulmer",
    venue="arXiv",
    year=2017,
    arxiv="1709.03423",
    bibtex="""@article{strauss2017ensemble,
  title = {Ensemble Methods as a Defense to Adversarial Perturbations Against Deep Neural Networks},
  author = {Strauss, Thilo and Hanselmann, Markus and Junginger, Andrej and Ulmer, Holger},
  journal = {arXiv preprint arXiv:1709.03423},
  year = {2017}
}""",
)

Combination = Literal["mean", "max"]


class Ensemble(nn.Module):
    """Several classifiers whose logits are averaged, or of which the largest logit of each class counts."""

    def __init__(self, members: list[nn.Module], combination: Combination) -> None:
        super().__init__()
        if combination not in ("mean", "max"):
            raise UsageError(f"combination must be 'mean' or 'max', got {combination!r}")
        self.normalize = Normalize()
        self.members = nn.ModuleList(members)
        self.combination = combination

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of [0, 1] images (B, C, H, W)."""
        z = self.normalize(x)
        logits = torch.stack([member(z) for member in self.members])
        return logits.mean(dim=0) if self.combination == "mean" else logits.amax(dim=0)


@register_model(
    "ensemble-mean",
    summary="4 classifiers, logits averaged, trained together by PGD adversarial training",
    family="ensemble",
    training="adversarial",
    paper=STRAUSS_2017,
    settings={"combination": "mean"},
    recipe=Recipe(epochs=200),
    objective=ADVERSARIAL,
)
@register_model(
    "ensemble-max",
    summary="4 classifiers, largest logit per class, trained together by PGD adversarial training",
    family="ensemble",
    training="adversarial",
    paper=STRAUSS_2017,
    settings={"combination": "max"},
    recipe=Recipe(epochs=200),
    objective=ADVERSARIAL,
)
def ensemble(num_classes: int, shape: Shape, *, members: int = 4, combination: Combination = "mean") -> nn.Module:
    """Classifiers of the dense baseline's architecture, combined without a router."""
    return Ensemble([classifier(num_classes, shape) for _ in range(members)], combination)
