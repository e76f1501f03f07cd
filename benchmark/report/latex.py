"""LaTeX tables: booktabs, escaped, ready for input into one- and two-column documents."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moebench.metrics import Measure
from moebench.report.claims import claim_range, same_name
from moebench.report.missed import Missed
from moebench.report.tables import COMPONENTS, RANKING_ATTACK, Board, Cell, Report, Row
from moebench.report.text import digest, fold, p_value, percent
from moebench.schema import Claim

MAX_NAME = 48

CLAIM_COLUMNS = {
    ("SA", "none"): "SA",
    ("RA", "PGD"): "RA (PGD)",
    ("RA", "AutoAttack (as named by paper)"): "RA (AA)",
    ("RA-E", "PGD"): "RA-E (PGD)",
    ("RA-R", "PGD"): "RA-R (PGD)",
}
"""Which published numbers a claims table shows, by metric and attack, and under what heading."""

SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\ensuremath{<}",
    ">": r"\ensuremath{>}",
    "|": r"\ensuremath{|}",
    '"': r"\char34{}",
    "'": r"{'}",
    "`": r"\char96{}",
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "\N{EN DASH}": r"\textendash{}",
    "—": r"\textemdash{}",
    "\N{LEFT SINGLE QUOTATION MARK}": r"\textquoteleft{}",
    "\N{RIGHT SINGLE QUOTATION MARK}": r"\textquoteright{}",
    "“": r"\textquotedblleft{}",
    "”": r"\textquotedblright{}",
    "…": r"\ldots{}",
    "·": r"\ensuremath{\cdot}",
    "\N{MULTIPLICATION SIGN}": r"\ensuremath{\times}",
    "±": r"\ensuremath{\pm}",
    "≤": r"\ensuremath{\leq}",
    "≥": r"\ensuremath{\geq}",
    "→": r"\ensuremath{\rightarrow}",
    "∞": r"\ensuremath{\infty}",
    "ß": r"\ss{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "œ": r"\oe{}",
    "Œ": r"\OE{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
}
GREEK = {
    "SMALL": "ALPHA BETA GAMMA DELTA EPSILON ZETA ETA THETA IOTA KAPPA LAMDA MU NU XI PI RHO SIGMA TAU UPSILON PHI CHI "
    "PSI OMEGA",
    "CAPITAL": "GAMMA DELTA THETA LAMDA XI PI SIGMA UPSILON PHI PSI OMEGA",
}
"""The Greek letters that LaTeX has a command for, by their Unicode names."""

ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0327": "c",
}


def escape(text: str) -> str:
    """Any text as LaTeX in plain ASCII, so that it compiles under every engine and font encoding.

    Accented Latin and Greek letters are kept; a character that no standard font has is written as its code point.
    """
    return re.sub("-(?=-)", "-{}", "".join(map(_character, unicodedata.normalize("NFC", text))))


def _character(char: str) -> str:
    if char in SPECIAL:
        return SPECIAL[char]
    greek = re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", unicodedata.name(char, ""))
    if greek and greek[2] in GREEK[greek[1]].split():
        name = greek[2].lower().replace("lamda", "lambda")
        return rf"\ensuremath{{\{name if greek[1] == 'SMALL' else name.capitalize()}}}"
    if char.isascii() and char.isprintable():
        return char
    if char.isspace():
        return " "
    parts = unicodedata.normalize("NFD", char)
    if len(parts) == 2 and parts[1] in ACCENTS and parts[0].isascii() and parts[0].isalpha():
        return rf"\{ACCENTS[parts[1]]}{{{parts[0]}}}"
    return rf"\texttt{{U+{ord(char):04X}}}"


def shorten(text: str, limit: int = MAX_NAME) -> str:
    """A text of at most `limit` characters, its middle left out where it is longer."""
    half = (limit - 1) // 2
    return text if len(text) <= limit else f"{text[:half]}…{text[-half:]}"


def render(report: Report) -> dict[str, str]:
    """The LaTeX files of a report by name."""
    files: dict[str, str] = {}
    for board in sorted((board for board in report.boards if board.rows), key=_prominence):
        stem = f"leaderboard-{fold(board.protocol.dataset)}-{board.protocol.threat.norm}"
        files[_free(files, stem, board.anchor)] = leaderboard(board)
        if board.missed:
            stem = f"missed-{fold(board.protocol.dataset)}-{board.protocol.threat.norm}"
            files[_free(files, stem, board.anchor)] = missed(board)
    for dataset in sorted({claim.dataset for claim in report.claims if claim.registry_name}):
        about = [claim for claim in report.claims if claim.dataset == dataset and claim.registry_name]
        table = claims(dataset, about, report)
        if table is not None:
            files[_free(files, f"claims-{fold(dataset)}", dataset)] = table
    return files


def _free(files: dict[str, str], stem: str, origin: str) -> str:
    return f"{stem}.tex" if f"{stem}.tex" not in files else f"{stem}-{digest(origin)}.tex"


def _prominence(board: Board) -> tuple[bool, int, int, int, str]:
    """The leading board with most models keeps the plain file name; others of its data set and norm get a suffix."""
    return (not board.main, -len(board.ranked), -len(board.rows), -board.protocol.n, board.anchor)


def leaderboard(board: Board) -> str:
    """One leaderboard as a table with its intervals, the best number of each column in bold."""
    columns = [column for column in _columns(board) if any(cell.measure for cell in column.cells)]
    best = [_best(board, column) for column in columns]
    pairs = list(zip(columns, best, strict=True))
    lines = [
        " & ".join([_rank(row), _name(row), *(_number(column.cells[at], at in top) for column, top in pairs)])
        for at, row in enumerate(board.rows)
    ]
    head = " & ".join(["\\#", "Model", *(escape(column.label) for column in columns)])
    return _file(_about(board), "rl" + "r" * len(columns), head, _with_rule(lines, len(board.ranked)))


class Column(NamedTuple):
    """One column of a leaderboard; `undercut` says that an over-stated RA would stand in it."""

    label: str
    cells: list[Cell]
    undercut: bool = False


def _columns(board: Board) -> list[Column]:
    columns = [
        Column("RA-worst", [row.worst for row in board.rows]),
        Column("SA", [row.sa for row in board.rows]),
        Column("RA", [row.ra for row in board.rows], undercut=True),
    ]
    if RANKING_ATTACK in board.attacks and len(board.attacks) > 1:
        place = board.attacks.index(RANKING_ATTACK)
        columns.append(Column("RA (AA)", [row.attacks[place] for row in board.rows], undercut=True))
    columns += [Column(label, [row.components[at] for row in board.rows]) for at, (label, _) in enumerate(COMPONENTS)]
    return columns


def _best(board: Board, column: Column) -> set[int]:
    """The rows with the highest number among ranked ones; an over-stated RA is never the best."""
    shown = {
        at: cell.measure.k
        for at, (row, cell) in enumerate(zip(board.ranked, column.cells, strict=False))
        if cell.measure and not (column.undercut and row.overstated)
    }
    return {at for at, k in shown.items() if k == max(shown.values())}


def _about(board: Board) -> list[str]:
    protocol = board.protocol
    marked = ", ".join(row.label for row in board.rows if row.overstated)
    lines = [
        f"Leaderboard: {protocol.dataset}, {protocol.split}, n = {protocol.n}, {protocol.threat}, "
        f"protocol {protocol.version}, suite {', '.join(board.suites)}; data sha256 {protocol.data_sha256}.",
        "Accuracies in percent; sub- and superscript reach to the ends of the 95 % Wilson interval.",
        "RA-worst: no recorded attack on any view breaks the sample. RA: no recorded attack on the whole model does.",
        "n/a: the model has no such part. A dash: not measured, or (rank) not comparable without autoattack.",
    ]
    if marked:
        lines.append(f"The dagger marks an over-stated RA, undercut by an attack on a part of the model: {marked}.")
    return lines


def _rank(row: Row) -> str:
    return "---" if row.rank is None else str(row.rank)


def _name(row: Row) -> str:
    return escape(shorten(row.label)) + (r"\,\ensuremath{^{\dagger}}" if row.overstated else "")


def _number(cell: Cell, best: bool) -> str:
    if cell.measure is None:
        return "n/a" if cell.state == "n/a" else "---"
    text = _interval(cell.measure)
    return rf"{{\boldmath{text}}}" if best else text


def _interval(found: Measure) -> str:
    down, up = found.value - found.low, found.high - found.value
    return rf"${percent(found.value, found.n)}_{{-{percent(down, found.n)}}}^{{+{percent(up, found.n)}}}$"


def missed(board: Board) -> str:
    """RA under AutoAttack and under moe-adaptive on the same samples, one row per MoE."""
    protocol = board.protocol
    about = [
        f"What AutoAttack misses: {protocol.dataset}, {protocol.split}, n = {protocol.n}, {protocol.threat}, "
        f"protocol {protocol.version}; data sha256 {protocol.data_sha256}.",
        "RA in percent with the 95 % Wilson interval; difference in points; missed: samples that only moe-adaptive "
        "breaks; only AA: samples that only AutoAttack breaks; p: exact McNemar test on these two counts.",
        *(f"A dash: {one.label}: {one.why}." for one in board.missed if one.paired is None),
    ]
    head = " & ".join(["Model", "RA (AA)", "RA (moe-adaptive)", "Difference", "Missed", "Only AA", "$p$"])
    return _file(about, "lrrrrrr", head, _with_rule([_missed(one) for one in board.missed], len(board.missed)))


def _missed(one: Missed) -> str:
    numbers = ["---" if found is None else _interval(found) for found in (one.standard, one.adaptive)]
    compared = ["---"] * 4
    if one.paired is not None and one.points is not None:
        p = escape(p_value(one.paired.p))
        compared = [f"${one.points:+.1f}$", str(one.paired.only_second), str(one.paired.only_first), p]
    return " & ".join([escape(shorten(one.label)), *numbers, *compared])


def claims(dataset: str, about: Sequence[Claim], report: Report) -> str | None:
    """What papers publish on one data set, one row per registry name, beside what moebench measured there.

    Returns: None where no published number is an accuracy of the kinds in the table.
    """
    shown = [claim for claim in about if (claim.metric, claim.attack) in CLAIM_COLUMNS]
    kinds = [kind for kind in CLAIM_COLUMNS if any((claim.metric, claim.attack) == kind for claim in shown)]
    if not shown:
        return None
    lines = []
    for model in sorted({claim.registry_name for claim in shown}):
        own = [claim for claim in shown if claim.registry_name == model]
        theirs = [[claim for claim in own if (claim.metric, claim.attack) == kind] for kind in kinds]
        ours = [_measured(model, metric, dataset, report) for metric in ("SA", "RA")]
        lines.append(" & ".join([escape(shorten(model)), *map(_claimed, theirs), *ours]))
    about_lines = [
        f"Claims: published accuracies on {dataset} in percent, as the papers state them; ranges span their variants.",
        "RA (PGD) and RA (AA): under the attacks that the papers call PGD and AutoAttack, at the papers' radii.",
        "moebench: under all recorded attacks on the whole model; a dash means not measured on this data set.",
    ]
    if any(claim.flag for claim in shown):
        about_lines.append("The asterisk marks claims that carry a flag; the model's HTML page says why.")
    last = 1 + len(kinds)
    top = rf" & \multicolumn{{{len(kinds)}}}{{c}}{{claimed}} & \multicolumn{{2}}{{c}}{{moebench}} \\" + "\n"
    top += rf"\cmidrule(lr){{2-{last}}}\cmidrule(l){{{last + 1}-{last + 2}}}" + "\n"
    head = " & ".join(["Model", *(CLAIM_COLUMNS[kind] for kind in kinds), "SA", "RA"])
    return _file(about_lines, "l" + "r" * (len(kinds) + 2), top + head, _with_rule(lines, len(lines)))


def _claimed(group: Sequence[Claim]) -> str:
    if not group:
        return "---"
    span = claim_range(group, "", same_dataset=True)
    low, high = f"{span.low:.2f}", f"{span.high:.2f}"
    return (low if low == high else f"{low}--{high}") + (r"\rlap{*}" if span.flagged else "")


def _measured(model: str, metric: str, dataset: str, report: Report) -> str:
    """Our number from the largest sample set of that data set, or a dash."""
    found = [
        cell.measure
        for board in report.boards
        if same_name(board.protocol.dataset, dataset)
        for row in board.rows
        if row.model.name == model and (cell := row.sa if metric == "SA" else row.ra).measure is not None
    ]
    best = max((one for one in found if one is not None), key=lambda one: one.n, default=None)
    return "---" if best is None else _interval(best)


def _with_rule(lines: Sequence[str], above: int) -> str:
    """Joins table lines, with a rule after the first `above` where some come after them."""
    rows = [f"{line} \\\\" for line in lines]
    if 0 < above < len(rows):
        rows.insert(above, r"\midrule")
    return "\n".join(rows)


def _file(about: Iterable[str], columns: str, head: str, body: str) -> str:
    """A complete file: comments, then a table that shrinks to the line width where graphicx is loaded."""
    plain = (line.encode("ascii", "backslashreplace").decode() for line in about)
    comments = "\n".join("% " + " ".join(line.split()) for line in plain)
    return rf"""% moebench: \usepackage{{booktabs}}
% With \usepackage{{graphicx}} a table that is too wide shrinks to the line; in two columns a table* keeps it legible.
{comments}
\begingroup\small\setlength{{\tabcolsep}}{{4pt}}\renewcommand{{\arraystretch}}{{1.15}}%
\sbox0{{\begin{{tabular}}{{@{{}}{columns}@{{}}}}
\toprule
{head} \\
\midrule
{body}
\bottomrule
\end{{tabular}}}}%
\leavevmode
\ifdim\wd0>\linewidth \ifdefined\resizebox \resizebox{{\linewidth}}{{!}}{{\box0}}\else \box0 \fi\else \box0 \fi
\endgroup
"""
