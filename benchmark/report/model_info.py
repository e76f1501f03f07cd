"""RobustBench's `model_info` files: one JSON object per model and threat model, with the keys that its site reads.

Accuracies and eps are strings there, in percent and as people write them; so they are here. What the store does not
know is null, as in the files that RobustBench's own benchmark writes. `external` is the worst case over all recorded
attacks where that is lower than AutoAttack, and `unreliable` says that their 95 % intervals do not even touch.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moebench import __version__
from moebench.report.claims import same_name, same_threat
from moebench.report.external import EXTERNAL
from moebench.report.html import arxiv_url
from moebench.report.tables import RANKING_ATTACK, Board, Cell, Row
from moebench.report.text import digest, fold, slug
from moebench.schema import format_eps

DATASETS = ("cifar10", "cifar100", "imagenet")
"""How RobustBench writes the data sets that it knows."""


@dataclass(frozen=True)
class Found:
    """The files by their path below `model_info`, and what was left out, each with the reason."""

    files: dict[str, str]
    left_out: tuple[str, ...]


def model_info(boards: Sequence[Board]) -> Found:
    """One file for each ranked row of some boards."""
    made: dict[str, str] = {}
    left_out = []
    for board in boards:
        for row in board.rows:
            if row.unranked is not None or any(mark.code == EXTERNAL for mark in row.marks):
                left_out.append(f"{row.label}: {row.unranked}")
                continue
            folder = f"{_dataset(board.protocol.dataset)}/{board.protocol.threat.norm}"
            path = f"{folder}/{_file_name(row)}.json"
            if path in made:
                path = f"{folder}/{_file_name(row)}_{digest(board.anchor + row.checkpoint.sha256)}.json"
            made[path] = json.dumps(facts(board, row), indent=2) + "\n"
    return Found(made, tuple(left_out))


def facts(board: Board, row: Row) -> dict[str, Any]:
    """The object of one row; keys and types as in RobustBench's repository."""
    paper, protocol = row.model.paper, board.protocol
    autoattack = row.attacks[board.attacks.index(RANKING_ATTACK)]
    found: dict[str, Any] = {
        "link": arxiv_url(paper.arxiv) if paper else None,
        "name": paper.title if paper else row.model.name,
        "authors": paper.authors if paper else None,
        # The recipes of the package train on the data set alone; of other weights nothing is known.
        "additional_data": False if row.checkpoint.recipe else None,
        "number_forward_passes": 1,
        "dataset": _dataset(protocol.dataset),
        "venue": f"{paper.venue} {paper.year}" if paper else None,
        "architecture": _architecture(row),
        "eps": format_eps(protocol.threat.eps),
        "clean_acc": _percent(row.sa),
        "reported": _reported(board, row),
        "autoattack_acc": _percent(autoattack),
    }
    if row.worst.measure is not None and autoattack.measure is not None:
        if row.worst.measure.k < autoattack.measure.k:
            found["external"] = _percent(row.worst)
        found["unreliable"] = row.worst.measure.high < autoattack.measure.low
    found["footnote"] = _footnote(board, row)
    return found


def _footnote(board: Board, row: Row) -> str:
    protocol = board.protocol
    words = (
        f"Measured by moebench {__version__} (protocol {protocol.version}, suite {', '.join(board.suites)}) on "
        f"{protocol.n} samples of {protocol.dataset} {protocol.split}; weights sha256 {row.checkpoint.sha256[:16]}."
    )
    worst, autoattack = row.worst.measure, row.attacks[board.attacks.index(RANKING_ATTACK)].measure
    if worst is not None and autoattack is not None and worst.k < autoattack.k:
        words += f" {_percent(row.worst)}% robust accuracy is the worst case over all recorded attacks, those on the "
        words += "routing included."
    return words


def _architecture(row: Row) -> str:
    kind = {"dense": "", "ensemble": "ensemble", "moe": "MoE", "dual": "dual MoE"}.get(
        row.model.family, row.model.family
    )
    return f"{row.model.name} ({', '.join(filter(None, (kind, row.model.routing)))})" if kind else row.model.name


def _reported(board: Board, row: Row) -> str | None:
    """The paper's robust accuracy on this data set and under this threat model; null where it is none or several."""
    protocol = board.protocol
    here = [
        claim
        for claim in row.claims
        if same_name(claim.dataset, protocol.dataset) and same_threat(claim.attack_params, protocol.threat)
    ]
    strongest = [claim for claim in here if claim.attack.startswith("AutoAttack")] or here
    values = {claim.value for claim in strongest}
    return f"{values.pop():.2f}" if len(values) == 1 else None


def _percent(cell: Cell) -> str | None:
    return None if cell.measure is None else f"{100 * cell.measure.value:.2f}"


def _dataset(name: str) -> str:
    known = [one for one in DATASETS if same_name(one, name)]
    return known[0] if known else fold(name) or digest(name)


def _file_name(row: Row) -> str:
    """Author, year and first word of the title, as RobustBench names models, and which of the paper's models it is."""
    paper = row.model.paper
    if paper is None:
        return slug(row.label)
    first = paper.authors.split(",")[0].split(" and ")[0].split()
    words = [_letters(word) for word in (first[-1] if first else "", (paper.title.split() or [""])[0])]
    return f"{words[0]}{paper.year}{words[1]}_{slug(row.label)}"


def _letters(word: str) -> str:
    plain = unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]", "", plain)[:40]
