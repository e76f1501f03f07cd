"""Bars: what each attack on each view leaves, with its interval, and what was published for that attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moebench.metrics import Measure, measure
from moebench.report.charts import PALETTE, Chart
from moebench.report.claims import VIEWS, ClaimRow, our_attack, same_name, same_threat
from moebench.report.evidence import WHOLE, Evidence
from moebench.report.plots import INK, error_bars, hundred, in_words, percent_axis
from moebench.report.settings import Setting
from moebench.report.text import percent
from moebench.schema import Claim, Json, ProtocolRecord

CLEAN = PALETTE[6]
COLOURS = {WHOLE: PALETTE[0], "experts": PALETTE[1], "router": PALETTE[2], "standard": PALETTE[3], "robust": PALETTE[5]}
OTHER_VIEW = PALETTE[4]
CLAIMED, ELSEWHERE = "claimed", "claimed, on other data"


@dataclass(frozen=True)
class Mark:
    """A published number in percent; `kind` says whether it is for the data of the figure."""

    kind: str
    value: float
    dataset: str
    source: str

    @property
    def words(self) -> str:
        """What its tooltip says."""
        return f"claimed {self.value:.2f} on {self.dataset} ({self.source})"


@dataclass(frozen=True)
class Bar:
    """A row of the figure; one without a `name` is a heading."""

    label: str
    name: str = ""
    measure: Measure | None = None
    colour: str = ""
    claims: tuple[Mark, ...] = ()


def bars_chart(setting: Setting, claims: Sequence[ClaimRow]) -> Chart:
    """What is left after each attack on each view, in rows by view, weak attacks first.

    Args:
        setting: whose results are shown.
        claims: the published numbers of the model that are to be marked.
    """
    rows = _rows(setting, claims)
    series = _series(rows)
    labels = [{"value": row.label, **({} if row.name else {"textStyle": {"fontWeight": "bold"}})} for row in rows]
    numbers = [percent(row.measure.value, row.measure.n) if row.measure else "" for row in rows]
    quiet = {"axisLine": {"show": False}, "axisTick": {"show": False}, "splitLine": {"show": False}, "inverse": True}
    option = {
        "grid": {"left": 14, "right": 8, "top": 34, "bottom": 38, "containLabel": True},
        "legend": {"top": 0, "left": 0, "data": [one["name"] for one in series[1:]], "itemHeight": 10},
        "tooltip": {"trigger": "item"},
        "xAxis": percent_axis("accuracy left, %"),
        "yAxis": [
            {"type": "category", "data": labels, **quiet, "axisLabel": _label(130)},
            {"type": "category", "data": numbers, **quiet, "position": "right", "axisLabel": _label(44)},
        ],
        "series": series,
    }
    return Chart(
        anchor=f"bars-{setting.anchor}",
        title=f"Accuracy by attack and view: {setting.label}",
        words=_words(setting, claimed=len(series) > 2),
        option=option,
        head=("Attack", "View", "Accuracy left, % (95 %)", "n", "Claimed, %"),
        rows=_table(setting, rows),
        height=76 + 21 * len(rows),
    )


def _series(rows: Sequence[Bar]) -> list[Json]:
    """Bars, their intervals, and diamonds for published numbers, open ones for those on other data."""
    values = [
        {"value": hundred(row.measure.value), "name": row.name, "itemStyle": {"color": row.colour}}
        if row.measure is not None
        else None
        for row in rows
    ]
    spans = [
        [place, hundred(row.measure.low), hundred(row.measure.high)]
        for place, row in enumerate(rows)
        if row.measure is not None
    ]
    series: list[Json] = [
        {"type": "bar", "name": "accuracy left, %", "data": values, "barWidth": 13},
        error_bars("95 % interval", spans, INK, flat=True),
    ]
    for kind, fill in ((CLAIMED, INK), (ELSEWHERE, "transparent")):
        marks = [
            {"value": [mark.value, place], "name": mark.words}
            for place, row in enumerate(rows)
            for mark in row.claims
            if mark.kind == kind
        ]
        if marks:
            style = {"color": fill, "borderColor": INK, "borderWidth": 1.5}
            look = {"symbol": "diamond", "symbolSize": 11, "itemStyle": style, "z": 6}
            series.append({"type": "scatter", "name": kind, "data": marks, **look})
    return series


def _label(width: int) -> dict[str, Any]:
    return {"width": width, "overflow": "truncate", "interval": 0, "fontSize": 12}


def _rows(setting: Setting, claims: Sequence[ClaimRow]) -> list[Bar]:
    rows = [
        Bar("clean images", "clean images", setting.clean, CLEAN, _clean_claims(setting, claims)),
        Bar("all attacks", "all attacks together (RA-worst)", setting.worst, COLOURS[WHOLE]),
    ]
    for view in setting.views:
        rows.append(Bar("whole model" if view == WHOLE else view))
        colour = COLOURS.get(view, OTHER_VIEW)
        told: set[str] = set()
        for one in (one for one in setting.cells if one.view == view):
            label = _name(one, [other for other in setting.cells if other.view == view])
            # The same number of a paper stands at the first result of its kind only.
            found = () if one.attack in told else _claims(one, claims)
            told.add(one.attack)
            name = f"{label} on {'the whole model' if view == WHOLE else view}"
            rows.append(Bar(label, name, measure(~one.outcomes.broken), colour, found))
    return rows


def _name(one: Evidence, same_view: Sequence[Evidence]) -> str:
    """The attack, and what tells it from another result of the same attack."""
    same = [other for other in same_view if (other.attack, other.warm) == (one.attack, one.warm)]
    words = [one.attack]
    words += ["(warm)"] if one.warm else []
    if len(same) > 1:
        seeds = {other.stored.cell.seed for other in same}
        words.append(f"seed {one.stored.cell.seed}" if len(seeds) == len(same) else f"#{same.index(one) + 1}")
    return " ".join(words)


def _claims(one: Evidence, claims: Sequence[ClaimRow]) -> tuple[Mark, ...]:
    """The claims for the attack and view of a result; on its own data set, for its threat model too."""
    protocol = one.stored.protocol
    found = []
    for row in claims:
        claim = row.claim
        view = "smooth" if claim.attack == "smooth PGD" and claim.metric == "RA" else VIEWS.get(claim.metric)
        if view != one.view or our_attack(claim) != one.attack:
            continue
        if same_name(claim.dataset, protocol.dataset) and not same_threat(claim.attack_params, protocol.threat):
            continue
        found.append(_mark(claim, protocol))
    return tuple(dict.fromkeys(found))


def _clean_claims(setting: Setting, claims: Sequence[ClaimRow]) -> tuple[Mark, ...]:
    found = (_mark(row.claim, setting.protocol) for row in claims if row.claim.metric == "SA")
    return tuple(dict.fromkeys(found))


def _mark(claim: Claim, protocol: ProtocolRecord) -> Mark:
    kind = CLAIMED if same_name(claim.dataset, protocol.dataset) else ELSEWHERE
    return Mark(kind, claim.value, claim.dataset, claim.source)


def _table(setting: Setting, rows: Sequence[Bar]) -> tuple[tuple[str, ...], ...]:
    view, found = "", []
    for row in rows:
        if not row.name:
            view = row.label
            continue
        claimed = "; ".join(dict.fromkeys(f"{mark.value:.2f} {mark.dataset}" for mark in row.claims)) or "—"
        found.append((row.label, view or "—", in_words(row.measure), str(setting.protocol.n), claimed))
    return tuple(found)


def _words(setting: Setting, claimed: bool) -> str:
    """What the figure shows, for who cannot see it."""
    strongest = setting.strongest()
    parts = [f"{in_words(setting.clean)} percent of {setting.protocol.n} clean images are right"]
    if strongest is not None:
        parts.append(f"{strongest.attack} on the whole model leaves {in_words(measure(~strongest.outcomes.broken))}")
    parts.append(f"all attacks together leave {in_words(setting.worst)}")
    marks = " Diamonds are published numbers, marked as claimed." if claimed else ""
    return f"{'; '.join(parts)}.{marks}"
