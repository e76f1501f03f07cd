"""Training: one loop for every recipe, deterministic by seed, resumable after any interruption.

The epoch that is kept is chosen on the validation split; the test split is never read here.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from moebench.checkpoint import checkpoint_path, clear_drafts, read_checkpoint, write_checkpoint
from moebench.datasets import Dataset, load_training_splits
from moebench.errors import RunError, UsageError
from moebench.models._base import MODELS, ModelEntry, Phase, Recipe
from moebench.models._weights import load_into, read_card, read_weights, save_weights, shipped_weights
from moebench.optimizers import make_optimizer, make_schedule
from moebench.recipes import own_settings, plan_training, variant_name
from moebench.training_adversary import TrainingAdversary
from moebench.training_log import TrainingLog

State = dict[str, Tensor]

VALIDATION_BATCH = 1000
"""Images at once; a validation split of large images would not fit into memory as a whole."""


@dataclass(frozen=True)
class TrainSpec:
    """What to train. `settings` override the model's settings, `recipe` fields its recipe.

    `objective` names another recipe than the model's own: "at", "free-at", …, or a model of the same builder.
    """

    model: str
    dataset: str
    out: Path
    seed: int = 0
    device: str = "cpu"
    settings: Mapping[str, Any] | None = None
    recipe: Mapping[str, Any] | None = None
    fresh: bool = False
    objective: str | None = None
    tensorboard: bool = False

    @property
    def stem(self) -> str:
        """What the files of this model are called: another recipe makes another model, with files of its own."""
        return self.model if self.objective is None else f"{self.model}.{self.objective}"


@dataclass(frozen=True)
class EpochLog:
    """One line of the training log: mean loss, and accuracies on the validation split (fractions).

    The accuracies are None where the recipe does not validate the epoch.
    """

    epoch: int
    loss: float
    val_clean: float | None
    val_robust: float | None


def train(spec: TrainSpec, progress: Callable[[EpochLog, int], None] | None = None) -> tuple[Path, dict[str, Any]]:
    """Trains a registered model and writes `OUT/NAME.safetensors`, its card and its log.

    With another recipe than the model's own the files are called `NAME.RECIPE.…`.

    Args:
        spec: model, recipe, data, folder, seed.
        progress: called after each epoch with its log and the number of epochs.
    Returns: the weights file and the card.

    Raises:
        UsageError: unknown names or settings, a recipe of another kind of model, a part to start from is missing, or
            the file holds another variant of the model.
        RunError: the loss became NaN, or the model collapsed to chance.
    """
    entry = MODELS.get(spec.model)
    plan = plan_training(entry, spec.objective, spec.recipe or {})
    if not 0 <= spec.seed < 2**32:
        raise UsageError(f"the seed must be between 0 and {2**32 - 1}, got {spec.seed}")
    spec = replace(spec, objective=plan.variant)
    entry = replace(entry, objective=plan.objective)
    train_set, val_set = load_training_splits(spec.dataset)
    _seed_everything(spec.seed)
    settings = {**entry.settings, **(spec.settings or {})}
    path = spec.out / f"{spec.stem}.safetensors"
    _keep_other_models(path, spec, settings, entry.settings)
    model = entry.make(train_set.num_classes, train_set.shape, **(spec.settings or {})).to(spec.device)
    initialised_from = _initialise(model, plan.recipe, spec)
    clear_drafts(spec.out, spec.stem)
    start = {**settings, **initialised_from}
    trainer = Trainer(model, entry, plan.recipe, train_set, val_set, spec, start)
    try:
        best, log = trainer.run(progress)
        validation = trainer.validation(best, log)
        warning = trainer.verdict(validation, trial=plan.recipe.epochs < plan.full)
    except RunError:
        # The same steps would end the same way, and another seed should not have to ask for --fresh.
        if trainer.epoch > 0:
            trainer.checkpoint_path.unlink(missing_ok=True)
        raise
    card = {
        "model": spec.model,
        "objective": spec.objective,
        "training": plan.training,
        "settings": settings,
        "num_classes": train_set.num_classes,
        "shape": list(train_set.shape),
        "dataset": spec.dataset,
        "data_sha256": trainer.data_sha256,
        "threat": asdict(trainer.threat),
        "seed": spec.seed,
        "recipe": asdict(plan.recipe),
        "initialised_from": initialised_from,
        "validation": {**validation, **({"warning": warning} if warning else {})},
        "log": [asdict(line) for line in log],
        "torch": torch.__version__.split("+")[0],
        "command": _command(spec),
    }
    card["sha256"] = save_weights(path, best, card)
    trainer.checkpoint_path.unlink(missing_ok=True)
    return path, card


class Trainer:
    """State of one training run: model, optimisers, schedules, averaged weights, the best epoch so far.

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
        self.data_sha256 = {"train": train_set.sha256, "val": val_set.sha256}
        self.threat = train_set.default_threat()
        self.x, self.y = _tensors(train_set, spec.device)
        self.x_val, self.y_val = _tensors(val_set, spec.device)
        smaller = replace(self.threat, eps=recipe.eps_fraction * self.threat.eps)
        self.adversary = TrainingAdversary(model, smaller, recipe, spec.seed)
        self.steps_per_epoch = max(len(self.x) // recipe.batch_size, 1)
        self.spans = [_epochs_of(phase, recipe.epochs) for phase in entry.objective]
        if recipe.epochs > 0 and any(first == last for first, last in self.spans):
            shares = ", ".join(f"{phase.span[0]:g} to {phase.span[1]:g}" for phase in entry.objective)
            raise UsageError(
                f"{spec.model} is trained in phases (shares {shares} of the epochs), and one of them would get none of "
                f"{recipe.epochs}; use more epochs"
            )
        self.optimizers = [make_optimizer(phase.parameters(model), phase.paced(recipe)) for phase in entry.objective]
        self.schedulers = [
            make_schedule(optimizer, phase.paced(recipe), (last - first) * self.steps_per_epoch * recipe.replays)
            for phase, optimizer, (first, last) in zip(entry.objective, self.optimizers, self.spans, strict=True)
        ]
        self.scaler = torch.amp.GradScaler(self._device_type, enabled=recipe.precision == "float16")
        self.average: AveragedModel | None = None
        if recipe.ema > 0:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)  # type: ignore[no-untyped-call]
        self.checkpoint_path = checkpoint_path(spec.out, spec.stem)
        events = spec.out / f"{spec.stem}.tensorboard" if spec.tensorboard else None
        self.log_file = TrainingLog(spec.out / f"{spec.stem}.log.jsonl", events)
        self.epoch = 0
        self.log: list[EpochLog] = []
        self.best: State = copy.deepcopy(model.state_dict())
        self.best_score = -1.0

    @property
    def _device_type(self) -> str:
        return torch.device(self.spec.device).type

    @property
    def shown(self) -> nn.Module:
        """What is validated and saved: the averaged weights, where the recipe averages them."""
        return self.model if self.average is None else self.average.module

    def run(self, progress: Callable[[EpochLog, int], None] | None) -> tuple[State, list[EpochLog]]:
        """Trains to the end of the recipe, from the last checkpoint if there is one."""
        if self.recipe.epochs == 0:
            return self.best, [EpochLog(0, 0.0, *self.validate())]
        if not self.spec.fresh:
            self._resume()
        try:
            while self.epoch < self.recipe.epochs:
                self._run_epoch(progress)
        finally:
            self.log_file.close()
        return self.best, self.log

    def _run_epoch(self, progress: Callable[[EpochLog, int], None] | None) -> None:
        began = time.perf_counter()
        rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
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

    def verdict(self, validation: Mapping[str, Any], *, trial: bool) -> str | None:
        """Judges whether the epoch that is kept has learnt anything.

        Args:
            validation: the kept epoch.
            trial: the run is shorter than its recipe, so that a low robust accuracy has another explanation.
        Returns: a warning, if there is one.

        Raises:
            RunError: the model collapsed to chance.
        """
        if self.recipe.epochs == 0:
            return None
        chance = 1.0 / max(int(self.y.max()) + 1, 2)
        constant = float(self.y_val.bincount().max()) / len(self.y_val)
        least = max(min(2 * chance, chance + (1 - chance) / 9), constant)
        if max(line.val_clean or 0.0 for line in self._counted(self.log)) <= least:
            raise RunError(
                f"{self.spec.stem} collapsed: validation accuracy never passed {least:.0%}; {self._nothing_saved()} "
                "(try another seed, a smaller beta or a lower learning rate)"
            )
        robust = validation["robust"]
        if self.recipe.select == "clean" or robust > constant:
            return None
        found = f"robust validation accuracy {robust:.1%}, and a constant answer gets {constant:.1%}"
        if trial:
            return f"{found}: train longer"
        raise RunError(
            f"{self.spec.stem} collapsed: {found}; {self._nothing_saved()} "
            "(try another seed, a smaller beta, a smaller radius or a lower learning rate)"
        )

    def _nothing_saved(self) -> str:
        return f"nothing was saved but {self.log_file.path}" if self.log_file.path.exists() else "nothing was saved"

    def validate(self) -> tuple[float, float]:
        """Clean and PGD accuracy on the validation split."""
        model = self.shown.eval()
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

    def validation(self, best: State, log: list[EpochLog]) -> dict[str, Any]:
        """The numbers by which the epoch was chosen, for the card."""
        chosen = max(self._counted(log), key=lambda line: (self._score(line), -line.epoch))
        return {
            "split": "val",
            "epoch": chosen.epoch,
            "clean": chosen.val_clean,
            "robust": chosen.val_robust,
            "attack": f"pgd-{self.recipe.attack_steps}, {self.threat}",
            "selected_by": self.recipe.select,
        }

    def _counted(self, log: list[EpochLog]) -> list[EpochLog]:
        """The epochs of which one is kept: validated, and not before the last phase begins."""
        first = self.spans[-1][0] if self.spans else -1
        return [line for line in log if line.val_clean is not None and line.epoch > first]

    def _train_epoch(self) -> float:
        self.model.train()
        active = [first <= self.epoch < last for first, last in self.spans]
        order = torch.randperm(len(self.x))
        total = 0.0
        for step in range(self.steps_per_epoch):
            rows = order[step * self.recipe.batch_size : (step + 1) * self.recipe.batch_size]
            x, y = self._augment(self.x[rows]), self.y[rows]
            for _ in range(self.recipe.replays):
                for loss in self._step(x, y, active):
                    total += loss
        return total / (self.steps_per_epoch * self.recipe.replays)

    def _step(self, x: Tensor, y: Tensor, active: list[bool]) -> list[float]:
        """One optimiser step of each active phase on a batch; returns their losses."""
        losses = []
        steppers = zip(self.entry.objective, self.optimizers, self.schedulers, strict=True)
        for phase, optimizer, scheduler in compress(steppers, active):
            self.model.zero_grad(set_to_none=True)
            with self._autocast():
                loss = phase.loss(self.model, x, y, self.adversary, self.recipe)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise RunError(
                    f"the loss of {self.spec.stem} became {losses[-1]} in epoch {self.epoch + 1}; "
                    f"{self._nothing_saved()}"
                )
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            if self.recipe.clip > 0:
                self.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(phase.parameters(self.model), self.recipe.clip)
            self.scaler.step(optimizer)
            self.scaler.update()
            scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return losses

    def _autocast(self) -> AbstractContextManager[object]:
        if self.recipe.precision == "float32":
            return nullcontext()
        # No cache: a weight first cast without gradients (to rank experts, say) would pass none on afterwards.
        return torch.autocast(self._device_type, getattr(torch, self.recipe.precision), cache_enabled=False)

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
        assert clean is not None and robust is not None
        return {"clean": clean, "robust": robust, "mean": (clean + robust) / 2}[self.recipe.select]

    def _keep_best(self) -> None:
        for line in self._counted(self.log[-1:]):
            score = self._score(line)
            if score > self.best_score:
                self.best_score = score
                self.best = copy.deepcopy(self.shown.state_dict())

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
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "best": self.best,
            "best_score": self.best_score,
            "log": [asdict(line) for line in self.log],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": self.scaler.state_dict(),
            "adversary_calls": self.adversary.calls,
            "delta": self.adversary.delta,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.spec.device) if self._device_type == "cuda" else None,
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
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.adversary.calls, self.adversary.delta = state["adversary_calls"], state["delta"]
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.spec.device)


def _epochs_of(phase: Phase, epochs: int) -> tuple[int, int]:
    """First epoch of a phase, and the one after its last."""
    return round(phase.span[0] * epochs), round(phase.span[1] * epochs)


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


def _keep_other_models(path: Path, spec: TrainSpec, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses to write over the weights of another model: other settings, another recipe or other data."""
    if spec.fresh or not path.exists():
        return
    try:
        card = read_card(path)
    except UsageError:
        # Nothing that could be loaded again.
        return
    # As the card would hold them.
    wanted = json.loads(json.dumps([spec.model, spec.objective, dict(settings), spec.dataset]))
    if [card.get("model"), card.get("objective"), card.get("settings"), card.get("dataset")] != wanted:
        held = variant_name(str(card.get("model")), card.get("objective"), own_settings(card, defaults))
        raise UsageError(
            f"{path} holds {held} trained on {card.get('dataset')}; choose another --out, or --fresh to replace it"
        )


def _tensors(dataset: Dataset, device: str) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(dataset.images).to(device), torch.from_numpy(dataset.labels).to(device)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _command(spec: TrainSpec) -> str:
    words = ["moebench train", f"--model {spec.model}", f"--dataset {spec.dataset}", f"--seed {spec.seed}"]
    words += [f"--recipe {spec.objective}"] if spec.objective is not None else []
    words += [f"--set {key}={value}" for key, value in {**(spec.settings or {}), **(spec.recipe or {})}.items()]
    return " ".join(words)


def split_settings(model: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits KEY=VALUE settings into those of the model's builder and those of its recipe."""
    known = MODELS.get(model).build.__kwdefaults__ or {}
    of_model = {key: value for key, value in settings.items() if key in known}
    return of_model, {key: value for key, value in settings.items() if key not in known}
