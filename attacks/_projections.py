"""Norms, projections, steps and random starts for Linf and L2 balls; every function works row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.attacks._random import normal, uniform
from moebench.schema import ThreatModel


def expand(per_sample: Tensor, like: Tensor) -> Tensor:
    """Reshapes (B,) to (B, 1, …) so that it multiplies a tensor (B, …)."""
    return per_sample.view(-1, *[1] * (like.dim() - 1))


def l2_norm(v: Tensor) -> Tensor:
    """Euclidean norm of each row, (B,)."""
    return v.flatten(1).square().sum(dim=1).sqrt()


def project(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """The nearest point of the ball around x, then of the box.

    For Linf this is the nearest point of their intersection; for L2, clipping to the box after scaling stays inside
    the ball because x itself is in the box.

    Args:
        x_adv: points, (B, …), in units of the [0, 1] pixel scale.
        x: centres, same shape.
        threat: norm, radius and box.
    """
    if threat.norm == "Linf":
        inside = torch.min(torch.max(x_adv, x - threat.eps), x + threat.eps)
    else:
        delta = x_adv - x
        factor = (threat.eps / l2_norm(delta).clamp_min(1e-12)).clamp_max(1.0)
        inside = x + delta * expand(factor, delta)
    return inside.clamp(threat.lower, threat.upper)


def ascend(x_adv: Tensor, gradient: Tensor, step_size: float, threat: ThreatModel) -> Tensor:
    """One steepest-ascent step of the threat model's norm: the sign for Linf, the unit gradient for L2."""
    if threat.norm == "Linf":
        return x_adv + step_size * gradient.sign()
    return x_adv + step_size * gradient / expand(l2_norm(gradient).clamp_min(1e-12), gradient)


def random_start(x: Tensor, keys: Tensor, threat: ThreatModel) -> Tensor:
    """A random point of the ball, clipped to the box: uniform in the cube for Linf, uniform in the ball for L2.

    Args:
        x: centres, (B, …).
        keys: one random key per sample, (B,) int64.
        threat: norm, radius and box.
    """
    size = x[0].numel()
    if threat.norm == "Linf":
        noise = (2 * uniform(keys, 0, size) - 1) * threat.eps
    else:
        direction = normal(keys, 0, size)
        radius = uniform(keys, 1, 1) ** (1.0 / size)
        noise = threat.eps * radius * direction / l2_norm(direction).clamp_min(1e-12).unsqueeze(1)
    return (x + noise.view_as(x)).clamp(threat.lower, threat.upper)
