"""Attack registry, the views that attacks run on, and the engine."""

from __future__ import annotations

from typing import Any

from moebench.attacks._base import ATTACKS, AttackEntry, AttackPlan


def list_attacks() -> list[str]:
    """Names of all registered attacks."""
    return ATTACKS.names()


def load_attack(name: str, **settings: Any) -> AttackPlan:
    """An attack with its settings bound.

    Raises:
        UsageError: unknown name or setting.
    """
    return ATTACKS.get(name).plan(**settings)


__all__ = ["ATTACKS", "AttackEntry", "AttackPlan", "list_attacks", "load_attack"]
