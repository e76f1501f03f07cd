"""Attacks that learn from training data: which data that is, what they are given, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from moebench.attacks._base import AttackPlan
from moebench.attacks._engine import to_samples
from moebench.attacks._training import TrainedAttack, Training
from moebench.attacks._views import make_view
from moebench.datasets import Dataset, MissingSplit, load_dataset
from moebench.errors import UsageError
from moebench.schema import IntArray, ThreatModel

CRAFTING = " crafting"
"""Ends the name of the stage that holds what it cost to fit the stage of the same name."""


def is_trained(plan: AttackPlan) -> bool:
    """Whether an attack needs training data."""
    return any(isinstance(stage, TrainedAttack) for stage in plan.stages)


def load_training(plans: Sequence[AttackPlan], dataset: Dataset, name: str | None, n: int | None) -> Dataset | None:
    """The data that the plans are fitted on; None where none of them needs any.

    Args:
        plans: what will be run.
        dataset: what will be attacked.
        name: a data set of its own, of which the train split is taken, or all of it where there are no splits; None
            for the train split of `dataset`.
        n: keep the first n samples.

    Raises:
        UsageError: there is no such data, it does not go with `dataset`, or it holds images that will be attacked.
    """
    needing = [plan.name for plan in plans if is_trained(plan)]
    if not needing:
        for option, value in (("--train-data", name), ("--train-n", n)):
            if value is not None:
                raise UsageError(f"{option} is for attacks that are made on training data, such as universal-pgd")
        return None
    try:
        training = _load(dataset.name if name is None else name, n, whole=name is not None)
    except MissingSplit as error:
        hint = f"name some with --train-data, such as --train-data {_example(dataset.name)}"
        raise UsageError(f"attack {needing[0]!r} is made on training data, and {error}; {hint}") from None
    if training.name != dataset.name or training.split == dataset.split:
        _check_goes_with(training, dataset)
    return training


def _load(name: str, n: int | None, *, whole: bool) -> Dataset:
    with _naming_the_option(n):
        try:
            return load_dataset(name, split="train", n=n)
        except MissingSplit:
            if not whole:
                raise
        return load_dataset(name, split="all", n=n)


@contextmanager
def _naming_the_option(n: int | None) -> Iterator[None]:
    """A wrong n is --train-n here, not --n."""
    try:
        yield
    except UsageError as error:
        if n is not None and str(error).startswith("n must be"):
            raise UsageError(f"--train-{error}") from None
        raise


def _example(name: str) -> str:
    kind = name.partition(":")[0]
    return {"npz": "npz:TRAIN.npz", "folder": "folder:TRAIN"}.get(kind, "npz:FILE")


def _check_goes_with(training: Dataset, dataset: Dataset) -> None:
    if training.shape != dataset.shape:
        have, need = ("×".join(map(str, data.shape)) for data in (training, dataset))
        raise UsageError(f"the training data {training.name} has images of {have}, and {dataset.name} of {need}")
    if training.class_names != dataset.class_names[: training.num_classes]:
        raise UsageError(
            f"the classes of the training data {training.name} are not those of {dataset.name}; give both the same "
            "class names in the same order"
        )
    attacked = {image.tobytes() for image in dataset.images}
    shared = sum(image.tobytes() in attacked for image in training.images)
    if shared:
        raise UsageError(
            f"{shared} of the {len(training)} training images in {training.name} are among the images to attack in "
            f"{dataset.name}; a universal perturbation is judged on images that it was not made on"
        )


def fit_stage(
    stage: TrainedAttack,
    training: Dataset,
    *,
    model: nn.Module,
    search: nn.Module,
    view: str,
    threat: ThreatModel,
    seed: int,
    device: torch.device | str,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> TrainedAttack:
    """Fits a stage.

    Args:
        stage: what to fit.
        training: images and labels.
        model: the whole model; success counts on it.
        search: a faster copy of it, which gives the gradients.
        view: what of it the attack sees.
        threat: norm, radius and box.
        seed: of random starts and the order of the data.
        device: where the model is.
        tell: told how many of how many passes over the data are done.
    """
    samples = to_samples(training.images, training.labels, training.ids, device)
    return stage.fit(Training(samples, make_view(view, search), model, threat, seed, tell))


def fit_budget(plan: AttackPlan, training: Dataset | None) -> tuple[int, int]:
    """The most forward and backward passes of single samples that fitting an attack can cost."""
    if training is None:
        return 0, 0
    budgets = [stage.fit_budget(len(training)) for stage in plan.stages if isinstance(stage, TrainedAttack)]
    return sum(forwards for forwards, _ in budgets), sum(backwards for _, backwards in budgets)


def shared_out(total: int, parts: int) -> IntArray:
    """A number of passes in `parts` nearly equal whole parts that sum to it, (parts,)."""
    return np.asarray(total // parts + (np.arange(parts) < total % parts), dtype=np.int64)
