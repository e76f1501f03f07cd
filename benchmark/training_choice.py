"""Which epoch of a training run is kept, and whether it has learnt anything: both by the validation split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moebench.errors import FailedTraining


@dataclass(frozen=True)
class EpochLog:
    """One line of the training log: mean loss, and accuracies on the validation split (fractions).

    The accuracies are None where the recipe does not validate the epoch.
    """

    epoch: int
    loss: float
    val_clean: float | None
    val_robust: float | None


@dataclass(frozen=True)
class EpochChoice:
    """The rule of a run: of the epochs that count, the best one, the earliest of equals.

    Attributes:
        select: the number that decides: "clean", "robust" or "mean".
        first: the epochs that the last phase begins after; those up to it do not count.
    """

    select: str
    first: int

    def counted(self, log: Sequence[EpochLog]) -> list[EpochLog]:
        """The epochs of which one is kept: validated, and not before the last phase begins."""
        return [line for line in log if line.val_clean is not None and line.epoch > self.first]

    def score(self, line: EpochLog) -> float:
        """The number that decides, of a validated epoch."""
        clean, robust = line.val_clean, line.val_robust
        assert clean is not None and robust is not None
        return {"clean": clean, "robust": robust, "mean": (clean + robust) / 2}[self.select]

    def chosen(self, log: Sequence[EpochLog]) -> EpochLog:
        """The epoch that is kept."""
        return max(self.counted(log), key=lambda line: (self.score(line), -line.epoch))


@dataclass(frozen=True)
class Chance:
    """Accuracies that show no learning.

    Attributes:
        constant: what the best constant answer gets on the validation split.
        least: what clean accuracy must pass: twice a guess, and the constant answer.
    """

    constant: float
    least: float

    @classmethod
    def of(cls, y: Tensor, y_val: Tensor) -> Chance:
        """From the labels (N,) of the training and (M,) of the validation split."""
        guess = 1.0 / max(int(y.max()) + 1, 2)
        constant = float(y_val.bincount().max()) / len(y_val)
        return cls(constant, max(min(2 * guess, guess + (1 - guess) / 9), constant))


def verdict(
    name: str, choice: EpochChoice, log: Sequence[EpochLog], chance: Chance, *, left: str, trial: bool
) -> str | None:
    """Judges whether the epoch that is kept has learnt anything.

    Args:
        name: what is trained.
        choice: the rule of the run.
        log: all of its epochs.
        chance: of its data.
        left: what a run that failed leaves behind, for the message.
        trial: the run is shorter than its recipe, so that a low accuracy has another explanation.
    Returns: a warning, if there is one.

    Raises:
        FailedTraining: the model collapsed to chance.
    """
    longer = "train longer, or " if trial else ""
    if max(line.val_clean or 0.0 for line in choice.counted(log)) <= chance.least:
        raise FailedTraining(
            f"{name} collapsed: validation accuracy never passed {chance.least:.0%}; {left} "
            f"({longer}try another seed, a smaller beta or a lower learning rate)"
        )
    robust = choice.chosen(log).val_robust or 0.0
    if choice.select == "clean" or robust > chance.constant:
        return None
    found = f"robust validation accuracy {robust:.1%}, and a constant answer gets {chance.constant:.1%}"
    if trial:
        return f"{found}: train longer"
    raise FailedTraining(
        f"{name} collapsed: {found}; {left} "
        "(try another seed, a smaller beta, a smaller radius or a lower learning rate)"
    )
