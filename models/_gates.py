"""Gates of MoE layers inside a convolutional network: routing networks on feature maps, noise and capacity.

Pavlitska, Fan, Ditschuneit and Zöllner, 2025 (arXiv 2509.05086); the names of the gates are the paper's.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from moebench.errors import UsageError
from moebench.models._moe import MoELayer, Routing, top_experts

GateName = Literal["gap-fc", "conv-gap", "double-conv-gap", "gap-random", "gap-first"]

MIDDLE = 8
"""Channels between the two convolutions of Double-Conv-GAP."""


class _ConvGap(nn.Module):
    """A 3×3 convolution without padding, one channel per expert, then the mean over the map.

    Maps smaller than the kernel, which the paper does not have, are padded.
    """

    def __init__(self, channels: int, experts: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, experts, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        padding = 1 if min(x.shape[2:]) < 3 else 0
        return F.conv2d(x, self.conv.weight, padding=padding).mean(dim=(2, 3))


class _Projection(nn.Module):
    """Inner products of the pooled features with fixed directions, which are drawn once or are the first axes."""

    directions: Tensor

    def __init__(self, directions: Tensor) -> None:
        super().__init__()
        self.register_buffer("directions", directions)

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) @ self.directions.T


def make_gate(name: GateName, channels: int, experts: int) -> nn.Module:
    """A routing network from feature maps (B, C, H, W) to router logits (B, E).

    | name | layers |
    | --- | --- |
    | gap-fc | global average pooling, linear |
    | conv-gap | 3×3 convolution without padding or bias, global average pooling |
    | double-conv-gap | 1×1 convolution to 8 channels, BatchNorm, 1×1 convolution, global average pooling; no ReLU |
    | gap-random | global average pooling, inner products with fixed Gaussian vectors; nothing is learned |
    | gap-first | global average pooling, its first E channels; nothing is learned |

    Raises:
        UsageError: no such gate, or fewer channels than experts for "gap-first".
    """
    if name == "gap-fc":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, experts))
    if name == "conv-gap":
        return _ConvGap(channels, experts)
    if name == "double-conv-gap":
        return nn.Sequential(
            nn.Conv2d(channels, MIDDLE, 1, bias=False),
            nn.BatchNorm2d(MIDDLE),
            nn.Conv2d(MIDDLE, experts, 1, bias=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    if name == "gap-random":
        return _Projection(torch.randn(experts, channels))
    if name == "gap-first":
        if experts > channels:
            raise UsageError(
                f"gate 'gap-first' takes one channel per expert; {experts} experts and {channels} channels"
            )
        return _Projection(torch.eye(experts, channels))
    raise UsageError(f"gate must be one of {', '.join(get_args(GateName))}, got {name!r}")


class NoisyMoELayer(MoELayer):
    """An MoE layer whose selection is noisy and limited while it trains; in eval mode it is plain top-k.

    In train mode the softmax of the batch is divided by its standard deviation and Gaussian noise is added; the k
    largest of that are selected, but no expert takes more than ceil(k B / E · capacity) images: it keeps those of
    highest score, the others go to their next best expert that has room. Weights come from the softmax without noise.
    (Where an expert has too many, the published code ranks its images by a softmax of these scores over the experts.)

    Args:
        experts: modules of equal output shape.
        router: maps the layer's input to router logits (B, E).
        top_k: experts per sample.
        noise: standard deviation of the noise, 0 for none (the paper's: 0.1, none with the entropy loss).
        capacity: how many times its even share an expert takes at most, at least 1; None for no limit.
    """

    def __init__(
        self,
        experts: list[nn.Module],
        router: nn.Module,
        *,
        top_k: int = 1,
        noise: float = 0.0,
        capacity: float | None = None,
    ) -> None:
        super().__init__(experts, router, top_k=top_k)
        if not 0 <= noise < math.inf:
            raise UsageError(f"noise of a gate must be a finite number >= 0, got {noise:g}")
        if capacity is not None and not 1 <= capacity < math.inf:
            raise UsageError(f"capacity of an expert must be at least 1, its even share, or None, got {capacity:g}")
        self.noise = noise
        self.capacity = capacity

    @override
    def assign(self, probs: Tensor) -> Routing:
        batch, count = probs.shape
        plain = self.noise == 0 and self.capacity is None
        if not self.training or plain or self.top_k == count:
            return super().assign(probs)
        scores = probs.detach()
        if self.noise > 0:
            scores = scores / scores.std().clamp_min(1e-12) + self.noise * torch.randn_like(scores)
        room = batch if self.capacity is None else math.ceil(self.top_k * batch / count * self.capacity)
        return self.weigh(probs, assign_within(scores, self.top_k, room))


def assign_within(scores: Tensor, top_k: int, room: int) -> Tensor:
    """Gives each sample k experts of high score, and no expert more than `room` samples where that is possible.

    Greedy: every sample asks for its k best experts; an expert keeps those of highest score that it has room for; the
    others ask for their next best that has room. Samples that no expert has room for get their best all the same.

    Args:
        scores: (B, E).
        top_k: k.
        room: samples per expert.
    Returns: (B, E) bool, k true entries per row.
    """
    if room >= len(scores):
        return top_experts(scores, top_k)
    selected = torch.zeros_like(scores, dtype=torch.bool)
    # Each round places everybody or fills an expert.
    for _ in range(scores.shape[1] + 1):
        missing = top_k - selected.sum(dim=1)
        left = room - selected.sum(dim=0)
        wanted = _best(scores, missing, ~selected & (left > 0))
        if not bool(wanted.any()):
            break
        for expert in range(scores.shape[1]):
            asking = wanted[:, expert].nonzero().squeeze(1)
            best = scores[asking, expert].argsort(descending=True, stable=True)[: int(left[expert])]
            selected[asking[best], expert] = True
    return selected | _best(scores, top_k - selected.sum(dim=1), ~selected)


def _best(scores: Tensor, counts: Tensor, allowed: Tensor) -> Tensor:
    """The best allowed experts of each sample, as many as `counts` (B,) says, (B, E) bool."""
    ranks = scores.masked_fill(~allowed, float("-inf")).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return allowed & (ranks < counts.unsqueeze(1))
