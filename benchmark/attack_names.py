"""Attack names with settings: `pgd-50[step_fraction=0.1]`, `published:rt-er[fp16=off,start=random]`.

What an attack can be told, the types and the choices are read from its source, so that a wrong name or setting is
answered without importing torch. Two ways to write the same settings give one name: sorted, and without what is the
default anyway.
"""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from moebench.errors import UsageError
from moebench.registry import LIBRARY, Option, attack_registry, check_attack_name

MOST = 1_000_000
"""Largest whole number that a setting takes: beyond it an attack would not end in anyone's lifetime."""

SWITCH = {"on": True, "off": False, "true": True, "false": False, "yes": True, "no": False}


@dataclass(frozen=True)
class AttackName:
    """A registered attack, and the settings that differ from its own."""

    base: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.base}[{written(self.settings)}]" if self.settings else self.base


def written(settings: Mapping[str, Any]) -> str:
    """Settings as names show them, sorted."""
    return ",".join(f"{key}={spell(value)}" for key, value in sorted(settings.items()))


def spell(value: Any) -> str:
    """One value as names show it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def base_name(name: str) -> str:
    """An attack's name without its settings."""
    return name.partition("[")[0]


def parse_attack(text: str) -> AttackName:
    """The attack and the settings that a name asks for.

    Raises:
        UsageError: unknown attack, setting or value, or a name that is not NAME[KEY=VALUE,…].
    """
    base, bracket, rest = text.partition("[")
    check_attack_name(base)
    if not bracket:
        return AttackName(base)
    if not rest.endswith("]") or not rest[:-1].strip():
        raise UsageError(f"settings of an attack are written NAME[KEY=VALUE,…], got {text!r}")
    pairs: dict[str, str] = {}
    for part in rest[:-1].split(","):
        key, sign, value = (word.strip() for word in part.partition("="))
        if not sign or not key or not value:
            raise UsageError(f"settings of an attack are written NAME[KEY=VALUE,…], got {part.strip()!r} in {text!r}")
        if key in pairs:
            raise UsageError(f"attack {text!r} gives {key!r} twice")
        pairs[key] = value
    if base.startswith(f"{LIBRARY}:"):
        # The library's classes say themselves what they take, once torch is there.
        return AttackName(base, {key: _literal(value) for key, value in sorted(pairs.items())})
    return AttackName(base, _settings(base, pairs))


def options_of(base: str) -> dict[str, Option]:
    """What a registered attack can be told, with the defaults of that name ("pgd-10" makes 10 steps)."""
    declared = attack_registry().declaration(base)
    if declared is None:
        return {}
    own = declared.facts.get("settings") or {}
    return {
        key: Option(own.get(key, option.default), option.choices)
        for key, option in declared.options.items()
        if key not in _in_pattern(declared.pattern, declared.options)
    }


def _in_pattern(pattern: str | None, options: Iterable[str]) -> set[str]:
    """Settings that stand in the name of a family's members."""
    return {key for key in options if pattern is not None and f"(?P<{key}>" in pattern}


def _settings(base: str, pairs: Mapping[str, str]) -> dict[str, Any]:
    options = options_of(base)
    found = {}
    for key, text in sorted(pairs.items()):
        if key not in options:
            close = difflib.get_close_matches(key, options, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}? " if close else ""
            has = f"it has {', '.join(map(_in_words, options, options.values()))}" if options else "it has none"
            raise UsageError(f"attack {base!r} has no setting {key!r}; {hint}{has}")
        value = _value(base, key, text, options[key])
        if value != options[key].default:
            found[key] = value
    return found


def _in_words(key: str, option: Option) -> str:
    if option.choices:
        return f"{key}={'|'.join(map(spell, option.choices))}"
    return f"{key}=on|off" if isinstance(option.default, bool) else f"{key}={spell(option.default)}"


def _value(base: str, key: str, text: str, option: Option) -> Any:
    """The value of a setting, of the type of its default.

    Raises:
        UsageError: it is of another type, or out of range.
    """
    default, wanted = option.default, ""
    if option.choices:
        wanted = " or ".join(map(spell, option.choices))
        by_name = {spell(choice): choice for choice in option.choices}
        if text in by_name:
            return by_name[text]
    elif isinstance(default, bool):
        wanted = "on or off"
        if text.lower() in SWITCH:
            return SWITCH[text.lower()]
    elif isinstance(default, int):
        wanted = f"a whole number from 1 to {MOST:,}"
        if text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MOST:
            return int(text)
    elif isinstance(default, float):
        wanted = "a finite number >= 0, such as 0.1 or 1/40"
        number = _number(text)
        if number is not None and math.isfinite(number) and number >= 0:
            return number
    else:
        return _literal(text)
    raise UsageError(f"setting {key!r} of attack {base!r} takes {wanted}, got {text!r}")


def _number(text: str) -> float | None:
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


def _literal(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return SWITCH.get(text.lower(), text)
