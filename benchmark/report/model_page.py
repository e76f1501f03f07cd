"""What a model's page shows beyond its row of the leaderboard: figures, experts, pictures, origins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moebench.report.bars import bars_chart
from moebench.report.charts import Chart
from moebench.report.claims import ClaimRow, of_main_configuration
from moebench.report.eps_curves import curve_charts
from moebench.report.evidence import WHOLE, Evidence, ReadableStore
from moebench.report.examples import Gallery, gallery
from moebench.report.expert_rows import ExpertTable, expert_table
from moebench.report.history import history_chart
from moebench.report.origins import origins
from moebench.report.per_class import class_chart, per_class
from moebench.report.routing_shift import RoutingShift, routing_shift
from moebench.report.settings import Key, Setting, left, settings
from moebench.schema import CheckpointRecord

Origins = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Panel:
    """A figure, or None and why there is none."""

    chart: Chart | None
    why: str = ""


@dataclass(frozen=True)
class SettingPage:
    """One checkpoint on one sample set under one threat model."""

    setting: Setting
    bars: Chart
    classes: Panel
    experts: ExpertTable | None
    routing: RoutingShift | None
    galleries: tuple[Gallery, ...]
    origins: Origins


@dataclass(frozen=True)
class Details:
    """All figures of a page; `files` are the pictures beside it, by path from the folder of pages.

    `claims` are those that have a measurement beside them, then those of a paper's main configuration.
    """

    settings: tuple[SettingPage, ...]
    eps: tuple[Chart, ...]
    steps: tuple[Chart, ...]
    histories: Mapping[str, Panel]
    claims: tuple[ClaimRow, ...]
    other_claims: tuple[ClaimRow, ...]
    files: Mapping[str, bytes] = field(repr=False)

    def have(self, what: str) -> bool:
        """Whether any setting has experts, routing or galleries."""
        return any(getattr(page, what) for page in self.settings)


def details(
    store: ReadableStore,
    own: Sequence[Evidence],
    parts: Sequence[Evidence],
    checkpoints: Sequence[CheckpointRecord],
    claims: Sequence[ClaimRow],
    leaders: Sequence[Key],
) -> Details:
    """The figures of one model.

    Args:
        store: asked for labels and examples.
        own: all results of the model.
        parts: results of parts of models, of any model.
        checkpoints: of the model.
        claims: published numbers of the model.
        leaders: keys of the settings whose boards lead, in their order.
    """
    main = of_main_configuration(claims)
    pages = tuple(_setting_page(store, setting, parts, main) for setting in settings(own, leaders))
    first = (*(row for row in claims if row.measured), *(row for row in main if not row.measured))
    files: dict[str, bytes] = {}
    for page in pages:
        for one in page.galleries:
            files |= one.files
    return Details(
        settings=pages,
        eps=curve_charts(own, "eps"),
        steps=curve_charts(own, "steps"),
        histories={checkpoint.sha256: _history(checkpoint) for checkpoint in checkpoints},
        claims=first,
        other_claims=tuple(row for row in claims if row not in first),
        files=files,
    )


def _setting_page(
    store: ReadableStore, setting: Setting, parts: Sequence[Evidence], claims: Sequence[ClaimRow]
) -> SettingPage:
    return SettingPage(
        setting=setting,
        bars=bars_chart(setting, claims),
        classes=_classes(store, setting),
        experts=expert_table(setting, parts),
        routing=routing_shift(setting),
        galleries=_galleries(store, setting),
        origins=origins(setting),
    )


def _classes(store: ReadableStore, setting: Setting) -> Panel:
    labels = store.labels(setting.protocol)
    if labels is None:
        return Panel(None, "the store has no labels of these samples: it was filled before labels were kept")
    chart = class_chart(setting, per_class(setting, labels))
    return Panel(chart) if chart is not None else Panel(None, "there are no samples")


def _galleries(store: ReadableStore, setting: Setting) -> tuple[Gallery, ...]:
    """The examples of the strongest attack on each view that has some, those on the whole model first."""
    shown: dict[str, Gallery] = {}
    for one in sorted(setting.cells, key=lambda one: (one.view != WHOLE, one.view, left(one))):
        if one.view not in shown:
            found = gallery(setting, one, store.examples(one.stored.result_id))
            if found is not None:
                shown[one.view] = found
    return tuple(shown.values())


def _history(checkpoint: CheckpointRecord) -> Panel:
    chart = history_chart(checkpoint)
    if chart is not None:
        return Panel(chart)
    entries = len(checkpoint.training_log)
    return Panel(
        None,
        "no training log came with these weights"
        if not entries
        else f"the training log has {entries} usable entries at most, a curve needs two",
    )
