"""Losses that keep a router from sending every image to one expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from moebench.models._base import Adversary, AdversaryOn, Forward, Phase, PhaseLoss, Recipe
from moebench.models._moe import MoELayer, Policy, Routing, has_shortcut, moe_layers, route, routed_by, top_experts

BalancingLoss = Callable[[Tensor, Tensor, Recipe], Tensor]
"""From a router's softmax (B, E), the experts chosen (B, E) bool and the recipe to a scalar, one per layer and pass."""


def switch_loss(probs: Tensor, selected: Tensor) -> Tensor:
    """E sum_i f_i P_i - 1, 0 for a uniform load (Fedus, Zoph and Shazeer, 2022, arXiv 2101.03961, equation 4).

    Args:
        probs: the router's softmax, (B, E) or (B, T, E); P_i is its mean, which carries the gradient.
        selected: experts chosen, bool, of that shape; f_i is the share of the choices that fall on expert i.
    """
    probs, selected = probs.flatten(0, -2), selected.flatten(0, -2)
    load = selected.float().mean(dim=0)
    return probs.shape[1] * (load / load.sum() * probs.mean(dim=0)).sum() - 1


def entropy(probs: Tensor) -> Tensor:
    """The entropy of distributions (…, E) in nats, (…)."""
    return -(probs * probs.clamp_min(1e-30).log()).sum(dim=-1)


def entropy_loss(probs: Tensor) -> Tensor:
    """mean_b H(p_b) - H(mean_b p_b): sure about each image, even over all of them; in [-log E, 0].

    Minus the mutual information of image and expert. Pavlitska et al., 2025 (arXiv 2509.05086), L_ent.
    """
    return entropy(probs).mean() - entropy(probs.mean(dim=0))


def column_entropy_loss(probs: Tensor) -> Tensor:
    """-H(mean_b p_b) = KL(mean_b p_b || uniform) - log E: even over all images, whatever it says of each.

    The column entropy of the code of Pavlitska et al., 2025 (arXiv 2509.05086).
    """
    return -entropy(probs.mean(dim=0))


def variance_loss(probs: Tensor) -> Tensor:
    """The switch loss of the likeliest experts, minus mean_i std_b(p_bi), plus 1 (same code); needs two images."""
    return switch_loss(probs, top_experts(probs, 1)) - probs.std(dim=0).mean() + 1


def switch_of_selected(probs: Tensor, selected: Tensor, recipe: Recipe) -> Tensor:
    """The switch loss of the experts that were selected."""
    return switch_loss(probs, selected)


class Hearing:
    """Takes down the routing of the passes that a loss makes through a model, while they are made.

    A pass counts where it has gradients and is no part of an attack. `passes` holds, per layer, the router's softmax
    and the selected experts of each. Listening costs no pass, so BatchNorm sees no image more often than without.
    """

    def __init__(self) -> None:
        self.passes: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._attacking = False

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Listens to the MoE layers of a model, by their names in it."""
        with routed_by(model, {name: self._listener(name) for name in moe_layers(model)}):
            yield

    def _listener(self, name: str) -> Policy:
        def listen(layer: MoELayer, features: Tensor) -> Routing:
            probs = layer.probabilities(features)
            routing = layer.assign(probs)
            if torch.is_grad_enabled() and not self._attacking:
                self.passes.setdefault(name, []).append((probs, routing.selected))
            return routing

        return listen

    def deaf_to(self, adversary: Adversary) -> Adversary:
        """The same adversary, whose passes are not taken down."""
        return _Unheard(adversary, self)

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Takes nothing down for a while."""
        self._attacking = True
        try:
            yield
        finally:
            self._attacking = False


class _Unheard(AdversaryOn):
    """An adversary during whose attacks nothing is taken down."""

    def __init__(self, adversary: Adversary, hearing: Hearing) -> None:
        super().__init__(adversary, lambda forward: forward)
        self._hearing = hearing

    @override
    def __call__(self, forward: Forward, x: Tensor, loss: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
        with self._hearing.pausing():
            return super().__call__(forward, x, loss, **options)


def balanced(
    phases: tuple[Phase, ...],
    part: Callable[[nn.Module], nn.Module] = lambda model: model,
    loss: BalancingLoss = switch_of_selected,
) -> tuple[Phase, ...]:
    """The same phases, with `recipe.balance` times a balancing loss, summed over the MoE layers, added.

    Where the layers sit inside a network, the loss of a layer is taken from the very passes that the phase's loss makes
    (their mean, if there are several): a pass of its own would show BatchNorm the images again. Where a model knows its
    routing without running its experts, it is taken on the clean images, whatever the phase does with them.

    Args:
        phases: an objective.
        part: the part of the model whose routers are balanced.
        loss: the balancing loss.
    """

    def wrap(phase_loss: PhaseLoss) -> PhaseLoss:
        def total(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
            if recipe.balance == 0:
                return phase_loss(model, x, y, adversary, recipe)
            module = part(model)
            if has_shortcut(module):
                value = phase_loss(model, x, y, adversary, recipe)
                soft, hard = route(module, x, soft=True), route(module, x)
                terms = [loss(soft[name].weights, hard[name].selected, recipe) for name in soft]
            else:
                hearing = Hearing()
                with hearing.listening(module):
                    value = phase_loss(model, x, y, hearing.deaf_to(adversary), recipe)
                terms = _means(hearing.passes, loss, recipe)
            # A dense model has none.
            return value + recipe.balance * torch.stack(terms).sum() if terms else value

        return total

    return tuple(replace(phase, loss=wrap(phase.loss)) for phase in phases)


def _means(passes: Mapping[str, list[tuple[Tensor, Tensor]]], loss: BalancingLoss, recipe: Recipe) -> list[Tensor]:
    return [
        torch.stack([loss(probs, selected, recipe) for probs, selected in heard]).mean() for heard in passes.values()
    ]
