"""The report: leaderboards, model pages, LaTeX, CSV and JSON lines, rendered from the store alone.

The same store gives the same bytes: nothing here asks for the time, the machine or the order of rows.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from moebench.errors import UsageError
from moebench.report import curves, examples, exports, html, latex, pages, tables
from moebench.report.bibliography import bibliography
from moebench.report.cached import Cached
from moebench.report.evidence import ReadableStore
from moebench.report.grids import grids
from moebench.report.results_json import SCHEMA_FILE, schema_text
from moebench.report.snapshot import Snapshot

__all__ = ["ReadableStore", "render", "write_report"]

OURS = (
    ("models", "*.html", f'content="{html.GENERATOR}"'),
    (".", pages.CHANGES, f'content="{html.GENERATOR}"'),
    (f"models/{examples.FOLDER}", "*.png", examples.MARK),
    ("tables", "*.tex", "% moebench:"),
)
"""Folder, pattern and mark of the files that come and go with the rows of the store."""


def render(store: ReadableStore, since: Snapshot | None = None) -> dict[str, str | bytes]:
    """All files of the report by their path inside the output folder: text, or the bytes of pictures.

    Args:
        store: what to report.
        since: an earlier report's leaderboards, which add a page of changes.
    """
    store = Cached(store)
    report = tables.build(store)
    extras = pages.build(store, report, since)
    made = html.render(report, extras.pages) | dict(extras.data)
    shown = grids(store, report)
    books = bibliography(card for grid in shown for card in grid.cited)
    made |= {f"tables/{name}": content for name, content in latex.files(shown, books).items()}
    made["data/moebench.bib"] = books.text
    made[f"data/{SCHEMA_FILE}"] = schema_text()
    made["data/leaderboard.csv"] = exports.leaderboard_csv(report.boards)
    made["data/curves.csv"] = curves.curves_csv(store.results(newest_only=True))
    made["data/results.jsonl"] = exports.results_jsonl(store)
    return made


def write_report(store: ReadableStore, out: Path, since: Snapshot | None = None) -> list[Path]:
    """Writes the report into a folder; files of an earlier report that are no more go.

    Each file is replaced in one step, the first when all of them are on the disk: where that has no room for them, an
    earlier report stays as it was.

    Args:
        store: what to report.
        out: the folder.
        since: an earlier report's leaderboards, to say what changed. Read it before: `out` may be that report.

    Returns: the written files, sorted.

    Raises:
        UsageError: the folder cannot be made or written.
    """
    made = render(store, since)
    drafts: dict[Path, Path] = {}
    try:
        for name in sorted(made):
            _draft(out / name, made[name], drafts)
        for path, draft in drafts.items():
            os.replace(draft, path)
        _remove_stale(out, set(made))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"cannot write the report to {str(out)!r}: {reason} ({error.filename or out}); "
            "give a folder that can be written with --out"
        ) from None
    finally:
        for draft in drafts.values():
            with suppress(OSError):
                draft.unlink(missing_ok=True)
    return [out / name for name in sorted(made)]


def _draft(path: Path, content: str | bytes, drafts: dict[Path, Path]) -> None:
    """Writes what is to replace a file beside it, and notes where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    draft = drafts[path] = path.with_name(f".{path.name}.draft")
    if isinstance(content, bytes):
        draft.write_bytes(content)
    else:
        draft.write_text(content, encoding="utf-8", errors="backslashreplace", newline="\n")


def _remove_stale(out: Path, made: set[str]) -> None:
    for folder, pattern, mark in OURS:
        for path in sorted((out / folder).glob(pattern)):
            if path.relative_to(out).as_posix() not in made and path.is_file() and mark in _opening(path):
                path.unlink()


def _opening(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(2000).decode("utf-8", "replace")
