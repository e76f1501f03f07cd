"""Results as one JSON document that another lab can recompute every number from, and its published schema.

The document holds, by run, all that the store knows of where a number comes from, and the verdict on every sample as
base64 of little-endian arrays. `moebench import` reads it; the schema says what each key means.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moebench import __version__
from moebench.report.evidence import ReadableStore, public, result_key
from moebench.report.exports import outcomes_digest, plain
from moebench.report.external import is_external
from moebench.schema import IntArray, Outcomes, StoredResult

FORMAT, FORMAT_VERSION = "moebench-results", 1
SCHEMA_FILE = "results.schema.json"

INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64")
"""Types of integer arrays; the first that holds all values is used."""


def schema_text() -> str:
    """The JSON Schema (draft 2020-12) of the document."""
    return files("moebench").joinpath("data", SCHEMA_FILE).read_text(encoding="utf-8")


def results_json(store: ReadableStore, results: Sequence[StoredResult], lab: str | None = None) -> str:
    """The document of some results, the same bytes for the same results.

    Args:
        store: gives their evidence and the flags of their runs.
        results: what to write; imported results are left out, because their own lab has to vouch for them.
        lab: who measured, if the file should say so.
    """
    flags = {run.run_id: [asdict(flag) for flag in run.flags] for run in store.runs()}
    started = {run.run_id: (run.started_at, run.seconds) for run in store.runs()}
    runs: dict[str, dict[str, Any]] = {}
    for stored in sorted((one for one in results if not is_external(one)), key=result_key):
        begin, seconds = started.get(stored.run_id, (None, None))
        run = runs.setdefault(
            stored.run_id,
            {
                "run_id": stored.run_id,
                "command": stored.command,
                "started_at": begin,
                "seconds": seconds,
                "model": asdict(stored.model),
                "checkpoint": asdict(stored.checkpoint),
                "protocol": asdict(stored.protocol),
                "environment": public(stored.environment),
                "flags": flags.get(stored.run_id, []),
                "labels": None if (labels := store.labels(stored.protocol)) is None else _array(labels),
                "results": [],
            },
        )
        # Hundreds of lines per model, of no use to a reader of results.
        run["checkpoint"].pop("training_log", None)
        run["results"].append(_result(stored, store.outcomes(stored.result_id)))
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "generator": {"name": "moebench", "version": __version__},
        "lab": lab,
        "runs": [plain(runs[run_id]) for run_id in sorted(runs)],
    }
    document["sha256"] = content_digest(document)
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def content_digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of a document without its own `sha256`: of its JSON with sorted keys and no blanks, in UTF-8."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _result(stored: StoredResult, outcomes: Outcomes) -> dict[str, Any]:
    return {
        "finished_at": stored.finished_at,
        "cell": asdict(stored.cell),
        "record": asdict(stored.record),
        "samples": pack_samples(outcomes),
    }


def pack_samples(outcomes: Outcomes) -> dict[str, Any]:
    """The verdicts on the samples 0 … n - 1 as JSON."""
    stages = list(dict.fromkeys(stage for stage in outcomes.stage if stage))
    numbers = {stage: at for at, stage in enumerate(["", *stages])}
    bits = np.packbits(outcomes.broken, bitorder="little")
    return {
        "n": int(outcomes.index.size),
        "broken": base64.b64encode(bits.tobytes()).decode(),
        "clean_pred": _array(outcomes.clean_pred),
        "adv_pred": _array(outcomes.adv_pred),
        "distance": _packed(np.asarray(outcomes.distance, dtype=np.float32)),
        "forwards": _array(outcomes.forwards),
        "backwards": _array(outcomes.backwards),
        "stages": stages,
        "stage": _array(np.array([numbers[stage] for stage in outcomes.stage], dtype=np.int64)),
        "sha256": outcomes_digest(outcomes),
    }


def unpack_samples(samples: Mapping[str, Any]) -> Outcomes:
    """The verdicts that `pack_samples` wrote.

    Raises:
        ValueError: an array has another length than n, or is no base64, or a stage has no name.
    """
    n, stages = int(samples["n"]), ["", *samples["stages"]]
    bits = np.frombuffer(base64.b64decode(samples["broken"], validate=True), dtype=np.uint8)
    if bits.size != (n + 7) // 8:
        raise ValueError(f"broken has {bits.size} bytes, {n} samples take {(n + 7) // 8}")
    arrays = {
        name: _unpacked(name, samples[name], n)
        for name in ("clean_pred", "adv_pred", "distance", "forwards", "backwards", "stage")
    }
    numbers = arrays.pop("stage").astype(np.int64)
    if n and not 0 <= numbers.min() <= numbers.max() < len(stages):
        raise ValueError(f"stage names one of {len(stages) - 1} stages by a number that is none of theirs")
    distance = arrays.pop("distance").astype(np.float32)
    integers = {name: array.astype(np.int64) for name, array in arrays.items()}
    return Outcomes(
        index=np.arange(n),
        broken=np.unpackbits(bits, count=n, bitorder="little").astype(np.bool_),
        distance=distance,
        stage=tuple(stages[number] for number in numbers),
        **integers,
    )


def unpack_labels(run: Mapping[str, Any]) -> IntArray | None:
    """The labels of a run's samples, (n,); None where the file does not tell them.

    Raises:
        ValueError: they are no base64, or of another number.
    """
    told = run["labels"]
    return None if told is None else _unpacked("labels", told, int(run["protocol"]["n"])).astype(np.int64)


def _array(values: NDArray[np.int64]) -> dict[str, str]:
    """Integers in the narrowest type that holds them."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    dtype = next(one for one in INTEGERS if np.iinfo(one).min <= low and high <= np.iinfo(one).max)
    return _packed(np.asarray(values).astype(dtype))


def _packed(values: NDArray[Any]) -> dict[str, str]:
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return {"dtype": values.dtype.name, "data": base64.b64encode(np.ascontiguousarray(little).tobytes()).decode()}


def _unpacked(name: str, array: Mapping[str, str], n: int) -> NDArray[Any]:
    dtype = np.dtype(array["dtype"]).newbyteorder("<")
    data = base64.b64decode(array["data"], validate=True)
    if len(data) != n * dtype.itemsize:
        raise ValueError(
            f"{name} has {len(data)} bytes, {n} samples of type {array['dtype']} take {n * dtype.itemsize}"
        )
    return np.frombuffer(data, dtype=dtype)
