"""Attack registry, the views that attacks run on, and the engine."""

from __future__ import annotations

from typing import Any

from moebench.attacks._base import ATTACKS, AttackEntry, AttackPlan
from moebench.registry import LIBRARY, check_attack_name


def list_attacks() -> list[str]:
    """Names of all registered attacks."""
    return ATTACKS.names()


def load_attack(name: str, **settings: Any) -> AttackPlan:
    """An attack with its settings bound: a registered one, or `torchattacks:NAME`.

    Raises:
        UsageError: unknown name or setting, or a class of torchattacks that cannot be used here.
    """
    check_attack_name(name)
    if name.startswith(f"{LIBRARY}:"):
        from moebench.attacks._library import library_plan

        return library_plan(name, **settings)
    return ATTACKS.get(name).plan(**settings)


__all__ = ["ATTACKS", "AttackEntry", "AttackPlan", "list_attacks", "load_attack"]
