"""A table on its way out: cells that keep their numbers until LaTeX, Markdown, CSV or a data frame writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

from moebench.errors import UsageError
from moebench.metrics import Measure
from moebench.report.suggest import one_of
from moebench.schema import PaperCard


@dataclass(frozen=True)
class Share:
    """A share of samples with its interval; a `doubted` one is shown but never the best. `sign` is a note's sign."""

    measure: Measure
    doubted: bool = False
    sign: str = ""


@dataclass(frozen=True)
class Portion:
    """A share of samples that is part of a breakdown: no interval, no best."""

    k: int
    n: int


@dataclass(frozen=True)
class Span:
    """Published values in percent, from the lowest to the highest; `flagged` where one of them is doubtful."""

    low: float
    high: float
    flagged: bool


@dataclass(frozen=True)
class Points:
    """A difference in percentage points."""

    value: float


@dataclass(frozen=True)
class Chance:
    """A p-value."""

    p: float


@dataclass(frozen=True)
class Amount:
    """A count that is written with an SI prefix, such as parameters."""

    count: int


@dataclass(frozen=True)
class Absent:
    """No number, and why; `applies` is false where there cannot be one."""

    why: str
    applies: bool = True


@dataclass(frozen=True)
class Label:
    """A name from outside, with the signs of the notes that it carries ("dagger", "ddagger")."""

    text: str
    signs: tuple[str, ...] = ()


Cell = Label | Share | Portion | Span | Points | Chance | Amount | Absent | int | str


@dataclass(frozen=True)
class Column:
    """One column: `key` names it in options and files, `label` heads it, columns of one `group` stand together.

    `best` says which end of its shares is set in bold. A column that is not `shown` has to be asked for.
    """

    key: str
    label: str
    group: str = ""
    best: Literal["high", "low"] | None = None
    shown: bool = True
    left: bool = False


@dataclass(frozen=True)
class Line:
    """One row, of one `model`; only rows that are `ranked` compete for bold. `papers` are what it comes from."""

    model: str
    cells: tuple[Cell, ...]
    ranked: bool = True
    papers: tuple[PaperCard, ...] = ()


@dataclass(frozen=True)
class Grid:
    """A table: `kind` is what `--table` calls it, `stem` the name of its file, `facts` what holds for all its rows.

    `title` is one sentence for a caption, `notes` are the sentences that explain its columns and signs. A rule follows
    the first `rule` lines.
    """

    kind: str
    stem: str
    title: str
    notes: tuple[str, ...]
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    papers: tuple[PaperCard, ...] = ()
    rule: int = 0
    main: bool = True

    @property
    def cited(self) -> tuple[PaperCard, ...]:
        """The papers that the table rests on: those of its rows, and those of its attacks."""
        return tuple(dict.fromkeys([*(card for line in self.lines for card in line.papers), *self.papers]))

    @property
    def shares(self) -> bool:
        """Whether any cell has an interval."""
        return any(isinstance(cell, Share) for line in self.lines for cell in line.cells)

    @property
    def percentages(self) -> bool:
        """Whether any cell is in percent."""
        return any(isinstance(cell, Share | Portion | Span) for line in self.lines for cell in line.cells)


def narrowed(grid: Grid, keys: Sequence[str] | None) -> Grid:
    """The columns of these keys in their order; without keys those that are shown and have anything to show.

    Raises:
        UsageError: there is no such column; the nearest is offered.
    """
    known = [column.key for column in grid.columns]
    if keys is None:
        places = [at for at, column in enumerate(grid.columns) if column.shown and not _empty(grid, at)]
    else:
        places = [
            known.index(one_of("column", f"ra[{key}]" if f"ra[{key}]" in known else key, known))
            for key in dict.fromkeys(keys)
        ]
        if not places:
            raise UsageError(f"--columns names no column; this table has {', '.join(known)}")
    return replace(
        grid,
        columns=tuple(grid.columns[at] for at in places),
        lines=tuple(replace(line, cells=tuple(line.cells[at] for at in places)) for line in grid.lines),
    )


def _empty(grid: Grid, at: int) -> bool:
    return all(isinstance(line.cells[at], Absent) for line in grid.lines)


def winners(grid: Grid, at: int) -> tuple[frozenset[int], frozenset[int]]:
    """The rows with the best and with the second-best share of a column; equal shares win together, 0 % never."""
    best = grid.columns[at].best
    found: dict[int, Fraction] = {}
    for row, line in enumerate(grid.lines):
        cell = line.cells[at]
        if line.ranked and isinstance(cell, Share) and not cell.doubted and (best == "low" or cell.measure.k):
            found[row] = Fraction(cell.measure.k, cell.measure.n)
    if best is None or not found:
        return frozenset(), frozenset()
    values = sorted(set(found.values()), reverse=best == "high")
    first, second = values[0], values[1] if len(values) > 1 else None
    return (
        frozenset(row for row, value in found.items() if value == first),
        frozenset(row for row, value in found.items() if value == second),
    )
