"""FAB: walks along the linearised decision boundary, looking for the nearest adversarial point.

Croce and Hein, "Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary Attack", ICML 2020 (arXiv
1907.02044), the targeted version that AutoAttack uses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from moebench.attacks._base import Attack, Oracle, Rows, State, register_attack
from moebench.attacks._losses import margin_to_target
from moebench.attacks._projections import expand, l2_norm
from moebench.attacks.apgd import likely_classes
from moebench.schema import Norm, PaperCard

CROCE_2020_FAB = PaperCard(
    title="Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary Attack",
    authors="Francesco Croce, Matthias Hein",
    venue="ICML",
    year=2020,
    arxiv="1907.02044",
    bibtex="""@inproceedings{croce2020minimally,
  title = {Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary Attack},
  author = {Croce, Francesco and Hein, Matthias},
  booktitle = {International Conference on Machine Learning},
  year = {2020}
}""",
)


@dataclass
class FABState(State):
    """Per-row state.

    Attributes:
        x: the current image.
        updates: iterations made.
        fresh: x is the result of an iteration and has yet to be tested; else it was moved back and is only a base
            point.
        crossed: the last tested image was adversarial, so the next one probably is.
    """

    x: Tensor
    updates: Tensor
    fresh: Tensor
    crossed: Tensor


@dataclass(frozen=True)
class FAB(Attack):
    """Targeted FAB, one run from the clean image.

    A tested image that is not adversarial is the base of the next iteration, so its forward pass serves both. One
    that is adversarial beyond eps is moved back towards the clean image by beta. The engine drops a row as soon as an
    adversarial image within eps is seen; how much nearer one could come does not matter here.

    Args:
        steps: iterations.
        alpha_max: largest weight of the step from the clean image.
        eta: overshoot beyond the boundary.
        beta: step back after an adversarial image.
        target_classes: classes tried per sample, most likely first.
    """

    steps: int = 100
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    target_classes: int = 9

    @property
    @override
    def stage(self) -> str:
        return "fab-t"

    @override
    def targets(self, logits: Tensor, y: Tensor) -> Tensor | None:
        return likely_classes(logits, self.target_classes)

    @override
    def start(self, rows: Rows, oracle: Oracle) -> FABState:
        size, device = len(rows), rows.x.device
        no = torch.zeros(size, dtype=torch.bool, device=device)
        return FABState(rows.x.clone(), torch.zeros(size, dtype=torch.int64, device=device), no, no.clone())

    @override
    def step(self, state: FABState, rows: Rows, oracle: Oracle) -> Tensor:
        """Tests likely adversarial rows, and those at their end, by a forward pass alone; iterates the others."""
        ended = torch.zeros(len(rows), dtype=torch.bool, device=state.x.device)
        at_end = state.updates >= self.steps
        probe = (state.fresh & (state.crossed | at_end)).nonzero().squeeze(1)
        if len(probe) > 0:
            self._test(state, rows, probe, oracle.logits(state.x[probe], rows.take(probe)))
            ended |= at_end
        going = (~at_end).nonzero().squeeze(1)
        if len(going) > 0:
            self._iterate(state, rows, going, oracle)
        return ended

    @override
    def budget(self) -> tuple[int, int]:
        # Every second iteration may turn out to have crossed the boundary only when its gradient is taken.
        return self.target_classes * 2 * self.steps + 2, self.target_classes * (self.steps + self.steps // 2)

    @override
    def final(self, state: FABState) -> Tensor:
        return state.x

    def _test(self, state: FABState, rows: Rows, at: Tensor, logits: Tensor) -> None:
        """Moves the adversarial ones among the rows `at` back towards the clean image."""
        crossed = logits.argmax(dim=1) != rows.y[at]
        back = rows.x[at] + (state.x[at] - rows.x[at]) * self.beta
        state.x[at] = torch.where(expand(crossed, back), back, state.x[at])
        state.crossed[at] = crossed
        state.fresh[at] = False

    def _iterate(self, state: FABState, rows: Rows, going: Tensor, oracle: Oracle) -> None:
        """One linearisation and step; a fresh image that turns out adversarial is moved back and waits."""
        subset = rows.take(going)
        x = state.x[going]
        logits, difference, gradient = oracle.gradient(x, subset, margin_to_target)
        surprise = state.fresh[going] & (logits.argmax(dim=1) != subset.y)
        moved = self._move(x, subset.x, difference, gradient, oracle)
        back = subset.x + (x - subset.x) * self.beta
        state.x[going] = torch.where(expand(surprise, x), back, moved)
        state.fresh[going] = ~surprise
        # A row that was probed just now keeps the probe's verdict; one that was not is known not to have crossed.
        state.crossed[going] = state.crossed[going] | surprise
        state.updates[going] += (~surprise).long()

    def _move(self, x: Tensor, x_clean: Tensor, difference: Tensor, gradient: Tensor, oracle: Oracle) -> Tensor:
        """Equation 9: the mean, weighted by distance, of the overshot projections of x and of the clean image."""
        norm = oracle.threat.norm
        w = gradient.flatten(1)
        level = (gradient * x).flatten(1).sum(dim=1) - difference
        from_x = project_on_hyperplane(x.flatten(1), w, level, norm)
        from_clean = project_on_hyperplane(x_clean.flatten(1), w, level, norm)
        near, far = _size(from_x, norm).clamp_min(1e-8), _size(from_clean, norm).clamp_min(1e-8)
        alpha = expand((near / (near + far)).clamp(0.0, self.alpha_max), x)
        forward, bias = x + self.eta * from_x.view_as(x), x_clean + self.eta * from_clean.view_as(x)
        return (forward * (1 - alpha) + bias * alpha).clamp(oracle.threat.lower, oracle.threat.upper)


def project_on_hyperplane(points: Tensor, w: Tensor, level: Tensor, norm: Norm) -> Tensor:
    """The shortest step from each point to the hyperplane w·z = level inside the box [0, 1].

    Along the optimal direction, coordinate i moves by min(lambda, cap_i) for Linf and min(lambda |w_i|, cap_i) for
    L2, where cap_i is its room to the face of the box; lambda is where the piecewise linear gain meets the gap.

    Args:
        points: (R, D) in [0, 1].
        w: normals, (R, D).
        level: (R,).
        norm: which norm of the step is smallest.
    Returns: steps (R, D); where the box does not reach the hyperplane, the step to the nearest corner.
    """
    gap = (w * points).sum(dim=1) - level
    direction = -w.sign() * torch.where(gap >= 0, 1.0, -1.0).unsqueeze(1)
    cap = torch.where(direction > 0, 1 - points, torch.where(direction < 0, points, torch.zeros_like(points)))
    size = w.abs()
    slope = size if norm == "Linf" else size.square()
    bend = cap if norm == "Linf" else cap / size.clamp_min(1e-12)
    bends, order = bend.sort(dim=1)
    slopes = slope.gather(1, order)
    # Gain at each bend: what has met its cap, plus the rest moving at full slope.
    met = (slopes * bends).cumsum(dim=1)
    rest = slopes.sum(dim=1, keepdim=True) - slopes.cumsum(dim=1)
    gain = met + rest * bends
    wanted = gap.abs().unsqueeze(1)
    segment = (gain < wanted).sum(dim=1, keepdim=True)
    inside = segment < gain.shape[1]
    at = segment.clamp_max(gain.shape[1] - 1)
    # Within the segment that ends at bend `at`, everything from `at` on still moves.
    moving = rest.gather(1, at) + slopes.gather(1, at)
    lam = bends.gather(1, at) - (gain.gather(1, at) - wanted) / moving.clamp_min(1e-20)
    lam = torch.where(inside, lam.clamp_min(0.0), bends[:, -1:])
    step = lam.expand_as(cap) if norm == "Linf" else lam * size
    return direction * torch.min(step, cap)


def _size(v: Tensor, norm: Norm) -> Tensor:
    return v.abs().amax(dim=1) if norm == "Linf" else l2_norm(v)


@register_attack("fab-t", summary="targeted FAB, 9 targets, 100 steps", paper=CROCE_2020_FAB)
@register_attack("smooth-fab-t", summary="fab-t on soft routing", views=("smooth",), paper=CROCE_2020_FAB)
@register_attack(
    "straight-through-fab-t",
    summary="fab-t on straight-through routing",
    views=("straight-through",),
    paper=CROCE_2020_FAB,
)
def fab_t(*, steps: int = 100, target_classes: int = 9) -> tuple[Attack, ...]:
    """Targeted FAB over the most likely wrong classes."""
    return (FAB(steps=steps, target_classes=target_classes),)
