"""The loop over the epochs: one for every recipe, deterministic by seed, resumable after any interruption."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.augmentation import augmented
from moebench.checkpoint import checkpoint_path, read_checkpoint, write_checkpoint
from moebench.datasets import Dataset
from moebench.errors import FailedTraining, UsageError
from moebench.learner import Learner
from moebench.models._base import ModelEntry, Phase, Recipe
from moebench.training_adversary import TrainingAdversary
from moebench.training_choice import Chance, EpochChoice, EpochLog
from moebench.training_log import TrainingLog
from moebench.training_spec import TrainSpec

State = dict[str, Tensor]
Listener = Callable[[EpochLog, int], None]

VALIDATION_BATCH = 1000
"""Images at once; a validation split of large images would not fit into memory as a whole."""


class Trainer:
    """One training run: its data, its learner, its log, the best epoch so far.

    `start` says what the fresh model is: its settings, and the weights that its parts begin with.

    Raises:
        UsageError: a phase would get no epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        entry: ModelEntry,
        recipe: Recipe,
        train_set: Dataset,
        val_set: Dataset,
        spec: TrainSpec,
        start: Mapping[str, Any],
    ) -> None:
        self.entry = entry
        self.recipe = recipe
        self.spec = spec
        self.start = start
        self.data_sha256 = {"train": train_set.sha256, "val": val_set.sha256}
        self.threat = train_set.default_threat()
        self.x, self.y = _tensors(train_set, spec.device)
        self.x_val, self.y_val = _tensors(val_set, spec.device)
        self.chance = Chance.of(self.y, self.y_val)
        self.steps_per_epoch = max(len(self.x) // recipe.batch_size, 1)
        self.spans = [_epochs_of(phase, recipe.epochs) for phase in entry.objective]
        if recipe.epochs > 0 and any(first == last for first, last in self.spans):
            shares = ", ".join(f"{phase.span[0]:g} to {phase.span[1]:g}" for phase in entry.objective)
            raise UsageError(
                f"{spec.model} is trained in phases (shares {shares} of the epochs), and one of them would get none of "
                f"{recipe.epochs}; use more epochs"
            )
        self.choice = EpochChoice(recipe.select, self.spans[-1][0] if self.spans else -1)
        smaller = replace(self.threat, eps=recipe.eps_fraction * self.threat.eps)
        adversary = TrainingAdversary(model, smaller, recipe, spec.seed)
        steps = [(last - first) * self.steps_per_epoch * recipe.replays for first, last in self.spans]
        self.learner = Learner(model, entry.objective, recipe, steps, adversary, spec.device)
        self.checkpoint_path = checkpoint_path(spec.out, spec.stem)
        events = spec.out / f"{spec.stem}.tensorboard" if spec.tensorboard else None
        self.log_file = TrainingLog(spec.out / f"{spec.stem}.log.jsonl", events)
        self.epoch = 0
        self.log: list[EpochLog] = []
        self.best: State = copy.deepcopy(model.state_dict())
        self.best_score = -1.0

    def run(self, progress: Listener | None) -> tuple[State, list[EpochLog]]:
        """Trains to the end of the recipe, from the last checkpoint if there is one.

        Raises:
            UsageError: the checkpoint is another run's, or none.
            FailedTraining: the loss is no number.
            RunError: the checkpoint or the log cannot be written.
        """
        if self.recipe.epochs == 0:
            return self.best, [EpochLog(0, 0.0, *self.validate())]
        if not self.spec.fresh:
            self._resume()
        try:
            while self.epoch < self.recipe.epochs:
                self._run_epoch(progress)
            self.log_file.catch_up()
        finally:
            self.log_file.close()
        return self.best, self.log

    def _run_epoch(self, progress: Listener | None) -> None:
        began = time.perf_counter()
        rates = [optimizer.param_groups[0]["lr"] for optimizer in self.learner.optimizers]
        loss = self._train_epoch()
        self.epoch += 1
        due = self.epoch % self.recipe.validate_every == 0 or self.epoch == self.recipe.epochs
        line = EpochLog(self.epoch, loss, *(self.validate() if due else (None, None)))
        self.log.append(line)
        self._keep_best()
        self._checkpoint()
        # After the checkpoint: a run that goes on from it knows the line, one that starts over has no line too many.
        self.log_file.write({**asdict(line), "lr": rates, "seconds": round(time.perf_counter() - began, 3)})
        if progress is not None:
            progress(line, self.recipe.epochs)

    def _train_epoch(self) -> float:
        """One pass over the training data; returns the mean loss of its steps, summed over the phases."""
        self.learner.model.train()
        active = [first <= self.epoch < last for first, last in self.spans]
        order = torch.randperm(len(self.x))
        total = 0.0
        for step in range(self.steps_per_epoch):
            rows = order[step * self.recipe.batch_size : (step + 1) * self.recipe.batch_size]
            x, y = augmented(self.x[rows], self.recipe), self.y[rows]
            for _ in range(self.recipe.replays):
                for loss in self.learner.step(x, y, active):
                    if not math.isfinite(loss):
                        raise FailedTraining(
                            f"the loss of {self.spec.stem} became {loss} in epoch {self.epoch + 1}; "
                            f"{self.log_file.left}"
                        )
                    total += loss
        return total / (self.steps_per_epoch * self.recipe.replays)

    def validate(self) -> tuple[float, float]:
        """Clean and PGD accuracy on the validation split."""
        model = self.learner.shown.eval()
        for parameter in model.parameters():
            parameter.grad = None
        adversary = TrainingAdversary(model, self.threat, self.recipe, self.spec.seed)
        clean = robust = 0
        for first in range(0, len(self.y_val), VALIDATION_BATCH):
            x, y = self.x_val[first : first + VALIDATION_BATCH], self.y_val[first : first + VALIDATION_BATCH]
            x_adv = adversary(model, x, partial(F.cross_entropy, target=y, reduction="none"))
            with torch.no_grad():
                clean += int((model(x).argmax(1) == y).sum())
                robust += int((model(x_adv).argmax(1) == y).sum())
        return clean / len(self.y_val), robust / len(self.y_val)

    def _keep_best(self) -> None:
        for line in self.choice.counted(self.log[-1:]):
            score = self.choice.score(line)
            if score > self.best_score:
                self.best_score = score
                self.best = copy.deepcopy(self.learner.shown.state_dict())

    def _identity(self) -> str:
        """What a checkpoint must share with this run to be continued by it."""
        return json.dumps(
            [
                self.spec.model,
                self.entry.version,
                self.spec.objective,
                self.spec.dataset,
                self.data_sha256,
                self.spec.seed,
                dict(self.start),
                asdict(self.recipe),
                asdict(self.threat),
            ],
            sort_keys=True,
        )

    def _checkpoint(self) -> None:
        state = {
            "identity": self._identity(),
            "epoch": self.epoch,
            "best": self.best,
            "best_score": self.best_score,
            "log": [asdict(line) for line in self.log],
            **self.learner.state_dict(),
        }
        write_checkpoint(self.checkpoint_path, state)

    def _resume(self) -> None:
        state = read_checkpoint(self.checkpoint_path, self.spec.device)
        if state is None:
            return
        if state["identity"] != self._identity():
            raise UsageError(
                f"{self.checkpoint_path} belongs to a run with another recipe or seed, or on other data; delete it or "
                "use --fresh"
            )
        self.epoch, self.best, self.best_score = state["epoch"], state["best"], state["best_score"]
        self.log = [EpochLog(**line) for line in state["log"]]
        self.log_file.go_on(state["log"])
        self.learner.load_state_dict(state)


def _epochs_of(phase: Phase, epochs: int) -> tuple[int, int]:
    """First epoch of a phase, and the one after its last."""
    return round(phase.span[0] * epochs), round(phase.span[1] * epochs)


def _tensors(dataset: Dataset, device: str) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(dataset.images).to(device), torch.from_numpy(dataset.labels).to(device)
