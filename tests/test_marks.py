"""Reasons for doubt beside a number, and what stands where there is none."""

from __future__ import annotations

import pytest
from fake_store import FakeStore, first_broken, model
from report_parts import row_of

from moebench.report import render, tables
from moebench.report.evidence import Evidence
from moebench.schema import Flag


def test_a_component_attack_below_the_whole_model_marks_ra_as_overstated_in_words() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 40))
    store.add(model("a"), "pgd-50", first_broken(200, 90), "router")
    (mark,) = row_of(store, "a").marks
    assert mark.code == "over-stated RA"
    assert "pgd-50 on router leaves 110 of 200 samples (55.0 %) standing" in mark.words
    assert "fewer than the 160 of 200 samples (80.0 %)" in mark.words
    assert "over-stated" in render(store)["index.html"]


def test_a_component_attack_that_leaves_as_many_standing_is_no_reason_for_doubt() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 40))
    store.add(model("a"), "pgd-50", first_broken(200, 40)[::-1].copy(), "experts")
    assert row_of(store, "a").marks == ()


def test_overstated_needs_an_attack_on_the_whole_model() -> None:
    store = FakeStore()
    store.add(model("a"), "pgd-50", first_broken(200, 90), "experts")
    assert tables.overstated([Evidence(store.stored[0], store.outcomes(1))]) == []
    assert row_of(store, "a").ra.state == "missing"


def test_flags_of_a_run_mark_the_row_of_its_checkpoint_only() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 40))
    flagged = store.add(model("b"), "autoattack", first_broken(200, 50))
    store.add_run(flagged, flags=(Flag("gradient masking", "square beats apgd"),))
    assert row_of(store, "a").marks == ()
    assert row_of(store, "b").marks == (tables.Mark("gradient masking", "square beats apgd"),)


def test_a_clean_accuracy_that_varies_is_a_reason_for_doubt() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 40), clean=0.95)
    store.add(model("a"), "pgd-50", first_broken(200, 40), clean=0.94)
    (mark,) = row_of(store, "a").marks
    assert "188 of 200" in mark.words
    assert "190 of 200" in mark.words


@pytest.mark.parametrize(
    ("family", "states"),
    [
        ("dense", ["n/a", "n/a", "n/a", "n/a"]),
        ("ensemble", ["n/a", "n/a", "n/a", "n/a"]),
        ("moe", ["missing", "missing", "n/a", "n/a"]),
        ("dual", ["missing", "missing", "missing", "missing"]),
        ("external", ["missing", "missing", "missing", "missing"]),
    ],
)
def test_what_a_family_cannot_have_differs_from_what_is_not_measured(family: str, states: list[str]) -> None:
    store = FakeStore()
    store.add(model("a", family), "autoattack", first_broken(200, 40))
    cells = row_of(store, "a").components
    assert [cell.state for cell in cells] == states
    assert all(cell.measure is None and cell.why for cell in cells)


def test_a_robust_accuracy_of_zero_is_shown_as_zero_and_a_missing_one_as_a_dash() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 200))
    page = render(store)["index.html"]
    assert ">0.0<small>0.0–1.9</small>" in page
    assert 'title="not measured: no attack on the view &#39;experts&#39; has been run">—</abbr>' in page
