"""The transfer page: a heat map, what it says in words, and the pairs as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from moebench.metrics import Measure
from moebench.report.charts import Chart
from moebench.report.heatmap import heat_map
from moebench.report.text import p_value, percent, safe
from moebench.report.transfers import Pair, Reach, TransferBoard

COLUMNS = (
    *("dataset", "split", "n", "norm", "eps", "protocol", "data_sha256", "attack", "source_view", "seed"),
    *("source", "source_weights", "target", "target_weights", "white_box"),
    *("accuracy", "ci_low", "ci_high", "success_rate", "success_ci_low", "success_ci_high", "success_n", "command"),
)


@dataclass(frozen=True)
class TransferSection:
    """One board as the page shows it."""

    board: TransferBoard
    chart: Chart
    message: tuple[str, ...]


def section(board: TransferBoard) -> TransferSection:
    """Chart and words of one board."""
    return TransferSection(board, _chart(board), tuple(message(board)))


def interval(found: Measure) -> str:
    """A share in percent with its interval."""
    return f"{percent(found.value, found.n)} % ({percent(found.low, found.n)}–{percent(found.high, found.n)})"


def pair_words(board: TransferBoard, at: tuple[int, int]) -> str:
    """One pair in words, with what is behind its number."""
    pair, source, target = board.pairs[at], board.sources[at[0]], board.targets[at[1]]
    whose = "its own images" if pair.white_box else f"images made on {source.label}"
    words = f"{target.label} gets {interval(pair.accuracy)} of {pair.accuracy.n} samples right under {whose}"
    if pair.success is not None:
        words += f"; they fool it on {interval(pair.success)} of the {pair.success.n} that both get right clean"
    return words


def message(board: TransferBoard) -> list[str]:
    """What the matrix says, a sentence each."""
    said = []
    reaches = board.reaches
    if len(reaches) == 1:
        said.append(f"Images made on {reaches[0].source.label} cost {_cost(reaches[0])}.")
    elif reaches:
        best, worst = reaches[0], reaches[-1]
        said.append(
            f"Images made on {best.source.label} transfer best: they cost {_cost(best)}, {_beyond(best)} the average "
            "source costs the same targets."
        )
        said.append(
            f"Those of {worst.source.label} transfer least: they cost {_cost(worst)}, {_beyond(worst)} the average."
        )
    own = board.white_box_points
    if reaches and own is not None:
        mean = fmean(reach.points for reach in reaches)
        said.append(
            f"On average a source's images cost itself {own:.1f} points of accuracy and other models {mean:.1f}."
        )
    for one in board.surprises:
        said.append(
            f"Images made on {one.source.label} leave {interval(one.foreign)} of {one.target.label} standing, fewer "
            f"than the {interval(one.own)} that its own images leave (p {_equals(one.p)}): the attack misses on "
            f"{one.target.label} what it finds elsewhere, a sign of masked gradients."
        )
    return said


def _cost(reach: Reach) -> str:
    models = "one other model" if reach.targets == 1 else f"{reach.targets} other models"
    return f"{models} {reach.points:.1f} points of accuracy" + (" on average" if reach.targets > 1 else "")


def _beyond(reach: Reach) -> str:
    return f"{abs(reach.beyond):.1f} {'more' if reach.beyond >= 0 else 'less'} than"


def _equals(p: float) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _chart(board: TransferBoard) -> Chart:
    sources, targets = ([party.label for party in parties] for parties in (board.sources, board.targets))
    values = {
        at: (100 * pair.accuracy.value, _tip(board, at, pair), pair.white_box) for at, pair in board.pairs.items()
    }
    title = f"Robust accuracy of the targets (across) on images of the sources (down), {board.attack}, %"
    words = (
        f"Heat map of {len(sources)} sources and {len(targets)} targets; darker means fewer samples left standing. "
        + " ".join(message(board)[:2])
    )
    table = [
        (source, *(_cell(board.pairs.get((row, column))) for column in range(len(targets))))
        for row, source in enumerate(sources)
    ]
    head = ("source \\ target, % with 95 % interval", *targets)
    anchor = f"heat-{board.anchor}"
    return heat_map(anchor, title, words, sources, targets, values, head, table, dark_is_low=True)


def _tip(board: TransferBoard, at: tuple[int, int], pair: Pair) -> str:
    source, target = board.sources[at[0]].label, board.targets[at[1]].label
    lines = [f"{_short(source)} → {_short(target)}{' (white box)' if pair.white_box else ''}"]
    lines.append(f"RA {interval(pair.accuracy)}")
    if pair.success is not None:
        lines.append(f"success {interval(pair.success)}, n = {pair.success.n}")
    return "\n".join(lines)


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:39]}…"


def _cell(pair: Pair | None) -> str:
    return "—" if pair is None else interval(pair.accuracy).replace(" %", "")


def transfer_csv(boards: Sequence[TransferBoard]) -> str:
    """All pairs in one table: fractions, empty where there is nothing to count."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for board in boards:
        for at in sorted(board.pairs):
            writer.writerow(map(safe, _row(board, at)))
    return text.getvalue()


def _row(board: TransferBoard, at: tuple[int, int]) -> list[Any]:
    protocol, pair = board.protocol, board.pairs[at]
    source, target = board.sources[at[0]], board.targets[at[1]]
    return [
        *(protocol.dataset, protocol.split, protocol.n, protocol.threat.norm, protocol.threat.eps, protocol.version),
        *(protocol.data_sha256, board.attack, board.view, board.seed),
        *(source.name, source.weights, target.name, target.weights, "yes" if pair.white_box else "no"),
        *_numbers(pair.accuracy),
        *_numbers(pair.success),
        None if pair.success is None else pair.success.n,
        pair.stored.command,
    ]


def _numbers(found: Measure | None) -> tuple[str | None, ...]:
    if found is None:
        return (None, None, None)
    return tuple(f"{value:.6f}" for value in (found.value, found.low, found.high))


def clean(board: TransferBoard, target: int) -> Measure | None:
    """The clean accuracy of a target on the samples of its pairs; None where it has none."""
    right = board.targets[target].right
    return None if right is None or not right.size else Measure(int(right.sum()), int(right.size))
