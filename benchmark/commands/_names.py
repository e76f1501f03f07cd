"""Wrong names are answered before torch is imported."""

from __future__ import annotations

from collections.abc import Iterable

from moebench.attack_names import parse_attack
from moebench.errors import UsageError
from moebench.registry import model_registry
from moebench.schema import check_view_name, split_part


def check_model_name(name: str) -> None:
    """Refuses a model that is not registered and cannot be a user's own (FILE.py:FACTORY).

    Raises:
        UsageError: unknown name, or no name of a part behind a slash.
    """
    model = name if name.endswith(".py") else split_part(name)[0]
    if ":" not in model and model not in model_registry():
        hint = f" (a file is given as {model}:FACTORY)" if model.endswith(".py") else ""
        raise UsageError(model_registry().unknown(model) + hint)


def check_attack_names(names: Iterable[str]) -> None:
    """Refuses attacks that do not exist.

    Raises:
        UsageError: unknown name, or settings that the attack does not have.
    """
    for name in names:
        parse_attack(name)


def check_names(model: str, attacks: tuple[str, ...], views: tuple[str, ...]) -> None:
    """Wrong names are answered before torch is imported."""
    check_model_name(model)
    check_attack_names(attacks)
    for view in views:
        check_view_name(view)
