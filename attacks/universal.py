"""Universal perturbations: one δ for all images, made on training data.

Moosavi-Dezfooli, Fawzi, Fawzi and Frossard, 2017 (arXiv 1610.08401) found them; here they are made by gradient ascent
on a capped loss over mini-batches, as in Shafahi, Najibi, Xu, Dickerson, Davis and Goldstein, 2020 (arXiv 1811.11304).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from moebench.attacks._base import Attack, Oracle, Rows, State, register_attack
from moebench.attacks._losses import cross_entropy, margin
from moebench.attacks._projections import ascend, random_start
from moebench.attacks._random import sample_keys
from moebench.attacks._training import TrainedAttack, Training
from moebench.errors import RunError
from moebench.schema import PaperCard, ThreatModel
from moebench.threat import distances

SHAFAHI_2020 = PaperCard(
    title="Universal Adversarial Training",
    authors="Ali Shafahi, Mahyar Najibi, Zheng Xu, John Dickerson, Larry S. Davis, Tom Goldstein",
    venue="AAAI",
    year=2020,
    arxiv="1811.11304",
    bibtex="""@inproceedings{shafahi2020universal,
  title = {Universal Adversarial Training},
  author = {Shafahi, Ali and Najibi, Mahyar and Xu, Zheng and Dickerson, John and Davis, Larry S. and Goldstein, Tom},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year = {2020}
}""",
)


@dataclass
class Shifted(State):
    """x: the image with the perturbation added, clipped to the box."""

    x: Tensor


class OneDelta(Attack):
    """Adds the same perturbation to every image: one look at the model per sample."""

    @property
    @abstractmethod
    def delta(self) -> Tensor:
        """The perturbation, (C, H, W)."""

    @override
    def start(self, rows: Rows, oracle: Oracle) -> Shifted:
        moved = rows.x + self.delta.to(rows.x.device)
        return Shifted(moved.clamp(oracle.threat.lower, oracle.threat.upper))

    @override
    def step(self, state: Shifted, rows: Rows, oracle: Oracle) -> Tensor:
        oracle.logits(state.x, rows)
        return torch.ones(len(rows), dtype=torch.bool, device=state.x.device)

    @override
    def final(self, state: Shifted) -> Tensor:
        return state.x

    @override
    def budget(self) -> tuple[int, int]:
        # On other views the search copy and the judge are asked after the view.
        return 3, 0


@dataclass(frozen=True)
class Universal(TrainedAttack, OneDelta):
    """Base of the attacks that make δ themselves."""

    @property
    @override
    def delta(self) -> Tensor:
        if self.fitted is None:
            raise RunError(f"attack stage {self.stage!r} has to be fitted on training data before it can run")
        return self.fitted.delta


@dataclass(frozen=True)
class UniversalFGSM(Universal):
    """One step of length eps along the gradient of the mean cross-entropy over the whole training data."""

    @property
    @override
    def stage(self) -> str:
        return "universal-fgsm"

    @override
    def fit(self, training: Training) -> Self:
        zero = training.samples.x.new_zeros(training.samples.x.shape[1:])
        everything = torch.arange(len(training), device=zero.device)
        gradient = training.gradient(zero, everything, cross_entropy)
        training.tell(1, 1)
        delta = into_ball(_ascend(zero, gradient, training.threat.eps, training.threat), training.threat)
        return replace(self, fitted=training.fit(delta))

    @override
    def fit_budget(self, n: int) -> tuple[int, int]:
        return 4 * n, n


@dataclass(frozen=True)
class UniversalPGD(Universal):
    """Projected gradient ascent on the mean of a capped loss over mini-batches of the training data.

    After each epoch δ is tried on the whole training data; the δ of all epochs and restarts that fools the largest
    share of it is kept. At the end of each restart -δ is tried as well. The defaults were chosen among a dozen settings
    by the fooling rate on the digits' validation split.

    Args:
        epochs: passes over the data, per restart.
        batch: samples of a mini-batch.
        step_fraction: step size of the first epoch as a fraction of eps; it falls linearly to a tenth in the last.
        loss: "ce" (cross-entropy) or "margin" (of the best wrong class over the label, in logits).
        cap: the loss of a sample counts up to here, so that samples that are fooled already do not dominate.
        restarts: random points of the ball to start from.
    """

    epochs: int = 30
    batch: int = 100
    step_fraction: float = 1.0
    loss: Literal["ce", "margin"] = "ce"
    cap: float = 3.0
    restarts: int = 3

    @property
    @override
    def stage(self) -> str:
        return "universal-pgd"

    @override
    def fit(self, training: Training) -> Self:
        best, best_rate = training.samples.x.new_zeros(training.samples.x.shape[1:]), -1.0
        for restart in range(self.restarts):
            delta = self._start(training, restart)
            for epoch in range(self.epochs):
                delta = self._epoch(training, delta, restart, epoch)
                candidates = (delta, -delta) if epoch == self.epochs - 1 else (delta,)
                for candidate in candidates:
                    rate = training.fooling_rate(candidate)
                    if rate > best_rate:
                        best, best_rate = candidate, rate
                training.tell(restart * self.epochs + epoch + 1, self.restarts * self.epochs)
        return replace(self, fitted=training.fit(best))

    @override
    def fit_budget(self, n: int) -> tuple[int, int]:
        epochs = self.restarts * self.epochs
        return n * (3 * epochs + self.restarts + 2), n * epochs

    def _start(self, training: Training, restart: int) -> Tensor:
        """A random point of the ball around a grey image: there the box takes nothing of it away."""
        shape = (1, *training.samples.x.shape[1:])
        key = sample_keys(training.seed, self.stage, torch.tensor([restart], device=training.samples.x.device))
        wide = replace(training.threat, lower=-2.0, upper=2.0)
        return into_ball(random_start(training.samples.x.new_zeros(shape), key, wide).squeeze(0), training.threat)

    def _epoch(self, training: Training, delta: Tensor, restart: int, epoch: int) -> Tensor:
        fall = 0.9 * epoch / max(self.epochs - 1, 1)
        step = self.step_fraction * (1 - fall) * training.threat.eps
        for part in training.order(f"{self.stage}/{restart}", epoch, self.batch):
            gradient = training.gradient(delta, part, self._capped)
            delta = into_ball(_ascend(delta, gradient, step, training.threat), training.threat)
        return delta

    def _capped(self, logits: Tensor, rows: Rows) -> Tensor:
        value = cross_entropy(logits, rows) if self.loss == "ce" else margin(logits, rows)
        return value.clamp_max(self.cap)


@dataclass(frozen=True)
class UniversalFile(OneDelta):
    """A δ that was made elsewhere: on another model, or in an earlier command.

    Args:
        sha256: of the δ, see `delta_sha256`.
        source: where the δ says it comes from.
        given: the δ itself, (C, H, W); no setting, its hash is.
    """

    sha256: str
    source: Mapping[str, Any]
    given: Tensor = field(compare=False, repr=False)

    @property
    @override
    def stage(self) -> str:
        return "universal-file"

    @property
    @override
    def delta(self) -> Tensor:
        return self.given

    @override
    def parameters(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "source": dict(self.source)}


def into_ball(delta: Tensor, threat: ThreatModel) -> Tensor:
    """The nearest perturbation (C, H, W) whose norm, computed in float64, is at most eps; the box plays no part."""
    eps = threat.eps
    if threat.norm == "Linf":
        limit = np.float32(eps)
        limit = limit if float(limit) <= eps else np.nextafter(limit, np.float32(0))
        return delta.clamp(-float(limit), float(limit))
    if delta_norm(delta, threat) <= eps:
        return delta
    # A hair inside, so that rounding to float32 cannot lead out again.
    scaled: Tensor = delta.double() * (eps * (1 - 1e-6) / delta.double().square().sum().sqrt())
    return scaled.to(delta.dtype)


def delta_norm(delta: Tensor, threat: ThreatModel) -> float:
    """Norm of a perturbation (C, H, W), computed in float64."""
    return float(distances(delta.unsqueeze(0), torch.zeros_like(delta).unsqueeze(0), threat))


def _ascend(delta: Tensor, gradient: Tensor, step: float, threat: ThreatModel) -> Tensor:
    return ascend(delta.unsqueeze(0), gradient.unsqueeze(0), step, threat).squeeze(0)


@register_attack(
    "universal-fgsm", summary="one δ for all images: one step on the whole training data", paper=SHAFAHI_2020
)
def universal_fgsm() -> tuple[Attack, ...]:
    """One step from zero."""
    return (UniversalFGSM(),)


@register_attack(
    "universal-pgd", summary="one δ for all images: epochs of PGD over the training data", paper=SHAFAHI_2020
)
def universal_pgd(
    *,
    epochs: int = 30,
    batch: int = 100,
    step_fraction: float = 1.0,
    loss: Literal["ce", "margin"] = "ce",
    cap: float = 3.0,
    restarts: int = 3,
) -> tuple[Attack, ...]:
    """Epochs of projected ascent."""
    return (
        UniversalPGD(epochs=epochs, batch=batch, step_fraction=step_fraction, loss=loss, cap=cap, restarts=restarts),
    )
