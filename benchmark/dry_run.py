"""What a command would compute, without computing it: its cells, the most passes they take, and what is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moebench.bill import Cost
from moebench.cells import most_passes, searches
from moebench.evaluation import EvalSpec, Prepared, prepare
from moebench.fitting import fit_budget
from moebench.planning import parse_attacks
from moebench.schema import WARM_START, StoredResult, is_protocol
from moebench.store import Store
from moebench.store.connect import MissingError


@dataclass(frozen=True)
class PlannedCell:
    """A cell that a command would compute: the most passes it can take, and whether the database has it already.

    `cost` is what it will probably take, None where nobody has looked.
    """

    attack: str
    view: str
    n: int
    forwards: int
    backwards: int
    stored: bool
    cost: Cost | None = None

    def to_json(self) -> dict[str, Any]:
        """As `--dry-run --json` prints it."""
        return asdict(self)


def plan_only(spec: EvalSpec) -> list[PlannedCell]:
    """What `evaluate` would do, without doing or writing anything."""
    return planned_cells(prepare(spec, parse_attacks(spec.attacks)))


def planned_cells(prepared: Prepared, known: Sequence[StoredResult] | None = None) -> list[PlannedCell]:
    """The cells of a prepared evaluation, with what each can cost and whether it is stored.

    `known` are the finished cells of its database, None to read them.
    """
    spec = prepared.spec
    correct = int((prepared.clean_pred == prepared.samples.y).sum())
    stored = set() if spec.fresh else fingerprints(stored_results(spec) if known is None else known)
    planned = []
    for plan, cell in prepared.cells:
        budgets = [most_passes(stage, cell.view) for stage, _ in searches(plan, spec.precision)]
        forwards, backwards = (spec.draws * sum(passes) for passes in zip(*budgets, strict=True))
        # An image that is taken over is judged in one pass.
        forwards += WARM_START in cell.parameters
        there = cell.fingerprint in stored
        more = fit_budget(plan, prepared.training)
        # A protocol attacks what is wrong already, too.
        rows = len(prepared.samples) if is_protocol(plan.name) else correct
        passes = rows * forwards + more[0], rows * backwards + more[1]
        planned.append(PlannedCell(plan.name, cell.view, len(prepared.samples), *passes, there))
    return planned


def fingerprints(results: Sequence[StoredResult]) -> set[str]:
    """The fingerprints of finished cells."""
    return {result.cell.fingerprint for result in results}


def stored_results(spec: EvalSpec) -> list[StoredResult]:
    """The finished cells of the database that a command names; none if there is no database yet.

    Raises:
        UsageError: the database cannot be read.
    """
    try:
        with Store.open(spec.db, write=False) as store:
            return store.results()
    except MissingError:
        # No database yet is the usual case of a first dry run; any other trouble would meet the real one too.
        return []
