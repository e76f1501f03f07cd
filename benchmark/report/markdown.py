"""Tables in GitHub's Markdown: the best number bold, the second underlined."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moebench.report.grid import (
    Absent,
    Amount,
    Cell,
    Chance,
    Column,
    Grid,
    Label,
    Points,
    Portion,
    Share,
    Span,
    narrowed,
    winners,
)
from moebench.report.text import p_value, percent, quantity

SIGNS = {"dagger": "†", "ddagger": "‡", "ast": r"\*"}
SPECIAL = re.compile(r"[\\`*_\[\]<>#|~$&@]")


def table(grid: Grid, columns: Sequence[str] | None = None) -> str:
    """One table with its title above and its notes below.

    Raises:
        UsageError: a column is asked for that the table does not have.
    """
    shown = narrowed(grid, columns)
    head = " | ".join(_heading(column) for column in shown.columns)
    ruler = " | ".join("---" if column.left else "---:" for column in shown.columns)
    texts = [_column(shown, place) for place in range(len(shown.columns))]
    lines = [f"| {' | '.join(row)} |" for row in zip(*texts, strict=True)]
    notes = ["In percent."] if shown.percentages else []
    notes += ["Best in bold, second underlined."] if any(column.best for column in shown.columns) else []
    notes += ["± reaches to the farther end of the 95 % Wilson interval."] if shown.shares else []
    below = " ".join(escape(note) for note in (*notes, *shown.notes))
    return "\n".join([f"**{escape(shown.title)}**", "", f"| {head} |", f"| {ruler} |", *lines, "", below, ""])


def escape(text: str) -> str:
    """Any text as one line of Markdown that is neither markup, nor HTML, nor a mention."""
    return SPECIAL.sub(lambda found: f"\\{found[0]}", " ".join(text.split()))


def _heading(column: Column) -> str:
    return escape(f"{column.group}: {column.label}" if column.group not in ("", "RA") else _plain(column))


def _plain(column: Column) -> str:
    return f"RA ({column.label})" if column.group == "RA" else column.label


def _column(grid: Grid, place: int) -> list[str]:
    best, second = winners(grid, place)
    return [_cell(line.cells[place], at in best, at in second) for at, line in enumerate(grid.lines)]


def _cell(cell: Cell, best: bool, second: bool) -> str:
    match cell:
        case Share(found, _, sign):
            number = percent(found.value, found.n)
            number = f"**{number}**" if best else f"<ins>{number}</ins>" if second else number
            arm = percent(max(found.value - found.low, found.high - found.value), found.n)
            return f"{number}{SIGNS.get(sign, '')} ± {arm}"
        case Label(text, signs):
            return escape(text) + "".join(SIGNS[sign] for sign in signs)
        case Absent(_, applies):
            return "—" if applies else "n/a"
        case Portion(k, n):
            return percent(k / n, n) if n else "—"
        case Span(low, high, flagged):
            return (f"{low:.2f}" if low == high else f"{low:.2f}–{high:.2f}") + ("\\*" if flagged else "")
        case Points(value):
            return f"{value:+.1f}"
        case Chance(p):
            return escape(p_value(p))
        case Amount(count):
            return quantity(count)
    return escape(str(cell))
