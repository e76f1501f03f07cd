"""Adversarial training that starts on clean images and comes to the whole radius by steps.

A small Transformer, a VGG and a deep narrow ResNet that meet the full radius at once end as a constant or close to it;
pre-trained on clean images and led there in steps they do not. (V-MoE's authors pre-train as well, on far more images.)
"""

from __future__ import annotations

from torch import Tensor, nn

from moebench.models._base import Adversary, Phase, PhaseLoss, Recipe
from moebench.models._objectives import cross_entropy_adversary

PRE_TRAINING = 0.4
"""Share of the epochs that sees clean images only."""

STEPS = ((0.25, 0.1), (0.5, 0.1), (0.75, 0.1), (1.0, 0.3))
"""Then: the share of the perturbation, and the share of the epochs that sees it; the epoch kept is of the last."""


def from_clean_to_adversarial(loss: PhaseLoss) -> tuple[Phase, ...]:
    """Phases with the loss on clean images, then on x + s · (x_adv - x) for a share s that grows to 1 (PGD-AT).

    Args:
        loss: on the images that it is given.
    """
    begin, phases = PRE_TRAINING, [Phase(loss, span=(0.0, PRE_TRAINING))]
    for share, epochs in STEPS:
        end = round(begin + epochs, 6)
        phases.append(Phase(_at_share(loss, share), span=(begin, end)))
        begin = end
    return tuple(phases)


def _at_share(loss: PhaseLoss, share: float) -> PhaseLoss:
    def adversarial(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
        x_adv = cross_entropy_adversary(model, x, y, adversary)
        return loss(model, x_adv if share == 1 else x + share * (x_adv - x), y, adversary, recipe)

    return adversarial
