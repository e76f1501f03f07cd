"""The attacks page: definitions, costs and overlap of the attacks in the store, board by board, and the same as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moebench.report import attack_facts
from moebench.report.attack_facts import Cost, Definition, Stored
from moebench.report.charts import Chart
from moebench.report.evidence import (
    Evidence,
    ReadableStore,
    attack_key,
    eligible,
    group_key,
    is_whole,
    result_key,
)
from moebench.report.heatmap import heat_map
from moebench.report.overlap import Overlap, Unit, in_tables, overlap, subject, unit_label
from moebench.report.tables import Board
from moebench.report.text import safe
from moebench.schema import is_protocol

COLUMNS = (
    *("dataset", "split", "n", "norm", "eps", "protocol", "data_sha256", "attack", "view", "models"),
    *("seconds_median", "forwards_per_sample_median", "backwards_per_sample_median"),
    *("samples_right", "samples_broken", "samples_broken_by_it_alone"),
)
OVERLAP_COLUMNS = (
    *("dataset", "split", "n", "norm", "eps", "protocol", "data_sha256", "attack", "view"),
    *("other_attack", "other_view", "models", "broken", "left_standing_by_other"),
)


@dataclass(frozen=True)
class Used:
    """An attack that the store has results of: what it is, and with which settings it was run."""

    definition: Definition
    stored: tuple[Stored, ...]


@dataclass(frozen=True)
class AttackSection:
    """One board. `chart` is None where there is no second attack to compare with; `devices` is where it was timed."""

    board: Board
    overlap: Overlap
    costs: tuple[Cost, ...]
    chart: Chart | None
    devices: tuple[str, ...]


@dataclass(frozen=True)
class AttacksPage:
    """Everything on the page; `others` are attacks that no result in the store is of."""

    used: tuple[Used, ...]
    others: tuple[Definition, ...]
    sections: tuple[AttackSection, ...]
    left_out: int


def build(store: ReadableStore, boards: Sequence[Board]) -> AttacksPage:
    """Reads all evidence of whole models; published protocols are no attacks."""
    results = [
        one
        for one in sorted(store.results(newest_only=True), key=result_key)
        if is_whole(one.model) and not is_protocol(one.cell.attack) and eligible(one)
    ]
    shown = [one for one in results if in_tables(one.cell.attack)]
    names = sorted({one.cell.attack for one in shown}, key=attack_key)
    used = tuple(
        Used(
            attack_facts.definition(name),
            attack_facts.stored_settings([one for one in shown if one.cell.attack == name]),
        )
        for name in names
    )
    known = {one.definition.name for one in used}
    others = tuple(one for one in attack_facts.definitions() if one.name not in known)
    groups: dict[tuple[Any, ...], list[Evidence]] = {}
    for one in shown:
        groups.setdefault(group_key(one.protocol), []).append(Evidence(one, store.outcomes(one.result_id)))
    sections = [
        _section(board, groups[group_key(board.protocol)]) for board in boards if group_key(board.protocol) in groups
    ]
    return AttacksPage(used, others, tuple(sections), len(results) - len(shown))


def _section(board: Board, cells: Sequence[Evidence]) -> AttackSection:
    checkpoints: dict[tuple[str, str], list[Evidence]] = {}
    for one in cells:
        checkpoints.setdefault((one.stored.model.name, one.stored.checkpoint.sha256), []).append(one)
    labels = {(row.model.name, row.checkpoint.sha256): (row.label, row.page) for row in board.rows}
    subjects = [
        found
        for key, own in sorted(checkpoints.items())
        if key in labels and (found := subject(*labels[key], own)) is not None
    ]
    made = overlap(subjects)
    pooled = {
        unit: (made.left[unit, unit].broken, sum(one.right for one in subjects if unit in one.units))
        for unit in made.units
    }
    devices = sorted({str(one.stored.environment.get("device", "unknown device")) for one in cells})
    chart = _chart(board, made) if len(made.units) > 1 else None
    return AttackSection(board, made, attack_facts.costs(checkpoints, pooled), chart, tuple(devices))


def _chart(board: Board, made: Overlap) -> Chart:
    values = {}
    labels = [unit_label(unit) for unit in made.units]
    for row, first in enumerate(made.units):
        for column, second in enumerate(made.units):
            found = made.left.get((first, second))
            if found is not None and found.share is not None and row != column:
                share = 100 * found.share
                tip = (
                    f"{labels[column]} leaves {found.standing} of {found.broken} samples\n"
                    f"that {labels[row]} breaks ({share:.1f} %),\n"
                    f"{found.models} model{'s' if found.models != 1 else ''}"
                )
                values[row, column] = (share, tip, False)
    words = (
        f"Heat map of {len(labels)} attacks: how much of what the attack of a row breaks the attack of a column leaves "
        "standing, in percent; darker means that the column misses more of it."
    )
    table = [
        (label, *(_cell(made, first, second) for second in made.units))
        for label, first in zip(labels, made.units, strict=True)
    ]
    title = "Of the samples that the attack of a row breaks, how many the attack of a column leaves standing, %"
    head = ("breaks \\ leaves standing", *labels)
    return heat_map(f"overlap-{board.anchor}", title, words, labels, labels, values, head, table)


def _cell(made: Overlap, first: Unit, second: Unit) -> str:
    found = made.left.get((first, second))
    if found is None or found.share is None or first == second:
        return "—"
    return f"{100 * found.share:.1f} ({found.standing} of {found.broken})"


def attacks_csv(page: AttacksPage) -> str:
    """Costs and breaks of every attack on every board, a row each; empty where there is nothing to compare with."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for section in page.sections:
        for cost in section.costs:
            alone = section.overlap.unique.get(cost.unit)
            passes = (f"{cost.forwards:.4f}", f"{cost.backwards:.4f}")
            row = (*_facts(section.board), *cost.unit, cost.models, f"{cost.seconds:.4f}", *passes)
            writer.writerow(map(safe, (*row, cost.right, cost.broken, alone)))
    return text.getvalue()


def overlap_csv(page: AttacksPage) -> str:
    """The overlap matrices, a row per pair of attacks."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(OVERLAP_COLUMNS)
    for section in page.sections:
        made = section.overlap
        for first in made.units:
            for second in made.units:
                found = made.left.get((first, second))
                if found is not None and first != second:
                    counts = (found.models, found.broken, found.standing)
                    writer.writerow(map(safe, (*_facts(section.board), *first, *second, *counts)))
    return text.getvalue()


def _facts(board: Board) -> tuple[Any, ...]:
    protocol = board.protocol
    threat = protocol.threat
    return (
        *(protocol.dataset, protocol.split, protocol.n, threat.norm, threat.eps, protocol.version),
        protocol.data_sha256,
    )
