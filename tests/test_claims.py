from __future__ import annotations

import csv
from importlib.resources import files
from pathlib import Path

from moebench.claims import load_claims
from moebench.schema import Claim
from moebench.store import Store


def test_every_row_of_the_table_becomes_a_claim() -> None:
    with Path(str(files("moebench") / "data" / "claims.csv")).open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    claims = load_claims()
    assert len(claims) == len(rows) > 800
    for claim, row in zip(claims, rows, strict=True):
        assert (claim.arxiv, claim.registry_name, claim.metric) == (
            row["paper_arxiv_id"],
            row["registry_name"],
            row["metric"],
        )
        assert claim.value == float(row["value_percent"])
        assert claim.source in row["source"] and (claim.flag or "") in row["source"]


def test_a_known_claim() -> None:
    assert load_claims()[1] == Claim(
        arxiv="2502.06832",
        model="ST MoE",
        registry_name="st-moe",
        dataset="CIFAR-10",
        architecture="MoE top-1, E=4, ResNet-18 experts",
        attack="PGD",
        attack_params="Linf eps=8/255, 50 steps, step 2/255 (values from official code; elided in the document)",
        metric="RA",
        value=52.54,
        source="2502.06832 Table 1 (=Table 3)",
        flag="undefended model: whole-MoE RA far above RA-E; official attack is gradient-masked "
        "(fp16, routing ignored); value identical to TRADES RA in Table 6",
    )


def test_sources_and_flags_are_split() -> None:
    claims = load_claims()
    assert sum(claim.flag is not None for claim in claims) > 300
    assert not any("FLAG" in claim.source or claim.source.endswith("|") for claim in claims)
    assert not any(claim.flag is not None and claim.flag.startswith(("|", "FLAG")) for claim in claims)
    assert all(claim.source for claim in claims)


def test_values_are_percentages_of_accuracy_like_metrics() -> None:
    shares = [claim.value for claim in load_claims() if claim.metric in ("SA", "RA", "RA-E", "RA-R")]
    assert len(shares) > 700 and all(0 <= value <= 100 for value in shares)


def test_the_store_gives_the_same_claims(tmp_path: Path) -> None:
    with Store.open(tmp_path / "r.db", write=True) as store:
        assert store.claims() == load_claims()
        own = store.claims("st-moe", "CIFAR-10")
        assert own == [
            claim for claim in load_claims() if (claim.registry_name, claim.dataset) == ("st-moe", "CIFAR-10")
        ]
        assert own and store.claims("no-such-model") == []
