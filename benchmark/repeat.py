"""Repeating a stored run on some of its samples, and comparing verdict by verdict.

Samples do not depend on each other, and random streams hang on the sample's number: a few of them give the verdicts
that all of them gave. Where a library attacks whole batches that does not hold; such cells are repeated as a whole or
not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from moebench.attacks._base import AttackPlan
from moebench.attacks._library import LibraryAttack
from moebench.booking import CellOutcome
from moebench.cells import run_cell
from moebench.errors import UsageError
from moebench.evaluation import EvalSpec, Listener, Prepared, cell_work
from moebench.identity import CODE
from moebench.radii import prepare_levels
from moebench.schema import WARM_START, CellSpec, IntArray, Outcomes, StoredResult, StoredRun
from moebench.warm import WarmStarts


@dataclass(frozen=True)
class Difference:
    """A sample whose verdict did not come out again: was it broken, and what was predicted without the attack."""

    attack: str
    view: str
    index: int
    was_broken: bool
    is_broken: bool
    was_clean_pred: int
    is_clean_pred: int


@dataclass(frozen=True)
class CellCheck:
    """How a cell compares: `compared` samples, of which `agree` have the verdict that is stored.

    `other_class` counts samples that both runs broke, into different classes. `skipped` says why none was compared.
    """

    attack: str
    view: str
    compared: int
    agree: int
    other_class: int = 0
    skipped: str | None = None


@dataclass(frozen=True)
class Verification:
    """A run repeated on the samples `index` (m,)."""

    run_id: str
    index: tuple[int, ...]
    n: int
    cells: tuple[CellCheck, ...]
    differences: tuple[Difference, ...]
    doubts: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether every verdict that was compared came out again."""
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """As `moebench verify --json` prints it."""
        return {**asdict(self), "agrees": self.agrees}


def verify(
    run: StoredRun,
    outcomes: Mapping[int, Outcomes],
    spec: EvalSpec,
    radii: Sequence[float],
    *,
    samples: int | None,
    seed: int,
    listener: Listener | None = None,
) -> Verification:
    """Repeats the finished cells of a run on a random subset of its samples; stores nothing.

    Args:
        run: what is repeated.
        outcomes: what is stored per sample, by the numbers of the run's results.
        spec: the evaluation that the run was, without its radius.
        radii: those of its sweep, up to its own; that one alone where it was none.
        samples: how many of the run's samples, None for all.
        seed: of the choice of samples.
        listener: told after each batch of decided samples.

    Raises:
        UsageError: the run cannot be repeated: its model, data or attacks are not what they were.
    """
    if not run.results:
        raise UsageError(f"run {run.run_id} cannot be repeated: it has no finished result")
    levels = prepare_levels(spec, radii, cold=False)
    level = levels[-1]
    _refuse_changes(run, level)
    n = run.protocol.n
    size = n if samples is None else min(samples, n)
    index = np.sort(np.random.default_rng(seed).choice(n, size, replace=False)).astype(np.int64)
    cells, differences = [], []
    apart = [stored for stored in run.results if not _needs_batches(stored, level)]
    why = "its verdicts hang on the batch that a library works on; --all repeats it"
    if not apart and size < n:
        raise UsageError(f"run {run.run_id} cannot be repeated on a part of its samples: {why}")
    for stored in run.results:
        if stored not in apart and size < n:
            cells.append(CellCheck(stored.cell.attack, stored.cell.view, 0, 0, skipped=why))
            continue
        outcome = _repeated(stored, levels, index, listener)
        check, found = _compared(stored, outcomes[stored.result_id], level, outcome, index)
        cells.append(check)
        differences += found
    doubts = tuple(finding.evidence for finding in level.findings)
    return Verification(run.run_id, tuple(index.tolist()), n, tuple(cells), tuple(differences), doubts)


def _refuse_changes(run: StoredRun, level: Prepared) -> None:
    """Says what has changed since the run.

    Raises:
        UsageError: something has.
    """
    name = f"run {run.run_id} cannot be repeated"
    loaded = level.loaded
    pairs = (
        (f"the data of {run.protocol.dataset}", run.protocol.data_sha256, level.protocol.data_sha256),
        ("the threat model", run.protocol.threat, level.protocol.threat),
        ("the version of the evaluation rules", run.protocol.version, level.protocol.version),
        ("the model's name", run.model.name, loaded.record.name),
        (f"the weights of {run.model.name}", run.checkpoint.sha256, loaded.checkpoint.sha256),
        (f"the code of {run.model.name}", run.environment.get(CODE, loaded.code), loaded.code),
    )
    for what, was, now in pairs:
        if was != now:
            raise UsageError(f"{name}: {what} changed from {_short(was)} to {_short(now)}")
    there = {cell.fingerprint for _, cell in level.cells}
    for stored in run.results:
        if stored.cell.fingerprint not in there:
            what = f"{stored.cell.attack} on {stored.cell.view}"
            raise UsageError(f"{name}: the settings of {what} are not those of this version or of its command")


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:16]}…" if len(text) > 40 else text


def _cell(level: Prepared, cell: CellSpec) -> tuple[AttackPlan, CellSpec]:
    """The prepared cell of the same attack and view."""
    return next(pair for pair in level.cells if (pair[1].attack, pair[1].view) == (cell.attack, cell.view))


def _needs_batches(stored: StoredResult, level: Prepared) -> bool:
    plan, cell = _cell(level, stored.cell)
    return cell.engine != "native" or any(isinstance(stage, LibraryAttack) for stage in plan.stages)


def _repeated(
    stored: StoredResult, levels: Sequence[Prepared], index: IntArray, listener: Listener | None
) -> CellOutcome:
    """The cell once more on the samples `index`, after those of smaller radii that it takes images from."""
    chain = WarmStarts()
    warm = WARM_START in stored.cell.parameters
    outcome: CellOutcome | None = None
    for level in levels if warm else levels[-1:]:
        plan, cell = _cell(level, stored.cell)
        number = 1 + [one for _, one in level.cells].index(cell)
        work = cell_work(level, plan, cell, number, listener)
        only = torch.zeros(len(level.samples), dtype=torch.bool, device=level.samples.x.device)
        only[torch.from_numpy(index).to(only.device)] = True
        work = replace(work, only=only)
        work = chain.given(work) if warm else work
        _, outcome = run_cell(work, None, "", resume=False)
        if warm:
            chain.note(work, outcome)
    assert outcome is not None
    return outcome


def _compared(
    stored: StoredResult, was: Outcomes, level: Prepared, outcome: CellOutcome, index: IntArray
) -> tuple[CellCheck, list[Difference]]:
    clean_pred, broken, adv_pred = (
        tensor.cpu().numpy()[index] for tensor in (level.clean_pred, outcome.broken, outcome.adv_pred)
    )
    rows = np.searchsorted(was.index, index)
    same = (was.broken[rows] == broken) & (was.clean_pred[rows] == clean_pred)
    cell = stored.cell
    differences = [
        Difference(
            cell.attack,
            cell.view,
            int(index[place]),
            bool(was.broken[rows[place]]),
            bool(broken[place]),
            int(was.clean_pred[rows[place]]),
            int(clean_pred[place]),
        )
        for place in np.flatnonzero(~same)
    ]
    other = int(np.count_nonzero(was.broken[rows] & broken & (was.adv_pred[rows] != adv_pred)))
    return CellCheck(cell.attack, cell.view, len(index), int(same.sum()), other), differences
