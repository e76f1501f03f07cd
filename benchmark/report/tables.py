"""From stored rows to ranked rows: all the arithmetic of the report, and none of its formatting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from moebench.metrics import Measure, from_accuracy, measure, worst_case
from moebench.report.admission import unranked_because
from moebench.report.claims import ClaimRange, ClaimRow, claim_key, compare, headline_ranges, is_headline
from moebench.report.evidence import (
    WHOLE,
    Evidence,
    ReadableStore,
    attack_key,
    cold_if_any,
    eligible,
    group_key,
    has_column,
    is_whole,
    names,
    newest,
    result_key,
)
from moebench.report.external import EXTERNAL, external_words
from moebench.report.missed import STANDARD, Missed, missed
from moebench.report.model_page import Details, details
from moebench.report.protocols import ProtocolRow, protocol_rows
from moebench.report.ranks import RankRange, rank_ranges
from moebench.report.result_rows import ResultRow, result_row
from moebench.report.settings import setting_key
from moebench.report.text import digest, percent, slug
from moebench.schema import (
    OVERSTATED_RA,
    BoolArray,
    CheckpointRecord,
    Claim,
    ModelRecord,
    ProtocolRecord,
    StoredResult,
    StoredRun,
    is_protocol,
)
from moebench.trust import passive_flags

RANKING_ATTACK = STANDARD
OVERSTATED = "over-stated RA"
COMPONENTS: tuple[tuple[str, str], ...] = (
    ("RA-E", "experts"),
    ("RA-R", "router"),
    ("RA-SMoE", "standard"),
    ("RA-RMoE", "robust"),
)

State = Literal["measured", "n/a", "missing"]


@dataclass(frozen=True)
class Cell:
    """One number of a leaderboard. `why` says what it is made from, or why there is none."""

    state: State
    measure: Measure | None
    why: str


@dataclass(frozen=True)
class Mark:
    """A reason to distrust a row, as a short code and in words."""

    code: str
    words: str


@dataclass(frozen=True)
class Row:
    """One checkpoint of one model on one leaderboard; `attacks` goes with the board's `attacks`.

    `rank` is None for a row without one, and `ranks` is all that the paired tests leave open; `compared` are published
    numbers that ask for what was measured here; `standing` (n,) says which samples no recorded attack breaks.
    """

    model: ModelRecord
    page: str
    checkpoint: CheckpointRecord
    label: str
    rank: int | None
    unranked: str | None
    worst: Cell
    sa: Cell
    ra: Cell
    attacks: tuple[Cell, ...]
    components: tuple[Cell, ...]
    claims: tuple[Claim, ...]
    claim_ranges: tuple[ClaimRange, ...]
    marks: tuple[Mark, ...]
    ranks: RankRange | None = None
    compared: tuple[ClaimRow, ...] = ()
    standing: BoolArray = field(default_factory=lambda: np.zeros(0, np.bool_), compare=False, repr=False)

    @property
    def overstated(self) -> bool:
        """Whether an attack on a part of the model undercuts RA."""
        return any(mark.code == OVERSTATED for mark in self.marks)


@dataclass(frozen=True)
class Board:
    """The leaderboard of one data set, sample set, threat model and protocol version.

    `main` is false where another radius on the same data leads, as for most radii of a sweep.
    """

    protocol: ProtocolRecord
    anchor: str
    attacks: tuple[str, ...]
    suites: tuple[str, ...]
    ranked: tuple[Row, ...]
    unranked: tuple[Row, ...]
    left_out: int
    missed: tuple[Missed, ...] = ()
    main: bool = True

    @property
    def rows(self) -> tuple[Row, ...]:
        """Ranked rows, then the others."""
        return self.ranked + self.unranked


@dataclass(frozen=True)
class ModelPage:
    """All that the store knows of one model."""

    model: ModelRecord
    page: str
    checkpoints: tuple[CheckpointRecord, ...]
    standings: tuple[tuple[Board, Row], ...]
    claims: tuple[ClaimRow, ...]
    results: tuple[ResultRow, ...]
    commands: tuple[str, ...]
    failed: tuple[StoredRun, ...]
    details: Details
    protocols: tuple[ProtocolRow, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything that the pages and tables show, in the order in which they show it."""

    boards: tuple[Board, ...]
    models: tuple[ModelPage, ...]
    claims: tuple[Claim, ...]


def build(store: ReadableStore) -> Report:
    """Reads the store once and ranks what it holds; parts of models, evaluated alone, are no models to rank."""
    found = sorted(store.results(newest_only=True), key=result_key)
    results = [one for one in found if is_whole(one.model)]
    parts = [Evidence(one, store.outcomes(one.result_id)) for one in found if not is_whole(one.model)]
    claims = tuple(sorted(store.claims(), key=claim_key))
    runs = sorted((run for run in store.runs() if is_whole(run.model)), key=lambda run: (run.started_at, run.run_id))
    evidence = [Evidence(stored, store.outcomes(stored.result_id)) for stored in results]
    groups: dict[tuple[Any, ...], list[Evidence]] = {}
    for one in evidence:
        if is_protocol(one.attack):
            continue
        groups.setdefault(group_key(one.stored.protocol), []).append(one)
    boards = _arranged({key: _board(groups[key], claims, runs) for key in sorted(groups)}, groups)
    models = sorted({one.stored.model.name for one in evidence} | {run.model.name for run in runs})
    return Report(boards, tuple(_page(store, name, boards, evidence, parts, claims, runs) for name in models), claims)


def _arranged(
    boards: Mapping[tuple[Any, ...], Board], groups: Mapping[tuple[Any, ...], Sequence[Evidence]]
) -> tuple[Board, ...]:
    """The boards by data and norm, in each the leading radius first.

    The data set's own radius leads, which a command asks for by naming none; else the one with most models.
    """
    by_data: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for key in boards:
        by_data.setdefault((*key[:3], *key[4:]), []).append(key)
    found: list[Board] = []
    for keys in by_data.values():

        def weight(key: tuple[Any, ...]) -> tuple[int, ...]:
            own = any(_at_own_radius(one.stored.command) for one in groups[key])
            return (not own, -len(boards[key].ranked), -len(boards[key].rows))

        leader = min(keys, key=weight)
        found.append(boards[leader])
        found += [replace(boards[key], main=False) for key in keys if key != leader]
    return tuple(found)


def _at_own_radius(command: str) -> bool:
    return bool(command) and "--eps" not in command.split()


def _board(group: Sequence[Evidence], claims: Sequence[Claim], runs: Sequence[StoredRun]) -> Board:
    protocol = newest(one.stored for one in group).protocol
    kept = [one for one in group if eligible(one.stored)]
    attacks = sorted({one.attack for one in kept if one.view == WHOLE and has_column(one.attack)}, key=attack_key)
    checkpoints: dict[tuple[str, str], list[Evidence]] = {}
    for one in kept:
        checkpoints.setdefault((one.stored.model.name, one.stored.checkpoint.sha256), []).append(one)
    models = [name for name, _ in checkpoints]
    rows = sorted(
        (_row(cells, attacks, models.count(key[0]) > 1, claims, runs) for key, cells in checkpoints.items()),
        key=_rank_key,
    )
    if any(not np.array_equal(one.outcomes.index, kept[0].outcomes.index) for one in kept):
        raise ValueError(f"results on {protocol.dataset} share a protocol but not their samples; the indices differ")
    ranked = [row for row in rows if row.unranked is None]
    ranges = rank_ranges([row.standing for row in ranked])
    return Board(
        protocol=protocol,
        anchor=f"{slug(protocol.dataset)}-{digest(repr(group_key(protocol)))}",
        attacks=tuple(attacks),
        suites=tuple(sorted({one.stored.cell.suite for one in kept})),
        ranked=tuple(replace(row, rank=found.best, ranks=found) for row, found in zip(ranked, ranges, strict=True)),
        unranked=tuple(row for row in rows if row.unranked is not None),
        left_out=len(group) - len(kept),
        missed=tuple(
            found
            for row in rows
            if (found := missed(row.label, row.page, checkpoints[row.model.name, row.checkpoint.sha256])) is not None
        ),
    )


def _rank_key(row: Row) -> tuple[Any, ...]:
    return (*(-_value(cell) for cell in (row.worst, row.ra, row.sa)), row.model.name, row.checkpoint.sha256)


def _value(cell: Cell) -> float:
    return cell.measure.value if cell.measure is not None else -1.0


def _row(
    cells: Sequence[Evidence],
    attacks: Sequence[str],
    several: bool,
    claims: Sequence[Claim],
    runs: Sequence[StoredRun],
) -> Row:
    """One checkpoint's numbers; `several` says that the board has more than one of this model."""
    last = newest(one.stored for one in cells)
    model = last.model
    whole = [one for one in cells if one.view == WHOLE]
    own = [claim for claim in claims if claim.registry_name == model.name]
    return Row(
        model=model,
        page=page_name(model.name),
        checkpoint=last.checkpoint,
        label=f"{model.name} · {last.checkpoint.sha256[:8]}" if several else model.name,
        rank=None,
        unranked=unranked_because(cells),
        worst=_standing(cells, "no attack has been run"),
        sa=_clean(last),
        ra=_standing(whole, "no attack on the whole model has been run"),
        attacks=tuple(
            _standing(cold_if_any([one for one in whole if one.attack == attack]), f"{attack} has not been run")
            for attack in attacks
        ),
        components=tuple(_component(model, cells, view) for _, view in COMPONENTS),
        claims=tuple(filter(is_headline, own)),
        claim_ranges=headline_ranges(own, last.protocol.dataset),
        marks=_marks(cells, runs),
        compared=tuple(
            found for claim in own if is_headline(claim) and (found := compare(claim, cells)).difference is not None
        ),
        standing=worst_case([one.outcomes for one in cells]),
    )


def page_name(name: str) -> str:
    """The file of a model's page, inside the folder of pages."""
    return f"{slug(name)}.html"


def _clean(stored: StoredResult) -> Cell:
    found = from_accuracy(stored.record.clean_accuracy, stored.record.n)
    if found is None:
        return Cell("missing", None, "not measured: the clean accuracy is unknown")
    return Cell("measured", found, f"{found.k} of {found.n} unperturbed samples are right")


def _standing(cells: Sequence[Evidence], missing: str) -> Cell:
    found = measure(worst_case([one.outcomes for one in cells])) if cells else None
    if found is None:
        return Cell("missing", None, f"not measured: {missing}")
    return Cell("measured", found, f"{found.k} of {found.n} samples stand after {names(cells)}")


def _component(model: ModelRecord, cells: Sequence[Evidence], view: str) -> Cell:
    on_view = [one for one in cells if one.view == view]
    reason = None if on_view else not_applicable(model.family, view)
    if reason is not None:
        return Cell("n/a", None, f"not applicable: {reason}")
    return _standing(on_view, f"no attack on the view {view!r} has been run")


def not_applicable(family: str, view: str) -> str | None:
    """Why a family of models has no such view; None where it has one, or where that is not known."""
    if view in ("standard", "robust") and family in ("dense", "ensemble", "moe"):
        return f"only a dual model has a {view} half"
    if view in ("experts", "router") and family == "dense":
        return "a dense model has neither experts nor a router"
    if view in ("experts", "router") and family == "ensemble":
        return "an ensemble has no router, so experts and routing cannot be attacked apart"
    return None


def _marks(cells: Sequence[Evidence], runs: Sequence[StoredRun]) -> tuple[Mark, ...]:
    stored = cells[0].stored
    where = (stored.model.name, stored.checkpoint.sha256, group_key(stored.protocol))
    found = {*overstated(cells), *_clean_differs(cells)}
    found |= {Mark(EXTERNAL, words) for one in cells if (words := external_words(one.stored)) is not None}
    passive = passive_flags((one.stored, one.outcomes) for one in cells)
    # A run knows only the attacks of its time; what outcomes can say is decided here, from all of them, and of what
    # else runs have flagged the last word of each code counts.
    last = {flag.code: flag for flag in passive}
    decided = {OVERSTATED_RA, *last}
    for run in runs:
        if (run.model.name, run.checkpoint.sha256, group_key(run.protocol)) == where:
            last |= {flag.code: flag for flag in run.flags if flag.code not in decided}
    found.update(Mark(flag.code, flag.evidence) for flag in last.values())
    return tuple(sorted(found, key=lambda mark: (mark.code, mark.words)))


def overstated(cells: Sequence[Evidence]) -> list[Mark]:
    """One mark for each view whose attacks leave fewer samples standing than all attacks on the whole model together.

    Every attack is judged on the whole model, so such a view proves that the attacks on the whole model were too weak.
    """
    whole = [one for one in cells if one.view == WHOLE]
    stated = measure(worst_case([one.outcomes for one in whole])) if whole else None
    if stated is None:
        return []
    marks = []
    for view in sorted({one.view for one in cells} - {WHOLE}):
        on_view = [one for one in cells if one.view == view]
        left = measure(worst_case([one.outcomes for one in on_view]))
        if left is not None and left.k < stated.k:
            words = (
                f"{names(on_view)} leaves {_in_words(left)} standing, fewer than the {_in_words(stated)} "
                f"that all attacks on the whole model together leave ({names(whole)})"
            )
            marks.append(Mark(OVERSTATED, words))
    return marks


def _in_words(found: Measure) -> str:
    return f"{found.k} of {found.n} samples ({percent(found.value, found.n)} %)"


def _clean_differs(cells: Sequence[Evidence]) -> list[Mark]:
    found = [from_accuracy(one.stored.record.clean_accuracy, one.stored.record.n) for one in cells]
    seen = sorted({one for one in found if one is not None}, key=lambda one: (one.value, one.n))
    if len(seen) < 2:
        return []
    words = f"{_in_words(seen[0])} and {_in_words(seen[-1])}"
    return [Mark("clean accuracy varies", f"the same weights on the same data were right on {words} in two results")]


def _page(
    store: ReadableStore,
    name: str,
    boards: Sequence[Board],
    evidence: Sequence[Evidence],
    parts: Sequence[Evidence],
    claims: Sequence[Claim],
    runs: Sequence[StoredRun],
) -> ModelPage:
    own = [one for one in evidence if one.stored.model.name == name]
    own_runs = [run for run in runs if run.model.name == name]
    commands = tuple(dict.fromkeys(one.stored.command for one in own))
    checkpoints = {run.checkpoint.sha256: run.checkpoint for run in own_runs}
    checkpoints |= {one.stored.checkpoint.sha256: one.stored.checkpoint for one in own}
    standings = tuple((board, row) for board in boards for row in board.rows if row.model.name == name)
    compared = tuple(compare(claim, own) for claim in claims if claim.registry_name == name)
    weights = tuple(checkpoints[sha] for sha in sorted(checkpoints))
    leaders = [setting_key(board.protocol, row.checkpoint.sha256) for board, row in standings if board.main]
    return ModelPage(
        model=newest(one.stored for one in own).model if own else own_runs[-1].model,
        page=page_name(name),
        checkpoints=weights,
        standings=standings,
        claims=compared,
        results=tuple(result_row(one, commands) for one in own if not is_protocol(one.attack)),
        commands=commands,
        failed=tuple(run for run in own_runs if run.status == "failed"),
        details=details(store, own, parts, weights, compared, leaders),
        protocols=protocol_rows(own, claims, commands),
    )
