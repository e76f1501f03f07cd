"""How numbers, names and moments are written; shared by the pages, the LaTeX tables and the CSV."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from moebench.errors import UsageError
from moebench.schema import split_part

RESERVED = frozenset({"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))})
MAX_SLUG = 60
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def percent(value: float, n: int) -> str:
    """A fraction of n samples in percent: one decimal, two from a thousand samples on; a dash for NaN."""
    if not math.isfinite(value):
        return "—"
    return f"{100 * value:.{2 if n >= 1000 else 1}f}"


def decimal(value: float) -> str:
    """Three decimals; a dash for NaN."""
    return f"{value:.3f}" if math.isfinite(value) else "—"


def p_value(value: float) -> str:
    """A probability with three decimals; "< 0.001" below that."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def sortable(value: int | float | None) -> str:
    """A number as the sorting script reads it; empty where there is none."""
    return "" if value is None or not math.isfinite(value) else repr(value)


def quantity(value: int | float | None) -> str:
    """A count with an SI prefix and three significant digits, such as "11.2 M"; a dash for None."""
    if value is None:
        return "—"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{_three(value / size)} {prefix}"
    return f"{value:g}" if isinstance(value, int) else _three(value)


def _three(value: float) -> str:
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"


def seconds(value: float | None) -> str:
    """A duration: "0.42 s", "1 min 05 s", "2 h 10 min"; a dash for None."""
    if value is None:
        return "—"
    if value < 60:
        return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def moment(stamp: str) -> str:
    """A stored date and time to the second; as it is where it is not written as usual."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.\d+)?(?:\+00:00|Z)", stamp)
    return f"{match[1]} {match[2]} UTC" if match else stamp


def digest(text: str, length: int = 8) -> str:
    """The first hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def fold(name: str) -> str:
    """A readable file name in lower-case ASCII; unlike names may fold to one."""
    folded = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    safe = re.sub(r"[^a-z0-9._-]+", "-", folded).strip("-._")[:MAX_SLUG].strip("-._")
    return f"{safe}-data" if safe.split(".")[0] in RESERVED else safe


def slug(name: str) -> str:
    """A file name that every system accepts; unlike names get unlike ones.

    A name that is safe as it stands is kept. Any other is folded and gets a hash of the original, so that neither a
    case-insensitive disk nor the folding makes two names one.
    """
    safe = fold(name)
    if safe and safe == name:
        return safe
    return f"{safe}-{digest(name)}" if safe else digest(name, 12)


def flatten(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as sorted ("a.b", "value") pairs, for printing."""
    pairs: list[tuple[str, str]] = []
    for key in sorted(record, key=str):
        value = record[key]
        if isinstance(value, Mapping):
            pairs.extend(flatten(value, f"{prefix}{key}."))
        elif isinstance(value, (list, tuple)):
            pairs.append((f"{prefix}{key}", ", ".join(plain(item) for item in value) or "—"))
        else:
            pairs.append((f"{prefix}{key}", plain(value)))
    return pairs


def grouped(record: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """A nested mapping by its first keys, for printing under headings; what is not nested comes first, as "general"."""
    nested = {key: value for key, value in record.items() if isinstance(value, Mapping) and value}
    rest = {key: "none" if value == {} else value for key, value in record.items() if key not in nested}
    general = flatten(rest)
    groups = [("general", general)] if general else []
    return groups + [(str(key), flatten(nested[key])) for key in sorted(nested, key=str)]


def plain(value: Any) -> str:
    """A JSON value as a reader expects it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "—"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def safe(value: Any) -> Any:
    """A CSV field that no spreadsheet runs as a formula: such text gets a leading apostrophe."""
    if isinstance(value, str) and value.lstrip(" ").startswith(FORMULA_STARTS):
        return f"'{value}"
    return value


def split_name(name: str) -> tuple[str, str | None]:
    """The name of a model without its part, and the part; what only looks like a part belongs to the name."""
    try:
        return split_part(name)
    except UsageError:
        return name, None


def without_part(name: str) -> str:
    """The name of a model without its part."""
    return split_name(name)[0]
