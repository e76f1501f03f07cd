"""The training history of a checkpoint as a figure: validation accuracy and loss over the epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moebench.report.charts import PALETTE, Chart
from moebench.report.plots import finite, hundred, percent_axis
from moebench.report.text import flatten
from moebench.schema import CheckpointRecord, Json

ACCURACIES = {"val_clean": ("clean", PALETTE[4]), "val_robust": ("robust", PALETTE[1])}


def history_chart(checkpoint: CheckpointRecord) -> Chart | None:
    """Accuracy on the validation split above, the loss below; None where there are not two epochs of either."""
    log = [line for line in checkpoint.training_log if finite(line.get("epoch")) is not None]
    curves = {key: _curve(log, key) for key in (*ACCURACIES, "loss")}
    if max(map(len, curves.values())) < 2:
        return None
    series: list[Any] = [
        _line(name, [[epoch, hundred(value)] for epoch, value in curves[key]], colour, 0)
        for key, (name, colour) in ACCURACIES.items()
        if curves[key]
    ]
    chosen = _chosen(checkpoint.recipe)
    if chosen is not None and series:
        mark = {
            "silent": True,
            "symbol": "none",
            "data": [{"xAxis": chosen}],
            "label": {"formatter": "kept", "position": "insideEndTop"},
        }
        series[-1]["markLine"] = {**mark, "lineStyle": {"color": PALETTE[6], "type": "dashed"}}
    above, both = bool(series), bool(series) and bool(curves["loss"])
    if curves["loss"]:
        series.append(_line("training loss", curves["loss"], PALETTE[6], int(above)))
    epochs = {
        "type": "value",
        "min": "dataMin",
        "max": "dataMax",
        "nameLocation": "middle",
        "nameGap": 26,
    }
    least = min((value for _, value in curves["loss"]), default=0.0)
    loss_axis = {
        "type": "value",
        "name": "loss",
        "min": 0 if least >= 0 else None,
        "nameLocation": "middle",
        "nameGap": 36,
        "splitNumber": 2,
    }
    axes = [percent_axis("validation, %")] * above + [loss_axis] * bool(curves["loss"])
    grids: list[Json] = [{"left": 56, "right": 18, "top": 40, "bottom": 150 if both else 44}]
    grids += [{"left": 56, "right": 18, "height": 80, "bottom": 40}] if both else []
    option = {
        "grid": grids,
        "legend": {"top": 0, "left": 0},
        "tooltip": {"trigger": "axis"},
        "xAxis": [
            {**epochs, "gridIndex": place, "name": "epoch" if place == len(axes) - 1 else ""}
            for place in range(len(axes))
        ],
        "yAxis": [{**axis, "gridIndex": place} for place, axis in enumerate(axes)],
        "series": series,
    }
    head, rows = _table(log)
    return Chart(
        anchor=f"history-{checkpoint.sha256[:8]}",
        title="Training history",
        words=_words(curves, chosen),
        option=option,
        head=head,
        rows=rows,
        height=400 if both else 280,
    )


def _curve(log: Sequence[Json], key: str) -> list[list[float]]:
    pairs = ((finite(line.get("epoch")), finite(line.get(key))) for line in log)
    return [[epoch, value] for epoch, value in pairs if epoch is not None and value is not None]


def _line(name: str, data: Sequence[Sequence[float]], colour: str, grid: int) -> dict[str, Any]:
    look = {"itemStyle": {"color": colour}, "lineStyle": {"color": colour, "width": 1.6}, "showSymbol": False}
    return {"type": "line", "name": name, "data": data, "xAxisIndex": grid, "yAxisIndex": grid, **look}


def _chosen(recipe: Json) -> float | None:
    validation = recipe.get("validation")
    return finite(validation.get("epoch")) if isinstance(validation, Mapping) else None


def _table(log: Sequence[Json]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    lines = [dict(flatten(line)) for line in log]
    known = dict.fromkeys(key for line in lines for key in line)
    keys = ["epoch", *(key for key in known if key != "epoch")]
    return tuple(keys), [tuple(line.get(key, "—") for key in keys) for line in lines]


def _words(curves: Mapping[str, Sequence[Sequence[float]]], chosen: float | None) -> str:
    parts = [
        f"validation accuracy, {name}: {100 * curves[key][0][1]:.1f} percent at first, "
        f"{100 * curves[key][-1][1]:.1f} at last"
        for key, (name, _) in ACCURACIES.items()
        if curves[key]
    ]
    if curves["loss"]:
        parts.append(f"loss {curves['loss'][0][1]:.3g} at first, {curves['loss'][-1][1]:.3g} at last")
    return f"{'; '.join(parts)}{f'; the weights of epoch {chosen:g} were kept' if chosen is not None else ''}."
