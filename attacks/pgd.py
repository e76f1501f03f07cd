"""FGSM and PGD: steepest ascent on the cross-entropy inside the ball.

Goodfellow, Shlens and Szegedy, 2015 (arXiv 1412.6572); Madry et al., 2018 (arXiv 1706.06083).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from moebench.attacks._base import Attack, Oracle, Rows, State, register_attack
from moebench.attacks._losses import cross_entropy
from moebench.attacks._projections import ascend, expand, project, random_start
from moebench.models._training_papers import MADRY_2018
from moebench.schema import PaperCard

GOODFELLOW_2015 = PaperCard(
    title="Explaining and Harnessing Adversarial Examples",
    authors="Ian J. Goodfellow, Jonathon Shlens, Christian Szegedy",
    venue="ICLR",
    year=2015,
    arxiv="1412.6572",
    bibtex="""@inproceedings{goodfellow2015explaining,
  title = {Explaining and Harnessing Adversarial Examples},
  author = {Goodfellow, Ian J. and Shlens, Jonathon and Szegedy, Christian},
  booktitle = {International Conference on Learning Representations},
  year = {2015}
}""",
)


@dataclass
class PGDState(State):
    """x: the current image; step: updates made; x_best, loss_best: the image of highest loss so far.

    anchor: the image after the last power of two of updates.
    """

    x: Tensor
    step: Tensor
    x_best: Tensor
    loss_best: Tensor
    anchor: Tensor


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient ascent with a fixed step.

    The next image depends on the current one alone, so a search that comes back to an image goes round in circles
    from there, and ends (arXiv 2503.19347). Returns are found by comparing with the image after the last power of two
    of updates (Brent, 1980), exactly, whatever the length of the circle.

    Args:
        steps: updates; the image after the last one is judged as well.
        step_fraction: step size as a fraction of eps.
        random_start: start at a random point of the ball instead of the clean image.
    """

    steps: int
    step_fraction: float = 0.25
    random_start: bool = True

    @property
    @override
    def stage(self) -> str:
        return "pgd" if self.random_start else "fgsm"

    @override
    def start(self, rows: Rows, oracle: Oracle) -> PGDState:
        x = random_start(rows.x, rows.key, oracle.threat) if self.random_start else rows.x.clone()
        count = torch.zeros(len(rows), dtype=torch.int64, device=x.device)
        lowest = torch.full((len(rows),), float("-inf"), device=x.device)
        # No image is outside the box, so nothing returns to the first anchor.
        return PGDState(x, count, x.clone(), lowest, torch.full_like(x, oracle.threat.lower - 1))

    @override
    def step(self, state: PGDState, rows: Rows, oracle: Oracle) -> Tensor:
        ended = state.step == self.steps
        if bool(ended.all()):
            self._keep_best(state, cross_entropy(oracle.logits(state.x, rows), rows))
            return ended
        _, loss, gradient = oracle.gradient(state.x, rows, cross_entropy)
        self._keep_best(state, loss)
        moved = ascend(state.x, gradient, self.step_fraction * oracle.threat.eps, oracle.threat)
        going = ~ended.view(-1, 1, 1, 1)
        state.x = torch.where(going, project(moved, rows.x, oracle.threat), state.x)
        state.step = state.step + 1
        return ended | self._circling(state, oracle)

    @override
    def budget(self) -> tuple[int, int]:
        return self.steps + 2, self.steps

    @override
    def final(self, state: PGDState) -> Tensor:
        return state.x_best

    def _circling(self, state: PGDState, oracle: Oracle) -> Tensor:
        """Which rows are back at their anchor, and so have seen every image that they would ever see."""
        if not oracle.repeatable:
            return torch.zeros_like(state.step, dtype=torch.bool)
        back = (state.x == state.anchor).flatten(1).all(dim=1)
        power_of_two = (state.step & (state.step - 1)) == 0
        state.anchor = torch.where(expand(power_of_two, state.x), state.x, state.anchor)
        return back

    def _keep_best(self, state: PGDState, loss: Tensor) -> None:
        better = loss > state.loss_best
        state.x_best = torch.where(better.view(-1, 1, 1, 1), state.x, state.x_best)
        state.loss_best = torch.where(better, loss, state.loss_best)


@register_attack("fgsm", summary="one step of size eps from the clean image", paper=GOODFELLOW_2015)
@register_attack("smooth-fgsm", summary="fgsm on soft routing", views=("smooth",), paper=GOODFELLOW_2015)
@register_attack(
    "straight-through-fgsm",
    summary="fgsm on straight-through routing",
    views=("straight-through",),
    paper=GOODFELLOW_2015,
)
def fgsm() -> tuple[Attack, ...]:
    """FGSM: PGD with one step of length eps and no random start."""
    return (PGD(steps=1, step_fraction=1.0, random_start=False),)


@register_attack("pgd-10", summary="PGD, 10 steps of eps/4, random start", settings={"steps": 10}, paper=MADRY_2018)
@register_attack("pgd-20", summary="PGD, 20 steps of eps/4, random start", settings={"steps": 20}, paper=MADRY_2018)
@register_attack("pgd-50", summary="PGD, 50 steps of eps/4, random start", settings={"steps": 50}, paper=MADRY_2018)
@register_attack(
    "smooth-pgd-10", summary="pgd-10 on soft routing", settings={"steps": 10}, views=("smooth",), paper=MADRY_2018
)
@register_attack(
    "smooth-pgd-20", summary="pgd-20 on soft routing", settings={"steps": 20}, views=("smooth",), paper=MADRY_2018
)
@register_attack(
    "smooth-pgd-50",
    summary="pgd-50 on the model with dense soft routing, judged on the hard model",
    settings={"steps": 50},
    views=("smooth",),
    paper=MADRY_2018,
)
@register_attack(
    "straight-through-pgd-10",
    summary="pgd-10 on straight-through routing",
    settings={"steps": 10},
    views=("straight-through",),
    paper=MADRY_2018,
)
@register_attack(
    "straight-through-pgd-20",
    summary="pgd-20 on straight-through routing",
    settings={"steps": 20},
    views=("straight-through",),
    paper=MADRY_2018,
)
@register_attack(
    "straight-through-pgd-50",
    summary="pgd-50 on straight-through routing",
    settings={"steps": 50},
    views=("straight-through",),
    paper=MADRY_2018,
)
@register_attack(
    "pgd-N",
    summary="PGD, N steps of eps/4, random start",
    pattern=r"pgd-(?P<steps>[1-9][0-9]{0,3})",
    takes="a whole number of steps from 1 to 9999",
    paper=MADRY_2018,
)
@register_attack(
    "smooth-pgd-N",
    summary="pgd-N on the model with dense soft routing, judged on the hard model",
    pattern=r"smooth-pgd-(?P<steps>[1-9][0-9]{0,3})",
    takes="a whole number of steps from 1 to 9999",
    views=("smooth",),
    paper=MADRY_2018,
)
def pgd(*, steps: int = 50, step_fraction: float = 0.25) -> tuple[Attack, ...]:
    """PGD on the cross-entropy."""
    return (PGD(steps=steps, step_fraction=step_fraction),)
