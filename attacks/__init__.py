"""Attack registry, the views that attacks run on, and the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moebench.attack_names import parse_attack
from moebench.attacks._base import ATTACKS, AttackEntry, AttackPlan
from moebench.registry import LIBRARY
from moebench.schema import is_protocol


def list_attacks() -> list[str]:
    """Names of all registered attacks; published protocols are no attacks of ours, see `list_protocols`."""
    return [name for name in ATTACKS.names() if not is_protocol(name)]


def list_protocols() -> list[str]:
    """Names of the papers' own evaluation protocols, which are scored by their own rules."""
    return [name for name in ATTACKS.names() if is_protocol(name)]


def load_attack(name: str, **settings: Any) -> AttackPlan:
    """An attack with its settings bound: a registered one, or `torchattacks:NAME`; `NAME[KEY=VALUE,…]` sets some.

    Raises:
        UsageError: unknown name or setting, or a class of torchattacks that cannot be used here.
    """
    asked = parse_attack(name)
    settings = {**asked.settings, **settings}
    if asked.base.startswith(f"{LIBRARY}:"):
        from moebench.attacks._library import library_plan

        return replace(library_plan(asked.base, **settings), name=str(asked))
    return replace(ATTACKS.get(asked.base).plan(**settings), name=str(asked))


__all__ = ["ATTACKS", "AttackEntry", "AttackPlan", "list_attacks", "list_protocols", "load_attack"]
