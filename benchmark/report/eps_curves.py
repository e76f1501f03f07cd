"""Curves of a model's page: accuracy over the radius and over the steps of PGD, each point with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moebench.metrics import Measure, from_accuracy
from moebench.report.charts import PALETTE, Chart
from moebench.report.curves import Curve, curves, steps_of
from moebench.report.evidence import WHOLE, Evidence, attack_key, eligible
from moebench.report.plots import error_bars, hundred, in_words, percent_axis
from moebench.report.settings import view_key
from moebench.report.text import digest
from moebench.schema import StoredResult, format_eps

SYMBOLS = ("circle", "rect", "triangle", "diamond", "pin", "arrow", "roundRect")


def curve_charts(own: Sequence[Evidence], axis: str) -> tuple[Chart, ...]:
    """One figure per checkpoint, sample set, norm and view; its lines are attacks, cold and warm apart.

    Args:
        own: all results of one model.
        axis: "eps" or "steps".
    """
    groups: dict[tuple[Any, ...], list[Curve]] = {}
    for curve in curves(one.stored for one in own if eligible(one.stored)):
        if curve.axis == axis:
            groups.setdefault(_figure(curve.points[0]), []).append(curve)
    several = len({key[-1] for key in groups}) > 1
    return tuple(_chart(groups[key], axis, several) for key in sorted(groups))


def _figure(stored: StoredResult) -> tuple[Any, ...]:
    protocol, view = stored.protocol, stored.cell.view
    data = (protocol.dataset, protocol.split, protocol.threat.norm, -protocol.n, protocol.version, protocol.data_sha256)
    return (*data, view != WHOLE, view_key(view), stored.checkpoint.sha256)


def _chart(group: Sequence[Curve], axis: str, several: bool) -> Chart:
    first = group[0].points[0]
    lines = sorted(
        group, key=lambda curve: (attack_key(curve.attack), curve.start, curve.points[0].protocol.threat.eps)
    )
    named = _named(lines, axis)
    lengths = sorted({steps_of(one) or 0 for curve in group for one in curve.points}) if axis == "steps" else []
    clean = from_accuracy(first.record.clean_accuracy, first.record.n)
    series: list[Any] = []
    rows: list[tuple[str, ...]] = []
    for place, (name, curve) in enumerate(named.items()):
        found = [(_position(one, axis), from_accuracy(one.record.accuracy, one.record.n)) for one in curve.points]
        points: list[tuple[float, Measure]] = [(at, share) for at, share in found if share is not None]
        # At radius 0 every attack leaves the clean accuracy.
        if axis == "eps" and clean is not None:
            points.insert(0, (0.0, clean))
        colour = PALETTE[place % len(PALETTE)]
        line = {"color": colour, "width": 2, "type": "dashed" if curve.start == "warm" else "solid"}
        series.append(
            {
                "type": "line",
                "name": name,
                "data": [[_place(at, lengths), hundred(share.value)] for at, share in points],
                "symbol": SYMBOLS[place % len(SYMBOLS)],
                "symbolSize": 8,
                "itemStyle": {"color": colour},
                "lineStyle": line,
            }
        )
        spans = [[_place(at, lengths), hundred(share.low), hundred(share.high)] for at, share in points]
        series.append(error_bars(name, spans, colour))
        rows += [(name, _written(at, axis), in_words(share), str(share.n)) for at, share in points]
    option = {
        "grid": {"left": 52, "right": 18, "top": 30 + 20 * ((len(named) + 2) // 3), "bottom": 46},
        "legend": {"top": 0, "left": 0, "data": list(named)},
        "tooltip": {"trigger": "item"},
        "xAxis": _x_axis(first, lengths),
        "yAxis": percent_axis("accuracy left, %"),
        "series": series,
    }
    view = "the whole model" if first.cell.view == WHOLE else f"the view {first.cell.view}"
    over = f"the {first.protocol.threat.norm} radius" if axis == "eps" else "the number of PGD steps"
    where = f"{first.protocol.dataset}, n = {first.protocol.n}"
    return Chart(
        anchor=f"{axis}-{digest(repr(_figure(first)))}",
        title=f"Accuracy over {over}: {view}, {where}{f', weights {first.checkpoint.sha256[:8]}' if several else ''}",
        words=_words(named, axis),
        option=option,
        head=("Attack", "Radius" if axis == "eps" else "Steps", "Accuracy left, % (95 %)", "n"),
        rows=rows,
        height=340,
    )


def _named(lines: Sequence[Curve], axis: str) -> dict[str, Curve]:
    """The lines by names that tell them apart: how each started, then the radius or the seed where it takes that."""
    named: dict[str, Curve] = {}
    for curve in lines:
        first = curve.points[0]
        words = f"{curve.attack}, {curve.start}"
        if axis == "steps":
            words += f", eps {format_eps(first.protocol.threat.eps)}"
        if first.cell.seed or words in named:
            words += f", seed {first.cell.seed}"
        # Other code of the same weights, or another engine precision, is all that can still differ.
        number, name = 2, words
        while name in named:
            name, number = f"{words} ({number})", number + 1
        named[name] = curve
    return named


def _position(stored: StoredResult, axis: str) -> float:
    return stored.protocol.threat.eps if axis == "eps" else float(steps_of(stored) or 0)


def _written(at: float, axis: str) -> str:
    return format_eps(at) if axis == "eps" else f"{at:.0f}"


def _place(at: float, lengths: Sequence[int]) -> float:
    """Where a point is along the axis: radii to scale, numbers of steps side by side."""
    return lengths.index(round(at)) if lengths else at


def _x_axis(first: StoredResult, lengths: Sequence[int]) -> dict[str, Any]:
    shape = {"nameLocation": "middle", "nameGap": 28}
    if lengths:
        return {"type": "category", "data": [str(length) for length in lengths], "name": "steps, not to scale", **shape}
    return {"type": "value", "min": 0, "name": f"radius eps, {first.protocol.threat.norm}", **shape}


def _words(named: dict[str, Curve], axis: str) -> str:
    parts = []
    for name, curve in named.items():
        first, last = curve.points[0], curve.points[-1]
        ends = [from_accuracy(one.record.accuracy, one.record.n) for one in (first, last)]
        unit = "eps" if axis == "eps" else "steps"
        start, end = (_written(_position(one, axis), axis) for one in (first, last))
        parts.append(f"{name}: {in_words(ends[0])} percent at {unit} {start}, {in_words(ends[1])} at {end}")
    return f"{'; '.join(parts)}."
