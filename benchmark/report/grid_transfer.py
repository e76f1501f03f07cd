"""Transfer matrices: how often the adversarial examples that were made on a source fool a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moebench.metrics import Measure, measure
from moebench.papers import attack_paper
from moebench.report import grid_boards
from moebench.report.evidence import WHOLE, ReadableStore, group_key, newest, result_key
from moebench.report.external import is_external
from moebench.report.grid import Absent, Cell, Column, Grid, Label, Line, Share
from moebench.report.text import fold
from moebench.schema import BoolArray, Outcomes, StoredResult

TRANSFER = "transfer"
"""The attack under whose name pairs are stored."""

Pairs = dict[tuple[str, str], StoredResult]


def transfer_grids(store: ReadableStore) -> list[Grid]:
    """One matrix per protocol, attack on the sources and seed; experts and halves of models count as models."""
    groups: dict[tuple[Any, ...], list[StoredResult]] = {}
    results = sorted((one for one in store.results(newest_only=True) if not is_external(one)), key=result_key)
    for stored in results:
        made = crafting(stored)
        if made is not None:
            settings = (str(made["attack"]), str(made.get("attack_parameters")), stored.cell.seed)
            groups.setdefault((*group_key(stored.protocol), *settings), []).append(stored)
    return [_Matrix(store, results, groups[key]).grid() for key in sorted(groups)]


def crafting(stored: StoredResult) -> Mapping[str, Any] | None:
    """How the examples of a stored pair were made: source, attack and their settings; None for any other result."""
    if stored.cell.attack != TRANSFER or stored.cell.view != WHOLE:
        return None
    settings = [one for one in stored.cell.parameters.values() if isinstance(one, Mapping) and "source" in one]
    return settings[0] if len(settings) == 1 and "attack" in settings[0] else None


class _Matrix:
    """The pairs of one matrix; the newest of each, and what each source gets right on the clean samples."""

    def __init__(self, store: ReadableStore, everything: Sequence[StoredResult], own: Sequence[StoredResult]) -> None:
        self.pairs: Pairs = {}
        self.made: dict[str, Mapping[str, Any]] = {}
        for stored in sorted(own, key=lambda one: (one.finished_at, one.result_id)):
            made = crafting(stored)
            if made is not None:
                self.pairs[str(made["source"]), stored.model.name] = stored
                self.made[str(made["source"])] = made
        self.last = newest(self.pairs.values())
        self.store = store
        where = group_key(self.last.protocol)
        weights = {source: made.get("source_weights") for source, made in self.made.items()}
        self.right: dict[str, BoolArray] = {}
        for stored in everything:
            source = stored.model.name
            same = weights.get(source) == stored.checkpoint.sha256 and group_key(stored.protocol) == where
            if same and source not in self.right:
                self.right[source] = _right(store.outcomes(stored.result_id))

    def grid(self) -> Grid:
        """The matrix as a table; beside the success rates the accuracies, for those who ask for them."""
        # A model comes before its parts, so that experts stand behind the whole.
        sources, targets = (sorted({pair[side] for pair in self.pairs}, key=_order) for side in (0, 1))
        attack, protocol, seed = str(self.made[sources[0]]["attack"]), self.last.protocol, self.last.cell.seed
        columns = [Column("source", "Source", left=True)]
        columns += [Column(f"success[{one}]", one, group="success on the target", best="high") for one in targets]
        columns += [
            Column(f"accuracy[{one}]", one, group="accuracy of the target", best="low", shown=False) for one in targets
        ]
        papers = {one.model.name: one.model.paper for one in self.pairs.values()}
        lines = []
        for source in sources:
            success = [self._success(source, target) for target in targets]
            accuracy = [self._accuracy(source, target) for target in targets]
            card = papers.get(source)
            lines.append(Line(source, (Label(source), *success, *accuracy), papers=(card,) if card else ()))
        card = attack_paper(attack)
        return Grid(
            kind="transfer",
            stem=f"transfer-{fold(attack)}-{fold(protocol.dataset)}-{protocol.threat.norm}",
            title=f"Transfer of {attack} on {grid_boards.where(protocol)}.",
            notes=(
                "Of the samples that source (row) and target (column) both classify correctly, the share that the "
                "target gets wrong under the examples made on the source.",
                "Bold: the other model whose examples hurt a target most. The asterisk marks a model's own examples "
                "(white box), which do not compete. A dash: not measured.",
            ),
            columns=tuple(columns),
            lines=tuple(lines),
            facts={
                "dataset": protocol.dataset,
                "split": protocol.split,
                "n": protocol.n,
                "norm": protocol.threat.norm,
                "eps": protocol.threat.eps,
                "protocol": protocol.version,
                "data_sha256": protocol.data_sha256,
                "attack": attack,
                "seed": seed,
            },
            papers=(card,) if card else (),
        )

    def _success(self, source: str, target: str) -> Cell:
        stored = self.pairs.get((source, target))
        if stored is None:
            return Absent("this pair has not been judged")
        outcomes = self.store.outcomes(stored.result_id)
        if source not in self.right:
            return Absent("what the source gets right on clean samples is not stored")
        both = _right(outcomes) & self.right[source]
        found = measure(outcomes.broken[both])
        return Absent("no sample is right on both") if found is None else _share(found, source == target)

    def _accuracy(self, source: str, target: str) -> Cell:
        stored = self.pairs.get((source, target))
        found = None if stored is None else measure(~self.store.outcomes(stored.result_id).broken)
        return Absent("this pair has not been judged") if found is None else _share(found, source == target)


def _share(found: Measure, white_box: bool) -> Share:
    return Share(found, white_box, "ast" if white_box else "")


def _right(outcomes: Outcomes) -> BoolArray:
    """Which samples are right before any attack, (n,)."""
    stages = np.array([bool(stage) for stage in outcomes.stage], dtype=np.bool_)
    right: BoolArray = ~outcomes.broken | stages
    return right


def _order(name: str) -> tuple[str, bool, str]:
    model, slash, part = name.rpartition("/")
    return (model, True, part) if slash else (name, False, "")
