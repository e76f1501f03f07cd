"""`moebench train` as a function: from a request to weights, card and log.

The test split is never read here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moebench.checkpoint import clear_drafts
from moebench.datasets import load_training_splits
from moebench.errors import FailedTraining, RunError, UsageError
from moebench.files import check_folder
from moebench.models._base import MODELS, Recipe
from moebench.models._weights import load_into, read_card, read_weights, save_weights, shipped_weights
from moebench.recipes import own_settings, plan_training, variant_name
from moebench.trainer import State, Trainer
from moebench.training_choice import EpochLog, verdict
from moebench.training_spec import TrainSpec, split_settings

__all__ = ["EpochLog", "TrainSpec", "Trainer", "split_settings", "train"]


def train(spec: TrainSpec, progress: Callable[[EpochLog, int], None] | None = None) -> tuple[Path, dict[str, Any]]:
    """Trains a registered model and writes `OUT/NAME.safetensors`, its card and its log.

    With another recipe than the model's own the files are called `NAME.RECIPE.…`.

    Args:
        spec: model, recipe, data, folder, seed.
        progress: called after each epoch with its log and the number of epochs.
    Returns: the weights file and the card.

    Raises:
        UsageError: unknown names or settings, a recipe of another kind of model, a part to start from is missing, the
            folder cannot be written, or the file holds another variant of the model.
        FailedTraining: the loss or the weights became NaN, or the model collapsed to chance.
        RunError: a file cannot be written; the same command goes on from the checkpoint.
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
    check_folder(spec.out)
    _keep_other_models(path, spec, settings, entry.settings)
    model = entry.make(train_set.num_classes, train_set.shape, **(spec.settings or {})).to(spec.device)
    initialised_from = _initialise(model, plan.recipe, spec)
    clear_drafts(spec.out, spec.stem)
    start = {**settings, **initialised_from}
    trainer = Trainer(model, entry, plan.recipe, train_set, val_set, spec, start)
    try:
        best, log = trainer.run(progress)
        warning = _judge(trainer, best, log, trial=plan.recipe.epochs < plan.full)
    except FailedTraining:
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
        "validation": {**_validation(trainer, log), **({"warning": warning} if warning else {})},
        "log": [asdict(line) for line in log],
        "torch": torch.__version__.split("+")[0],
        "command": spec.command,
    }
    try:
        card["sha256"] = save_weights(path, best, card)
    except RunError as error:
        kept = "; the checkpoint is kept, and the same command writes them" if trainer.epoch > 0 else ""
        raise RunError(f"{error}{kept}") from None
    trainer.checkpoint_path.unlink(missing_ok=True)
    return path, card


def _judge(trainer: Trainer, best: State, log: Sequence[EpochLog], *, trial: bool) -> str | None:
    """A warning about what was learnt, if there is one; a model that is composed of trained ones learns nothing."""
    if trainer.recipe.epochs == 0:
        return None
    spec, left = trainer.spec, trainer.log_file.left
    # An expert that no image reaches does not show in the loss.
    wrong = [name for name, value in best.items() if not bool(torch.isfinite(value).all())]
    if wrong:
        raise FailedTraining(
            f"weights of {spec.stem} are no numbers, {wrong[0]} first; {left} (lower the learning rate)"
        )
    return verdict(spec.stem, trainer.choice, log, trainer.chance, left=left, trial=trial)


def _validation(trainer: Trainer, log: Sequence[EpochLog]) -> dict[str, Any]:
    """The numbers by which the epoch was chosen, for the card."""
    chosen = trainer.choice.chosen(log)
    return {
        "split": "val",
        "epoch": chosen.epoch,
        "clean": chosen.val_clean,
        "robust": chosen.val_robust,
        "attack": f"pgd-{trainer.recipe.attack_steps}, {trainer.threat}",
        "selected_by": trainer.recipe.select,
    }


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


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
