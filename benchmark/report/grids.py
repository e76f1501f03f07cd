"""All tables that a store can fill."""

from __future__ import annotations

from collections.abc import Sequence

from moebench.report import grid_boards
from moebench.report.evidence import ReadableStore
from moebench.report.grid import Grid
from moebench.report.grid_claims import claim_grids
from moebench.report.grid_transfer import transfer_grids
from moebench.report.tables import Board, Report

KINDS = ("leaderboard", "claims", "transfer", "attacks", "missed")
"""The tables by name, in the order in which they are listed."""


def grids(store: ReadableStore, report: Report, kinds: Sequence[str] = KINDS) -> list[Grid]:
    """The tables of these kinds, the leading boards first; only those that have rows.

    Args:
        store: what the report was built from.
        report: its boards, models and claims.
        kinds: some of `KINDS`.
    """
    boards = sorted((board for board in report.boards if board.rows), key=_prominence)
    found: list[Grid] = []
    for kind in kinds:
        if kind == "leaderboard":
            found += map(grid_boards.leaderboard, boards)
        elif kind == "missed":
            found += [grid_boards.missed(board) for board in boards if board.missed]
        elif kind == "attacks":
            found += [grid_boards.attacks(board, report) for board in boards if board.attacks]
        elif kind == "claims":
            found += claim_grids(report)
        else:
            found += transfer_grids(store)
    return [grid for grid in found if grid.lines]


def _prominence(board: Board) -> tuple[bool, int, int, int, str]:
    """The leading board with most models keeps the plain file name; others of its data set and norm get a suffix."""
    return (not board.main, -len(board.ranked), -len(board.rows), -board.protocol.n, board.anchor)
