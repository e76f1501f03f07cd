"""Transfer matrices as tables for papers: how often examples made on a source fool a target."""

from __future__ import annotations

from moebench.metrics import Measure
from moebench.papers import attack_paper
from moebench.report import grid_boards, transfers
from moebench.report.evidence import ReadableStore, protocol_facts
from moebench.report.external import is_external
from moebench.report.grid import Absent, Cell, Column, Grid, Label, Line, Share
from moebench.report.text import fold
from moebench.report.transfers import Pair, Party, TransferBoard

UNJUDGED = "this pair has not been judged"


def transfer_grids(store: ReadableStore) -> list[Grid]:
    """One matrix per protocol, attack on the sources and seed; experts and halves of models count as models."""
    return [_grid(board) for board in transfers.build(store, lambda stored: not is_external(stored))]


def _grid(board: TransferBoard) -> Grid:
    """The matrix as a table; beside the success rates the accuracies, for those who ask for them."""
    names = [party.label for party in board.targets]
    columns = [Column("source", "Source", left=True)]
    columns += [Column(f"success[{one}]", one, group="success on the target", best="high") for one in names]
    columns += [
        Column(f"accuracy[{one}]", one, group="accuracy of the target", best="low", shown=False) for one in names
    ]
    papers = {pair.stored.model.name: pair.stored.model.paper for pair in board.pairs.values()}
    lines = []
    for row, source in enumerate(board.sources):
        pairs = [board.pairs.get((row, column)) for column in range(len(board.targets))]
        cells = (*(_success(source, pair) for pair in pairs), *map(_accuracy, pairs))
        card = papers.get(source.name)
        lines.append(Line(source.label, (Label(source.label), *cells), papers=(card,) if card else ()))
    card, protocol = attack_paper(board.attack), board.protocol
    return Grid(
        kind="transfer",
        stem=f"transfer-{fold(board.attack)}-{fold(protocol.dataset)}-{protocol.threat.norm}",
        title=f"Transfer of {board.attack} on {grid_boards.where(protocol)}.",
        notes=(
            "Of the samples that source (row) and target (column) both classify correctly, the share that the "
            "target gets wrong under the examples made on the source.",
            "Bold: the other model whose examples hurt a target most. The asterisk marks a model's own examples "
            "(white box), which do not compete. A dash: not measured.",
        ),
        columns=tuple(columns),
        lines=tuple(lines),
        facts={
            **protocol_facts(protocol),
            "attack": board.attack,
            "seed": board.seed,
        },
        papers=(card,) if card else (),
    )


def _success(source: Party, pair: Pair | None) -> Cell:
    if pair is None:
        return Absent(UNJUDGED)
    if source.right is None:
        return Absent("what the source gets right on clean samples is not stored")
    return Absent("no sample is right on both") if pair.success is None else _share(pair.success, pair)


def _accuracy(pair: Pair | None) -> Cell:
    return Absent(UNJUDGED) if pair is None else _share(pair.accuracy, pair)


def _share(found: Measure, pair: Pair) -> Share:
    return Share(found, pair.white_box, "ast" if pair.white_box else "")
