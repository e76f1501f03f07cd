"""Distances and the only judge of validity: is an image inside the ball and the box of a threat model?"""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.schema import ThreatModel

TOLERANCE = 1e-6
"""Slack for float32 rounding of x + delta, in units of the [0, 1] pixel scale."""


def distances(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """Norm of each perturbation, (B,), computed in float64."""
    delta = (x_adv.double() - x.double()).flatten(1)
    return delta.abs().amax(dim=1) if threat.norm == "Linf" else delta.square().sum(dim=1).sqrt()


def within(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """Which images are finite, in the box, and no farther than eps from the clean image, (B,) bool.

    Args:
        x_adv: images to check, (B, …).
        x: clean images, same shape.
        threat: norm, radius and box.
    """
    flat = x_adv.flatten(1)
    in_box = ((flat >= threat.lower) & (flat <= threat.upper)).all(dim=1)
    near = distances(x_adv, x, threat) <= threat.eps + TOLERANCE * (1 if threat.norm == "Linf" else 10)
    return torch.isfinite(flat).all(dim=1) & in_box & near
