"""Adversarial training that starts on clean images and comes to the whole radius by steps.

A small Transformer, a VGG and a deep narrow ResNet that meet the full radius at once end as a constant or close to it;
pre-trained on clean images and led there in steps they do not. (V-MoE's authors pre-train as well, on far more images.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from moebench.models._base import Adversary, Phase, PhaseLoss, Recipe
from moebench.models._objectives import cross_entropy_adversary, fast_adversary, standard_loss, trades_loss

Attack = Callable[[Any, Tensor, Tensor, Adversary, Any], Tensor]
"""From (model, images, labels, adversary, recipe) to the images that the radius of the last step allows."""

PRE_TRAINING = 0.4
"""Share of the epochs that sees clean images only."""

STEPS = ((0.25, 0.1), (0.5, 0.1), (0.75, 0.1), (1.0, 0.3))
"""Then: the share of the perturbation, and the share of the epochs that sees it; the epoch kept is of the last."""


def _pgd(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    return cross_entropy_adversary(model, x, y, adversary)


ATTACKS: dict[str, Attack] = {"pgd": _pgd, "fast": fast_adversary}
"""The attack of PGD adversarial training, and that of Fast AT."""


def from_clean_to_adversarial(loss: PhaseLoss, attack: str = "pgd") -> tuple[Phase, ...]:
    """Phases with the loss on clean images, then on x + s · (x_adv - x) for a share s that grows to 1.

    Args:
        loss: on the images that it is given.
        attack: which of `ATTACKS` makes x_adv.
    """
    return _by_steps(loss, lambda share: _at_share(loss, share, ATTACKS[attack]))


def from_clean_to_trades() -> tuple[Phase, ...]:
    """Phases with the loss on clean images, then TRADES on x + s · (x_adv - x) for a share s that grows to 1."""
    return _by_steps(standard_loss, lambda share: partial(trades_loss, share=share))


def _by_steps(clean: PhaseLoss, at_share: Callable[[float], PhaseLoss]) -> tuple[Phase, ...]:
    begin, phases = PRE_TRAINING, [Phase(clean, span=(0.0, PRE_TRAINING))]
    for share, epochs in STEPS:
        end = round(begin + epochs, 6)
        phases.append(Phase(at_share(share), span=(begin, end)))
        begin = end
    return tuple(phases)


def _at_share(loss: PhaseLoss, share: float, attack: Attack) -> PhaseLoss:
    def adversarial(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
        x_adv = attack(model, x, y, adversary, recipe)
        return loss(model, x_adv if share == 1 else x + share * (x_adv - x), y, adversary, recipe)

    return adversarial
