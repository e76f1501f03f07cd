"""The published numbers that ship with the package, each with its source and, where it does not add up, the reason."""

from __future__ import annotations

import csv
import io
from importlib.resources import files

from moebench.schema import Claim

_FLAG = "| FLAG:"


def load_claims() -> list[Claim]:
    """All claims of the packaged table, in its order; `value` is in percent, as published."""
    text = files("moebench").joinpath("data", "claims.csv").read_text(encoding="utf-8")
    return [_claim(row) for row in csv.DictReader(io.StringIO(text, newline=""))]


def _claim(row: dict[str, str]) -> Claim:
    source, _, flag = row["source"].partition(_FLAG)
    return Claim(
        arxiv=row["paper_arxiv_id"],
        model=row["model"],
        registry_name=row["registry_name"],
        dataset=row["dataset"],
        architecture=row["architecture"],
        attack=row["attack"],
        attack_params=row["attack_params"],
        metric=row["metric"],
        value=float(row["value_percent"]),
        source=source.strip(),
        flag=flag.strip() or None,
    )
