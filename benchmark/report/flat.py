"""Tables for machines: plain columns of numbers and texts, as CSV or as a data frame."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moebench.report.grid import Absent, Amount, Cell, Chance, Column, Grid, Label, Points, Portion, Share, Span
from moebench.report.suggest import one_of
from moebench.report.text import safe

if TYPE_CHECKING:
    from pandas import DataFrame

NAMES = {"dagger": "over-stated RA", "ddagger": "external", "ast": "white box"}
"""What the signs of a table are called where there is a column for them."""

NOT_APPLICABLE = "n/a"
"""Where there cannot be a number, unlike one that is missing; a data frame has no value in both places."""

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Flat:
    """Rows of one kind of table with all their columns; a value that is not measured is None."""

    header: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]


def flat(grids: Sequence[Grid]) -> Flat:
    """Some tables of one kind as one: what holds for all rows of a table comes first, and every column is there.

    Shares are fractions with the ends of their 95 % interval in columns of their own, claims are in percent.
    """
    records: list[dict[str, Value]] = []
    for grid in grids:
        columns = [_fields(column, [line.cells[at] for line in grid.lines]) for at, column in enumerate(grid.columns)]
        for own in zip(*columns, strict=True):
            record: dict[str, Value] = dict(grid.facts)
            for fields in own:
                record |= fields
            records.append(record)
    header = tuple(dict.fromkeys(key for record in records for key in record))
    return Flat(header, tuple(tuple(record.get(key) for key in header) for record in records))


def _fields(column: Column, cells: Sequence[Cell]) -> list[dict[str, Value]]:
    """The values of one column by name, for each of its cells; all cells have the same names."""
    key, kinds = column.key, {type(cell) for cell in cells}
    names = [key, f"{key}_low", f"{key}_high"] if Share in kinds else [key]
    if Span in kinds:
        names = [f"{key}_low", f"{key}_high", f"{key}_flagged"]
    if any(isinstance(cell, Label) and cell.signs for cell in cells):
        names = [key, "signs"]
    return [dict(zip(names, _values(cell, len(names)), strict=True)) for cell in cells]


def _values(cell: Cell, width: int) -> Sequence[Value]:
    match cell:
        case Share(found):
            return [found.value, found.low, found.high]
        case Span(low, high, flagged):
            return [low, high, flagged]
        case Label(text, signs):
            return [text, "; ".join(NAMES[sign] for sign in signs) or None][:width]
        case Portion(k, n):
            return [k / n if n else None]
        case Points(value) | Chance(value) | Amount(value):
            return [value]
        case Absent(_, applies):
            return [None if applies else NOT_APPLICABLE] * width
    return [cell]


def chosen(table: Flat, columns: Sequence[str] | None) -> Flat:
    """The columns of these names, an interval with its share.

    Raises:
        UsageError: there is no such column; the nearest is offered.
    """
    if columns is None:
        return table
    known = [*table.header, *(one.rsplit("_", 1)[0] for one in table.header if one.endswith(("_low", "_high")))]
    wanted: dict[str, None] = {}
    for column in columns:
        name = one_of("column", _alias(column, known), known)
        wanted |= dict.fromkeys(one for one in (name, *(f"{name}_{end}" for end in ("low", "high", "flagged")))
                                if one in table.header)  # fmt: skip
    places = [table.header.index(one) for one in wanted]
    return Flat(tuple(wanted), tuple(tuple(row[at] for at in places) for row in table.rows))


def _alias(column: str, known: Sequence[str]) -> str:
    return f"ra[{column}]" if f"ra[{column}]" in known else column


def csv_text(table: Flat) -> str:
    """A CSV whose texts no spreadsheet runs; fractions with nine digits, nothing where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(safe, table.header))
    for row in table.rows:
        writer.writerow(map(_field, row))
    return text.getvalue()


def _field(value: Value) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.9g}" if isinstance(value, float) else safe(value)


def frame(table: Flat) -> DataFrame:
    """A pandas data frame whose columns have one type each."""
    import pandas as pd

    names = {"model", "source"}
    columns: dict[str, Any] = {
        name: [None if row[at] == NOT_APPLICABLE and name not in names else row[at] for row in table.rows]
        for at, name in enumerate(table.header)
    }
    return pd.DataFrame(columns).convert_dtypes()
