"""What attacks do to the routing, for a model's page: shift per layer, from–to matrices, and classes by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moebench.report.charts import Chart
from moebench.report.evidence import WHOLE, Evidence
from moebench.report.per_class import class_name
from moebench.report.plots import INK, hundred
from moebench.report.settings import Setting, left, view_key
from moebench.report.text import digest
from moebench.schema import RoutingLayer

SHADES = ("rgba(0, 114, 178, 0.04)", "rgba(0, 114, 178, 0.7)")
"""Of a heat map: transparent enough for the page's own ink to be legible on it, light and dark."""

LABELLED = 10
"""Experts up to which a cell of a heat map bears its number."""

WIDE = 16
"""Experts up to which the table below a heat map is the whole matrix; above, it lists the largest moves."""

MOVES = 40


@dataclass(frozen=True)
class ShiftRow:
    """One layer under one result; `leads` says that it is of the view's strongest attack."""

    attack: str
    view: str
    layer: RoutingLayer
    n: int
    leads: bool


@dataclass(frozen=True)
class Map:
    """A figure that may be folded under its title."""

    title: str
    chart: Chart
    first: bool


@dataclass(frozen=True)
class RoutingShift:
    """The routing of one setting: a row per result and layer, and figures of the strongest attack on each view."""

    rows: tuple[ShiftRow, ...]
    maps: tuple[Map, ...]
    classes: tuple[Map, ...]
    per_token: bool


def routing_shift(setting: Setting) -> RoutingShift | None:
    """The routing of the results of a setting; None where none has any."""
    routed = [one for one in setting.cells if one.stored.record.routing]
    if not routed:
        return None
    leading = _leading(routed)
    rows = tuple(
        ShiftRow(
            f"{one.attack} (warm)" if one.warm else one.attack, one.view, layer, one.stored.record.n, one in leading
        )
        for one in routed
        for layer in one.stored.record.routing
    )
    layers = len(leading[0].stored.record.routing)
    maps = []
    for one in leading:
        for place, layer in enumerate(one.stored.record.routing):
            first = one is leading[0] and (layers <= 2 or place == 0)
            if any(map(any, layer.moves)):
                where = "the whole model" if one.view == WHOLE else one.view
                title = f"{layer.name}: {one.attack} on {where}"
                maps.append(Map(title, _moves_chart(setting, one, layer, title), first))
    return RoutingShift(
        rows,
        tuple(maps),
        _classes(setting, leading[0]),
        any(_per_token(leading[0], layer) for layer in leading[0].stored.record.routing),
    )


def _leading(routed: Sequence[Evidence]) -> list[Evidence]:
    """The result of each view that leaves fewest samples, the whole model's first."""
    views: dict[str, list[Evidence]] = {}
    for one in routed:
        views.setdefault(one.view, []).append(one)
    return [
        min(views[view], key=lambda one: (left(one), one.attack, one.stored.result_id))
        for view in sorted(views, key=view_key)
    ]


def _per_token(one: Evidence, layer: RoutingLayer) -> bool:
    """Whether moves count tokens: then there are more of them than samples that were right, which are attacked."""
    record = one.stored.record
    return sum(map(sum, layer.moves)) > round(record.clean_accuracy * record.n)


def _moves_chart(setting: Setting, one: Evidence, layer: RoutingLayer, title: str) -> Chart:
    """From which first expert (row) to which (column), in percent of the row."""
    moves, total = layer.moves, sum(map(sum, layer.moves))
    kept = sum(row[place] for place, row in enumerate(moves) if place < len(row))
    names = [str(number) for number in range(len(moves))]
    what = "tokens" if _per_token(one, layer) else "samples"
    head, rows = _table(moves)
    return Chart(
        anchor=f"moves-{setting.anchor}-{digest(repr((one.stored.result_id, layer.name)))}",
        title=f"Where {what} went: {title}",
        words=f"{kept} of {total} {what} keep their first expert. {_largest(moves)}",
        option=_heat(names, names, moves, "first expert on the attacked image", "on the clean image"),
        head=head,
        rows=rows,
        height=min(560, 90 + 34 * len(moves)),
    )


def _classes(setting: Setting, one: Evidence) -> tuple[Map, ...]:
    """Which experts answer which classes on clean images; the same under every attack."""
    found = []
    for place, layer in enumerate(one.stored.record.routing):
        if not layer.classes or not any(map(any, layer.classes)):
            continue
        experts = [str(number) for number in range(len(layer.classes[0]))]
        classes = [class_name(setting.protocol, number) for number in range(len(layer.classes))]
        title = f"Classes and experts: {layer.name}"
        chart = Chart(
            anchor=f"experts-{setting.anchor}-{digest(layer.name)}",
            title=title,
            words=f"How many samples of each class the layer {layer.name} sends to each expert on the clean image.",
            option=_heat(experts, classes, layer.classes, "first expert", "class"),
            head=("Class", *(f"expert {name}" for name in experts)),
            rows=[(name, *map(str, counts)) for name, counts in zip(classes, layer.classes, strict=True)],
            height=min(720, 90 + 24 * len(classes)),
        )
        found.append(Map(title, chart, place == 0))
    return tuple(found)


def _heat(
    columns: Sequence[str], lines: Sequence[str], counts: Sequence[Sequence[int]], x: str, y: str
) -> dict[str, Any]:
    """A heat map of counts, each in percent of its row; a row without samples stays empty."""
    labelled = len(columns) <= LABELLED
    data: list[Any] = []
    for line, row in enumerate(counts):
        for column, count in enumerate(row if sum(row) else ()):
            cell = [column, line, round(hundred(count / sum(row)))]
            # Names are for tooltips; large maps do without, to stay small.
            data.append({"value": cell, "name": f"{lines[line]} → {columns[column]}"} if labelled else cell)
    flat = {"splitLine": {"show": False}, "axisTick": {"show": False}}
    label = {"interval": 0 if len(lines) <= 32 else "auto", "width": 90, "overflow": "truncate"}
    return {
        "grid": {"left": 26, "right": 10, "top": 8, "bottom": 36 if labelled else 76, "containLabel": True},
        "tooltip": {"trigger": "item"},
        "xAxis": {"type": "category", "data": columns, "name": x, "nameLocation": "middle", "nameGap": 26, **flat},
        "yAxis": {
            **{"type": "category", "data": lines, "inverse": True, "name": y, "nameLocation": "middle", **flat},
            **{"nameGap": 26 if max(map(len, lines), default=0) <= 3 else 100, "axisLabel": label},
        },
        "visualMap": {
            **({"type": "continuous", "show": False} if labelled else {"type": "piecewise", "splitNumber": 5}),
            **{"min": 0, "max": 100, "orient": "horizontal", "left": "center", "bottom": 0},
            **{"text": ["100 % of the row", "0"], "inRange": {"color": SHADES}},
        },
        "series": [
            {
                "type": "heatmap",
                "name": "share of the row, %",
                "data": data,
                "label": {"show": labelled, "color": INK},
                "emphasis": {"itemStyle": {"borderWidth": 1}},
            }
        ],
    }


def _table(moves: Sequence[Sequence[int]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    if len(moves) <= WIDE:
        head = ("From expert", *(f"to {number}" for number in range(len(moves))))
        return head, [(str(place), *map(str, row)) for place, row in enumerate(moves)]
    return ("From expert", "to expert", "count"), [
        (str(start), str(end), str(count)) for count, start, end in _ranked(moves)[:MOVES]
    ]


def _ranked(moves: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Moves to another expert as (count, from, to), largest first."""
    found = [
        (count, start, end)
        for start, row in enumerate(moves)
        for end, count in enumerate(row)
        if count and start != end
    ]
    return sorted(found, key=lambda move: (-move[0], move[1], move[2]))


def _largest(moves: Sequence[Sequence[int]]) -> str:
    ranked = _ranked(moves)
    if not ranked:
        return "None moves to another one."
    count, start, end = ranked[0]
    return f"The largest move is of {count} from expert {start} to expert {end}."
