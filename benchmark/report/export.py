"""What `moebench export` writes: from a choice of tables and a format to files."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Literal

from moebench.errors import UsageError
from moebench.report import flat, latex, markdown, tables
from moebench.report.bibliography import Bibliography, bibliography
from moebench.report.evidence import ReadableStore
from moebench.report.external import is_external
from moebench.report.grid import Grid
from moebench.report.grids import KINDS, grids
from moebench.report.model_info import model_info
from moebench.report.results_json import SCHEMA_FILE, results_json, schema_text
from moebench.report.suggest import one_of
from moebench.report.tables import Board, Report
from moebench.schema import ProtocolRecord, format_eps

Format = Literal["latex", "csv", "json", "markdown", "bibtex", "parquet", "model_info"]
FORMATS: tuple[Format, ...] = ("latex", "csv", "json", "markdown", "bibtex", "parquet", "model_info")
SUFFIXES = {"latex": "tex", "csv": "csv", "markdown": "md", "parquet": "parquet"}

TABLE_FORMATS = ("latex", "csv", "markdown", "parquet")
"""Formats that write tables; the others write the store, the papers, or one file per model."""


@dataclass(frozen=True)
class Choice:
    """What to export; an empty tuple or None means all there is.

    `together` says that several tables may be written, each in a file of its own.
    """

    format: Format
    kinds: tuple[str, ...] = ()
    dataset: str | None = None
    norm: str | None = None
    eps: float | None = None
    n: int | None = None
    models: tuple[str, ...] = ()
    style: latex.Style = latex.BARE
    cite: bool = False
    lab: str | None = None
    together: bool = False


@dataclass(frozen=True)
class Written:
    """Files by name, and notes for the user; a single text has the name under which it would be saved."""

    files: dict[str, bytes]
    notes: tuple[str, ...] = field(default=())


def export(store: ReadableStore, choice: Choice) -> Written:
    """Everything that was asked for, as files.

    Raises:
        UsageError: a name matches nothing, a format needs a package that is missing, or the choice is several tables
            where one is wanted.
    """
    if choice.format == "json":
        return _json(store, choice)
    report = _narrowed(tables.build(store), choice)
    if choice.format == "model_info":
        _model_names([row.model.name for board in report.boards for row in board.rows], choice.models)
        found = model_info([_rows(board, choice.models) for board in report.boards])
        if not found.files:
            why = f": {found.left_out[0]}" if found.left_out else ""
            raise UsageError(f"no model has been ranked here, so there is no model_info to write{why}")
        return Written(_encoded(found.files), tuple(f"left out {one}" for one in found.left_out))
    there = grids(store, report, choice.kinds or KINDS)
    _model_names(sorted({line.model for grid in there for line in grid.lines}), choice.models)
    shown = [one for grid in there if (one := _lines(grid, choice.models)).lines]
    books = bibliography(card for grid in shown for card in grid.cited)
    if choice.format == "bibtex":
        return Written({"moebench.bib": books.text.encode()})
    if not shown:
        raise UsageError(_nothing(choice))
    return _tables(shown, books, choice)


def _tables(shown: Sequence[Grid], books: Bibliography, choice: Choice) -> Written:
    columns = choice.style.columns
    if choice.format in ("csv", "parquet"):
        kinds = dict.fromkeys(grid.kind for grid in shown)
        made = {kind: flat.chosen(flat.flat([g for g in shown if g.kind == kind]), columns) for kind in kinds}
        suffix = SUFFIXES[choice.format]
        written = {kind: flat.csv_text(one).encode() if suffix == "csv" else parquet(one) for kind, one in made.items()}
        return Written({f"{kind}.{suffix}": content for kind, content in written.items()})
    if not choice.together:
        shown = [_single(shown)]
    if choice.format == "latex":
        style = replace(choice.style, keys=books.keys if choice.cite else {})
        made_tex = latex.files(shown, books, style)
        if style.label is not None and len(made_tex) > 1:
            raise UsageError(f"--label is for one table, and {len(made_tex)} match; choose one with --table")
        return Written(_encoded(made_tex))
    texts = {name.removesuffix(".tex") + ".md": grid for name, grid in zip(latex.files(shown), shown, strict=True)}
    return Written(_encoded({name: markdown.table(grid, columns) for name, grid in texts.items()}))


def parquet(table: flat.Flat) -> bytes:
    """A table as a Parquet file.

    Raises:
        UsageError: pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise UsageError("parquet needs pyarrow, which is not installed; pip install 'moebench[parquet]'")
    buffer = io.BytesIO()
    flat.frame(table).to_parquet(buffer, engine="pyarrow", index=False)
    return buffer.getvalue()


def _single(shown: Sequence[Grid]) -> Grid:
    """The only table; of several radii of one data set the leading one.

    Raises:
        UsageError: there are several.
    """
    main = [grid for grid in shown if grid.main] or list(shown)
    if len(main) > 1:
        titles = "; ".join(grid.title.rstrip(".") for grid in main[:4])
        more = f"; and {len(main) - 4} more" if len(main) > 4 else ""
        raise UsageError(
            f"{len(main)} tables match: {titles}{more}; choose with --table, --dataset, --norm, --eps or --n, or give "
            "a folder with --out DIR/"
        )
    return main[0]


def _json(store: ReadableStore, choice: Choice) -> Written:
    everything = [one for one in store.results(newest_only=True) if _wanted(one.protocol, choice)]
    _check_filters([one.protocol for one in store.results(newest_only=True)], choice)
    names = _model_names(sorted({one.model.name for one in everything}), choice.models)
    chosen = [one for one in everything if not names or one.model.name in names]
    foreign = sum(is_external(one) for one in chosen)
    if len(chosen) == foreign:
        raise UsageError(_nothing(choice) + (f" ({foreign} imported results are not passed on)" if foreign else ""))
    notes = (f"{foreign} imported results are left out: their own lab has to vouch for them",) if foreign else ()
    files = {"results.json": results_json(store, chosen, choice.lab)}
    if choice.together:
        files[SCHEMA_FILE] = schema_text()
    return Written(_encoded(files), notes)


def _narrowed(report: Report, choice: Choice) -> Report:
    """The boards, claims and models that the filters leave."""
    _check_filters([board.protocol for board in report.boards], choice, [claim.dataset for claim in report.claims])
    boards = tuple(board for board in report.boards if _wanted(board.protocol, choice))
    claims = report.claims
    if choice.dataset is not None:
        wanted = choice.dataset.casefold()
        claims = tuple(claim for claim in claims if claim.dataset.casefold() == wanted)
    return replace(report, boards=boards, claims=claims)


def _check_filters(protocols: Iterable[ProtocolRecord], choice: Choice, more: Sequence[str] = ()) -> None:
    """Refuses filters that nothing in the store can match, naming what there is."""
    known = list(protocols)
    if choice.dataset is not None:
        one_of("data set", choice.dataset, [*(one.dataset for one in known), *more])
    norms = {one.threat.norm for one in known}
    if choice.norm is not None and choice.norm not in norms:
        raise UsageError(f"nothing was measured under {choice.norm}; there is {', '.join(sorted(norms)) or 'nothing'}")
    radii = {one.threat.eps for one in known}
    if choice.eps is not None and not any(_close(choice.eps, one) for one in radii):
        there = ", ".join(map(format_eps, sorted(radii))) or "nothing"
        raise UsageError(f"nothing was measured at eps {format_eps(choice.eps)}; there is {there}")
    counts = {one.n for one in known}
    if choice.n is not None and choice.n not in counts:
        there = ", ".join(map(str, sorted(counts))) or "nothing"
        raise UsageError(f"nothing was measured on {choice.n} samples; there is {there}")


def _wanted(protocol: ProtocolRecord, choice: Choice) -> bool:
    return (
        (choice.dataset is None or protocol.dataset.casefold() == choice.dataset.casefold())
        and choice.norm in (None, protocol.threat.norm)
        and (choice.eps is None or _close(choice.eps, protocol.threat.eps))
        and choice.n in (None, protocol.n)
    )


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-9


def _model_names(known: Iterable[str], wanted: Sequence[str]) -> set[str]:
    known = list(known)
    return {one_of("model", name, known) for name in wanted}


def _rows(board: Board, models: Sequence[str]) -> Board:
    """A board with the rows of some models; ranks stay those among all."""
    if not models:
        return board
    wanted = {name.casefold() for name in models}
    keep = [
        tuple(row for row in rows if row.model.name.casefold() in wanted) for rows in (board.ranked, board.unranked)
    ]
    return replace(board, ranked=keep[0], unranked=keep[1])


def _lines(grid: Grid, models: Sequence[str]) -> Grid:
    """A table with the rows of some models: their name is in the first label, with the weights behind it if need be."""
    if not models:
        return grid
    wanted = {name.casefold() for name in models}
    keep = [line for line in grid.lines if line.model.casefold() in wanted]
    return replace(grid, lines=tuple(keep), rule=sum(line in keep for line in grid.lines[: grid.rule]))


def _nothing(choice: Choice) -> str:
    what = f"no {' or '.join(choice.kinds)} table" if choice.kinds else "nothing"
    filters = (choice.dataset, choice.norm, choice.eps, choice.n, *choice.models)
    return f"the store has {what} to export" + (" for these filters" if any(filters) else "") + (
        "; `moebench transfer` measures what a transfer matrix shows" if choice.kinds == ("transfer",) else ""
    )  # fmt: skip


def _encoded(files: dict[str, str]) -> dict[str, bytes]:
    return {name: text.encode("utf-8", "backslashreplace") for name, text in files.items()}
