"""Where a setting's numbers come from: the facts that its results share, and those in which they differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moebench.report.evidence import public
from moebench.report.settings import Setting
from moebench.report.text import flatten, moment


def origins(setting: Setting) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Facts by name with their values in all results of a setting, each once."""
    protocol, cells = setting.protocol, [one.stored for one in setting.cells]
    threat = protocol.threat
    dates = sorted(moment(stored.finished_at) for stored in cells)
    facts: dict[str, tuple[str, ...]] = {
        "weights SHA-256": (setting.checkpoint.sha256,),
        "weights from": (setting.checkpoint.origin,),
        "data": (f"{protocol.dataset}, {protocol.split} split, {protocol.n} samples, {protocol.num_classes} classes",),
        "data SHA-256": (protocol.data_sha256,),
        "threat model": (f"{threat}, images in [{threat.lower:g}, {threat.upper:g}]",),
        "protocol version": (protocol.version,),
        "suite": _each(stored.cell.suite for stored in cells),
        "engine": _each(f"{stored.cell.engine}, {stored.cell.precision}" for stored in cells),
        "seed": _each(str(stored.cell.seed) for stored in cells),
        "finished": (dates[0],) if dates[0] == dates[-1] else (f"{dates[0]} to {dates[-1]}",),
    }
    found: dict[str, dict[str, None]] = {}
    for stored in cells:
        for key, value in _said(stored.environment):
            found.setdefault(key, {})[value] = None
    facts |= {key: tuple(sorted(values)) for key, values in found.items() if key not in facts}
    return tuple(facts.items())


def _said(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """An environment's facts; a commit and whether its tree was changed are one of them."""
    facts = public(environment)
    git = facts.get("git")
    if isinstance(git, Mapping) and "commit" in git:
        facts["git commit"] = f"{git['commit']}{' with changes' if git.get('dirty') else ''}"
        del facts["git"]
    return [(key.removeprefix("versions."), value) for key, value in flatten(facts)]


def _each(values: Any) -> tuple[str, ...]:
    return tuple(sorted(dict.fromkeys(values)))
