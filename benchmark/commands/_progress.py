"""Live progress on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from moebench.evaluation import Listener
    from moebench.evaluation import Progress as Step


@contextmanager
def listening() -> Iterator[Listener]:
    """A listener that draws a bar per cell; silent where standard error is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None)

        def listen(step: Step) -> None:
            text = f"[{step.number}/{step.total}] {step.attack} on {step.view}: {step.stage}, {step.standing} standing"
            progress.update(task, description=text.replace("[", "\\["), completed=step.done, total=step.n)

        yield listen
