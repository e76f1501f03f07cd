"""Warm starts: an adversarial image found at one radius counts at every larger one, for it lies in the larger ball.

In a sweep over radii the samples that a cell breaks are taken over by the cell of the next radius: the image is judged
again under the larger threat model, and only what stands is attacked. So the larger radius breaks the union of what
both break, and the curve cannot rise. Nothing is taken away: a standing sample is attacked as it would be without
warm starts, from the same random start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moebench.attacks._engine import Samples
from moebench.booking import CellOutcome
from moebench.cells import run_cell
from moebench.identity import warm_fingerprint
from moebench.schema import WARM_START, CellSpec, Outcomes
from moebench.work import CellWork, Tell


def warm_started(cell: CellSpec, smaller: CellSpec, eps: float) -> CellSpec:
    """A cell that takes over what `smaller` finds at radius `eps`.

    Its parameters and its fingerprint name that cell, so that neither passes for the other.
    """
    source: Mapping[str, Any] = {"eps": eps, "fingerprint": smaller.fingerprint}
    both = warm_fingerprint(cell.fingerprint, source)
    return replace(cell, fingerprint=both, parameters={**cell.parameters, WARM_START: source})


@dataclass
class _Chain:
    """What one attack on one view has found so far.

    Attributes:
        broken: (N,) which samples it broke at any radius so far.
        index, x_adv: (m,) and (m, C, H, W), the images at hand.
        absent: cells at their radii, and the samples that they broke, whose images are not at hand.
    """

    broken: Tensor
    index: Tensor
    x_adv: Tensor
    absent: list[tuple[CellWork, Tensor]]


class WarmStarts:
    """The adversarial images of a sweep, by attack and view; the radii must come in ascending order.

    The store keeps verdicts and no images. Where a cell was reused or resumed, and a larger radius needs its images,
    the cell is run again on the samples that it broke, and on those only: the same seed gives the same images.
    """

    def __init__(self) -> None:
        self._chains: dict[tuple[str, str], _Chain] = {}

    def given(self, work: CellWork) -> CellWork:
        """The work of a cell, with what was found before; nothing is done until the cell runs."""
        if WARM_START not in work.cell.parameters:
            return work
        chain = self._chain(work)
        return replace(work, found=lambda: _images(chain, work.tell))

    def note(self, work: CellWork, outcome: CellOutcome) -> None:
        """Remembers what a cell found that has just run."""
        chain = self._chain(work)
        new = self._new(work, chain, outcome.broken)
        # A resumed cell has the clean image where an earlier process found the adversarial one.
        moved = (outcome.x_adv[new] != work.samples.x[new]).flatten(1).any(dim=1)
        chain.index = torch.cat((chain.index, new[moved]))
        chain.x_adv = torch.cat((chain.x_adv, outcome.x_adv[new[moved]]))
        self._miss(work, chain, new[~moved])

    def note_stored(self, work: CellWork, outcomes: Outcomes) -> None:
        """Remembers what a cell found that an earlier command ran."""
        chain = self._chain(work)
        broken = torch.from_numpy(outcomes.broken.copy()).to(work.samples.x.device)
        self._miss(work, chain, self._new(work, chain, broken))

    def _chain(self, work: CellWork) -> _Chain:
        samples = work.samples
        wrong = work.clean_pred != samples.y
        empty = _Chain(wrong, torch.zeros_like(samples.y[:0]), samples.x[:0], [])
        return self._chains.setdefault((work.plan.name, work.cell.view), empty)

    @staticmethod
    def _new(work: CellWork, chain: _Chain, broken: Tensor) -> Tensor:
        """The samples (m,) that no smaller radius broke."""
        new = (broken & ~chain.broken).nonzero().squeeze(1)
        chain.broken = chain.broken | broken
        return new

    @staticmethod
    def _miss(work: CellWork, chain: _Chain, index: Tensor) -> None:
        if len(index) > 0:
            chain.absent.append((replace(work, found=None), index))


def _images(chain: _Chain, tell: Tell) -> tuple[Tensor, Tensor]:
    """All samples with an image, (m,), and the images (m, C, H, W); absent ones are made again first."""
    while chain.absent:
        work, index = chain.absent.pop(0)
        samples = work.samples
        part = Samples(samples.x[index], samples.y[index], samples.ids[index])
        again = replace(work, samples=part, clean_pred=work.clean_pred[index], tell=tell)
        _, outcome = run_cell(again, None, "", resume=False)
        chain.index = torch.cat((chain.index, index[outcome.broken]))
        chain.x_adv = torch.cat((chain.x_adv, outcome.x_adv[outcome.broken]))
    order = chain.index.argsort()
    return chain.index[order], chain.x_adv[order]
