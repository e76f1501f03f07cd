"""An attack that weighs the router against the experts.

A perturbation can act on an MoE in two ways: it changes which experts answer, and it changes what they answer. The
attacks behind RA-R and RA-E see one of the two; this one pulls at both with a given share, whatever the gradient of
the whole model makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from moebench.attacks._base import Attack, Loss, Rows, register_attack
from moebench.attacks.apgd import APGD, likely_classes
from moebench.errors import UsageError


@dataclass(frozen=True)
class Joint(APGD):
    """Auto-PGD on a weighted sum of the losses of router, experts and whole model.

    For the image x, its perturbation δ, a share λ of the router and a weight w of the whole model it raises

        L(δ) = (1 - w) · [λ · l(z_R) + (1 - λ) · l(z_E)] + w · l(z),

        z_R = split_forward(x + δ, x):  the soft routing of x + δ weighs the experts' outputs on x (view `router`),
        z_E = split_forward(x, x + δ):  the hard routing of x weighs the experts' outputs on x + δ (view `experts`),
        z   = F(x + δ):                 the whole model,

    with l the cross-entropy, or the targeted DLR of a wrong class. λ = 1, w = 0 is the attack behind RA-R and λ = 0,
    w = 0 the one behind RA-E. Every λ (and every class) is a row of its own, so a sample leaves at its first success;
    a target is number of λ, or number of λ · K + class. Success is judged on the whole model.

    Args:
        shares: the values of λ, each in [0, 1], in the order in which they are tried.
        whole: w, in [0, 1].
    """

    shares: tuple[float, ...] = (0.5, 0.25, 0.75)
    whole: float = 0.0

    def __post_init__(self) -> None:
        if not self.shares or not all(0 <= share <= 1 for share in self.shares):
            raise UsageError(f"shares must be numbers in [0, 1], at least one; got {self.shares}")
        if not 0 <= self.whole <= 1:
            raise UsageError(f"whole must be in [0, 1], got {self.whole:g}")

    @property
    @override
    def stage(self) -> str:
        return "joint-t" if self.loss == "dlr-targeted" else "joint"

    @property
    @override
    def view(self) -> str:
        return "joint"

    @override
    def targets(self, logits: Tensor, y: Tensor) -> Tensor | None:
        """Numbers of λ, or λ · K + class with the likeliest classes first; `logits` are (B, 3, K), see `JointView`."""
        if logits.dim() == 2:
            return y.new_zeros(len(y), 0)
        numbers = torch.arange(len(self.shares), device=y.device)
        if self.loss != "dlr-targeted":
            return numbers.expand(len(y), -1)
        classes = likely_classes(logits[:, 2], self.target_classes)
        return (classes.unsqueeze(2) + numbers * logits.shape[2]).flatten(1)

    @override
    def budget(self) -> tuple[int, int]:
        """Passes of the view, each of which runs the router and, up to twice, the experts."""
        rows = len(self.shares) * (self.target_classes if self.loss == "dlr-targeted" else 1)
        return rows * (self.steps + 1) + 2, rows * self.steps

    @override
    def _loss(self) -> Loss:
        plain = super()._loss()

        def loss(logits: Tensor, rows: Rows) -> Tensor:
            number, aim = rows.target, rows
            if self.loss == "dlr-targeted":
                number, aim = rows.target // logits.shape[2], replace(rows, target=rows.target % logits.shape[2])
            share = logits.new_tensor(self.shares)[number]
            router, experts, whole = (plain(logits[:, part], aim) for part in range(3))
            return (1 - self.whole) * (share * router + (1 - share) * experts) + self.whole * whole

        return loss


@register_attack(
    "joint", summary="Auto-PGD on the losses of router and experts, weighed in several ways", views=("whole",)
)
def joint(*, shares: tuple[float, ...] = (0.5, 0.25, 0.75), whole: float = 0.0, steps: int = 100) -> tuple[Attack, ...]:
    """Pull at router and experts at once."""
    return (Joint(loss="ce", steps=steps, shares=shares, whole=whole),)
