"""A loss that wants the experts of a layer to answer differently on average.

Pavlitska et al., 2025 (arXiv 2509.05086): `variance_alpha` of the published code, which fails as soon as it is asked
for (it takes a feature map for true or false), so no number of the paper comes from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from moebench.models._balancing import Hearing
from moebench.models._base import Adversary, Phase, PhaseLoss
from moebench.models._moe import MoELayer, moe_layers


def output_variance_loss(means: Tensor) -> Tensor:
    """relu(1 - sqrt(var_i m_i + 1e-4)) of the experts' mean outputs m (E,): 0 once they lie a unit apart.

    The variance is that of a sample, Σ (m_i - mean m)² / (E - 1).
    """
    return (1 - (means.var() + 1e-4).sqrt()).relu()


class HearingOutputs(Hearing):
    """Takes down the mean output of each expert, over its images and all values of their feature maps.

    `means` holds, per layer, the means (E,) of each pass that counts (see `Hearing`); 0 for an expert without images.
    """

    def __init__(self) -> None:
        super().__init__()
        self.means: dict[str, list[Tensor]] = {}

    @override
    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for name, layer in moe_layers(model).items():
                self._listen(name, layer, stack)
            yield

    def _listen(self, name: str, layer: MoELayer, stack: ExitStack) -> None:
        heard: dict[int, Tensor] = {}

        def note(number: int) -> Callable[..., None]:
            def hook(expert: nn.Module, given: Any, output: Tensor) -> None:
                if len(output) > 0:
                    heard[number] = output.mean()

            return hook

        def end(layer: nn.Module, given: Any, output: Tensor) -> None:
            if torch.is_grad_enabled() and not self._attacking:
                means = [heard.get(number, output.new_zeros(())) for number in range(len(experts))]
                self.means.setdefault(name, []).append(torch.stack(means))
            heard.clear()

        experts = list(layer.experts)
        for number, expert in enumerate(experts):
            stack.callback(expert.register_forward_hook(note(number)).remove)
        stack.callback(layer.register_forward_hook(end).remove)


def with_output_variance(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """The same phases, with `recipe.output_variance` times the loss, summed over the MoE layers, added.

    It is taken from the passes that the phase's loss makes (their mean, if there are several).
    """

    def wrap(phase_loss: PhaseLoss) -> PhaseLoss:
        def total(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Any) -> Tensor:
            if recipe.output_variance == 0:
                return phase_loss(model, x, y, adversary, recipe)
            hearing = HearingOutputs()
            with hearing.listening(model):
                value = phase_loss(model, x, y, hearing.deaf_to(adversary), recipe)
            terms = [torch.stack([*map(output_variance_loss, heard)]).mean() for heard in hearing.means.values()]
            extra: Tensor = recipe.output_variance * torch.stack(terms).sum()
            return value + extra

        return total

    return tuple(replace(phase, loss=wrap(phase.loss)) for phase in phases)
