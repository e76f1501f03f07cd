"""Training: one loop for every recipe, deterministic by seed, resumable after any interruption.

The epoch that is kept is chosen on the validation split; the test split is never read here.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.attacks._projections import ascend, project
from moebench.attacks._projections import random_start as random_point
from moebench.attacks._random import sample_keys
from moebench.datasets import Dataset, load_dataset
from moebench.errors import RunError, UsageError
from moebench.models._base import MODELS, Forward, ModelEntry, Phase, Recipe, evaluating
from moebench.models._weights import load_into, read_weights, save_weights, shipped_weights
from moebench.schema import ThreatModel

State = dict[str, Tensor]


@dataclass(frozen=True)
class TrainSpec:
    """What to train. `settings` override the model's settings, `recipe` fields its recipe."""

    model: str
    dataset: str
    out: Path
    seed: int = 0
    device: str = "cpu"
    settings: Mapping[str, Any] | None = None
    recipe: Mapping[str, Any] | None = None
    fresh: bool = False


@dataclass(frozen=True)
class EpochLog:
    """One line of the training log: mean loss, and accuracies on the validation split (fractions)."""

    epoch: int
    loss: float
    val_clean: float
    val_robust: float


class TrainingAdversary:
    """PGD with a random start, used inside the objectives and for the robust validation accuracy.

    Runs the model in eval mode (BatchNorm must not learn from intermediate images) and restores the mode after.
    """

    def __init__(self, model: nn.Module, threat: ThreatModel, recipe: Recipe, seed: int) -> None:
        self.model = model
        self.threat = threat
        self.recipe = recipe
        self.seed = seed
        self.calls = 0

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        loss: Callable[[Tensor], Tensor],
        *,
        steps: int | None = None,
        eps: float | None = None,
        step_size: float | None = None,
        random_start: bool = True,
    ) -> Tensor:
        """Images (B, C, H, W) near x that raise the loss; each call draws other random starts."""
        threat = self.threat if eps is None else replace(self.threat, eps=eps)
        size = self.recipe.step_fraction * threat.eps if step_size is None else step_size
        keys = sample_keys(self.seed, f"train/{self.calls}", torch.arange(len(x), device=x.device))
        self.calls += 1
        x_adv = random_point(x, keys, threat) if random_start else x.clone()
        with evaluating(self.model):
            for _ in range(self.recipe.attack_steps if steps is None else steps):
                x_adv.requires_grad_()
                (gradient,) = torch.autograd.grad(loss(forward(x_adv)).sum(), x_adv)
                x_adv = project(ascend(x_adv.detach(), gradient, size, threat), x, threat)
        return x_adv.detach()


def train(spec: TrainSpec, progress: Callable[[EpochLog, int], None] | None = None) -> tuple[Path, dict[str, Any]]:
    """Trains a registered model and writes `OUT/NAME.safetensors` and its card.

    Args:
        spec: model, data, folder, seed.
        progress: called after each epoch with its log and the number of epochs.
    Returns: the weights file and the card.

    Raises:
        UsageError: unknown names or settings, or a part to start from is missing.
        RunError: the loss became NaN, or the model collapsed to chance.
    """
    entry = MODELS.get(spec.model)
    if entry.recipe is None:
        raise UsageError(f"model {spec.model!r} has no training recipe")
    if not 0 <= spec.seed < 2**32:
        raise UsageError(f"the seed must be between 0 and {2**32 - 1}, got {spec.seed}")
    recipe = _override(entry.recipe, spec.recipe or {})
    if recipe.epochs > 0 and not entry.objective:
        raise UsageError(f"{spec.model} is composed of trained models and has no objective; leave out epochs")
    train_set, val_set = load_dataset(spec.dataset, split="train"), load_dataset(spec.dataset, split="val")
    _seed_everything(spec.seed)
    settings = {**entry.settings, **(spec.settings or {})}
    model = entry.make(train_set.num_classes, train_set.shape, **(spec.settings or {})).to(spec.device)
    initialised_from = _initialise(model, recipe, spec)
    trainer = Trainer(model, entry, recipe, train_set, val_set, spec, {**settings, **initialised_from})
    try:
        best, log = trainer.run(progress)
    except RunError:
        # The same steps would end the same way, and another seed should not have to ask for --fresh.
        if trainer.epoch > 0:
            trainer.checkpoint_path.unlink(missing_ok=True)
        raise
    card = {
        "model": spec.model,
        "settings": settings,
        "num_classes": train_set.num_classes,
        "shape": list(train_set.shape),
        "dataset": spec.dataset,
        "data_sha256": {"train": train_set.sha256, "val": val_set.sha256},
        "threat": asdict(trainer.threat),
        "seed": spec.seed,
        "recipe": asdict(recipe),
        "initialised_from": initialised_from,
        "validation": trainer.validation(best, log),
        "log": [asdict(entry) for entry in log],
        "torch": torch.__version__.split("+")[0],
        "command": _command(spec),
    }
    path = spec.out / f"{spec.model}.safetensors"
    card["sha256"] = save_weights(path, best, card)
    trainer.checkpoint_path.unlink(missing_ok=True)
    return path, card


class Trainer:
    """State of one training run: model, optimisers, schedules, the best epoch so far.

    `start` says what the fresh model is: its settings, and the weights that its parts begin with.
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
        self.model = model
        self.entry = entry
        self.recipe = recipe
        self.spec = spec
        self.start = start
        self.threat = train_set.default_threat()
        self.x, self.y = _tensors(train_set, spec.device)
        self.x_val, self.y_val = _tensors(val_set, spec.device)
        self.adversary = TrainingAdversary(model, self.threat, recipe, spec.seed)
        self.steps_per_epoch = max(len(self.x) // recipe.batch_size, 1)
        self.spans = [_epochs_of(phase, recipe.epochs) for phase in entry.objective]
        self.optimizers = [make_optimizer(phase.parameters(model), recipe) for phase in entry.objective]
        self.schedulers = [
            make_schedule(optimizer, recipe, (last - first) * self.steps_per_epoch)
            for optimizer, (first, last) in zip(self.optimizers, self.spans, strict=True)
        ]
        self.checkpoint_path = spec.out / f".{spec.model}.training.pt"
        self.epoch = 0
        self.log: list[EpochLog] = []
        self.best: State = copy.deepcopy(model.state_dict())
        self.best_score = -1.0

    def run(self, progress: Callable[[EpochLog, int], None] | None) -> tuple[State, list[EpochLog]]:
        """Trains to the end of the recipe, from the last checkpoint if there is one."""
        if self.recipe.epochs == 0:
            return self.best, [EpochLog(0, 0.0, *self.validate())]
        if not self.spec.fresh:
            self._resume()
        while self.epoch < self.recipe.epochs:
            loss = self._train_epoch()
            self.epoch += 1
            self.log.append(EpochLog(self.epoch, loss, *self.validate()))
            self._keep_best()
            self._checkpoint()
            if progress is not None:
                progress(self.log[-1], self.recipe.epochs)
        chance = 1.0 / int(self.y.max() + 1)
        if max(line.val_clean for line in self.log) < 2 * chance:
            raise RunError(
                f"{self.spec.model} collapsed: validation accuracy never passed {2 * chance:.0%}; nothing was saved "
                "(try another seed, a smaller beta or a lower learning rate)"
            )
        return self.best, self.log

    def validate(self) -> tuple[float, float]:
        """Clean and PGD accuracy on the validation split."""
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.grad = None
        with torch.no_grad():
            clean = (self.model(self.x_val).argmax(1) == self.y_val).double().mean().item()
        adversary = TrainingAdversary(self.model, self.threat, self.recipe, self.spec.seed)
        x_adv = adversary(self.model, self.x_val, lambda z: F.cross_entropy(z, self.y_val, reduction="none"))
        with torch.no_grad():
            robust = (self.model(x_adv).argmax(1) == self.y_val).double().mean().item()
        return clean, robust

    def validation(self, best: State, log: list[EpochLog]) -> dict[str, Any]:
        """The numbers by which the epoch was chosen, for the card."""
        counted = [line for line in log if line.epoch > self.spans[-1][0]] if self.spans else log
        chosen = max(counted, key=lambda line: (self._score(line), -line.epoch))
        return {
            "split": "val",
            "epoch": chosen.epoch,
            "clean": chosen.val_clean,
            "robust": chosen.val_robust,
            "attack": f"pgd-{self.recipe.attack_steps}, {self.threat}",
            "selected_by": self.recipe.select,
        }

    def _train_epoch(self) -> float:
        self.model.train()
        active = [first <= self.epoch < last for first, last in self.spans]
        order = torch.randperm(len(self.x))
        total = 0.0
        for step in range(self.steps_per_epoch):
            rows = order[step * self.recipe.batch_size : (step + 1) * self.recipe.batch_size]
            x, y = self._augment(self.x[rows]), self.y[rows]
            steppers = zip(self.entry.objective, self.optimizers, self.schedulers, strict=True)
            for phase, optimizer, scheduler in compress(steppers, active):
                self.model.zero_grad(set_to_none=True)
                loss = phase.loss(self.model, x, y, self.adversary, self.recipe)
                if not math.isfinite(loss.item()):
                    raise RunError(
                        f"the loss of {self.spec.model} became {loss.item()} in epoch {self.epoch + 1}; "
                        "nothing was saved"
                    )
                loss.backward()  # type: ignore[no-untyped-call]
                if self.recipe.clip > 0:
                    nn.utils.clip_grad_norm_(phase.parameters(self.model), self.recipe.clip)
                optimizer.step()
                scheduler.step()
                total += loss.item()
        return total / self.steps_per_epoch

    def _augment(self, x: Tensor) -> Tensor:
        """Shifts each image by up to `translate` pixels, filling with 0, and flips half of them where that is asked."""
        if self.recipe.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1).to(x.device) < 0.5, x.flip(3), x)
        reach = self.recipe.translate
        if reach == 0:
            return x
        height, width = x.shape[-2:]
        padded = F.pad(x, (reach, reach, reach, reach))
        shifts = torch.randint(0, 2 * reach + 1, (len(x), 2))
        return torch.stack(
            [padded[i, :, dy : dy + height, dx : dx + width] for i, (dy, dx) in enumerate(shifts.tolist())]
        )

    def _score(self, line: EpochLog) -> float:
        clean, robust = line.val_clean, line.val_robust
        return {"clean": clean, "robust": robust, "mean": (clean + robust) / 2}[self.recipe.select]

    def _keep_best(self) -> None:
        if self.log[-1].epoch <= self.spans[-1][0]:
            return
        score = self._score(self.log[-1])
        if score > self.best_score:
            self.best_score = score
            self.best = copy.deepcopy(self.model.state_dict())

    def _identity(self) -> str:
        """What a checkpoint must share with this run to be continued by it."""
        return json.dumps(
            [
                self.spec.model,
                self.spec.dataset,
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
            "model": self.model.state_dict(),
            "best": self.best,
            "best_score": self.best_score,
            "log": [asdict(line) for line in self.log],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "adversary_calls": self.adversary.calls,
            "rng": torch.get_rng_state(),
        }
        temporary = self.checkpoint_path.with_suffix(f".{os.getpid()}")
        try:
            self.checkpoint_path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, temporary)
            os.replace(temporary, self.checkpoint_path)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError that does not say so.
            with suppress(OSError):
                temporary.unlink()
            reason = (error.strerror or error) if isinstance(error, OSError) else "is the disk full?"
            raise UsageError(f"cannot write {self.checkpoint_path}: {reason}") from None

    def _resume(self) -> None:
        if not self.checkpoint_path.exists():
            return
        try:
            state = torch.load(self.checkpoint_path, map_location=self.spec.device, weights_only=True)
            identity = state["identity"]
        except Exception as error:
            raise UsageError(
                f"cannot read {self.checkpoint_path} ({type(error).__name__}); delete it or use --fresh"
            ) from None
        if identity != self._identity():
            raise UsageError(
                f"{self.checkpoint_path} belongs to a run with another recipe or seed; delete it or use --fresh"
            )
        self.epoch, self.best, self.best_score = state["epoch"], state["best"], state["best_score"]
        self.log = [EpochLog(**line) for line in state["log"]]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        self.adversary.calls = state["adversary_calls"]
        torch.set_rng_state(state["rng"].cpu())


def _epochs_of(phase: Phase, epochs: int) -> tuple[int, int]:
    """First epoch of a phase, and the one after its last."""
    return round(phase.span[0] * epochs), round(phase.span[1] * epochs)


def make_optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser; the schedule sets its rate."""
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=recipe.lr_low, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "adamw":
        kernels = [parameter for parameter in parameters if parameter.dim() in (2, 4)]
        others = [parameter for parameter in parameters if parameter.dim() not in (2, 4)]
        groups: list[dict[str, Any]] = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=recipe.lr_low, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr_high,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The recipe's schedule over so many optimiser steps."""
    if recipe.schedule == "triangular":
        half_cycle = max(steps // (2 * recipe.cycles), 1)
        return torch.optim.lr_scheduler.CyclicLR(
            optimizer, recipe.lr_low, recipe.lr_high, step_size_up=half_cycle, cycle_momentum=False
        )
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr_high
    warm = round(recipe.warmup * steps)
    lowest = recipe.lr_low / recipe.lr_high if recipe.lr_high > 0 else 0.0

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        left = 1 - min((step - warm) / max(steps - warm, 1), 1.0)
        fall = {"cosine": (1 - math.cos(math.pi * left)) / 2, "poly": left**0.9, "constant": 1.0}[recipe.schedule]
        return lowest + (1 - lowest) * fall if recipe.schedule != "constant" else 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _initialise(model: nn.Module, recipe: Recipe, spec: TrainSpec) -> dict[str, str]:
    """Starts parts of the model from trained weights: those in the output folder, else the shipped ones."""
    sources: dict[str, str] = {}
    for part, name in recipe.init_from.items():
        candidates = [spec.out / f"{name}.safetensors", shipped_weights(spec.dataset, name)]
        path = next((candidate for candidate in candidates if candidate.exists()), None)
        if path is None:
            raise UsageError(
                f"{spec.model} starts from a trained {name}; "
                f"run `moebench train --model {name} --dataset {spec.dataset} --out {spec.out}` first"
            )
        state, card = read_weights(path)
        if (card.get("model"), card.get("dataset")) != (name, spec.dataset):
            raise UsageError(
                f"{path} holds {card.get('model')} trained on {card.get('dataset')}; "
                f"{spec.model} on {spec.dataset} starts from {name} trained on {spec.dataset}"
            )
        load_into(model.get_submodule(part), state, str(path))
        sources[part] = f"{name} {card['sha256']}"
    return sources


def _override(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    unknown = sorted(set(changes) - set(asdict(recipe)))
    if unknown:
        raise UsageError(f"a recipe has no {', '.join(unknown)}; it has {', '.join(asdict(recipe))}")
    return replace(recipe, **changes)


def _tensors(dataset: Dataset, device: str) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(dataset.images).to(device), torch.from_numpy(dataset.labels).to(device)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _command(spec: TrainSpec) -> str:
    words = ["moebench train", f"--model {spec.model}", f"--dataset {spec.dataset}", f"--seed {spec.seed}"]
    words += [f"--set {key}={value}" for key, value in {**(spec.settings or {}), **(spec.recipe or {})}.items()]
    return " ".join(words)


def split_settings(model: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits KEY=VALUE settings into those of the model's builder and those of its recipe."""
    known = MODELS.get(model).build.__kwdefaults__ or {}
    of_model = {key: value for key, value in settings.items() if key in known}
    return of_model, {key: value for key, value in settings.items() if key not in known}
