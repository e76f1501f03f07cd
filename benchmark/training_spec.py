"""What a training run is asked for, as the command line and the library put it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebench.models._base import MODELS


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

    @property
    def command(self) -> str:
        """The command that trains it again."""
        words = ["moebench", "train", "--model", self.model, "--dataset", self.dataset, "--seed", str(self.seed)]
        words += ["--recipe", self.objective] if self.objective is not None else []
        for key, value in {**(self.settings or {}), **(self.recipe or {})}.items():
            words += ["--set", f"{key}={value}"]
        return shlex.join(words)


def split_settings(model: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits KEY=VALUE settings into those of the model's builder and those of its recipe."""
    known = MODELS.get(model).build.__kwdefaults__ or {}
    of_model = {key: value for key, value in settings.items() if key in known}
    return of_model, {key: value for key, value in settings.items() if key not in known}
