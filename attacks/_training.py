"""Attacks that learn from training data before they meet a sample: what they are given, and what comes out."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from moebench.attacks._base import Attack, Loss, Rows
from moebench.attacks._engine import Samples
from moebench.attacks._passes import batches
from moebench.attacks._random import sample_keys, uniform
from moebench.attacks._views import View
from moebench.errors import RunError
from moebench.schema import ThreatModel

PIXELS_PER_PASS = 2**18
"""Pixels that go through the model together. The width depends on the image size alone, never on the evaluation's
batch size, so that a perturbation does not depend on it either."""

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Fit:
    """What an attack learnt: one perturbation (C, H, W), and what it cost.

    `fooling_rate` is the share of the training samples that the whole model gets right without the perturbation and
    wrong with it, of those that it gets right; `n` counts all training samples. Passes are of single samples.
    """

    delta: Tensor
    fooling_rate: float
    n: int
    forwards: int
    backwards: int
    seconds: float


class Training:
    """Training samples as an attack sees them: gradients of a view, and success on the whole model.

    Args:
        samples: of the training split, on the device.
        view: what gradients are of. It is prepared on each batch anew, because what some views keep of the clean
            samples is too large to be kept of a whole training split.
        model: the whole model; it alone says which samples are fooled.
        threat: norm, radius and box.
        seed: of random starts and of the order of the samples.
        tell: told how many of how many passes over the data are done.
    """

    def __init__(
        self,
        samples: Samples,
        view: View,
        model: nn.Module,
        threat: ThreatModel,
        seed: int,
        tell: Tell = lambda done, total: None,
    ) -> None:
        self.samples = samples
        self.view = view
        self.model = model
        self.threat = threat
        self.seed = seed
        self.tell = tell
        self.forwards = 0
        self.backwards = 0
        self._begin = time.perf_counter()
        self._width = max(1, PIXELS_PER_PASS // samples.x[0].numel())
        self._prepares = type(view).prepare is not View.prepare
        everything = torch.arange(len(samples), device=samples.x.device)
        self._right = everything[self._standing(samples.x.new_zeros(samples.x.shape[1:]), everything)]

    def __len__(self) -> int:
        return len(self.samples)

    def order(self, stream: str, epoch: int, size: int) -> Iterator[Tensor]:
        """Mini-batches of up to `size` sample numbers that cover the data once, in an order drawn for this epoch."""
        draws = uniform(sample_keys(self.seed, stream, self.samples.ids), epoch, 1).squeeze(1)
        yield from batches(draws.argsort(stable=True), size)

    def gradient(self, delta: Tensor, index: Tensor, loss: Loss) -> Tensor:
        """Gradient (C, H, W) of the mean loss over the samples `index` (m,) at x + delta, clipped to the box.

        Raises:
            RunError: the view's logits have no gradient.
        """
        total = torch.zeros_like(delta)
        for part in batches(index, self._width):
            x, y = self.samples.x[part], self.samples.y[part]
            place = torch.arange(len(part), device=part.device)
            rows = Rows(part, x, y, torch.full_like(part, -1), torch.zeros_like(part), torch.zeros_like(part))
            self.view.prepare(x)
            leaf = delta.detach().clone().requires_grad_()
            with torch.enable_grad():
                logits = self.view.logits((x + leaf).clamp(self.threat.lower, self.threat.upper), place)
                if not logits.requires_grad:
                    raise RunError(
                        "the model's logits have no gradient (is there a no_grad or detach in its forward pass?), so "
                        "no universal perturbation can be made on it"
                    )
                (gradient,) = torch.autograd.grad(loss(logits, rows).sum(), leaf, allow_unused=True)
            if gradient is not None:
                total += gradient
            self.forwards += len(part) * (1 + self._prepares)
            self.backwards += len(part)
        return total / max(len(index), 1)

    def fooling_rate(self, delta: Tensor) -> float:
        """Share of the samples that the model gets right without delta and wrong with it; 0 if it gets none right."""
        if len(self._right) == 0:
            return 0.0
        return 1.0 - int(self._standing(delta, self._right).sum()) / len(self._right)

    def fit(self, delta: Tensor) -> Fit:
        """The perturbation that was chosen, with all that was spent so far."""
        rate, seconds = self.fooling_rate(delta), time.perf_counter() - self._begin
        return Fit(delta.detach().clone(), rate, len(self), self.forwards, self.backwards, seconds)

    @torch.no_grad()
    def _standing(self, delta: Tensor, index: Tensor) -> Tensor:
        """Which of the samples `index` (m,) the whole model gets right at x + delta, (m,) bool."""
        right = []
        for part in batches(index, self._width):
            x = (self.samples.x[part] + delta).clamp(self.threat.lower, self.threat.upper)
            right.append(self.model(x).argmax(dim=1) == self.samples.y[part])
            self.forwards += len(part)
        return torch.cat(right) if right else index.new_zeros(0, dtype=torch.bool)


@dataclass(frozen=True)
class TrainedAttack(Attack):
    """An attack that is fitted on training data before the engine runs it.

    `fitted` is None before. It is no setting: it follows from the settings, the model and the training data, which
    all are part of a result's fingerprint.
    """

    fitted: Fit | None = field(default=None, compare=False, repr=False, kw_only=True)

    @abstractmethod
    def fit(self, training: Training) -> Self:
        """The same attack, fitted."""

    @abstractmethod
    def fit_budget(self, n: int) -> tuple[int, int]:
        """The most forward and backward passes of single samples that fitting on n of them can cost."""

    @override
    def parameters(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "fitted"}
