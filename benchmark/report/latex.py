r"""LaTeX tables: booktabs, escaped, ready for input into one- and two-column documents.

A table tries \small, \footnotesize and \scriptsize in this order and takes the first that fits the line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from moebench.metrics import Measure
from moebench.report.bibliography import Bibliography
from moebench.report.grid import (
    Absent,
    Amount,
    Cell,
    Chance,
    Grid,
    Label,
    Line,
    Points,
    Portion,
    Share,
    Span,
    narrowed,
    winners,
)
from moebench.report.latex_text import escape, shorten
from moebench.report.text import digest, p_value, percent, quantity
from moebench.schema import PaperCard

Interval = Literal["pm", "ends", "none"]

INTERVALS: Mapping[Interval, str] = {
    "pm": r"$\pm$ reaches to the farther end of the 95\,\% Wilson interval.",
    "ends": r"Sub- and superscripts reach to the ends of the 95\,\% Wilson interval.",
    "none": "",
}
"""How an interval is written, and what the caption says of it.

The Wilson interval is not centred: half its width would promise less than the interval holds near 0 and 100 %.
"""


@dataclass(frozen=True)
class Style:
    """How tables are written.

    Without `caption`, `label` and `wide` a file is the bare tabular, to be input inside a float of the author's; with
    any of them it is a whole `table`, over both columns of the page (`table*`) if `wide`. `keys` are what papers are
    cited by, empty for no citations.
    """

    columns: Sequence[str] | None = None
    wide: bool = False
    caption: str | None = None
    label: str | None = None
    interval: Interval = "pm"
    keys: Mapping[PaperCard, str] = field(default_factory=dict)

    @property
    def floats(self) -> bool:
        """Whether the file is a float and not a bare tabular."""
        return self.wide or self.caption is not None or self.label is not None


BARE = Style()


def files(grids: Iterable[Grid], books: Bibliography | None = None, style: Style = BARE) -> dict[str, str]:
    """The LaTeX files of some tables by name; tables that would share one get the start of a hash of their facts."""
    made: dict[str, str] = {}
    for grid in grids:
        name = f"{grid.stem}.tex"
        if name in made:
            name = f"{grid.stem}-{digest(repr((grid.title, *grid.facts.items())))}.tex"
        made[name] = table(grid, books, style)
    return made


def table(grid: Grid, books: Bibliography | None = None, style: Style = BARE) -> str:
    """One table as a complete file: comments, then a tabular or a float.

    Raises:
        UsageError: a column is asked for that the table does not have.
    """
    shown = narrowed(grid, style.columns)
    columns = [_column(shown, place, style) for place in range(len(shown.columns))]
    rows = [" & ".join(texts) + r" \\" for texts in zip(*columns, strict=True)]
    if 0 < shown.rule < len(rows):
        rows.insert(shown.rule, r"\midrule")
    form = "@{}" + "".join("l" if column.left else "r" for column in shown.columns) + "@{}"
    body = "\n".join([rf"\begin{{tabular}}{{{form}}}", r"\toprule", *_head(shown), r"\midrule", *rows])
    tabular = FITTING % f"{body}\n\\bottomrule\n\\end{{tabular}}"
    comments = [
        f"{grid.title} {INTERVALS[style.interval] if shown.shares else ''}",
        *grid.notes,
        *_sources(grid, books),
    ]
    if style.floats:
        tabular = _float(shown, tabular, style)
    about = "\n".join(f"% {line}" for line in map(_comment, comments) if line)
    return f"% moebench: \\usepackage{{booktabs}}\n{HINT}\n{about}\n{tabular}"


HINT = r"""% What is wider than the line gets smaller type, then shrinks where graphicx is loaded; in a two-column page
% moebench export --columns (fewer columns) or --wide (a table*) keeps it legible."""

FITTING = r"""\begingroup\renewcommand{\arraystretch}{1.1}\setlength{\abovetopsep}{4pt}%%
\def\moebenchtable{%%
%s}%%
\small\setlength{\tabcolsep}{5pt}\sbox0{\moebenchtable}%%
\ifdim\wd0>\linewidth \footnotesize\setlength{\tabcolsep}{4pt}\sbox0{\moebenchtable}\fi
\ifdim\wd0>\linewidth \scriptsize\setlength{\tabcolsep}{3pt}\sbox0{\moebenchtable}\fi
\leavevmode
\ifdim\wd0>\linewidth \ifdefined\resizebox \resizebox{\linewidth}{!}{\box0}\else \box0 \fi\else \box0 \fi
\endgroup
"""


def _comment(line: str) -> str:
    plain = " ".join(line.split()).encode("ascii", "backslashreplace").decode()
    return plain.replace(r"$\pm$", "+-").replace(r"\,\%", " %")


def _sources(grid: Grid, books: Bibliography | None) -> list[str]:
    facts = [f"{key} {value}" for key, value in grid.facts.items() if key in ("data_sha256", "protocol", "suites")]
    keys = sorted({books.keys[card] for card in grid.cited if card in books.keys}) if books else []
    cited = [f"Rests on: {', '.join(keys)} (moebench export --format bibtex)."] if keys else []
    return [f"Measured by moebench: {', '.join(facts)}."] * bool(facts) + cited


def _float(grid: Grid, tabular: str, style: Style) -> str:
    where = "table*" if style.wide else "table"
    caption = escape(style.caption) if style.caption is not None else _caption(grid, style)
    label = rf"\label{{{style.label}}}" if style.label else ""
    return rf"""\begin{{{where}}}[t]
\centering
\caption{{{caption}}}{label}
{tabular}\end{{{where}}}
"""


MAX_WORD = 32
THREAT = re.compile(r"(Linf|L2) ([0-9./e-]+)(?=\))")
BALL = {"Linf": r"\infty", "L2": "2"}


def _caption(grid: Grid, style: Style) -> str:
    """Title, unit, what bold and the interval mean, and the notes."""
    told = ["In percent."] if grid.percentages else []
    if any(column.best for column in grid.columns):
        told.append(r"Best in bold, second underlined.")
    interval = [INTERVALS[style.interval]] if grid.shares else []
    title = THREAT.sub(lambda found: rf"$\ell_{BALL[found[1]]} \leq {found[2]}$", _text(grid.title))
    return " ".join([title, *told, *filter(None, interval), *map(_text, grid.notes)])


def _text(words: str) -> str:
    """Words of a caption, each short enough that lines can be broken."""
    return escape(" ".join(shorten(word, MAX_WORD) for word in words.split()))


def _head(grid: Grid) -> list[str]:
    """The headings; a group of columns has its name above a rule of its own."""
    labels = " & ".join(_heading(column.label) for column in grid.columns) + r" \\"
    if not any(column.group for column in grid.columns):
        return [labels]
    over, rules, at = [], [], 1
    for group, columns in groupby(grid.columns, key=lambda column: column.group):
        width = len(list(columns))
        if group:
            over.append(rf"\multicolumn{{{width}}}{{c}}{{{escape(shorten(group))}}}")
            rules.append(rf"\cmidrule(lr){{{at}-{at + width - 1}}}")
        else:
            over += [""] * width
        at += width
    return [" & ".join(over) + r" \\", "".join(rules), labels]


def _heading(label: str) -> str:
    return "$p$" if label == "p" else escape(shorten(label))


def _column(grid: Grid, place: int, style: Style) -> list[str]:
    """The cells of one column as text."""
    best, second = winners(grid, place)
    cells = [line.cells[place] for line in grid.lines]
    texts = [_cell(cell, at in best, at in second, style) for at, cell in enumerate(cells)]
    if any(map(_flagged, cells)):
        # The asterisk of one claim moves its whole column, so that numbers stay aligned and inside the rule.
        texts = [text if _flagged(cell) else rf"{text}\phantom{{*}}" for cell, text in zip(cells, texts, strict=True)]
    if isinstance(cells[0], Label):
        texts = [text + _cited(line, style) for line, text in zip(grid.lines, texts, strict=True)]
    return texts


def _cited(line: Line, style: Style) -> str:
    keys = sorted({style.keys[card] for card in line.papers if card in style.keys})
    return rf"~\cite{{{','.join(keys)}}}" if keys else ""


def _flagged(cell: Cell) -> bool:
    return isinstance(cell, Span) and cell.flagged


def _cell(cell: Cell, best: bool, second: bool, style: Style) -> str:
    match cell:
        case Share(measure, _, sign):
            return _share(measure, best, second, style.interval, sign)
        case Label(text, signs):
            return escape(shorten(text)) + "".join(rf"\,\ensuremath{{^{{\{sign}}}}}" for sign in signs)
        case Absent(_, applies):
            return "---" if applies else "n/a"
        case Portion(k, n):
            return percent(k / n, n) if n else "---"
        case Span(low, high, flagged):
            ends = f"{low:.2f}" if low == high else f"{low:.2f}--{high:.2f}"
            return f"{ends}*" if flagged else ends
        case Points(value):
            return f"${value:+.1f}$"
        case Chance(p):
            return escape(p_value(p))
        case Amount(count):
            return escape(quantity(count)).replace(" ", r"\,")
    return escape(shorten(str(cell)))


def _share(found: Measure, best: bool, second: bool, interval: Interval, sign: str = "") -> str:
    """A share in percent: the number in bold or underlined, its interval small behind it."""
    number = percent(found.value, found.n)
    number = rf"\mathbf{{{number}}}" if best else rf"\underline{{{number}}}" if second else number
    number += rf"^{{\{sign}}}" if sign else ""
    down, up = (percent(arm, found.n) for arm in (found.value - found.low, found.high - found.value))
    if interval == "none":
        return f"${number}$"
    if interval == "ends":
        return rf"${{{number}}}_{{-{down}}}^{{+{up}}}$"
    arm = percent(max(found.value - found.low, found.high - found.value), found.n)
    return rf"${number}{{\scriptstyle\,\pm\,{arm}}}$"
