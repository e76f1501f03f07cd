"""Models that are one MoE layer behind the normalisation: the image alone decides the routing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from moebench.models._base import Normalize
from moebench.models._moe import MoELayer, RoutedModel, Tape


class ImageMoE(RoutedModel):
    """F(x) = moe(normalised x); attacks on the router need not run the experts."""

    normalize: Normalize
    moe: MoELayer

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of [0, 1] images (B, C, H, W)."""
        logits: Tensor = self.moe(self.normalize(x))
        return logits

    @override
    def route(self, x: Tensor, *, soft: bool = False) -> Tape:
        z = self.normalize(x)
        return {"moe": self.moe.soft_routing(z) if soft else self.moe.own_routing(z)}


class NetworkMoE(ImageMoE):
    """Whole networks as experts, so that the logits are a mixture of theirs."""

    @override
    def expert_outputs(self, x: Tensor) -> dict[str, Tensor]:
        z = self.normalize(x)
        return {"moe": torch.stack([expert(z) for expert in self.moe.experts], dim=1)}

    @override
    def mix(self, outputs: Mapping[str, Tensor], tape: Tape) -> Tensor:
        return (tape["moe"].weights.unsqueeze(2) * outputs["moe"]).sum(dim=1)
