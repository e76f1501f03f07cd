"""What each attack breaks that others do not: pairwise overlap, unique breaks, and the commonest combinations.

A unit is an attack on a view. Only samples count that the model gets right without an attack: a sample that is wrong
from the start is broken by nobody. Models are pooled only where the same attacks have been run on all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moebench.metrics import worst_case
from moebench.report.evidence import WHOLE, Evidence, attack_key, cold_if_any, eligible, has_column
from moebench.report.transfers import right_clean
from moebench.schema import SUITES, BoolArray, IntArray

Unit = tuple[str, str]
"""An attack and the view of the model that it saw."""

COMBINATIONS = 12
"""How many combinations of attacks a table lists."""


def in_tables(attack: str) -> bool:
    """Whether an attack is compared with others: those with a column, and all of a suite; not every setting of each."""
    return has_column(attack) or any(attack in suite for suite in SUITES.values())


def unit_label(unit: Unit) -> str:
    """A unit in words: "autoattack", "pgd-50 on experts"."""
    attack, view = unit
    return attack if view == WHOLE or attack.startswith(f"{view}-") else f"{attack} on {view}"


def unit_key(unit: Unit) -> tuple[object, ...]:
    """Attacks on the whole model first, then view by view; weak to strong."""
    attack, view = unit
    return view != WHOLE, view, attack_key(attack)


@dataclass(frozen=True)
class Subject:
    """One checkpoint under all its attacks: `fell[u, i]` says that unit u broke sample i, which was right clean."""

    label: str
    page: str
    units: tuple[Unit, ...]
    fell: BoolArray
    right: int

    @cached_property
    def unique(self) -> dict[Unit, int]:
        """Per unit, how many samples no other unit breaks; nothing where there is no other one."""
        if len(self.units) < 2:
            return {}
        alone = self.fell & (self.fell.sum(axis=0) == 1)
        return dict(zip(self.units, (int(count) for count in alone.sum(axis=1)), strict=True))


@dataclass(frozen=True)
class Left:
    """Of the `broken` samples that one unit breaks on the models that both were run on, another leaves `standing`."""

    standing: int
    broken: int
    models: int

    @property
    def share(self) -> float | None:
        """The share that is left standing; None where nothing was broken."""
        return self.standing / self.broken if self.broken else None


@dataclass(frozen=True)
class Combination:
    """A set of units that alone broke `count` samples, all of them; the empty one is of samples that stand."""

    units: frozenset[Unit]
    count: int


@dataclass(frozen=True)
class Combinations:
    """Models that the same units were run on, with the commonest combinations; `rest` counts samples in rarer ones."""

    models: tuple[str, ...]
    units: tuple[Unit, ...]
    total: int
    listed: tuple[Combination, ...]
    rest: int


@dataclass(frozen=True)
class Overlap:
    """One board: its units, its models, what one unit leaves of what another breaks, and the combinations."""

    units: tuple[Unit, ...]
    subjects: tuple[Subject, ...]
    left: Mapping[tuple[Unit, Unit], Left]
    combinations: tuple[Combinations, ...]

    @cached_property
    def unique(self) -> dict[Unit, int]:
        """Per unit, the samples of all models that it alone breaks; no entry where it was never beside another."""
        found: dict[Unit, int] = {}
        for subject in self.subjects:
            for unit, count in subject.unique.items():
                found[unit] = found.get(unit, 0) + count
        return found


def subject(label: str, page: str, cells: Sequence[Evidence]) -> Subject | None:
    """What fell of one checkpoint on one sample set; None where no attack of the tables was run.

    Several results of one attack on one view (other seeds, other sources of transfer) count together.

    Raises:
        ValueError: the cells cover different samples.
    """
    groups: dict[Unit, list[Evidence]] = {}
    for one in cells:
        if eligible(one.stored) and in_tables(one.attack):
            groups.setdefault((one.attack, one.view), []).append(one)
    units = tuple(sorted(groups, key=unit_key))
    if not units:
        return None
    right = np.logical_and.reduce([right_clean(one.outcomes) for group in groups.values() for one in group])
    left = np.stack([worst_case([one.outcomes for one in cold_if_any(groups[unit])]) for unit in units])
    return Subject(label, page, units, ~left & right, int(np.count_nonzero(right)))


def overlap(subjects: Sequence[Subject]) -> Overlap:
    """Pools the models of one board."""
    units = tuple(sorted({unit for one in subjects for unit in one.units}, key=unit_key))
    left: dict[tuple[Unit, Unit], Left] = {}
    for one in subjects:
        fell = one.fell.astype(np.int64)
        missed: IntArray = fell @ (1 - fell).T
        broken = fell.sum(axis=1)
        for row, first in enumerate(one.units):
            for column, second in enumerate(one.units):
                old = left.get((first, second), Left(0, 0, 0))
                counts = old.standing + int(missed[row, column]), old.broken + int(broken[row])
                left[first, second] = Left(*counts, old.models + 1)
    return Overlap(units, tuple(subjects), left, tuple(_combinations(subjects)))


def _combinations(subjects: Sequence[Subject]) -> list[Combinations]:
    groups: dict[tuple[Unit, ...], list[Subject]] = {}
    for one in subjects:
        if len(one.units) > 1:
            groups.setdefault(one.units, []).append(one)
    found = []
    for units, group in sorted(groups.items(), key=lambda item: (-len(item[1]), [unit_key(unit) for unit in item[0]])):
        counts: Counter[bytes] = Counter()
        for one in group:
            patterns, times = np.unique(one.fell.T, axis=0, return_counts=True)
            for pattern, count in zip(patterns, times, strict=True):
                counts[pattern.tobytes()] += int(count)
        # Samples that are wrong from the start show as standing; there are as many as are not right.
        standing = bytes(len(units))
        counts[standing] -= sum(one.fell.shape[1] - one.right for one in group)
        ranked = sorted(((key, count) for key, count in counts.items() if count), key=lambda item: (-item[1], item[0]))
        listed = [
            Combination(frozenset(unit for unit, hit in zip(units, key, strict=True) if hit), count)
            for key, count in ranked[:COMBINATIONS]
        ]
        rest = sum(count for _, count in ranked[COMBINATIONS:])
        total = sum(one.right for one in group)
        found.append(Combinations(tuple(one.label for one in group), units, total, tuple(listed), rest))
    return found
