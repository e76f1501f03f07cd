"""Auto-PGD: PGD with momentum whose step size adapts to the loss's progress.

Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks", ICML
2020 (arXiv 2003.01690), algorithm 1, with the constants of AutoAttack's standard version.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from moebench.attacks._base import Attack, Loss, Oracle, Rows, State, register_attack
from moebench.attacks._losses import cross_entropy, dlr, targeted_dlr
from moebench.attacks._projections import expand, l2_norm
from moebench.attacks._random import normal, uniform
from moebench.schema import PaperCard, ThreatModel

CROCE_2020 = PaperCard(
    title="Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks",
    authors="Francesco Croce, Matthias Hein",
    venue="ICML",
    year=2020,
    arxiv="2003.01690",
    bibtex="""@inproceedings{croce2020reliable,
  title = {Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks},
  author = {Croce, Francesco and Hein, Matthias},
  booktitle = {International Conference on Machine Learning},
  year = {2020}
}""",
)


@dataclass
class APGDState(State):
    """Per-row state, in the symbols of algorithm 1.

    Attributes:
        x: x^(k), the current image, with its gradient.
        x_old: x^(k-1).
        gradient: of the loss at x.
        x_max, gradient_max, loss_max: the best image so far.
        loss: f(x^(k)).
        step_size: eta, (R,).
        k: iterations made.
        rises: iterations since the last checkpoint in which the loss rose.
        halved: whether the step was halved at the last checkpoint.
        loss_max_checkpoint: loss_max at the last checkpoint.
    """

    x: Tensor
    x_old: Tensor
    gradient: Tensor
    x_max: Tensor
    gradient_max: Tensor
    loss_max: Tensor
    loss: Tensor
    step_size: Tensor
    k: Tensor
    rises: Tensor
    halved: Tensor
    loss_max_checkpoint: Tensor


@dataclass(frozen=True)
class APGD(Attack):
    """Untargeted or targeted Auto-PGD, one restart.

    Args:
        loss: "ce", "dlr" or "dlr-targeted".
        steps: N_iter.
        rho: share of rising iterations below which the step is halved.
        target_classes: classes tried per sample, best first, for the targeted loss.
    """

    loss: Literal["ce", "dlr", "dlr-targeted"] = "ce"
    steps: int = 100
    rho: float = 0.75
    target_classes: int = 9

    @property
    @override
    def stage(self) -> str:
        return {"ce": "apgd-ce", "dlr": "apgd-dlr", "dlr-targeted": "apgd-t"}[self.loss]

    @override
    def targets(self, logits: Tensor, y: Tensor) -> Tensor | None:
        if self.loss != "dlr-targeted":
            return None
        return likely_classes(logits, self.target_classes)

    @override
    def start(self, rows: Rows, oracle: Oracle) -> APGDState:
        x = self.first(rows, oracle.threat)
        _, loss, gradient = oracle.gradient(x, rows, self._loss())
        size, device = len(rows), x.device
        return APGDState(
            x=x,
            x_old=x.clone(),
            gradient=gradient,
            x_max=x.clone(),
            gradient_max=gradient.clone(),
            loss_max=loss.clone(),
            # The reference keeps no loss of the starting point: the first rise is counted against 0.
            loss=torch.zeros_like(loss),
            step_size=torch.full((size,), 2.0 * oracle.threat.eps, device=device),
            k=torch.zeros(size, dtype=torch.int64, device=device),
            rises=torch.zeros(size, device=device),
            halved=torch.ones(size, dtype=torch.bool, device=device),
            loss_max_checkpoint=loss.clone(),
        )

    def first(self, rows: Rows, threat: ThreatModel) -> Tensor:
        """The starting points, (R, C, H, W)."""
        return start_on_sphere(rows, threat)

    @override
    def step(self, state: APGDState, rows: Rows, oracle: Oracle) -> Tensor:
        x_new = self._move(state, rows, oracle.threat)
        state.x_old, state.x = state.x, x_new
        last = state.k == self.steps - 1
        if bool(last.all()):
            loss = self._loss()(oracle.logits(x_new, rows), rows)
            gradient = state.gradient
        else:
            _, loss, gradient = oracle.gradient(x_new, rows, self._loss())
        state.gradient = gradient
        state.rises = state.rises + (loss > state.loss)
        state.loss = loss
        better = loss > state.loss_max
        state.loss_max = torch.where(better, loss, state.loss_max)
        state.x_max = torch.where(expand(better, x_new), x_new, state.x_max)
        state.gradient_max = torch.where(expand(better, x_new), gradient, state.gradient_max)
        self._checkpoint(state)
        state.k = state.k + 1
        return last

    @override
    def budget(self) -> tuple[int, int]:
        units = self.target_classes if self.loss == "dlr-targeted" else 1
        return units * (self.steps + 1) + 2, units * self.steps

    @override
    def final(self, state: APGDState) -> Tensor:
        return state.x_max

    def _move(self, state: APGDState, rows: Rows, threat: ThreatModel) -> Tensor:
        """Z = P(x + eta g), then x + a (z - x) + (1 - a) (x - x_old), projected; a = 1 in the first iteration."""
        momentum = expand(torch.where(state.k > 0, 0.75, 1.0), state.x)
        eta = expand(state.step_size, state.x)
        direction = state.gradient.sign() if threat.norm == "Linf" else _unit(state.gradient)
        z = _project(state.x + eta * direction, rows.x, threat)
        mixed = state.x + (z - state.x) * momentum + (state.x - state.x_old) * (1 - momentum)
        return _project(mixed, rows.x, threat)

    def _checkpoint(self, state: APGDState) -> None:
        """At the iterations w_j: halves the step and goes back to the best image where progress stalled."""
        windows = checkpoints(self.steps, state.k.device)[state.k]
        due = windows > 0
        stalled = state.rises <= self.rho * windows
        unchanged = ~state.halved & (state.loss_max_checkpoint >= state.loss_max)
        halve = due & (stalled | unchanged)
        state.step_size = torch.where(halve, state.step_size / 2, state.step_size)
        state.x = torch.where(expand(halve, state.x), state.x_max, state.x)
        state.gradient = torch.where(expand(halve, state.x), state.gradient_max, state.gradient)
        state.halved = torch.where(due, halve, state.halved)
        state.loss_max_checkpoint = torch.where(due, state.loss_max, state.loss_max_checkpoint)
        state.rises = torch.where(due, torch.zeros_like(state.rises), state.rises)

    def _loss(self) -> Loss:
        return {"ce": cross_entropy, "dlr": dlr, "dlr-targeted": targeted_dlr}[self.loss]


def likely_classes(logits: Tensor, count: int) -> Tensor:
    """The classes after the most likely one, in falling order of their logits, (B, min(count, K - 1))."""
    return logits.argsort(dim=1, descending=True)[:, 1 : count + 1]


def start_on_sphere(rows: Rows, threat: ThreatModel) -> Tensor:
    """A random direction scaled to norm eps, clipped to the box: the start of Auto-PGD."""
    size = rows.x[0].numel()
    noise = 2 * uniform(rows.key, 0, size) - 1 if threat.norm == "Linf" else normal(rows.key, 0, size)
    length = noise.abs().amax(dim=1) if threat.norm == "Linf" else l2_norm(noise)
    delta = threat.eps * (noise / (length.unsqueeze(1) + 1e-12)).view_as(rows.x)
    return (rows.x + delta).clamp(threat.lower, threat.upper)


@lru_cache(maxsize=16)
def checkpoints(steps: int, device: torch.device) -> Tensor:
    """For each iteration, the length of the window that ends there, 0 where none does, (steps,).

    p_0 = 0, p_1 = 0.22, and the windows shrink by 0.03 down to 0.06 of the iterations.
    """
    windows = torch.zeros(steps)
    window, shrink, smallest = max(int(0.22 * steps), 1), max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)
    end = window - 1
    while end < steps:
        windows[end] = window
        window = max(window - shrink, smallest)
        end += window
    return windows.to(device)


def _unit(v: Tensor) -> Tensor:
    return v / expand(l2_norm(v) + 1e-12, v)


def _project(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """As `project`, in the order of operations of the reference, whose trajectories this attack reproduces."""
    if threat.norm == "Linf":
        return torch.min(torch.max(x_adv, x - threat.eps), x + threat.eps).clamp(threat.lower, threat.upper)
    delta = x_adv - x
    length = l2_norm(delta)
    scaled = delta / expand(length + 1e-12, delta) * expand(length.clamp_max(threat.eps), delta)
    return (x + scaled).clamp(threat.lower, threat.upper)


@register_attack("apgd-ce", summary="Auto-PGD on the cross-entropy, 100 steps", paper=CROCE_2020)
@register_attack("smooth-apgd-ce", summary="apgd-ce on soft routing", views=("smooth",), paper=CROCE_2020)
@register_attack(
    "straight-through-apgd-ce",
    summary="apgd-ce on straight-through routing",
    views=("straight-through",),
    paper=CROCE_2020,
)
def apgd_ce(*, steps: int = 100) -> tuple[Attack, ...]:
    """Auto-PGD on the cross-entropy."""
    return (APGD(loss="ce", steps=steps),)


@register_attack(
    "apgd-dlr", summary="Auto-PGD on the difference of logits ratio, 100 steps", min_classes=3, paper=CROCE_2020
)
@register_attack(
    "smooth-apgd-dlr", summary="apgd-dlr on soft routing", views=("smooth",), min_classes=3, paper=CROCE_2020
)
@register_attack(
    "straight-through-apgd-dlr",
    summary="apgd-dlr on straight-through routing",
    views=("straight-through",),
    min_classes=3,
    paper=CROCE_2020,
)
def apgd_dlr(*, steps: int = 100) -> tuple[Attack, ...]:
    """Auto-PGD on the difference of logits ratio."""
    return (APGD(loss="dlr", steps=steps),)


@register_attack(
    "apgd-t", summary="Auto-PGD on the targeted DLR, 9 targets, 100 steps", min_classes=4, paper=CROCE_2020
)
@register_attack("smooth-apgd-t", summary="apgd-t on soft routing", views=("smooth",), min_classes=4, paper=CROCE_2020)
@register_attack(
    "straight-through-apgd-t",
    summary="apgd-t on straight-through routing",
    views=("straight-through",),
    min_classes=4,
    paper=CROCE_2020,
)
def apgd_t(*, steps: int = 100, target_classes: int = 9) -> tuple[Attack, ...]:
    """Targeted Auto-PGD over the most likely wrong classes."""
    return (APGD(loss="dlr-targeted", steps=steps, target_classes=target_classes),)
