"""What papers publish on one data set, one row per model, beside what moebench measured there."""

from __future__ import annotations

from collections.abc import Sequence

from moebench.metrics import Measure
from moebench.papers import paper_of
from moebench.report.claims import claim_range, same_name
from moebench.report.grid import Absent, Cell, Column, Grid, Label, Line, Share, Span
from moebench.report.tables import Report
from moebench.report.text import fold
from moebench.schema import Claim

CLAIM_COLUMNS = {
    ("SA", "none"): "SA",
    ("RA", "PGD"): "RA (PGD)",
    ("RA", "AutoAttack (as named by paper)"): "RA (AA)",
    ("RA-E", "PGD"): "RA-E (PGD)",
    ("RA-R", "PGD"): "RA-R (PGD)",
}
"""Which published numbers a claims table shows, by metric and attack, and under what heading."""

OURS = (("SA", "sa"), ("RA", "ra"), ("RA-worst", "ra_worst"))


def claim_grids(report: Report) -> list[Grid]:
    """One table per data set that has claims of models of the registry, of the kinds that are shown."""
    found = []
    for dataset in sorted({claim.dataset for claim in report.claims if claim.registry_name}):
        about = [claim for claim in report.claims if claim.dataset == dataset and claim.registry_name]
        shown = [claim for claim in about if (claim.metric, claim.attack) in CLAIM_COLUMNS]
        if shown:
            found.append(_grid(dataset, shown, report))
    return found


def _grid(dataset: str, shown: Sequence[Claim], report: Report) -> Grid:
    kinds = [kind for kind in CLAIM_COLUMNS if any((claim.metric, claim.attack) == kind for claim in shown)]
    columns = [Column("model", "Model", left=True)]
    columns += [Column(f"claimed[{CLAIM_COLUMNS[kind]}]", CLAIM_COLUMNS[kind], group="claimed") for kind in kinds]
    columns += [Column(key, label, group="moebench") for label, key in OURS]
    lines = []
    for model in sorted({claim.registry_name for claim in shown}):
        own = [claim for claim in shown if claim.registry_name == model]
        theirs = [_claimed([claim for claim in own if (claim.metric, claim.attack) == kind]) for kind in kinds]
        ours = [_measured(model, key, dataset, report) for _, key in OURS]
        papers = [paper_of(arxiv) for arxiv in sorted({claim.arxiv for claim in own})]
        lines.append(Line(model, (Label(model), *theirs, *ours), papers=tuple(papers)))
    measured = any(isinstance(cell, Share) for line in lines for cell in line.cells)
    notes = [
        "Claimed: as the papers state it, over their variants, at the papers' radii; RA (PGD) and RA (AA) under the "
        "attacks that they call PGD and AutoAttack. A dash: not published"
        + (", or not measured on this data set." if measured else "."),
    ]
    if measured:
        notes.append("moebench: RA under all recorded attacks on the whole model, RA-worst under all on any view.")
    if any(claim.flag for claim in shown):
        notes.append("The asterisk marks claims that may not add up; the model's page says why.")
    beside = " beside those measured by moebench" if measured else ""
    return Grid(
        kind="claims",
        stem=f"claims-{fold(dataset)}",
        title=f"Published accuracies on {dataset}{beside}.",
        notes=tuple(notes),
        columns=tuple(columns),
        lines=tuple(lines),
        facts={"dataset": dataset},
    )


def _claimed(group: Sequence[Claim]) -> Cell:
    if not group:
        return Absent("not published")
    span = claim_range(group, "", same_dataset=True)
    return Span(span.low, span.high, span.flagged)


def _measured(model: str, key: str, dataset: str, report: Report) -> Cell:
    """Our number from the largest sample set of that data set, at the leading radius where there are several."""
    found: list[tuple[int, bool, Measure]] = []
    for board in report.boards:
        if not same_name(board.protocol.dataset, dataset):
            continue
        for row in board.rows:
            measure = {"sa": row.sa, "ra": row.ra, "ra_worst": row.worst}[key].measure
            if row.model.name == model and measure is not None:
                found.append((measure.n, board.main, measure))
    if not found:
        return Absent("not measured on this data set")
    return Share(max(found, key=lambda one: one[:2])[2])
