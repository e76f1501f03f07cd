"""Charts as data: an ECharts option, the same in words for who cannot see it, and the numbers as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moebench.schema import Json

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
"""Colours that colour-blind people tell apart (Okabe and Ito, 2008), legible on light and dark pages."""


@dataclass(frozen=True)
class Chart:
    """One figure of a page.

    `option` is what ECharts draws; colours of text and axes follow the page's theme, `renderItem: "interval"` of a
    custom series with data [position, low, high] draws error bars. `words` say in a sentence or two what is to be seen.
    `head` and `rows` are the table of its numbers, which also stands in for the figure where no script runs.
    `width` is the least width in pixels: on a narrower page the figure scrolls.
    """

    anchor: str
    title: str
    words: str
    option: Json
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    height: int = 320
    width: int = 0
