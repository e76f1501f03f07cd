"""Results of another lab: read from its file, checked against its own evidence, and stored apart from ours.

What can be checked is checked: the file against the published schema, its hashes, every aggregate against the samples
that it is made of, every perturbation against the radius. That the samples are true cannot be; so imported results have
model names and fingerprints of their own, nothing reuses them, and boards show them without a rank.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from moebench.errors import UsageError
from moebench.metrics import first_breaker, right_at_first, wilson
from moebench.report.evidence import public
from moebench.report.exports import outcomes_digest
from moebench.report.results_json import (
    FORMAT,
    FORMAT_VERSION,
    content_digest,
    schema_text,
    unpack_labels,
    unpack_samples,
)
from moebench.schema import (
    IMPORTED,
    PROTOCOL_VERSION,
    WARM_START,
    IntArray,
    Outcomes,
    StoredResult,
    StoredRun,
    ThreatModel,
    is_protocol,
)
from moebench.store.external import ExternalRun, of_lab
from moebench.store.records import run_from_json

MAX_LAB = 40
LAB = re.compile(rf"\S(?:.{{0,{MAX_LAB - 2}}}\S)?")
SLACK = 1e-4
"""By how much more than eps a distance may be, relatively: float32 on another machine."""

TOLERANCE = 1e-9


@dataclass(frozen=True)
class External:
    """A file that has passed every check: its runs as the store will hold them, and who measured."""

    lab: str
    file_sha256: str
    runs: tuple[ExternalRun, ...]

    @property
    def results(self) -> int:
        """How many results it holds."""
        return sum(len(run.results) for run in self.runs)


def check_lab(lab: str) -> str:
    """A name of who measured that is fit for tables.

    Raises:
        UsageError: it is empty, too long, or holds what cannot be printed.
    """
    if not (LAB.fullmatch(lab) and lab.isprintable()):
        raise UsageError(f"--from takes a name of 1 to {MAX_LAB} printable characters, got {lab[:60]!r}")
    return lab


def read_external(path: Path, lab: str | None = None) -> External:
    """Reads and checks a file of results.

    Args:
        path: a file that `moebench export --format json` wrote.
        lab: who measured; None for what the file itself says.

    Raises:
        UsageError: the file cannot be read, is none of ours, is damaged, or contradicts itself.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    document = _document(path, data)
    said = lab if lab is not None else document["lab"]
    if said is None:
        raise UsageError(f"{path.name} does not say who measured; add --from NAME")
    label, digest = check_lab(said), hashlib.sha256(data).hexdigest()
    origin = {
        "from": label,
        "file": path.name,
        "file_sha256": digest,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "generator": dict(document["generator"]),
    }
    runs, seen = [], set()
    for number, run in enumerate(document["runs"]):
        where = f"{path.name}: run {run['run_id']!r}"
        if run["run_id"] in seen:
            raise UsageError(f"{where} is there twice; the file was put together by hand, ask for a new export")
        seen.add(run["run_id"])
        try:
            stored, evidence, labels = _run(run)
        except (UsageError, ValueError) as error:
            raise UsageError(f"{where} (runs[{number}]) cannot be imported: {error}") from None
        runs.append(of_lab(stored, evidence, labels, label, origin))
    return External(label, digest, tuple(runs))


def _document(path: Path, data: bytes) -> Mapping[str, Any]:
    """The file as a document of the schema, its hash checked."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON number")

    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=refuse)
    except UnicodeDecodeError:
        raise UsageError(f"{path.name} is no UTF-8 text; `moebench export --format json` writes it so") from None
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise UsageError(f"{path.name} is no JSON that can be read: {reason}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UsageError(f"{path.name} is no file of moebench results; `moebench export --format json` writes them")
    if found.get("format_version") != FORMAT_VERSION:
        raise UsageError(
            f"{path.name} has format version {str(found.get('format_version'))[:20]}, this moebench reads "
            f"{FORMAT_VERSION}; upgrade moebench or ask for an export of that version"
        )
    _check_schema(path, found)
    if content_digest(found) != found["sha256"]:
        raise UsageError(f"{path.name} is damaged or was edited: its content does not have the sha256 that it states")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _check_schema(path: Path, document: Any) -> None:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(json.loads(schema_text())).iter_errors(document))
    if error is not None:
        words = error.message if len(error.message) <= 160 else f"{error.message[:100]} … {error.message[-50:]}"
        raise UsageError(f"{path.name} does not follow the schema at {error.json_path}: {words}")


def _run(run: Mapping[str, Any]) -> tuple[StoredRun, tuple[Outcomes, ...], IntArray | None]:
    """A run of a checked document, with the evidence of its results and the labels of its samples.

    Raises:
        UsageError: it contradicts itself.
    """
    if IMPORTED in run["environment"]:
        raise UsageError("it was imported by that lab itself; ask the lab that measured")
    if run["protocol"]["version"] != PROTOCOL_VERSION:
        raise UsageError(
            f"it follows version {run['protocol']['version']} of the evaluation rules, this moebench knows "
            f"{PROTOCOL_VERSION}"
        )
    stored = run_from_json({**run, "environment": public(run["environment"])})
    evidence, cells, labels = [], set(), unpack_labels(run)
    for one, written in zip(stored.results, run["results"], strict=True):
        name = f"{one.cell.attack} on {one.cell.view}"
        if one.cell.fingerprint in cells:
            raise UsageError(f"{name} is there twice")
        cells.add(one.cell.fingerprint)
        outcomes = unpack_samples(written["samples"])
        problems = [*_problems(one, outcomes, written["samples"], labels), *_mislabelled(one, outcomes, labels)]
        if problems:
            raise UsageError(f"{name}: {problems[0]}")
        evidence.append(outcomes)
    return stored, tuple(evidence), labels


def _problems(
    stored: StoredResult, outcomes: Outcomes, written: Mapping[str, Any], labels: IntArray | None
) -> Iterator[str]:
    """Where a result contradicts its samples, in words."""
    record, cell, protocol = stored.record, stored.cell, stored.protocol
    n = outcomes.index.size
    if not n == record.n == protocol.n:
        yield f"it has {n} samples, its aggregate says {record.n} and its protocol {protocol.n}"
        return
    if (record.attack, record.view) != (cell.attack, cell.view):
        yield f"its aggregate is of {record.attack} on {record.view}"
    if outcomes_digest(outcomes) != written["sha256"]:
        yield "its samples do not have the sha256 that they state"
    yield from _impossible(outcomes, protocol.num_classes, protocol.threat, published=is_protocol(cell.attack))
    standing, right = int(np.count_nonzero(~outcomes.broken)), _right(outcomes, labels, is_protocol(cell.attack))
    low, high = wilson(standing, n)
    counted = {
        "accuracy": (record.accuracy, standing / n),
        "ci_low": (record.ci_low, low),
        "ci_high": (record.ci_high, high),
        "clean_accuracy": (record.clean_accuracy, record.clean_accuracy if right is None else right / n),
        "forwards": (record.forwards, int(outcomes.forwards.sum())),
        "backwards": (record.backwards, int(outcomes.backwards.sum())),
        "changed_predictions": (record.changed_predictions, float(np.mean(outcomes.clean_pred != outcomes.adv_pred))),
    }
    for name, (told, found) in counted.items():
        if not abs(told - found) <= TOLERANCE * max(1.0, abs(found)):
            yield f"{name} is {told:.9g}, its samples give {found:.9g}"
    broke = first_breaker(outcomes)
    for stage, facts in record.stages.items():
        count = facts.get("broken") if isinstance(facts, Mapping) else None
        if count is not None and stage not in ("clean", WARM_START) and count != broke.get(stage, 0):
            yield f"stage {stage!r} broke {count} samples, its samples give {broke.get(stage, 0)}"


def _right(outcomes: Outcomes, labels: IntArray | None, published: bool) -> int | None:
    """How many clean predictions are right; None where neither labels nor verdicts tell."""
    if not published:
        return int(np.count_nonzero(right_at_first(outcomes)))
    # A published protocol scores all samples by its own rule, those that are wrong from the start as well.
    if labels is None or labels.size != outcomes.index.size:
        return None
    return int(np.count_nonzero(outcomes.clean_pred == labels))


def _impossible(outcomes: Outcomes, classes: int, threat: ThreatModel, published: bool) -> Iterator[str]:
    """What no evaluation can give; the images of published protocols need not be valid."""
    for name in ("clean_pred", "adv_pred"):
        values = getattr(outcomes, name)
        if not 0 <= values.min() <= values.max() < classes:
            yield f"{name} names a class that is none of {classes}"
    if any(stage and not hit for stage, hit in zip(outcomes.stage, outcomes.broken, strict=True)):
        yield "a stage is said to have broken a sample that stands"
    if outcomes.forwards.min() < 0 or outcomes.backwards.min() < 0:
        yield "a number of passes is negative"
    if not np.all(np.isfinite(outcomes.distance)) or outcomes.distance.min() < 0:
        yield "a distance is negative or not finite"
    hit = np.array([bool(stage) for stage in outcomes.stage])
    if published:
        if np.any(outcomes.broken & ~hit):
            yield "a sample is said to be wrong without the protocol, which scores all samples"
        return
    if outcomes.distance.max() > threat.eps * (1 + SLACK):
        yield f"a perturbation of norm {outcomes.distance.max():.6g} is outside {threat}"
    if np.any(outcomes.clean_pred[hit] == outcomes.adv_pred[hit]):
        yield "a sample is said to be broken although its prediction did not change"


def _mislabelled(stored: StoredResult, outcomes: Outcomes, labels: IntArray | None) -> Iterator[str]:
    """Where verdicts contradict the labels; a published protocol has a rule of its own."""
    if labels is None or labels.size != outcomes.index.size or is_protocol(stored.cell.attack):
        return
    hit = np.array([bool(stage) for stage in outcomes.stage])
    if np.any((outcomes.clean_pred != labels) != (outcomes.broken & ~hit)):
        yield "a sample is not wrong from the start exactly where its clean prediction differs from its label"
    if np.any(outcomes.adv_pred[hit] == labels[hit]):
        yield "a sample is said to be broken although its prediction is the label"


def without(external: External, own: set[str]) -> External:
    """The file without the runs whose original ids are this store's own."""
    return replace(external, runs=tuple(run for run in external.runs if run.original_id not in own))
