"""The pages beside leaderboards and models, and the data files that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moebench.flags import MEANINGS
from moebench.papers import own_paper
from moebench.report import attacks_page, changes, pareto, snapshot, transfer_page, transfers
from moebench.report.evidence import ReadableStore
from moebench.report.snapshot import Snapshot
from moebench.report.tables import Report
from moebench.schema import SUITE_VERSION, SUITES

CHANGES = "changes.html"


@dataclass(frozen=True)
class Page:
    """A page: its file, which is also the name of its template, and what the template is given."""

    file: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Extras:
    """The pages, and the data files that belong to them, by path."""

    pages: tuple[Page, ...]
    data: Mapping[str, str]


def build(store: ReadableStore, report: Report, since: Snapshot | None = None) -> Extras:
    """All further pages of a store; the page of changes only where there is an earlier report to compare with."""
    boards = transfers.build(store)
    attacks = attacks_page.build(store, report.boards)
    now = snapshot.take(store, report.boards)
    known = frozenset(page.model.name for page in report.models)
    found = [
        Page(
            "transfer.html",
            {
                "sections": tuple(transfer_page.section(board) for board in boards),
                "known": known,
                "clean": transfer_page.clean,
                "pair_words": transfer_page.pair_words,
            },
        ),
        Page("pareto.html", {"plots": pareto.build(report.boards)}),
        Page("attacks.html", {"page": attacks, "suite": SUITE_VERSION, "suites": SUITES}),
        Page("method.html", {"suites": SUITES, "meanings": MEANINGS, "bibtex": own_paper().bibtex}),
    ]
    if since is not None:
        facts = {"boards": changes.compare(since, now), "before": since, "after": now, "known": known}
        found.append(Page(CHANGES, facts))
    data = {
        "data/transfer.csv": transfer_page.transfer_csv(boards),
        "data/attacks.csv": attacks_page.attacks_csv(attacks),
        "data/overlap.csv": attacks_page.overlap_csv(attacks),
        snapshot.PLACE.as_posix(): snapshot.dump(now),
    }
    return Extras(tuple(found), data)
