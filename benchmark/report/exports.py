"""The same rows for machines: a CSV of the leaderboards and sorted JSON lines of every stored result."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from moebench.report.evidence import ReadableStore, attack_key, public, result_key
from moebench.report.tables import COMPONENTS, Board, Cell, Row
from moebench.report.text import safe
from moebench.schema import Outcomes, StoredResult

METRICS = ("ra_worst", "sa", "ra", *(label.lower().replace("-", "_") for label, _ in COMPONENTS))


def leaderboard_csv(boards: Sequence[Board]) -> str:
    """All leaderboards in one table: fractions, empty where not measured, "n/a" where not applicable."""
    attacks = sorted({attack for board in boards for attack in board.attacks}, key=attack_key)
    numbers = [*METRICS, *(f"ra[{attack}]" for attack in attacks)]
    facts = ["dataset", "split", "n", "norm", "eps", "protocol", "suites", "data_sha256", "rank", "model", "family"]
    ends = ["marks", "parameters", "active_parameters", "flops", "checkpoint_sha256", "unranked_because"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    spread = [f"{name}{suffix}" for name in numbers for suffix in ("", "_low", "_high")]
    writer.writerow(map(safe, [*facts, *spread, *ends]))
    for board in boards:
        for row in board.rows:
            writer.writerow(map(safe, _csv_row(board, row, attacks)))
    return text.getvalue()


def _csv_row(board: Board, row: Row, attacks: Sequence[str]) -> list[Any]:
    protocol = board.protocol
    by_attack = dict(zip(board.attacks, row.attacks, strict=True))
    cells = [row.worst, row.sa, row.ra, *row.components, *(by_attack.get(attack) for attack in attacks)]
    return [
        protocol.dataset,
        protocol.split,
        protocol.n,
        protocol.threat.norm,
        protocol.threat.eps,
        protocol.version,
        " ".join(board.suites),
        protocol.data_sha256,
        row.rank,
        row.model.name,
        row.model.family,
        *(value for cell in cells for value in _numbers(cell)),
        "; ".join(sorted({mark.code for mark in row.marks})),
        row.checkpoint.parameters,
        row.checkpoint.active_parameters,
        row.checkpoint.flops,
        row.checkpoint.sha256,
        row.unranked,
    ]


def _numbers(cell: Cell | None) -> tuple[Any, Any, Any]:
    if cell is None or cell.measure is None:
        text = "n/a" if cell is not None and cell.state == "n/a" else None
        return (text, text, text)
    found = cell.measure
    return (f"{found.value:.6f}", f"{found.low:.6f}", f"{found.high:.6f}")


def results_jsonl(store: ReadableStore) -> str:
    """Every stored result, older ones too, as one JSON object per line, in a fixed order."""
    results = sorted(store.results(newest_only=False), key=result_key)
    return "".join(_line(stored, store.outcomes(stored.result_id)) for stored in results)


def _line(stored: StoredResult, outcomes: Outcomes) -> str:
    record = asdict(stored)
    record["environment"] = public(stored.environment)
    # Hundreds of lines per model; the log stays in the database and in the card beside the weights.
    del record["checkpoint"]["training_log"]
    record["outcomes"] = {
        "n": int(outcomes.index.size),
        "standing": int(np.count_nonzero(np.logical_not(outcomes.broken))),
        "sha256": outcomes_digest(outcomes),
    }
    return json.dumps(plain(record), sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def outcomes_digest(outcomes: Outcomes) -> str:
    """A hash of the verdicts (sample, broken, clean and adversarial prediction), the same on every machine."""
    verdicts = (outcomes.index, outcomes.broken, outcomes.clean_pred, outcomes.adv_pred)
    return hashlib.sha256(np.stack([np.asarray(one, dtype="<i8") for one in verdicts]).tobytes()).hexdigest()


def plain(value: Any) -> Any:
    """A value as strict JSON: tuples become lists, numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
