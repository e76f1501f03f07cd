"""What `moebench sweep` shows while it works, and the tables at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typing_extensions import override

from moebench.bill import together
from moebench.commands._say import bill_lines
from moebench.commands._tables import duration, percent, standard_output
from moebench.evaluation import Listener
from moebench.evaluation import Progress as Step
from moebench.suite import Failure, ModelPlan, Planned, Swept, Watcher
from moebench.summary import Summary


class Shown(Watcher):
    """Shows a bar on a terminal; elsewhere one line on standard error for each model that is done."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)
        self._place = ""

    @override
    def planning(self, number: int, total: int, model: str) -> None:
        text = f"what is missing: {escape(model)}"
        self._progress.update(self._task, description=text, completed=number, total=total)

    @override
    def starting(self, plan: ModelPlan, number: int, total: int, left: float | None) -> Listener:
        self._place = f"[{number}/{total}]"
        rest = "" if left is None else f", about {duration(left)} left"

        def listen(step: Step) -> None:
            text = (
                f"{self._place} {plan.spec.model}: {step.attack} on {step.view}, {step.stage}, "
                f"{step.standing} standing{rest}"
            )
            self._progress.update(self._task, description=escape(text), completed=step.done, total=step.n)

        return listen

    @override
    def finished(self, plan: ModelPlan, summary: Summary) -> None:
        ra = "–" if summary.ra_worst is None else f"{percent(summary.ra_worst)} %"
        self._print(f"{self._place} {plan.spec.model}, {plan.spec.dataset}: RA-worst {ra}, {duration(summary.seconds)}")

    @override
    def failed(self, failure: Failure) -> None:
        self._print(f"failed: {failure}")

    def _print(self, text: str) -> None:
        self._progress.console.print(escape(text), soft_wrap=True)


@contextmanager
def watching() -> Iterator[Watcher]:
    """A watcher that shows on standard error what a sweep does."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # `disable` stops the bar alone; lines are printed wherever standard error goes.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Shown(progress)


def say_planned_suite(planned: Planned) -> None:
    """What is missing, per model, with what it takes: at most, and probably."""
    console = standard_output()
    table = Table(box=None, pad_edge=False)
    for name in ("model", "data", "missing"):
        table.add_column(name, overflow="fold")
    for name in ("cells", "forwards", "backwards", "about", "at most"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in planned.plans:
        names = ", ".join(dict.fromkeys(cell.attack for cell in plan.missing)) or "nothing"
        passes = [sum(getattr(cell, kind) for cell in plan.missing) for kind in ("forwards", "backwards")]
        counts = (f"{len(plan.missing)} of {len(plan.cells)}", *(f"{count:,}" for count in passes))
        bill = plan.bill if plan.missing else None
        times = ("–", "–") if bill is None else (duration(bill.seconds), duration(bill.seconds_at_most))
        table.add_row(escape(plan.spec.model), escape(plan.spec.dataset), escape(names), *counts, *times)
    console.print(table)
    bills = [plan.bill for plan in planned.plans if plan.bill is not None and plan.missing]
    for line in bill_lines(together(bills)) if bills else ():
        console.print(escape(line))
    _say_failures(console, planned.failures)


def say_swept(swept: Swept) -> None:
    """The rows that were made, then what failed."""
    console = standard_output()
    if swept.summaries:
        table = Table(box=None, pad_edge=False)
        for name in ("model", "data"):
            table.add_column(name, overflow="fold")
        for name in ("n", "SA %", "RA %", "RA-E %", "RA-R %", "RA-worst %", "flags", "time", "run"):
            table.add_column(name, justify="right", no_wrap=True)
        for one in swept.summaries:
            shares = (one.sa, *(one.headlines[key] for key in ("ra", "ra_e", "ra_r")), one.ra_worst)
            numbers = ("–" if share is None else percent(share) for share in shares)
            ends = (str(len(one.flags) or "–"), duration(one.seconds), one.run_id)
            table.add_row(escape(one.model), escape(one.dataset), str(one.n), *numbers, *ends)
        console.print(table)
    if swept.complete:
        console.print(f"{swept.complete} evaluations had every result in the database already.")
    _say_failures(console, swept.failures)


def _say_failures(console: Console, failures: tuple[Failure, ...]) -> None:
    if failures:
        console.print(f"{len(failures)} could not be done:")
    for failure in failures:
        console.print(f"  {escape(str(failure))}")
