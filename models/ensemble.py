"""Ensembles of the experts that the MoEs route between: all of them run, and no router chooses.

Strauss, Hanselmann, Junginger and Ulmer, 2017 (arXiv 1709.03423) proposed ensembles as a defence; here they are the
reference that shows what routing itself gains or costs, with the experts and the adversarial training of `at-moe`.
`ensemble-vote` decides by majority, and its members are trained to be right each by itself, since each has one vote.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.errors import UsageError
from moebench.models._base import Adversary, Normalize, Phase, Recipe, Shape, register_model
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

Combination = Literal["mean", "max", "vote"]


def majority_vote(logits: Tensor) -> Tensor:
    """What an ensemble that votes answers: the votes of each class, (B, K), with a gradient that attacks can follow.

    Args:
        logits: of the members, (M, B, K).
    Returns: the number of members whose largest logit the class has, plus the mean over the members of its
        probability. That is less than a vote unless the vote is unanimous, so it breaks ties and changes nothing else;
        and it moves where the votes stand still, which is what an attack by queries sees.

    Votes have no gradient. Passed straight through is that of the soft votes sum_i softmax(z_i / T_i), T_i a member's
    lead over its second class (no less than 1): with a temperature of their own, members that are sure have a gradient
    still, and those that are lost already do not outweigh the undecided ones.
    """
    classes = logits.shape[2]
    votes = F.one_hot(logits.argmax(dim=2), classes).to(logits.dtype).sum(dim=0)
    value = votes + logits.softmax(dim=2).mean(dim=0)
    best = logits.detach().topk(min(2, classes), dim=2).values
    lead = (best[:, :, 0] - best[:, :, -1]).clamp_min(1.0).unsqueeze(2)
    soft = (logits / lead).softmax(dim=2).sum(dim=0)
    return value.detach() + soft - soft.detach()


class Ensemble(nn.Module):
    """Several classifiers that all answer: the mean of their logits, the largest logit of each class, or a vote."""

    def __init__(self, members: list[nn.Module], combination: Combination) -> None:
        super().__init__()
        if combination not in ("mean", "max", "vote"):
            raise UsageError(f"combination must be 'mean', 'max' or 'vote', got {combination!r}")
        self.normalize = Normalize()
        self.members = nn.ModuleList(members)
        self.combination = combination

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of [0, 1] images (B, C, H, W)."""
        logits = self.member_logits(x)
        if self.combination == "vote":
            return majority_vote(logits)
        return logits.mean(dim=0) if self.combination == "mean" else logits.amax(dim=0)

    def member_logits(self, x: Tensor) -> Tensor:
        """Logits (M, B, K) of every member."""
        z = self.normalize(x)
        return torch.stack([member(z) for member in self.members])


def each_member_loss(model: Ensemble, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    """mean_i CE(f_i(x_adv), y), x_adv chosen to raise the same: every member has to be right by itself."""

    def cross_entropy(logits: Tensor) -> Tensor:
        members = len(logits)
        each = F.cross_entropy(logits.flatten(0, 1), y.repeat(members), reduction="none")
        return each.view(members, -1).mean(dim=0)

    x_adv = adversary(model.member_logits, x, cross_entropy)
    return cross_entropy(model.member_logits(x_adv)).mean()


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
@register_model(
    "ensemble-vote",
    summary="4 classifiers, majority vote, each trained to be right by PGD adversarial training",
    family="ensemble",
    training="adversarial",
    paper=STRAUSS_2017,
    settings={"combination": "vote"},
    recipe=Recipe(epochs=150),
    objective=(Phase(each_member_loss),),
)
def ensemble(num_classes: int, shape: Shape, *, members: int = 4, combination: Combination = "mean") -> nn.Module:
    """Classifiers of the dense baseline's architecture, combined without a router."""
    return Ensemble([classifier(num_classes, shape) for _ in range(members)], combination)
