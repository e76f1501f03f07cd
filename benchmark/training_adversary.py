"""The attack inside adversarial training: PGD in eval mode and float32, and the δ of Free AT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from moebench.attacks._projections import ascend, project
from moebench.attacks._projections import random_start as random_point
from moebench.attacks._random import sample_keys
from moebench.models._base import Forward, Recipe, evaluating
from moebench.schema import ThreatModel


class TrainingAdversary:
    """PGD with a random start, used inside the objectives and for the robust validation accuracy.

    Runs the model in eval mode (BatchNorm must not learn from intermediate images) and restores the mode after; always
    in float32, because half precision rounds small gradients to 0, whose sign is 0.
    """

    def __init__(self, model: nn.Module, threat: ThreatModel, recipe: Recipe, seed: int) -> None:
        self.model = model
        self.threat = threat
        self.recipe = recipe
        self.seed = seed
        self.calls = 0
        self.delta: Tensor | None = None

    @property
    def eps(self) -> float:
        """Radius of the threat model."""
        return self.threat.eps

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        loss: Callable[[Tensor], Tensor],
        *,
        steps: int | None = None,
        eps: float | None = None,
        step_size: float | None = None,
        random_start: bool = True,
        from_clean: bool = False,
    ) -> Tensor:
        """Images (B, C, H, W) near x that raise the loss; each call draws other random starts."""
        threat = self.threat if eps is None else replace(self.threat, eps=eps)
        size = self.recipe.step_fraction * threat.eps if step_size is None else step_size
        keys = sample_keys(self.seed, f"train/{self.calls}", torch.arange(len(x), device=x.device))
        self.calls += 1
        x_adv = random_point(x, keys, threat) if random_start else x.clone()
        with evaluating(self.model), torch.autocast(x.device.type, enabled=False):
            for _ in range(self.recipe.attack_steps if steps is None else steps):
                x_adv.requires_grad_()
                (gradient,) = torch.autograd.grad(loss(forward(x_adv)).sum(), x_adv)
                origin = x if from_clean else x_adv.detach()
                x_adv = project(ascend(origin, gradient, size, threat), x, threat)
        return x_adv.detach()

    def carried(self, x: Tensor) -> Tensor:
        """Images x + δ; their backward pass moves δ, which stays for the next batch."""
        if self.delta is None or self.delta.shape != x.shape:
            self.delta = torch.zeros_like(x)
        x_adv = (x + self.delta).clamp(self.threat.lower, self.threat.upper).requires_grad_()
        x_adv.register_hook(self._carry)  # type: ignore[no-untyped-call]
        return x_adv

    def _carry(self, gradient: Tensor) -> None:
        assert self.delta is not None
        # δ belongs to no image, so no box cuts it but the one that holds its ball.
        ball = replace(self.threat, lower=-self.eps, upper=self.eps)
        # A loss scaled for half precision may overflow; the scaler drops that step of the weights as well.
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        self.delta = project(ascend(self.delta, gradient, self.eps, ball), torch.zeros_like(self.delta), ball)
