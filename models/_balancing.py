"""Losses that keep a router from sending every image to one expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moebench.models._base import Adversary, Phase, PhaseLoss, Recipe
from moebench.models._moe import route


def switch_loss(probs: Tensor, selected: Tensor) -> Tensor:
    """E sum_i f_i P_i - 1, 0 for a uniform load (Fedus, Zoph and Shazeer, 2022, arXiv 2101.03961, equation 4).

    Args:
        probs: the router's softmax, (B, E) or (B, T, E); P_i is its mean, which carries the gradient.
        selected: experts chosen, bool, of that shape; f_i is the share of the choices that fall on expert i.
    """
    probs, selected = probs.flatten(0, -2), selected.flatten(0, -2)
    load = selected.float().mean(dim=0)
    return probs.shape[1] * (load / load.sum() * probs.mean(dim=0)).sum() - 1


def balanced(
    phases: tuple[Phase, ...], part: Callable[[nn.Module], nn.Module] = lambda model: model
) -> tuple[Phase, ...]:
    """The same phases, with `recipe.balance` times the switch loss of all MoE layers on the clean images added.

    Args:
        phases: an objective.
        part: the part of the model whose routers are balanced.
    """

    def wrap(loss: PhaseLoss) -> PhaseLoss:
        def total(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
            value = loss(model, x, y, adversary, recipe)
            if recipe.balance > 0:
                module = part(model)
                soft, hard = route(module, x, soft=True), route(module, x)
                terms = [switch_loss(soft[name].weights, hard[name].selected) for name in soft]
                value = value + recipe.balance * torch.stack(terms).sum()
            return value

        return total

    return tuple(Phase(wrap(phase.loss), phase.part, phase.span) for phase in phases)
