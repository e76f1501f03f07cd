"""What a cell's fingerprint covers, and the fingerprint that a stored result should have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moebench.provenance import fingerprint
from moebench.schema import IMPORTED, WARM_START, CellSpec, ProtocolRecord, StoredResult, StoredRun

CODE = "code"
"""Where a run's environment says which version of the model's code it used."""


def cell_fingerprint(
    *,
    model: str,
    weights: str,
    code: str,
    protocol: ProtocolRecord,
    attack: str,
    parameters: Mapping[str, Any],
    view: str,
    seed: int,
    engine: str,
    precision: str,
) -> str:
    """The fingerprint of a cell: equal for equal work, on any machine.

    Args:
        model: name of the model with its settings.
        weights: hash of its weights.
        code: version of its code.
        protocol: data, threat model and version of the rules.
        attack: name of the attack.
        parameters: all settings of the attack; no warm start.
        view: what of the model it sees.
        seed: of its random streams.
        engine: what ran it.
        precision: of the search.
    """
    facts = {
        "model": model,
        "weights": weights,
        "code": code,
        "data": protocol.data_sha256,
        "threat": protocol.threat,
        "attack": attack,
        "parameters": parameters,
        "view": view,
        "seed": seed,
        "engine": engine,
        "protocol": protocol.version,
    }
    # Left out at their defaults, so that a result keeps its identity when such an option is added.
    if precision != "float32":
        facts["precision"] = precision
    return fingerprint(facts)


def warm_fingerprint(cell: str, source: Mapping[str, Any]) -> str:
    """The fingerprint of a cell that takes over what another one found, which `source` names with its radius."""
    return fingerprint({"cell": cell, WARM_START: source})


def run_fingerprint(cells: Sequence[CellSpec]) -> str:
    """The fingerprint of a run that shows these cells, in its order."""
    return fingerprint({"cells": [cell.fingerprint for cell in cells]})


def expected_fingerprint(result: StoredResult) -> str | None:
    """The fingerprint that a result should have by what is stored of it; None where its code's version is not.

    Nor for a result of another laboratory: it was checked when it was imported, and has a name of its own here.
    """
    cell, code = result.cell, result.environment.get(CODE)
    if code is None or IMPORTED in result.environment:
        return None
    parameters = dict(cell.parameters)
    source = parameters.pop(WARM_START, None)
    found = cell_fingerprint(
        model=result.model.name,
        weights=result.checkpoint.sha256,
        code=code,
        protocol=result.protocol,
        attack=cell.attack,
        parameters=parameters,
        view=cell.view,
        seed=cell.seed,
        engine=cell.engine,
        precision=cell.precision,
    )
    return found if source is None else warm_fingerprint(found, source)


def expected_run_fingerprint(run: StoredRun) -> str | None:
    """The fingerprint that a run should have; None where it is not done, external or not told its code."""
    if run.status != "done" or CODE not in run.environment or IMPORTED in run.environment:
        return None
    return run_fingerprint([result.cell for result in run.results])
