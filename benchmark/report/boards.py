"""What a leaderboard carries beside its table: verdicts sample by sample, citations, and what numbers rest on."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moebench.report.claims import HEADLINE_ATTACKS, ClaimRange, ClaimRow
from moebench.report.evidence import protocol_facts
from moebench.report.exports import METRICS
from moebench.report.latex_text import escape, shorten
from moebench.report.tables import COMPONENTS, Board, Cell, Row
from moebench.schema import BoolArray, Json


@dataclass(frozen=True)
class BoardView:
    """A board with `data`, which its scripts read, and `bare`: the keys of columns that hold nothing in any row.

    `claims` has, row by row, the published numbers that the table shows, and the one of them that ours is held against.
    """

    board: Board
    data: Json
    bare: frozenset[str]
    claims: tuple[tuple[ClaimRange | None, ClaimRow | None], ...]


def view(board: Board) -> BoardView:
    """All that one board's part of the page shows."""
    return BoardView(board, _data(board), _bare(board), tuple(map(headline, board.rows)))


def headline(row: Row) -> tuple[ClaimRange | None, ClaimRow | None]:
    """The first published range that asks what was measured, with its widest gap; where none does, the first range."""
    for shown in row.claim_ranges:
        asked = [
            one
            for one in row.compared
            if (one.claim.dataset, HEADLINE_ATTACKS[one.claim.attack]) == (shown.dataset, shown.attack)
        ]
        if asked:
            return shown, min(asked, key=lambda one: one.difference or 0.0)
    return (row.claim_ranges[0] if row.claim_ranges else None), None


def packed(standing: BoolArray) -> str:
    """Verdicts as base64 of bits, first sample in the highest bit of the first byte."""
    return base64.b64encode(np.packbits(standing).tobytes()).decode("ascii")


def _data(board: Board) -> Json:
    """One entry per row in every list, in the order of the rows; texts that rows share are listed once."""
    rows = board.rows
    papers, cited = _shared(row.model.paper.bibtex if row.model.paper else None for row in rows)
    bases, based = _shared(_basis(cell) for row in rows for cell in (row.worst, row.ra))
    protocol = board.protocol
    return {
        "name": f"{protocol.dataset}, {protocol.threat}",
        "protocol": protocol_facts(protocol, board.suites),
        "keys": [row_key(row) for row in rows],
        "weights": [row.checkpoint.sha256 for row in rows],
        "latex": {
            str(number): written
            for number, row in enumerate(rows)
            if (written := escape(shorten(row.label))) != row.label
        },
        "standing": [packed(row.standing) for row in rows],
        "papers": papers,
        "paper": cited,
        "bases": bases,
        "basis": [based[at : at + 2] for at in range(0, len(based), 2)],
    }


def row_key(row: Row) -> str:
    """What names a row in a page's address: its model's page, and the weights where the board has several."""
    stem = row.page.removesuffix(".html")
    return stem if row.label == row.model.name else f"{stem}@{row.checkpoint.sha256[:8]}"


def _basis(cell: Cell) -> str | None:
    """What a number is made from, without the counts that differ from row to row."""
    return cell.why.partition(" stand after ")[2] or None


def _shared(texts: Iterable[str | None]) -> tuple[list[str], list[int | None]]:
    """The different texts in order of appearance, and for each text its place among them."""
    places: dict[str, int] = {}
    found = [None if text is None else places.setdefault(text, len(places)) for text in texts]
    return list(places), found


def _bare(board: Board) -> frozenset[str]:
    """Columns without a single number, which start hidden."""
    rows, bare = board.rows, set[str]()
    keys = METRICS[-len(COMPONENTS) :]
    for at, key in enumerate(keys):
        if all(row.components[at].measure is None for row in rows):
            bare.add(key)
    filled = {
        "claimed": any(row.claim_ranges for row in rows),
        "gap": any(row.compared for row in rows),
        "flags": any(row.marks for row in rows),
        "active_parameters": any(row.checkpoint.active_parameters is not None for row in rows),
        "flops": any(row.checkpoint.flops is not None for row in rows),
        "venue": any(row.model.paper for row in rows),
        "routing": any(row.model.routing for row in rows),
        "training": any(row.model.training for row in rows),
    }
    return frozenset(bare | {key for key, found in filled.items() if not found})
