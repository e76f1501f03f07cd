"""Attacks on hard routing: drive the router to chosen experts, and fool those experts.

A top-k router cuts the ball into regions, one for each set of experts that it can select, and the model is smooth
inside a region only. Gradients of the whole model see the region of the current image alone, and never the border.
These attacks go through the regions one by one: the forward pass runs the region's experts, whichever the router would
select, and the loss adds how far the router is from selecting them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from moebench.attacks._base import Attack, Loss, Rows, register_attack
from moebench.attacks._losses import dlr_towards
from moebench.attacks._regions import no_regions
from moebench.attacks.apgd import APGD

INSIDE = 0.05
"""Router margin, as a share of the spread of the router's logits, beyond which nothing more is asked of the router."""


@dataclass(frozen=True)
class Region(APGD):
    """Auto-PGD over (region, wrong class) pairs, the most promising ones at the clean image first.

    Loss: the targeted DLR of the region's experts, plus `router_weight` times the router's margin for the region, cut
    off once the router selects it. Both terms are free of the scale of the logits.

    Args:
        pairs: pairs tried per sample.
        router_weight: weight of the router's margin.
    """

    loss: str = "region"  # type: ignore[assignment]
    pairs: int = 36
    router_weight: float = 1.0

    @property
    @override
    def stage(self) -> str:
        return "region"

    @property
    @override
    def view(self) -> str:
        return "region"

    @override
    def unfit(self, model: nn.Module) -> str | None:
        return no_regions(model)

    @override
    def targets(self, logits: Tensor, y: Tensor) -> Tensor | None:
        """Pairs as region · K + class; `logits` are (B, regions, K + 1), see `RegionView`."""
        if logits.dim() == 2:
            return y.new_zeros(len(y), 0)
        batch, regions, width = logits.shape
        classes = width - 1
        flat = logits.reshape(batch * regions, width)
        scores = []
        for wrong in range(classes):
            aim = torch.full((len(flat),), wrong, device=y.device)
            gain = self._gain(flat, y.repeat_interleave(regions), aim).view(batch, regions)
            scores.append(gain.masked_fill((y == wrong).unsqueeze(1), float("-inf")))
        order = torch.stack(scores, dim=2).flatten(1).argsort(dim=1, descending=True)
        return order[:, : min(self.pairs, regions * (classes - 1))]

    @override
    def budget(self) -> tuple[int, int]:
        return self.pairs * (self.steps + 1) + 2, self.pairs * self.steps

    @override
    def _loss(self) -> Loss:
        def loss(logits: Tensor, rows: Rows) -> Tensor:
            return self._gain(logits, rows.y, rows.target % (logits.shape[1] - 1))

        return loss

    def _gain(self, logits: Tensor, y: Tensor, aim: Tensor) -> Tensor:
        fooled = dlr_towards(logits[:, :-1], y, aim)
        return fooled + self.router_weight * logits[:, -1].clamp_max(INSIDE)


@dataclass(frozen=True)
class RouteFlip(Region):
    """Auto-PGD that only changes the route: lowers the router's margin for the experts selected at the clean image."""

    pairs: int = 1

    @property
    @override
    def stage(self) -> str:
        return "route-flip"

    @override
    def targets(self, logits: Tensor, y: Tensor) -> Tensor | None:
        if logits.dim() == 2:
            return y.new_zeros(len(y), 0)
        own = logits[:, :, -1].argmax(dim=1)
        return (own * (logits.shape[2] - 1) + y).unsqueeze(1)

    @override
    def _gain(self, logits: Tensor, y: Tensor, aim: Tensor) -> Tensor:
        return -logits[:, -1]


@register_attack(
    "region",
    summary="Auto-PGD over the regions of a hard router and the wrong classes",
    views=("whole",),
    min_classes=4,
)
def region(*, pairs: int = 36, steps: int = 100, router_weight: float = 1.0) -> tuple[Attack, ...]:
    """Drive the router to each set of experts while fooling those experts."""
    return (Region(pairs=pairs, steps=steps, router_weight=router_weight),)


@register_attack("route-flip", summary="Auto-PGD that changes the selected experts and nothing else", views=("whole",))
def route_flip(*, steps: int = 100) -> tuple[Attack, ...]:
    """Change the route only."""
    return (RouteFlip(steps=steps),)
