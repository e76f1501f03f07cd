"""Training objectives that several papers share, each a loss over (model, images, labels, adversary, recipe).

Those that fit any classifier are registered by name, for `moebench train --recipe NAME`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.models._base import Adversary, Phase, PhaseLoss, Recipe, evaluating
from moebench.registry import Registry, decorator_for, objective_registry


@dataclass(frozen=True)
class Objective:
    """A training objective that fits any classifier.

    Attributes:
        name: what `--recipe` calls it.
        loss: the loss of its only phase.
        summary: one line for listings.
        training: the `training` of models that are registered with it as their own.
        defaults: fields of the recipe that it sets; the others stay the model's.
    """

    name: str
    loss: PhaseLoss
    summary: str
    training: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


OBJECTIVES: Registry[Objective] = objective_registry()


def _objective(loss: PhaseLoss, name: str, facts: dict[str, Any]) -> Objective:
    return Objective(name, loss, **facts)


register_objective = decorator_for(lambda: OBJECTIVES, _objective)
"""Declares a loss as an objective for any classifier; the keyword arguments are the fields of `Objective`."""


def kl_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) of the softmax distributions of two logits (B, K), per sample (B,)."""
    log_p, log_q = logits_p.log_softmax(dim=1), logits_q.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def cross_entropy_adversary(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary) -> Tensor:
    """Images near x that raise the model's cross-entropy."""
    return adversary(model, x, lambda logits: F.cross_entropy(logits, y, reduction="none"))


@register_objective(
    "standard", summary="cross-entropy on clean images", training="standard", defaults={"select": "clean"}
)
def standard_loss(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    """Cross-entropy on clean images."""
    return F.cross_entropy(model(x), y)


@register_objective(
    "at",
    summary="PGD adversarial training (Madry et al., 2018)",
    training="adversarial",
    defaults={"select": "robust"},
)
def adversarial_loss(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    """Cross-entropy on adversarial images only (Madry et al., 2018, arXiv 1706.06083)."""
    return F.cross_entropy(model(cross_entropy_adversary(model, x, y, adversary)), y)


@register_objective(
    "trades",
    summary="TRADES with weight beta = 6 (Zhang et al., 2019)",
    training="trades",
    defaults={"select": "robust", "beta": 6.0},
)
def trades_loss(
    model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe, share: float = 1.0
) -> Tensor:
    """CE(f(x), y) + beta KL(p(x) || p(x')), x' chosen to raise the divergence (Zhang et al., 2019).

    With a `share` s below 1, x' is only that part of the way from x.
    """
    # The attack is computed in float32, and so is what it moves away from.
    with torch.no_grad(), evaluating(model), torch.autocast(x.device.type, enabled=False):
        reference = model(x)
    x_adv = adversary(model, x, lambda logits: kl_divergence(reference, logits))
    x_adv = x_adv if share == 1 else x + share * (x_adv - x)
    clean, adv = model(torch.cat((x, x_adv))).chunk(2)
    return F.cross_entropy(clean, y) + recipe.beta * kl_divergence(clean, adv).mean()


def fast_adversary(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    """Images one step from a random start (Fast AT), see `fast_adversarial_loss`."""
    return adversary(
        model,
        x,
        lambda logits: F.cross_entropy(logits, y, reduction="none"),
        steps=1,
        step_size=recipe.fast_step * adversary.eps,
        from_clean=recipe.fast_from == "clean",
    )


@register_objective(
    "fast-at",
    summary="Fast AT: one step of 1.25 eps from a random start (Wong et al., 2020)",
    training="fast-at",
    defaults={"select": "robust"},
)
def fast_adversarial_loss(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    """Cross-entropy on FGSM images from a random start (Wong, Rice and Kolter, 2020, arXiv 2001.03994, algorithm 3).

    delta is uniform in the ball, then delta + fast_step * eps * sign(gradient), projected to the ball. The variant of
    Robust Experts (arXiv 2509.05086) adds the step to the clean image and halves the radius: `fast_from="clean"`,
    `fast_step=1`, `eps_fraction=0.5`. Catastrophic overfitting, which this objective is known for, is met by keeping
    the epoch of highest PGD accuracy.

    Differs from the paper: the gradient is taken in eval mode, as for all attacks here.
    """
    return F.cross_entropy(model(fast_adversary(model, x, y, adversary, recipe)), y)


@register_objective(
    "free-at",
    summary="Free AT: 8 replays of each batch, whose gradient moves weights and δ (Shafahi et al., 2019)",
    training="free-at",
    defaults={"select": "robust", "replays": 8},
)
def free_adversarial_loss(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    """Cross-entropy at x + δ, whose backward pass gives weights and δ their gradient (arXiv 1904.12843, algorithm 1).

    δ is carried on from replay to replay and from batch to batch; the recipe's `replays` is the paper's m, and the
    model's epochs are divided by it, so that the weights see as many batches as before.
    """
    return F.cross_entropy(model(adversary.carried(x)), y)


STANDARD = (Phase(standard_loss),)
ADVERSARIAL = (Phase(adversarial_loss),)
TRADES = (Phase(trades_loss),)
FAST = (Phase(fast_adversarial_loss),)
FREE = (Phase(free_adversarial_loss),)
