"""Results that another lab measured and that were imported: how the report knows them, and what it says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moebench.schema import IMPORTED, Json, StoredResult

EXTERNAL = "external"
"""The mark of a row of imported numbers."""


def origin(environment: Json) -> Mapping[str, Any] | None:
    """Where an imported run comes from; None for a run of this store."""
    found = environment.get(IMPORTED)
    return found if isinstance(found, Mapping) else None


def is_external(stored: StoredResult) -> bool:
    """Whether a result was imported."""
    return origin(stored.environment) is not None


def external_words(stored: StoredResult) -> str | None:
    """Why an imported result takes no rank, in words; None for one of this store."""
    found = origin(stored.environment)
    if found is None:
        return None
    return (
        f"external: measured by {found.get('from')} and imported from {found.get('file')} "
        f"(sha256 {str(found.get('file_sha256'))[:12]}) on {str(found.get('at'))[:10]}; not run here"
    )
