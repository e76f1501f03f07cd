"""Pieces of chart options that several figures share: axes in percent, error bars, numbers in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moebench.metrics import Measure
from moebench.report.text import percent
from moebench.schema import Json

INK = "ink"
"""Stands for the page's own colour of text; assets/charts.js puts it in."""


def percent_axis(name: str) -> dict[str, Any]:
    """A value axis from 0 to 100."""
    return {"type": "value", "min": 0, "max": 100, "name": name, "nameLocation": "middle", "nameGap": 30}


def hundred(value: float) -> float:
    """A fraction in percent, as short as a chart needs it."""
    return round(100 * value, 2)


def error_bars(name: str, data: Sequence[Sequence[float | None]], colour: str, *, flat: bool = False) -> Json:
    """Intervals as a series: data of [position, low, high] in percent, and an offset in pixels where there is a fourth.

    Args:
        name: as the legend has it; the name of the series whose intervals they are hides both together.
        data: one per interval.
        colour: of the lines.
        flat: whether the values lie along the x axis.
    """
    encode = {"y": 0, "x": [1, 2]} if flat else {"x": 0, "y": [1, 2]}
    return {
        "type": "custom",
        "name": name,
        "renderItem": "interval",
        "dimensions": ["position", "low", "high", "offset"],
        "encode": {**encode, "tooltip": [1, 2]},
        "itemStyle": {"color": colour},
        "data": data,
        "z": 5,
    }


def in_words(found: Measure | None) -> str:
    """A share with its interval, in percent; a dash for none."""
    return "—" if found is None else f"{percent(found.value, found.n)} ({span(found)})"


def span(found: Measure) -> str:
    """The ends of an interval in percent."""
    return f"{percent(found.low, found.n)}–{percent(found.high, found.n)}"


def finite(value: Any) -> float | None:
    """A number that JSON can hold, None for all else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value
