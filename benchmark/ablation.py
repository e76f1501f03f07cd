"""What each departure of a published protocol is worth: the protocol on our models, one after the other taken away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moebench.attack_names import parse_attack
from moebench.claims import load_claims
from moebench.errors import UsageError
from moebench.evaluation import EvalSpec, Listener, evaluate
from moebench.metrics import Measure, from_accuracy
from moebench.published import ProtocolCard, Variant, card_of, shared_settings, variants
from moebench.side_by_side import EVERYTHING, claimed
from moebench.store import Store


@dataclass(frozen=True)
class AblationRow:
    """One row for all models: `kind` is "claim", "published", "all", "without", "only", "none" or "moebench".

    `measures` has a share per model, None where there is none; `texts` is what the papers say where `kind` is "claim".
    """

    kind: str
    label: str
    attack: str
    measures: tuple[Measure | None, ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ablation:
    """The rows, in order, and where they come from: the run of each model."""

    card: ProtocolCard
    models: tuple[str, ...]
    dataset: str
    n: int
    eps: float
    runs: tuple[str, ...]
    rows: tuple[AblationRow, ...]

    def to_json(self) -> dict[str, Any]:
        """As `moebench ablation --json` prints it; shares are fractions."""
        return {
            "protocol": self.card.name,
            "models": list(self.models),
            "dataset": self.dataset,
            "n": self.n,
            "eps": self.eps,
            "runs": list(self.runs),
            "rows": [
                {
                    "kind": row.kind,
                    "label": row.label,
                    "attack": row.attack,
                    "values": [None if one is None else {**asdict(one), "value": one.value} for one in row.measures],
                    "claims": list(row.texts),
                }
                for row in self.rows
            ],
        }


def ablation(
    name: str,
    models: Sequence[str],
    spec: EvalSpec,
    *,
    against: Sequence[str] = (),
    command: str = "",
    listener: Listener | None = None,
) -> Ablation:
    """Runs what the database lacks of an ablation, and reads the table from it.

    Args:
        name: a protocol, perhaps with settings that all rows share.
        models: what to evaluate.
        spec: data, radius, sample size and database; its model and attacks are not read.
        against: attacks of moebench that are shown besides the one of the protocol's kind.
        command: written to the store with each run.
        listener: told after each block of samples.

    Raises:
        UsageError: `name` is no protocol, or something else that was asked for cannot be done.
        RunError: the work failed on the way; what was finished is kept.
    """
    card, rows = planned(name)
    ours = list(dict.fromkeys((card.counterpart, *against)))
    attacks = tuple(dict.fromkeys((*(row.attack for row in rows), *ours)))
    found: list[dict[str, Measure | None]] = []
    summaries = []
    for model in models:
        summary = evaluate(
            replace(spec, model=model, attacks=attacks, views=("whole",), trust=False, command=command), listener
        )
        with Store.open(spec.db, write=False) as store:
            results = store.run(summary.run_id).results
        shares = {one.cell.attack: from_accuracy(one.record.accuracy, one.record.n) for one in results}
        left = summary.ra_worst
        found.append({**shares, "": None if left is None else from_accuracy(left, summary.n)})
        summaries.append(summary)
    first = summaries[0]
    table = [_claims(card, models)]
    table += [AblationRow(row.kind, row.label, row.attack, tuple(one[row.attack] for one in found)) for row in rows]
    table += [AblationRow("moebench", f"moebench: {one}", one, tuple(cell[one] for cell in found)) for one in ours]
    table.append(AblationRow("moebench", EVERYTHING, "", tuple(one[""] for one in found)))
    runs = tuple(summary.run_id for summary in summaries)
    return Ablation(card, tuple(models), first.dataset, first.n, first.eps, runs, tuple(table))


def planned(name: str) -> tuple[ProtocolCard, list[Variant]]:
    """The card of a protocol and the variants that its ablation runs.

    Raises:
        UsageError: it is no protocol, has no such setting, or gives one that the ablation itself sets.
    """
    asked = parse_attack(name)
    card = card_of(asked.base)
    if card is None:
        raise UsageError(f"{name!r} is no published protocol; an ablation takes one, such as published:rt-er")
    shared = shared_settings(name)
    own = [key for key in asked.settings if key not in shared]
    if own:
        raise UsageError(f"an ablation sets {own[0]} itself, row by row; leave it out of {name!r}")
    return card, variants(card, shared)


def _claims(card: ProtocolCard, models: Sequence[str]) -> AblationRow:
    known = load_claims()
    texts = tuple(claimed(card, model, known) for model in models)
    return AblationRow("claim", f"claimed (arXiv {card.arxiv}; other data)", "", texts=texts)
