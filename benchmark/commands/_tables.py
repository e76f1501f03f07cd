"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from moebench.metrics import Measure, wilson
from moebench.schema import ResultRecord, format_eps

if TYPE_CHECKING:
    from moebench.radii import Sweep
    from moebench.summary import Summary

LABELS = {"ra": "RA", "ra_e": "RA-E", "ra_r": "RA-R", "ra_smoe": "RA-SMoE", "ra_rmoe": "RA-RMoE"}
HEADINGS = ("attack", "view", "acc %", "95 % interval", "rerouted %", "forwards", "backwards", "seconds")
LEFT = 2
"""How many columns are text and stand at the left; numbers stand at the right."""
OPTIONAL = (6, 5, 7, 4)
"""Columns that a narrow terminal does without, the first to go first."""
UNLIMITED = 10_000


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _or_dash(value: float | None) -> str:
    return "–" if value is None else percent(value)


def interval(value: float, n: int) -> str:
    """A share in percent with its 95 % Wilson interval."""
    low, high = wilson(round(value * n), n)
    return f"{percent(value)} % \\[{percent(low)}, {percent(high)}]"


def measured(found: Measure) -> str:
    """A share in percent with the ends of its interval, for a cell of a table."""
    return f"{percent(found.value)} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


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
    if summary.ra_worst is not None:
        yield f"  {'RA-worst':9} {interval(summary.ra_worst, summary.n)}   (every attack stored for these weights)"
    if missing:
        yield f"  [dim]not applicable or not attacked here: {', '.join(missing)}[/dim]"


def standard_output() -> Console:
    """Where results go: the terminal wraps long lines, files and pipes get them whole."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = UNLIMITED
    return console


def results_lines(records: Sequence[ResultRecord], width: int) -> list[str]:
    """A heading and one line per attack and view; where they are wider than `width`, the costs are left out."""
    rows = [HEADINGS, *(_cells(record) for record in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    shown = list(range(len(HEADINGS)))
    for column in OPTIONAL:
        if sum(widths[kept] + 2 for kept in shown) - 2 > width:
            shown.remove(column)
    heading, *lines = ("  ".join(_aligned(row, widths, column) for column in shown).rstrip() for row in rows)
    return [f"[bold]{heading}[/bold]", *(line.replace("[", "\\[") for line in lines)]


def curve_lines(sweep: Sweep, width: int) -> list[str]:
    """A line per attack and view with a column per radius, the worst case last; in blocks where `width` is short."""
    heads = [format_eps(summary.eps) for summary in sweep.summaries]
    rows = [(*key, *(percent(one.accuracy) for one in records)) for key, records in sweep.curves.items()]
    rows.append(("RA-worst", "all stored", *map(_or_dash, (one.ra_worst for one in sweep.summaries))))
    table = [("attack", "view", *heads), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines: list[str] = []
    columns = list(range(LEFT, len(widths)))
    while columns:
        block = [0, 1]
        while columns and (len(block) == LEFT or sum(widths[at] + 2 for at in [*block, columns[0]]) - 2 <= width):
            block.append(columns.pop(0))
        heading, *body = ("  ".join(_aligned(row, widths, at) for at in block).rstrip() for row in table)
        lines += [f"[bold]{heading}[/bold]", *(line.replace("[", "\\[") for line in body)]
    return lines


def _aligned(row: Sequence[str], widths: Sequence[int], column: int) -> str:
    return row[column].ljust(widths[column]) if column < LEFT else row[column].rjust(widths[column])


def _cells(record: ResultRecord) -> tuple[str, ...]:
    layers = record.routing
    return (
        record.attack,
        record.view,
        percent(record.accuracy),
        f"{percent(record.ci_low)}–{percent(record.ci_high)}",
        "–" if not layers else percent(sum(layer.changed for layer in layers) / len(layers)),
        _short(record.forwards),
        _short(record.backwards),
        f"{record.seconds:.1f}",
    )


def _short(count: int) -> str:
    """A number of passes in at most five characters."""
    for limit, divisor, unit in ((10_000, 1, ""), (10_000_000, 1_000, "k"), (10_000_000_000, 1_000_000, "M")):
        if count < limit:
            return f"{count // divisor}{unit}"
    return f"{count // 1_000_000_000}G"


def duration(seconds: float) -> str:
    """Seconds as "12 s", "3 min" or "2 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
