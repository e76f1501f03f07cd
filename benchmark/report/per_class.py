"""Accuracy class by class: on clean images, and under the worst case over all attacks, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moebench.metrics import Measure, measure
from moebench.report.charts import PALETTE, Chart
from moebench.report.plots import error_bars, hundred, in_words, percent_axis
from moebench.report.settings import Setting
from moebench.schema import IntArray, ProtocolRecord

MOST = 24
"""Classes in a figure; where there are more it shows the weakest, and its table all."""


@dataclass(frozen=True)
class ClassRow:
    """One class; both shares are None where the sample set has none of it."""

    name: str
    n: int
    clean: Measure | None
    worst: Measure | None


def class_name(protocol: ProtocolRecord, number: int) -> str:
    """What a class is called, its number where it has no name."""
    return protocol.class_names[number] if 0 <= number < len(protocol.class_names) else str(number)


def per_class(setting: Setting, labels: IntArray) -> tuple[ClassRow, ...]:
    """Every class of the data.

    Args:
        setting: whose outcomes are counted.
        labels: of the protocol's samples by their number, (n,).
    """
    outcomes = setting.cells[0].outcomes
    own = labels[outcomes.index]
    right, stands = outcomes.clean_pred == own, setting.stands
    rows = []
    for number in range(setting.protocol.num_classes):
        here = own == number
        count = int(np.count_nonzero(here))
        rows.append(ClassRow(class_name(setting.protocol, number), count, measure(right[here]), measure(stands[here])))
    return tuple(rows)


def class_chart(setting: Setting, rows: Sequence[ClassRow]) -> Chart | None:
    """Clean and worst-case accuracy of each class as dots with intervals; None where no class has samples."""
    found = [(row, row.clean, row.worst) for row in rows if row.clean is not None and row.worst is not None]
    if not found:
        return None
    by_strength = sorted(found, key=lambda one: (one[2].value if one[2] else 0.0, one[0].name))
    chosen = [one for one in found if one in by_strength[:MOST]]
    series = []
    for name, which, colour, symbol, offset in (
        ("clean", 1, PALETTE[4], "circle", -5),
        ("under the worst case", 2, PALETTE[1], "diamond", 5),
    ):
        shares = [(place, one[which]) for place, one in enumerate(chosen)]
        dots = [
            {"value": [hundred(share.value), place], "name": chosen[place][0].name}
            for place, share in shares
            if isinstance(share, Measure)
        ]
        spans = [
            [place, hundred(share.low), hundred(share.high), offset]
            for place, share in shares
            if isinstance(share, Measure)
        ]
        style = {"symbol": symbol, "symbolSize": 9, "symbolOffset": [0, offset], "itemStyle": {"color": colour}, "z": 6}
        series += [
            {"type": "scatter", "name": name, "data": dots, **style},
            error_bars(name, spans, colour, flat=True),
        ]
    label = {"width": 120, "overflow": "truncate", "interval": 0}
    option = {
        "grid": {"left": 4, "right": 20, "top": 34, "bottom": 38, "containLabel": True},
        "legend": {"top": 0, "left": 0, "data": ["clean", "under the worst case"]},
        "tooltip": {"trigger": "item"},
        "xAxis": percent_axis("accuracy, %"),
        "yAxis": {
            "type": "category",
            "data": [one[0].name for one in chosen],
            "inverse": True,
            "axisTick": {"show": False},
            "axisLabel": label,
        },
        "series": series,
    }
    some = f", the {MOST} weakest of {len(found)} classes" if len(chosen) < len(found) else ""
    return Chart(
        anchor=f"classes-{setting.anchor}",
        title=f"Accuracy by class: {setting.label}{some}",
        words=_words(by_strength[0][0], by_strength[-1][0]),
        option=option,
        head=("Class", "Clean, % (95 %)", "Worst case, % (95 %)", "n"),
        rows=[(row.name, in_words(row.clean), in_words(row.worst), str(row.n)) for row in rows],
        height=80 + 30 * len(chosen),
    )


def _words(weakest: ClassRow, strongest: ClassRow) -> str:
    return (
        f"Weakest under the worst case is class {weakest.name} with {in_words(weakest.worst)} percent of {weakest.n} "
        f"samples, strongest is class {strongest.name} with {in_words(strongest.worst)} percent of {strongest.n}."
    )
