"""The leaderboards as one JSON file that a later report can be compared with, verdicts per sample included.

A file from outside is read with suspicion: every field is checked, and what does not fit is one line for the user.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moebench import __version__
from moebench.errors import UsageError
from moebench.metrics import Measure, worst_case
from moebench.report.evidence import Evidence, ReadableStore, eligible, group_key, is_whole, result_key
from moebench.report.overlap import Unit, unit_key, unit_label
from moebench.report.tables import Board, Row
from moebench.report.transfers import right_clean
from moebench.schema import BoolArray, is_protocol

FORMAT = "moebench snapshot"
VERSION = 1
PLACE = Path("data") / "snapshot.json"
"""Where a report keeps its own."""

MOST_BYTES = 500_000_000
"""Largest file that is read: 500 models on 100,000 samples take about a tenth of it."""

T = TypeVar("T")


@dataclass(frozen=True)
class SnapRow:
    """One checkpoint: its numbers, why to doubt them, and per sample (in order) whether it stands and is right clean.

    `standing` and `right` are None where the numbers were not counted sample by sample.
    """

    model: str
    family: str
    weights: str
    rank: int | None
    worst: Measure | None
    sa: Measure | None
    flags: tuple[str, ...]
    attacks: tuple[str, ...]
    standing: BoolArray | None
    right: BoolArray | None


@dataclass(frozen=True)
class SnapBoard:
    """One leaderboard: its protocol in the fields that decide what may be compared, and its rows."""

    dataset: str
    split: str
    norm: str
    eps: float
    lower: float
    upper: float
    n: int
    version: str
    data_sha256: str
    suites: tuple[str, ...]
    rows: tuple[SnapRow, ...]

    @property
    def question(self) -> tuple[Any, ...]:
        """What is asked, whatever the samples and the version of the rules."""
        return self.dataset, self.split, self.norm, self.eps, self.lower, self.upper

    @property
    def samples(self) -> tuple[Any, ...]:
        """Which samples were attacked."""
        return self.data_sha256, self.n


@dataclass(frozen=True)
class Snapshot:
    """The leaderboards of one report; `made_by` is the version of moebench."""

    boards: tuple[SnapBoard, ...]
    made_by: str = __version__


def take(store: ReadableStore, boards: Sequence[Board]) -> Snapshot:
    """The snapshot of a report's leaderboards."""
    cells: dict[tuple[Any, ...], list[Evidence]] = {}
    for one in sorted(store.results(newest_only=True), key=result_key):
        if is_whole(one.model) and eligible(one) and not is_protocol(one.cell.attack):
            where = (group_key(one.protocol), one.model.name, one.checkpoint.sha256)
            cells.setdefault(where, []).append(Evidence(one, store.outcomes(one.result_id)))
    return Snapshot(tuple(_board(board, cells) for board in boards))


def _board(board: Board, cells: dict[tuple[Any, ...], list[Evidence]]) -> SnapBoard:
    protocol, threat = board.protocol, board.protocol.threat
    key = group_key(protocol)
    rows = tuple(_row(row, cells.get((key, row.model.name, row.checkpoint.sha256), [])) for row in board.rows)
    return SnapBoard(
        *(protocol.dataset, protocol.split, threat.norm, threat.eps, threat.lower, threat.upper, protocol.n),
        *(protocol.version, protocol.data_sha256, board.suites, rows),
    )


def _row(row: Row, cells: Sequence[Evidence]) -> SnapRow:
    left = worst_case([one.outcomes for one in cells]) if cells else None
    right = right_clean(cells[-1].outcomes) if cells else None
    units: set[Unit] = {(one.attack, one.view) for one in cells}
    return SnapRow(
        model=row.model.name,
        family=row.model.family,
        weights=row.checkpoint.sha256,
        rank=row.rank,
        worst=row.worst.measure,
        sa=row.sa.measure,
        flags=tuple(sorted({mark.code for mark in row.marks})),
        attacks=tuple(unit_label(unit) for unit in sorted(units, key=unit_key)),
        standing=_if_it_counts(left, row.worst.measure),
        right=_if_it_counts(right, row.sa.measure),
    )


def _if_it_counts(hits: BoolArray | None, found: Measure | None) -> BoolArray | None:
    """Verdicts, if they are those behind a number."""
    if hits is None or found is None or (int(np.count_nonzero(hits)), hits.size) != (found.k, found.n):
        return None
    return hits


def dump(snapshot: Snapshot) -> str:
    """The snapshot as JSON; the same leaderboards give the same bytes."""
    record = {
        "format": FORMAT,
        "version": VERSION,
        "moebench": snapshot.made_by,
        "boards": [
            {
                **{key: getattr(board, key) for key in ("dataset", "split", "norm", "eps", "lower", "upper", "n")},
                "protocol": board.version,
                "data_sha256": board.data_sha256,
                "suites": list(board.suites),
                "rows": [_plain(row) for row in board.rows],
            }
            for board in snapshot.boards
        ],
    }
    return json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def _plain(row: SnapRow) -> dict[str, Any]:
    return {
        "model": row.model,
        "family": row.family,
        "weights": row.weights,
        "rank": row.rank,
        "ra_worst": _counts(row.worst),
        "sa": _counts(row.sa),
        "flags": list(row.flags),
        "attacks": list(row.attacks),
        "standing": _packed(row.standing),
        "right": _packed(row.right),
    }


def _counts(found: Measure | None) -> dict[str, int] | None:
    return None if found is None else {"k": found.k, "n": found.n}


def _packed(hits: BoolArray | None) -> str | None:
    """Booleans as bits, most significant first, in base64."""
    return None if hits is None else base64.b64encode(np.packbits(hits).tobytes()).decode("ascii")


def read(path: Path) -> Snapshot:
    """The snapshot of a file, or of a folder that holds a report.

    Raises:
        UsageError: there is none, or it is not what a report writes.
    """
    file = path / PLACE if path.is_dir() else path
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UsageError(f"{str(file)!r} is larger than any snapshot; --since takes a report's {PLACE}")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot read the snapshot {str(file)!r}: {error.strerror or error}; --since takes an earlier report's "
            f"folder or its {PLACE.as_posix()}"
        ) from None
    except UnicodeDecodeError:
        raise UsageError(_not_one(file, "it is no text")) from None
    try:
        return parse(text)
    except _Unfit as error:
        raise UsageError(_not_one(file, str(error))) from None


def _not_one(file: Path, why: str) -> str:
    return f"{str(file)!r} is no snapshot of a report: {why}; --since takes an earlier report's {PLACE.as_posix()}"


class _Unfit(Exception):
    """A file is not what it should be; the message says where, on one line."""


def parse(text: str) -> Snapshot:
    """A snapshot from its JSON.

    Raises:
        _Unfit: it is not what `dump` writes.
    """
    try:
        record = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _Unfit("it is no JSON") from error
    top = _Fields(record, "it")
    if top.take("format", str) != FORMAT:
        raise _Unfit(f"its format is {top.take('format', str)[:40]!r}, expected {FORMAT!r}")
    version = top.take("version", int)
    if version != VERSION:
        raise _Unfit(f"it has version {version}, and this moebench reads version {VERSION}")
    boards = top.each("boards", _parse_board)
    return Snapshot(boards, top.take("moebench", str))


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


class _Fields:
    """The fields of a JSON object, taken one by one with their types."""

    def __init__(self, record: Any, where: str) -> None:
        if not isinstance(record, dict):
            raise _Unfit(f"{where} is no object")
        self.record, self.where = record, where

    def take(self, key: str, kind: type[T]) -> T:
        """A field of a type; whole numbers pass for floats, booleans for nothing else."""
        if key not in self.record:
            raise _Unfit(f"{self.where} has no {key!r}")
        value = self.record[key]
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise _Unfit(f"{self.where}: {key!r} must be of type {kind.__name__}, got {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise _Unfit(f"{self.where}: {key!r} must be finite")
        return value

    def maybe(self, key: str, kind: type[T]) -> T | None:
        """The same, or None."""
        return None if self.record.get(key, 0) is None else self.take(key, kind)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        values = self.take(key, list)
        if not all(isinstance(value, str) for value in values):
            raise _Unfit(f"{self.where}: {key!r} must be a list of texts")
        return tuple(values)

    def each(self, key: str, make: Callable[[_Fields], T]) -> tuple[T, ...]:
        """A list of objects."""
        at = f"{key}[%d]" if self.where == "it" else f"{self.where}.{key}[%d]"
        return tuple(make(_Fields(one, at % number)) for number, one in enumerate(self.take(key, list)))

    def within(self, key: str, low: int, high: int) -> int:
        """A whole number in a range."""
        value = self.take(key, int)
        if not low <= value <= high:
            raise _Unfit(f"{self.where}: {key!r} must be from {low} to {high}, got {str(value)[:20]}")
        return value


def _parse_board(fields: _Fields) -> SnapBoard:
    n = fields.within("n", 0, 10**9)

    def row(one: _Fields) -> SnapRow:
        return _parse_row(one, n)

    return SnapBoard(
        dataset=fields.take("dataset", str),
        split=fields.take("split", str),
        norm=fields.take("norm", str),
        eps=fields.take("eps", float),
        lower=fields.take("lower", float),
        upper=fields.take("upper", float),
        n=n,
        version=fields.take("protocol", str),
        data_sha256=fields.take("data_sha256", str),
        suites=fields.texts("suites"),
        rows=fields.each("rows", row),
    )


def _parse_row(fields: _Fields, n: int) -> SnapRow:
    worst, sa = _parse_counts(fields, "ra_worst"), _parse_counts(fields, "sa")
    return SnapRow(
        model=fields.take("model", str),
        family=fields.take("family", str),
        weights=fields.take("weights", str),
        rank=None if fields.maybe("rank", int) is None else fields.within("rank", 1, 10**9),
        worst=worst,
        sa=sa,
        flags=fields.texts("flags"),
        attacks=fields.texts("attacks"),
        standing=_parse_bits(fields, "standing", n, worst),
        right=_parse_bits(fields, "right", n, sa),
    )


def _parse_counts(fields: _Fields, key: str) -> Measure | None:
    if fields.maybe(key, dict) is None:
        return None
    counts = _Fields(fields.take(key, dict), f"{fields.where}.{key}")
    n = counts.within("n", 1, 10**9)
    return Measure(counts.within("k", 0, n), n)


def _parse_bits(fields: _Fields, key: str, n: int, found: Measure | None) -> BoolArray | None:
    text = fields.maybe(key, str)
    if text is None:
        return None
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _Unfit(f"{fields.where}: {key!r} is no base64") from None
    if len(raw) != (n + 7) // 8:
        raise _Unfit(f"{fields.where}: {key!r} must hold {n} bits, got {8 * len(raw)}")
    hits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), count=n).astype(bool)
    if _if_it_counts(hits, found) is None:
        raise _Unfit(f"{fields.where}: {key!r} does not add up to the number beside it")
    return hits
