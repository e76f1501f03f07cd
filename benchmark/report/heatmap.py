"""Heat maps of shares: rows down, columns across, one colour scale from 0 to 100 %, numbers legible on each colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moebench.report.charts import PALETTE, Chart

RAMP = ("#dbe9f6", "#9ecae1", "#4f9bcb", "#2166ac", "#08306b")
"""One hue from pale to dark, so that it also reads in grey and by people who cannot tell hues apart."""

OUTLINE = PALETTE[1]
"""Frames the marked cells."""

SIDE = 140
"""Most room for names at the left, in pixels."""

PHONE = 358
"""Width of a figure on a small screen, in pixels."""

INKS = ("#000000", "#ffffff")


def heat_map(
    anchor: str,
    title: str,
    words: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[int, int], tuple[float, str, bool]],
    head: tuple[str, ...],
    table: Sequence[tuple[str, ...]],
    *,
    dark_is_low: bool = False,
) -> Chart:
    """The chart of a matrix: `anchor`, `title`, `words`, `head` and `table` are those of `Chart`.

    `rows` and `columns` are labels, the first row on top. `values` holds by (row, column) the percentage, what to say
    of it, and whether the cell is framed; other cells stay empty. `dark_is_low` makes small percentages the dark ones.
    """
    ramp = RAMP[::-1] if dark_is_low else RAMP
    # Framed cells last, so that no neighbour is drawn over their frame.
    ordered = sorted(values.items(), key=lambda item: (item[1][2], item[0]))
    data = [_datum(at, *value, ramp) for at, value in ordered]
    side = min(SIDE, 20 + round(6.2 * max((len(name) for name in (*rows, *columns)), default=0)))
    label = {"width": side - 8, "overflow": "truncate", "interval": 0, "fontSize": 11}
    bare = {"splitLine": {"show": False}, "axisTick": {"show": False}}
    option: dict[str, Any] = {
        "grid": {"left": side, "right": 14, "top": 16 + round(0.77 * side), "bottom": 62},
        "tooltip": {"formatter": "tip"},
        "xAxis": {
            **bare,
            "type": "category",
            "data": list(columns),
            "position": "top",
            "axisLabel": {**label, "rotate": 50 if len(columns) > 2 else 0},
        },
        "yAxis": {**bare, "type": "category", "data": list(rows), "inverse": True, "axisLabel": label},
        "visualMap": {
            **{"type": "continuous", "min": 0, "max": 100, "calculable": False, "orient": "horizontal"},
            **{"left": 8, "bottom": 8, "itemWidth": 12, "itemHeight": 130, "text": ["100 %", "0 %"]},
            "inRange": {"color": list(ramp)},
        },
        "series": [
            {
                "type": "heatmap",
                "data": data,
                "label": {"show": True, "fontSize": 11, "textBorderWidth": 0},
                "labelLayout": {"hideOverlap": True},
                "itemStyle": {"borderColor": "rgba(127,127,127,0.25)", "borderWidth": 1},
                "emphasis": {"itemStyle": {"borderColor": OUTLINE, "borderWidth": 2}},
            }
        ],
    }
    height, width = 78 + round(0.77 * side) + max(3, len(rows)) * 28, side + 14 + 30 * len(columns)
    # A matrix that fits a phone is drawn to fit it.
    return Chart(anchor, title, words, option, head, table, height, width if width > PHONE else 0)


def _datum(at: tuple[int, int], value: float, tip: str, framed: bool, ramp: Sequence[str]) -> dict[str, Any]:
    row, column = at
    datum: dict[str, Any] = {
        "value": [column, row, round(value, 1)],
        "tip": tip,
        "label": {"color": ink(value, ramp), "formatter": f"{value:.0f}"},
    }
    if framed:
        datum["itemStyle"] = {"borderColor": OUTLINE, "borderWidth": 3}
    return datum


def ink(percent: float, ramp: Sequence[str] = RAMP) -> str:
    """Black or white, whichever is easier to read on the colour of a percentage; their contrast is at least 4.5."""
    ground = luminance(colour(percent, ramp))
    return max(INKS, key=lambda one: _contrast(luminance(channels(one)), ground))


def colour(percent: float, ramp: Sequence[str]) -> tuple[float, float, float]:
    """The red, green and blue in [0, 1] that a continuous visual map gives a percentage."""
    place = min(max(percent, 0.0), 100.0) / 100 * (len(ramp) - 1)
    first = min(int(place), len(ramp) - 2)
    low, high = channels(ramp[first]), channels(ramp[first + 1])
    red, green, blue = (a + (place - first) * (b - a) for a, b in zip(low, high, strict=True))
    return red, green, blue


def luminance(channels: tuple[float, float, float]) -> float:
    """The relative luminance of WCAG 2."""
    red, green, blue = (one / 12.92 if one <= 0.04045 else float(((one + 0.055) / 1.055) ** 2.4) for one in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def channels(code: str) -> tuple[float, float, float]:
    """Red, green and blue in [0, 1] of #rrggbb."""
    red, green, blue = (int(code[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return red, green, blue


def _contrast(one: float, other: float) -> float:
    light, dark = max(one, other), min(one, other)
    return (light + 0.05) / (dark + 0.05)
