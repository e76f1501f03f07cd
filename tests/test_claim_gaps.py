"""Claims beside measurements: which two numbers may be compared, and what is said where none can."""

from __future__ import annotations

import pytest
from fake_store import FakeStore, claim, first_broken, model, protocol

from moebench.report import boards, render, tables
from moebench.report.claims import our_attack, same_threat
from moebench.schema import ThreatModel


def test_claims_of_another_data_set_are_labelled_and_not_compared() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 40))
    store.published = [claim("a", 69.09, flag="too good")]
    files = render(store)
    assert "claimed 69.09" in files["index.html"]
    assert "PGD, CIFAR-10 (other data set)" in files["index.html"]
    assert "too good" in files["index.html"]
    assert "published for another data set than digits" in files["index.html"]
    (row,) = tables.build(store).models[0].claims
    assert (row.measured, row.difference, row.why) == (None, None, "not measured on CIFAR-10")


def test_a_claim_is_compared_where_data_norm_radius_view_and_attack_agree() -> None:
    store, cifar = FakeStore(), protocol("cifar10", 200, eps=8 / 255)
    store.add(model("a"), "pgd-50", first_broken(200, 100), on=cifar, clean=0.9)
    store.add(model("a"), "pgd-50", first_broken(200, 150), "experts", on=cifar, clean=0.9)
    store.published = [
        claim("a", 69.09),
        claim("a", 60.0, metric="RA-E"),
        claim("a", 92.0, metric="SA", attack="none", attack_params=""),
        claim("a", 50.0, attack_params="Linf eps=2/255, 50 steps"),
        claim("a", 50.0, attack="AutoAttack (as named by paper)"),
        claim("a", 3.0, metric="prose: RA gain"),
    ]
    rows = {(row.claim.metric, row.claim.value): row for row in tables.build(store).models[0].claims}
    assert rows["RA", 69.09].difference == pytest.approx(50 - 69.09)
    assert rows["RA-E", 60.0].difference == pytest.approx(25 - 60)
    assert rows["SA", 92.0].difference == pytest.approx(-2)
    assert [row.measured for row in rows.values()].count(None) == 2
    assert rows["prose: RA gain", 3.0].why == "no attack or metric of moebench corresponds to it"


def test_the_words_of_a_claim_name_our_attack_and_threat_model() -> None:
    assert our_attack(claim("a", 1.0, attack_params="Linf eps=8/255, 20 steps")) == "pgd-20"
    assert our_attack(claim("a", 1.0, attack_params="elided")) is None
    assert our_attack(claim("a", 1.0, attack="FGSM")) == "fgsm"
    threat = ThreatModel("Linf", 8 / 255)
    assert same_threat("Linf eps=8/255, 50 steps, step 2/255 (values from official code)", threat)
    assert not same_threat("Linf eps=0.09 (units not stated)", threat)
    assert not same_threat("eps and step size not stated", threat)
    assert not same_threat("L2 eps=8/255", threat)
    assert not same_threat("Linf eps=8/0", threat)


def test_a_gap_stands_only_where_the_claim_asks_what_was_measured() -> None:
    store, cifar = FakeStore(), protocol("cifar10", 200, eps=8 / 255)
    for where in (cifar, protocol()):
        store.add(model("a"), "autoattack", first_broken(200, 120), on=where)
        store.add(model("a"), "pgd-50", first_broken(200, 100), on=where)
    store.published = [claim("a", 69.09), claim("a", 48.0, metric="RA-E")]
    gaps = {board.protocol.dataset: board.rows[0].compared for board in tables.build(store).boards}
    assert gaps["digits"] == ()
    assert [found.difference for found in gaps["cifar10"]] == [pytest.approx(50 - 69.09)]


def test_the_gap_belongs_to_the_claim_beside_it() -> None:
    store, cifar = FakeStore(), protocol("cifar-10", 200, eps=8 / 255)
    store.add(model("a"), "autoattack", first_broken(200, 120), on=cifar)
    store.published = [claim("a", 69.09), claim("a", 54.4, attack="AutoAttack (as named by paper)")]
    for attack, shown, gap in (("fgsm", "AutoAttack", 40 - 54.4), ("pgd-50", "AutoAttack", 40 - 54.4)):
        store.add(model("a"), attack, first_broken(200, 100), on=cifar)
        found, against = boards.headline(tables.build(store).boards[0].rows[0])
        assert found is not None
        assert against is not None
        assert (found.attack, against.difference) == (shown, pytest.approx(gap))
    store.published = [claim("a", 69.09), claim("a", 60.0, dataset="CIFAR-100")]
    found, against = boards.headline(tables.build(store).boards[0].rows[0])
    assert found is not None
    assert against is not None
    assert (found.attack, against.difference) == ("PGD", pytest.approx(50 - 69.09))
