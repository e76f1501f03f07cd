"""What an attack is and what it costs: its definition from the registry, its settings and passes from the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from moebench.attack_names import base_name, options_of, spell
from moebench.registry import LIBRARY, Declaration, attack_registry
from moebench.report.evidence import Evidence, attack_key, cold_if_any, eligible
from moebench.report.overlap import Unit, in_tables, unit_key
from moebench.report.text import flatten
from moebench.report.transfers import TRANSFER, origin
from moebench.schema import SUITES, StoredResult, is_protocol

STORED_ONLY = {
    TRANSFER: "images that were made on another model, judged on this one",
    "universal-file": "one δ for all images, read from a file",
    "none": "no attack",
}
"""Names in the store that no registry declares."""

LIBRARY_SUMMARY = "a class of torchattacks, judged like every other attack"


@dataclass(frozen=True)
class Definition:
    """What an attack is called, does and can be told; `summary` is None for a name that is not known here."""

    name: str
    summary: str | None
    views: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]
    suites: tuple[str, ...]
    min_classes: int


@dataclass(frozen=True)
class Stored:
    """One setting of an attack as results keep it, and the models that it was run on; `label` tells transfers apart."""

    label: str
    models: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Cost:
    """What a unit cost on one board: medians over models, per sample and for all n samples."""

    unit: Unit
    models: int
    seconds: float
    forwards: float
    backwards: float
    broken: int
    right: int


def definitions() -> tuple[Definition, ...]:
    """All attacks that `moebench list attacks` prints but published protocols, by name; families as "pgd-N"."""
    registry = attack_registry()
    declared = (*registry.declarations(), *registry.families())
    known = [one for one in declared if not is_protocol(one.name)]
    library = Definition(f"{LIBRARY}:NAME", LIBRARY_SUMMARY, (), (), (), 2)
    return (*(_declared(one) for one in sorted(known, key=lambda one: attack_key(one.name))), library)


def definition(attack: str) -> Definition:
    """The definition behind a stored name, with or without settings."""
    base = base_name(attack)
    declared = attack_registry().declaration(base)
    if declared is not None:
        return _declared(declared, base)
    summary = STORED_ONLY.get(base, LIBRARY_SUMMARY if base.startswith(f"{LIBRARY}:") else None)
    return Definition(base, summary, ("whole",) if base == TRANSFER else (), (), (), 2)


def _declared(declared: Declaration, name: str | None = None) -> Definition:
    name = declared.name if name is None else name
    facts = declared.facts
    settings = tuple((key, spell(option.default)) for key, option in sorted(options_of(declared.name).items()))
    suites = tuple(version for version, attacks in SUITES.items() if name in attacks)
    return Definition(
        name=name,
        summary=str(facts["summary"]) if facts.get("summary") else None,
        views=tuple(facts.get("views") or ()),
        settings=settings,
        suites=suites,
        min_classes=int(facts.get("min_classes", 2)),
    )


def stored_settings(results: Sequence[StoredResult]) -> tuple[Stored, ...]:
    """The distinct settings under which one attack was run, those of most models first."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], set[str]] = {}
    for stored in results:
        source = origin(stored)
        label = "" if source is None else f"from {source['source']}"
        found.setdefault((label, tuple(flatten(stored.cell.parameters))), set()).add(stored.model.name)
    ranked = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple(Stored(label, tuple(sorted(models)), settings) for (label, settings), models in ranked)


def costs(checkpoints: Mapping[Any, Sequence[Evidence]], pooled: Mapping[Unit, tuple[int, int]]) -> tuple[Cost, ...]:
    """The cost of each unit of a board.

    Args:
        checkpoints: the evidence of each checkpoint. Of several results of one unit (seeds, sources) all are paid.
        pooled: per unit, how many samples fell and how many were right, over all models.
    """
    spent: dict[Unit, list[tuple[float, float, float]]] = {}
    for cells in checkpoints.values():
        groups: dict[Unit, list[Evidence]] = {}
        for one in cells:
            if eligible(one.stored) and in_tables(one.attack):
                groups.setdefault((one.attack, one.view), []).append(one)
        for unit, group in groups.items():
            records = [one.stored.record for one in cold_if_any(group)]
            n = max(1, records[0].n)
            passes = [sum(record.forwards for record in records), sum(record.backwards for record in records)]
            spent.setdefault(unit, []).append((sum(record.seconds for record in records), passes[0] / n, passes[1] / n))
    found = []
    for unit in sorted(set(spent) & set(pooled), key=unit_key):
        seconds, forwards, backwards = (median(column) for column in zip(*spent[unit], strict=True))
        found.append(Cost(unit, len(spent[unit]), seconds, forwards, backwards, *pooled[unit]))
    return tuple(found)
