"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from moebench.metrics import wilson
from moebench.schema import ResultRecord

if TYPE_CHECKING:
    from moebench.summary import Summary

LABELS = {"ra": "RA", "ra_e": "RA-E", "ra_r": "RA-R", "ra_smoe": "RA-SMoE", "ra_rmoe": "RA-RMoE"}


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def interval(value: float, n: int) -> str:
    """A share in percent with its 95 % Wilson interval."""
    low, high = wilson(round(value * n), n)
    return f"{percent(value)} % \\[{percent(low)}, {percent(high)}]"


def headline_lines(summary: Summary) -> Iterable[str]:
    """SA, the RA family and RA-worst; metrics that do not apply are named as such once, at the end."""
    yield f"  {'SA':9} {interval(summary.sa, summary.n)}"
    missing = []
    for key, label in LABELS.items():
        value = summary.headlines[key]
        if value is None:
            missing.append(label)
        else:
            yield f"  {label:9} {interval(value, summary.n)}"
    yield f"  {'RA-worst':9} {interval(summary.ra_worst, summary.n)}   (every attack stored for these weights)"
    if missing:
        yield f"  [dim]not applicable or not attacked here: {', '.join(missing)}[/dim]"


def results_table(records: Sequence[ResultRecord]) -> Table:
    """One line per attack and view."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("attack", "view"):
        table.add_column(heading, no_wrap=True)
    for heading in ("acc %", "95 % interval", "rerouted %", "forwards", "backwards", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        layers = record.routing
        rerouted = "–" if not layers else percent(sum(layer.changed for layer in layers) / len(layers))
        table.add_row(
            record.attack,
            record.view.replace("[", "\\["),
            percent(record.accuracy),
            f"{percent(record.ci_low)}–{percent(record.ci_high)}",
            rerouted,
            _short(record.forwards),
            _short(record.backwards),
            f"{record.seconds:.1f}",
        )
    return table


def _short(count: int) -> str:
    """A number of passes in at most five characters."""
    for limit, divisor, unit in ((10_000, 1, ""), (10_000_000, 1_000, "k"), (10_000_000_000, 1_000_000, "M")):
        if count < limit:
            return f"{count // divisor}{unit}"
    return f"{count // 1_000_000_000}G"
