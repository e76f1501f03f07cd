"""Accuracy against robustness: which models no other one beats in both, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moebench.metrics import Measure
from moebench.report.charts import PALETTE, Chart
from moebench.report.tables import Board, Row
from moebench.report.text import percent, quantity

SHAPES = {"moe": "circle", "dual": "diamond", "ensemble": "rect", "dense": "triangle", "external": "pin"}
"""A shape for each family beside its colour, for who cannot tell the colours apart."""
OTHER = "arrow"

SMALLEST, LARGEST = 10.0, 30.0
"""Diameters of the points in pixels; their logarithm of FLOPs lies evenly between."""

DECADE = 10.0

DASH = "path://M0 4h8v2H0zM12 4h8v2h-8z"

LABEL = 22
"""Longest name that is written beside a point."""


@dataclass(frozen=True)
class Point:
    """A model that has both numbers. `front`: no ranked model is at least as good in both and better in one."""

    row: Row
    sa: Measure
    worst: Measure
    front: bool
    size: float

    @property
    def ranked(self) -> bool:
        """Whether enough attacks have been run to compare it."""
        return self.row.unranked is None


@dataclass(frozen=True)
class Plot:
    """The points of one board, most robust first, its chart, and the legend of sizes as (FLOPs, diameter)."""

    board: Board
    points: tuple[Point, ...]
    chart: Chart | None
    legend: tuple[tuple[float, float], ...]


def build(boards: Sequence[Board]) -> tuple[Plot, ...]:
    """A plot per board."""
    return tuple(_plot(board) for board in boards)


def front(values: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (SA, RA-worst) no other one dominates: at least as good in both and better in one.

    Equal points are on the front together.
    """
    order = sorted(range(len(values)), key=lambda at: values[at], reverse=True)
    found, best, beside = [False] * len(values), -math.inf, math.inf
    for at in order:
        sa, worst = values[at]
        # Of equal SA only the most robust stay; a smaller SA must be paid for by more robustness.
        if worst > best or (worst == best and sa == beside):
            found[at], best, beside = True, worst, sa
    return found


def diameter(flops: float | None, low: float, high: float) -> float:
    """The size of a point between the smallest and the largest FLOPs of its board; the smallest where unknown.

    The largest size stands for ten times the smallest FLOPs or more: models of about the same cost look it.
    """
    if flops is None or flops <= 0:
        return SMALLEST
    return SMALLEST + (LARGEST - SMALLEST) * math.log(flops / low) / max(math.log(high / low), math.log(DECADE))


def _plot(board: Board) -> Plot:
    rows = [row for row in board.rows if row.sa.measure is not None and row.worst.measure is not None]
    values = [(row.sa.measure.value, row.worst.measure.value) for row in rows if row.sa.measure and row.worst.measure]
    ranked = [number for number, row in enumerate(rows) if row.unranked is None]
    on_front = {number for number, on in zip(ranked, front([values[at] for at in ranked]), strict=True) if on}
    costs = [float(row.checkpoint.flops) for row in rows if row.checkpoint.flops]
    low, high = (min(costs), max(costs)) if costs else (0.0, 0.0)
    points = tuple(
        Point(row, row.sa.measure, row.worst.measure, number in on_front, diameter(row.checkpoint.flops, low, high))
        for number, row in enumerate(rows)
        if row.sa.measure is not None and row.worst.measure is not None
    )
    steps = [low, math.sqrt(low * high), high] if high > 1.2 * low else [high] if costs else []
    legend = tuple((flops, diameter(flops, low, high)) for flops in steps)
    return Plot(board, points, _chart(board, points) if points else None, legend)


def _chart(board: Board, points: Sequence[Point]) -> Chart:
    families = sorted({point.row.model.family for point in points}, key=_family_key)
    across, up = _range([point.sa for point in points]), _range([point.worst for point in points])
    middle = (across["min"] + 2 * across["max"]) / 3
    series: list[dict[str, Any]] = [_front_line(points, across["min"], up["min"])]
    for family in families:
        own = [point for point in points if point.row.model.family == family]
        series += [*_crosses(own, _colour(family)), _scatter(family, own, middle)]
    names = [point.row.label for point in points if point.front]
    words = (
        f"Scatter of {len(points)} models, RA-worst over SA, {board.protocol.dataset}, {board.protocol.threat}. "
        + (f"No ranked model is better in both than {', '.join(names)}." if names else "None of them is ranked.")
    )
    axis = {"type": "value", "scale": True, "nameLocation": "middle"}
    option: dict[str, Any] = {
        "grid": {"left": 56, "right": 24, "top": 62, "bottom": 48},
        "legend": {"data": [{"name": "Pareto front", "icon": DASH}, *families], "top": 0, "left": 0},
        "tooltip": {"formatter": "tip"},
        "xAxis": {**axis, "name": "SA, %", "nameGap": 30, **across},
        "yAxis": {**axis, "name": "RA-worst, %", "nameGap": 38, **up},
        "series": series,
    }
    table = [
        (
            point.row.label,
            _percent(point.sa),
            _percent(point.worst),
            quantity(point.row.checkpoint.flops),
            "yes" if point.front else "no" if point.ranked else "not ranked",
        )
        for point in points
    ]
    head = ("Model", "SA, %", "RA-worst, %", "FLOPs", "On the front")
    protocol = board.protocol
    title = f"SA against RA-worst with 95 % intervals, {protocol.dataset}, {protocol.threat}, n = {protocol.n}"
    return Chart(f"pareto-{board.anchor}", title, words, option, head, table, height=460)


def _range(measures: Sequence[Measure]) -> dict[str, float]:
    """The ends of an axis in percent: whole tens around the intervals."""
    low, high = min(one.low for one in measures), max(one.high for one in measures)
    return {"min": 10 * math.floor(10 * low - 1e-9) if low > 0 else 0, "max": min(100, 10 * math.ceil(10 * high))}


def _scatter(family: str, points: Sequence[Point], middle: float) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": family,
        "symbol": SHAPES.get(family, OTHER),
        "z": 3,
        "data": [_datum(point, middle) for point in points],
        "itemStyle": {"color": _colour(family)},
        "label": {"show": True, "fontSize": 11},
        "labelLayout": {"hideOverlap": True, "dy": -10},
        "emphasis": {"scale": 1.2},
    }


def _datum(point: Point, middle: float) -> dict[str, Any]:
    """One point; its name stands towards the `middle` of the axis, so that the edge does not cut it."""
    row = point.row
    side = "right" if 100 * point.sa.value < middle else "left"
    datum: dict[str, Any] = {
        "value": [round(100 * point.sa.value, 3), round(100 * point.worst.value, 3)],
        "symbolSize": round(point.size, 1),
        "label": {"formatter": _short(row.label, LABEL), "position": side},
        "link": f"models/{row.page}",
        "tip": f"{_short(row.label, 40)}\nSA {_percent(point.sa)} %\nRA-worst {_percent(point.worst)} %\n"
        f"FLOPs {quantity(row.checkpoint.flops)}" + ("" if point.ranked else "\nnot ranked"),
    }
    if not point.ranked:
        # Hollow: fewer attacks have been run on it, so it stands higher than it would.
        datum["itemStyle"] = {"color": "transparent", "borderColor": _colour(row.model.family), "borderWidth": 2}
    return datum


def _crosses(points: Sequence[Point], colour: str) -> list[dict[str, Any]]:
    """Both intervals of each point, faint."""
    common = {"type": "custom", "renderItem": "interval", "silent": True, "z": 1, "itemStyle": {"color": f"{colour}55"}}
    flat = [[_at(one.worst.value), _at(one.sa.low), _at(one.sa.high)] for one in points]
    upright = [[_at(one.sa.value), _at(one.worst.low), _at(one.worst.high)] for one in points]
    return [
        {**common, "encode": {"y": 0, "x": [1, 2]}, "data": flat},
        {**common, "encode": {"x": 0, "y": [1, 2]}, "data": upright},
    ]


def _front_line(points: Sequence[Point], left: float, bottom: float) -> dict[str, Any]:
    """The staircase under which everything is beaten, from the left edge of the plot to its bottom."""
    on_front = sorted({(_at(point.sa.value), _at(point.worst.value)) for point in points if point.front})
    corners = [[left, on_front[0][1]]] if on_front else []
    for number, (sa, worst) in enumerate(on_front):
        below = on_front[number + 1][1] if number + 1 < len(on_front) else bottom
        corners += [[sa, worst], [sa, below]]
    return {
        "type": "line",
        "name": "Pareto front",
        "data": corners,
        "symbol": "none",
        "silent": True,
        "z": 2,
        "lineStyle": {"color": PALETTE[6], "width": 1.5, "type": "dashed"},
        "itemStyle": {"color": PALETTE[6]},
    }


def _family_key(family: str) -> tuple[int, str]:
    known = list(SHAPES)
    return (known.index(family) if family in SHAPES else len(known), family)


def _colour(family: str) -> str:
    return PALETTE[min(_family_key(family)[0], len(SHAPES))]


def _at(share: float) -> float:
    return round(100 * share, 3)


def _percent(found: Measure) -> str:
    return f"{percent(found.value, found.n)} ({percent(found.low, found.n)}–{percent(found.high, found.n)})"


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
