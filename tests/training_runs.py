"""Short training runs, and models that train in a moment or fail to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Flat
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.errors import UsageError
from moebench.models._base import Adversary, Phase, Recipe, Shape, register_model
from moebench.models._objectives import STANDARD
from moebench.train import EpochLog, TrainSpec, train

# Fewer steps than the recipes: the loop is the same and an epoch takes a fraction of a second.
# One cycle, or the learning rate would be the same at the start of every epoch.
FILES = ["resnet-at.json", "resnet-at.log.jsonl", "resnet-at.safetensors"]
QUICK: dict[str, Any] = {"cycles": 1, "attack_steps": 1, "batch_size": 100, "lr_low": 2e-3, "lr_high": 8e-3}


def spec(out: Path, model: str = "resnet-at", *, epochs: int = 2, **changes: Any) -> TrainSpec:
    recipe = {**QUICK, "epochs": epochs, **changes.pop("recipe", {})}
    return TrainSpec(model, "digits", out, recipe=recipe, **changes)


def refused(wanted: TrainSpec, progress: Callable[[EpochLog, int], None] | None = None) -> str:
    """The one line of the error that training must end in."""
    with pytest.raises(UsageError) as caught:
        train(wanted, progress)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def command(out: Path, *words: str, model: str = "resnet-at", epochs: int = 4) -> list[str]:
    line = [sys.executable, "-m", "moebench", "train", "--model", model, "--epochs", str(epochs), "--out", str(out)]
    return [*line, *(part for key, value in QUICK.items() for part in ("--set", f"{key}={value}")), *words]


def run(line: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, capture_output=True, text=True, timeout=200, check=False, **options)


class Interrupt:
    """Interrupts after the given epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.seen: list[int] = []

    def __call__(self, line: EpochLog, epochs: int) -> None:
        self.seen.append(line.epoch)
        if line.epoch == self.epoch:
            raise KeyboardInterrupt


def not_a_number(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    """Cross-entropy that becomes NaN in the second epoch."""
    steps = getattr(model, "steps", 0) + 1
    model.steps = steps  # type: ignore[assignment]
    return F.cross_entropy(model(x), y) * (float("nan") if steps > 10 else 1.0)


def learns_nothing(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    logits: Tensor = model(x)
    return logits.sum() * 0.0


FACTS: dict[str, Any] = {"summary": "a test's", "family": "dense", "training": "none"}


SURE: dict[str, Any] = {"optimizer": "sgd", "schedule": "constant", "lr_high": 0.5, "momentum": 0.0}
"""Teaches a linear model the digits in two epochs."""


def then_nothing(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    """Drives the weights to where all images get the same answer."""
    logits: Tensor = model(x)
    return -1e3 * logits[:, 3].mean()


LATE = (Phase(STANDARD[0].loss, span=(0.0, 0.5)), Phase(then_nothing, span=(0.5, 1.0)))


@register_model("test-fragile", recipe=Recipe(epochs=4), objective=STANDARD, **FACTS)
@register_model("test-late", recipe=Recipe(epochs=4), objective=LATE, **FACTS)
@register_model("test-nan", recipe=Recipe(epochs=2), objective=(Phase(not_a_number),), **FACTS)
@register_model("test-collapse", recipe=Recipe(epochs=2), objective=(Phase(learns_nothing),), **FACTS)
@register_model("test-untrained", **FACTS)
def flat(num_classes: int, shape: Shape) -> nn.Module:
    return Flat(64, num_classes)


@register_model("test-unused", recipe=Recipe(epochs=2), objective=STANDARD, **FACTS)
def unused(num_classes: int, shape: Shape) -> nn.Module:
    model = Flat(64, num_classes)
    model.register_buffer("unused", torch.full((2,), float("nan")))
    return model
