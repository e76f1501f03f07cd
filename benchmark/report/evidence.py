"""What the report reads of a store, and how stored results are grouped, ordered and allowed into a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moebench.schema import (
    PART_FAMILY,
    WARM_START,
    Claim,
    Example,
    IntArray,
    Json,
    ModelRecord,
    Outcomes,
    ProtocolRecord,
    StoredResult,
    StoredRun,
    is_protocol,
)

WHOLE = "whole"
ENGINE = "native"
QUICK_LOOK = "bfloat16-only"

ROUTED = ("moe", "dual")
"""Families whose models have routing to attack; of a user's own model, its results tell."""

ATTACK_ORDER = (
    "fgsm",
    "pgd-10",
    "pgd-20",
    "pgd-50",
    "apgd-ce",
    "apgd-dlr",
    "apgd-t",
    "fab-t",
    "square",
    "autoattack",
    "moe-adaptive",
)


STEPS = re.compile(r"(?P<family>(?:smooth-)?pgd)-(?P<steps>[0-9]+)")
"""Names of attacks that differ in their number of steps alone."""

PRIVATE = frozenset({"host", "hostname", "node", "pid", "process", "user", "username", "cwd"})
"""Facts about whose machine ran; of use in the store, of none to a reader."""


class ReadableStore(Protocol):
    """What the report reads of a store."""

    def results(self, *, newest_only: bool = True) -> Sequence[StoredResult]:
        """Finished cells; without `newest_only` also those that a later one replaces."""

    def outcomes(self, result_id: int, /) -> Outcomes:
        """The per-sample evidence of one of them."""

    def labels(self, protocol: ProtocolRecord, /) -> IntArray | None:
        """The labels (n,) of a protocol's samples, by their number; None where they are not stored."""

    def examples(self, result_id: int, /) -> Sequence[Example]:
        """A few samples that a result broke, as pictures; none where none are stored."""

    def claims(self) -> Sequence[Claim]:
        """The published numbers."""

    def runs(self) -> Sequence[StoredRun]:
        """All runs, failed ones too."""


@dataclass(frozen=True)
class Evidence:
    """A finished cell with its per-sample outcomes."""

    stored: StoredResult
    outcomes: Outcomes

    @property
    def attack(self) -> str:
        """The attack's name."""
        return self.stored.cell.attack

    @property
    def view(self) -> str:
        """What of the model the attack saw."""
        return self.stored.cell.view

    @property
    def warm(self) -> bool:
        """Whether it took over what the attack found at a smaller radius."""
        return is_warm(self.stored)


def is_warm(stored: StoredResult) -> bool:
    """Whether a result took over what the attack found at a smaller radius."""
    return WARM_START in stored.cell.parameters


def cold_if_any(cells: Sequence[Evidence]) -> list[Evidence]:
    """The results without a warm start, all of them if there is none without.

    An attack's name stands for what it does alone; images from smaller radii make it another, stronger one.
    """
    return [one for one in cells if not one.warm] or list(cells)


def group_key(protocol: ProtocolRecord) -> tuple[Any, ...]:
    """What two numbers must share to be ranked together; sorts boards, larger sample sets first."""
    threat = protocol.threat
    return (
        protocol.dataset,
        protocol.split,
        threat.norm,
        threat.eps,
        threat.lower,
        threat.upper,
        -protocol.n,
        protocol.version,
        protocol.data_sha256,
    )


def protocol_facts(protocol: ProtocolRecord, suites: Sequence[str] | None = None) -> dict[str, str | int | float]:
    """What holds for all numbers of one protocol, as files tell it; the suites too where numbers have any."""
    return {
        "dataset": protocol.dataset,
        "split": protocol.split,
        "n": protocol.n,
        "norm": protocol.threat.norm,
        "eps": protocol.threat.eps,
        "protocol": protocol.version,
        **({} if suites is None else {"suites": " ".join(suites)}),
        "data_sha256": protocol.data_sha256,
    }


def result_key(stored: StoredResult) -> tuple[Any, ...]:
    """Orders results by what they are, and only then by when they were made."""
    cell = stored.cell
    where = (stored.model.name, *group_key(stored.protocol), stored.checkpoint.sha256)
    return (*where, cell.view != WHOLE, cell.view, attack_key(cell.attack), cell.engine, cell.seed, stored.result_id)


def attack_key(attack: str) -> tuple[int, str, int, str]:
    """Weak to strong as the papers list them, PGD by its steps; others after them by name, which is the last part."""
    match = STEPS.fullmatch(attack)
    family, steps = (match["family"], int(match["steps"])) if match else (attack, 0)
    known = "pgd-10" if family == "pgd" else attack
    return (ATTACK_ORDER.index(known) if known in ATTACK_ORDER else len(ATTACK_ORDER), family, steps, attack)


def has_column(attack: str) -> bool:
    """Whether an attack gets a column of a leaderboard: PGD of other lengths is for curves, settings are for pages."""
    return attack in ATTACK_ORDER or (STEPS.fullmatch(attack) is None and "[" not in attack)


def eligible(stored: StoredResult) -> bool:
    """Whether a result may enter a table: other engines, quick looks and protocols are shown on model pages only."""
    return stored.cell.engine == ENGINE and stored.cell.precision != QUICK_LOOK and not is_protocol(stored.cell.attack)


def is_whole(model: ModelRecord) -> bool:
    """Whether a record is of a model, and not of one expert or one half of it."""
    return model.family != PART_FAMILY


def is_routed(cells: Sequence[Evidence]) -> bool:
    """Whether results are of a model that has routing to attack, from its family or from routing that was recorded."""
    return any(one.stored.model.family in ROUTED or bool(one.stored.record.routing) for one in cells)


def newest(results: Iterable[StoredResult]) -> StoredResult:
    """The result that was finished last."""
    return max(results, key=lambda stored: (stored.finished_at, stored.result_id))


def public(environment: Json) -> dict[str, Any]:
    """An environment without the facts that identify a machine or its user."""
    return {key: value for key, value in environment.items() if key.lower() not in PRIVATE}


def names(cells: Sequence[Evidence]) -> str:
    """The attacks behind a number in words, such as "autoattack, pgd-50 on experts"."""
    pairs = sorted({(one.view != WHOLE, one.view, attack_key(one.attack)) for one in cells})
    return ", ".join(key[-1] if view == WHOLE else f"{key[-1]} on {view}" for _, view, key in pairs)
