"""Losses that attacks raise, each per sample: (logits (R, K), rows) -> (R,)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from moebench.attacks._base import Rows


def cross_entropy(logits: Tensor, rows: Rows) -> Tensor:
    """-log softmax(z)_y."""
    return F.cross_entropy(logits, rows.y, reduction="none")


def dlr(logits: Tensor, rows: Rows) -> Tensor:
    """Difference of logits ratio, -(z_y - max_{i != y} z_i) / (z_(1) - z_(3)) (Croce and Hein, 2020, equation 6)."""
    top, order = logits.sort(dim=1, descending=True)
    runner_up = (order[:, 0] == rows.y).long()
    rival = top.gather(1, runner_up.unsqueeze(1)).squeeze(1)
    return -(_at(logits, rows.y) - rival) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, rows: Rows) -> Tensor:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2) (Croce and Hein, 2020, equation 7)."""
    return dlr_towards(logits, rows.y, rows.target)


def dlr_towards(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The targeted difference of logits ratio of labels (R,) and targets (R,)."""
    top = logits.topk(4, dim=1).values
    scale = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12
    return -(_at(logits, y) - _at(logits, target)) / scale


def margin_to_target(logits: Tensor, rows: Rows) -> Tensor:
    """z_t - z_y, positive once the target class beats the label."""
    return _at(logits, rows.target) - _at(logits, rows.y)


def margin(logits: Tensor, rows: Rows) -> Tensor:
    """max_{i != y} z_i - z_y, positive once the sample is misclassified."""
    others = logits.scatter(1, rows.y.unsqueeze(1), float("-inf"))
    return others.amax(dim=1) - _at(logits, rows.y)


def _at(logits: Tensor, column: Tensor) -> Tensor:
    return logits.gather(1, column.unsqueeze(1)).squeeze(1)
