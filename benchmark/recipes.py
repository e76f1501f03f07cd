"""What a model is trained by: its own recipe, an objective that fits any classifier, or one of a model built alike."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from moebench.errors import UsageError
from moebench.models._balancing import balanced
from moebench.models._base import MODELS, ModelEntry, Phase, Recipe
from moebench.models._objectives import OBJECTIVES
from moebench.registry import objective_registry, recipe_refusal, recipes_of

EPOCHS = 200
"""Epochs of a general objective on a model that has no epochs of its own."""


@dataclass(frozen=True)
class TrainingPlan:
    """Recipe and objective of one training run.

    Attributes:
        recipe: with the user's changes.
        full: the epochs that it has without them.
        objective: the phases.
        training: what the registry calls a model so trained.
        variant: the name of the recipe where it is not the model's own.
    """

    recipe: Recipe
    full: int
    objective: tuple[Phase, ...]
    training: str
    variant: str | None = None


def plan_training(entry: ModelEntry, name: str | None, changes: Mapping[str, Any]) -> TrainingPlan:
    """The plan for a model and a recipe's name.

    Args:
        entry: the model.
        name: an objective that fits any classifier, a registered model of the same builder, or None for the model's
            own recipe. A name that means the model's own recipe is no variant.
        changes: fields of the recipe.

    Raises:
        UsageError: no such recipe, not for this model, or a field has an impossible value.
    """
    if name is not None and name in objective_registry() and OBJECTIVES.get(name).training != entry.training:
        return _general(entry, name, changes)
    if name is not None and name not in objective_registry() and name != entry.name:
        other = _sibling(entry, name)
        if (other.recipe, other.objective) != (entry.recipe, entry.objective):
            return replace(_own(other, changes), variant=name)
    return _own(entry, changes)


def _own(entry: ModelEntry, changes: Mapping[str, Any]) -> TrainingPlan:
    if entry.recipe is None:
        raise UsageError(
            f"model {entry.name!r} has no training recipe; --recipe takes {', '.join(recipes_of(entry.name))}"
        )
    recipe = override(entry.recipe, changes, entry)
    if entry.objective and recipe.epochs == 0:
        raise UsageError(f"{entry.name} is not composed of trained models: it needs at least 1 epoch, got 0")
    if recipe.epochs > 0 and not entry.objective:
        raise UsageError(f"{entry.name} is composed of trained models and has no objective; leave out epochs")
    return TrainingPlan(recipe, entry.recipe.epochs, entry.objective, entry.training)


def _general(entry: ModelEntry, name: str, changes: Mapping[str, Any]) -> TrainingPlan:
    objective = OBJECTIVES.get(name)
    own = entry.recipe or Recipe(epochs=0)
    recipe = override(override(own, objective.defaults), changes, entry)
    full = max((own.epochs or EPOCHS) // recipe.replays, 1)
    if "epochs" not in changes:
        recipe = replace(recipe, epochs=full)
    elif recipe.epochs == 0:
        raise UsageError(f"recipe {name!r} needs at least 1 epoch, got 0")
    regularize = entry.regularize or balanced
    return TrainingPlan(recipe, full, regularize((Phase(objective.loss),)), objective.training, name)


def _sibling(entry: ModelEntry, name: str) -> ModelEntry:
    """The model of that name, if what trains it can train this one."""
    try:
        other = MODELS.get(name)
    except UsageError:
        raise UsageError(recipe_refusal(entry.name, name)) from None
    if other.build is not entry.build or not other.objective:
        raise UsageError(recipe_refusal(entry.name, name))
    return other


def override(recipe: Recipe, changes: Mapping[str, Any], entry: ModelEntry | None = None) -> Recipe:
    """The recipe with some of its fields changed.

    Args:
        recipe: to change.
        changes: fields and their values.
        entry: the model, for the message: its settings may have been meant.

    Raises:
        UsageError: it has no such field, or the value is impossible.
    """
    known = [one.name for one in fields(recipe)]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        settings = sorted(entry.build.__kwdefaults__ or {}) if entry is not None else []
        close = difflib.get_close_matches(unknown[0].lower(), [*settings, *known], n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        also = f"; {entry.name} itself has {', '.join(settings)}" if entry is not None and settings else ""
        raise UsageError(f"a recipe has no {', '.join(unknown)}; {hint}it has {', '.join(known)}{also}")
    return replace(recipe, **changes)


def own_settings(card: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that weights were trained with and that differ from the registry entry's own."""
    return {key: value for key, value in card.get("settings", {}).items() if defaults.get(key) != value}


def variant_name(name: str, recipe: str | None, settings: Mapping[str, Any]) -> str:
    """How tables call a model with another recipe or other settings: "rt-er[recipe=at,router=frozen]"."""
    changed = {**settings, **({} if recipe is None else {"recipe": recipe})}
    return f"{name}[{','.join(f'{key}={value}' for key, value in sorted(changed.items()))}]" if changed else name
