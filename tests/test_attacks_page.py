"""The attacks page: what one attack breaks and another misses, against a count by hand; costs; definitions."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from fake_store import FakeStore, first_broken, model
from page_stores import N, broke, everything, wrong_clean

from moebench.registry import attack_registry
from moebench.report import attack_facts, attacks_page, render, tables
from moebench.report.attacks_page import AttackSection
from moebench.report.cached import Cached
from moebench.report.overlap import unit_label
from moebench.schema import is_protocol

WHOLE, EXPERTS = ("pgd-50", "whole"), ("pgd-50", "experts")
AUTO, FGSM = ("autoattack", "whole"), ("fgsm", "whole")


def section_of(store: FakeStore) -> AttackSection:
    (section,) = attacks_page.build(store, tables.build(store).boards).sections
    return section


def two_models() -> FakeStore:
    store = FakeStore()
    for name, shift in (("a", 0), ("b", 10)):
        store.add(model(name), "autoattack", broke(*range(shift, shift + 8)))
        store.add(model(name), "pgd-50", broke(*range(shift + 4, shift + 10)))
    store.add(model("a"), "pgd-50", broke(0, 30), "experts")
    return store


def test_the_overlap_counts_what_the_other_attack_leaves_of_both_models() -> None:
    left = section_of(two_models()).overlap.left
    assert (left[AUTO, WHOLE].standing, left[AUTO, WHOLE].broken, left[AUTO, WHOLE].models) == (8, 16, 2)
    assert (left[WHOLE, AUTO].standing, left[WHOLE, AUTO].broken) == (4, 12)
    assert (left[EXPERTS, AUTO].standing, left[EXPERTS, AUTO].broken, left[EXPERTS, AUTO].models) == (1, 2, 1)
    assert left[AUTO, EXPERTS].broken == 8


def test_unique_breaks_are_those_of_no_other_attack_on_the_same_model() -> None:
    made = section_of(two_models()).overlap
    by_model = {one.label: one.unique for one in made.subjects}
    # a: autoattack breaks 0–7, pgd-50 4–9, on experts 0 and 30.
    assert by_model["a"] == {AUTO: 3, WHOLE: 2, EXPERTS: 1}
    assert by_model["b"] == {AUTO: 4, WHOLE: 2}
    assert made.unique == {AUTO: 7, WHOLE: 4, EXPERTS: 1}


@pytest.mark.parametrize("seed", range(5))
def test_overlap_and_combinations_agree_with_counting_sample_by_sample(seed: int) -> None:
    draw, store = np.random.default_rng(seed), FakeStore()
    fell: dict[str, dict[tuple[str, str], set[int]]] = {}
    for name in ("a", "b", "c"):
        wrong = draw.random(N) < 0.1
        for attack in ("fgsm", "autoattack", "pgd-50"):
            hits = draw.random(N) < 0.4
            store.add(model(name), attack, hits)
            wrong_clean(store, wrong)
            fell.setdefault(name, {})[attack, "whole"] = set(np.flatnonzero(hits & ~wrong))
        fell[name]["right", ""] = set(np.flatnonzero(~wrong))
    made = section_of(store).overlap
    units = (FGSM, WHOLE, AUTO)
    assert set(made.units) == set(units)
    for first in units:
        for second in units:
            expected = sum(len(own[first] - own[second]) for own in fell.values())
            assert made.left[first, second].standing == expected
    assert made.unique == {
        unit: sum(len(own[unit].difference(*(own[other] for other in units if other != unit))) for own in fell.values())
        for unit in units
    }
    counted = Counter(
        frozenset(unit for unit in units if sample in own[unit]) for own in fell.values() for sample in own["right", ""]
    )
    (group,) = made.combinations
    assert {one.units: one.count for one in group.listed} == dict(counted)
    assert (group.total, group.rest) == (sum(counted.values()), 0)
    assert [one.count for one in group.listed] == sorted(counted.values(), reverse=True)


def test_models_are_pooled_in_combinations_only_where_the_same_attacks_were_run() -> None:
    groups = section_of(two_models()).overlap.combinations
    assert sorted(group.models for group in groups) == [("a",), ("b",)]


def test_several_results_of_one_attack_count_together_and_warm_starts_do_not() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", broke(0))
    store.add(model("a"), "pgd-50", broke(1))
    store.add(model("a"), "pgd-50", broke(2))
    warm = store.add(model("a"), "pgd-50", broke(3, 4, 5))
    source = {"warm-start": {"eps": 0.1, "fingerprint": "f"}}
    store.stored[-1] = replace(warm, cell=replace(warm.cell, parameters=source))
    made = section_of(store).overlap
    assert made.left[WHOLE, AUTO].broken == 2


def test_costs_are_medians_over_models_per_sample() -> None:
    store = FakeStore()
    for name, seconds, forwards in (("a", 1.0, 40), ("b", 9.0, 400), ("c", 3.0, 4000)):
        store.add(model(name), "autoattack", broke(0))
        last = store.stored[-1]
        record = replace(last.record, seconds=seconds, forwards=forwards, backwards=forwards // 2)
        store.stored[-1] = replace(last, record=record)
    (cost,) = section_of(store).costs
    assert (cost.models, cost.seconds, cost.forwards, cost.backwards) == (3, 3.0, 400 / N, 200 / N)
    assert (cost.broken, cost.right) == (3, 3 * N)
    (row,) = csv.DictReader(io.StringIO(render(store)["data/attacks.csv"]))
    assert (row["seconds_median"], row["forwards_per_sample_median"], row["samples_broken"]) == (
        "3.0000",
        "10.0000",
        "3",
    )
    assert row["samples_broken_by_it_alone"] == ""


def test_one_attack_alone_has_no_matrix_and_no_unique_breaks() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", broke(0, 1))
    assert section_of(store).chart is None
    page = render(store)["attacks.html"]
    assert "<figure" not in page
    assert "no other attack has been run on these models" in page


def test_protocols_other_engines_and_other_settings_are_not_compared() -> None:
    store = two_models()
    before = section_of(store).overlap.units
    store.add(model("a"), "published:rt-er", broke(5))
    store.add(model("a"), "square", broke(5), engine="reference")
    store.add(model("a"), "pgd-50[step_fraction=0.1]", broke(5))
    store.add(model("a"), "pgd-7", broke(5))
    assert section_of(store).overlap.units == before
    page = render(store)["attacks.html"]
    assert "2 results with other settings or numbers of steps are on the model pages" in page
    assert "published:rt-er" not in page


def test_definitions_are_those_of_the_registry_with_defaults_of_the_name() -> None:
    by_name = {one.name: one for one in attack_facts.definitions()}
    listed = [one.name for one in (*attack_registry().declarations(), *attack_registry().families())]
    assert set(by_name) == {name for name in listed if not is_protocol(name)} | {"torchattacks:NAME"}
    assert ("steps", "10") in by_name["pgd-10"].settings
    assert by_name["smooth-pgd-50"].views == ("smooth",)
    assert by_name["pgd-50"].suites == ("v1",)
    assert by_name["pgd-20"].suites == ()
    assert attack_facts.definition("pgd-77").summary == by_name["pgd-N"].summary
    assert attack_facts.definition("torchattacks:MIFGSM").summary
    assert attack_facts.definition("no such attack").summary is None


def test_settings_are_listed_as_stored_once_for_all_models_that_share_them() -> None:
    store = two_models()
    page = attacks_page.build(store, tables.build(store).boards)
    (auto,) = [one for one in page.used if one.definition.name == "autoattack"]
    (stored,) = auto.stored
    assert stored.models == ("a", "b")
    assert stored.settings == (("steps", "100"), ("targets", "1, 2"))


def test_labels_of_units_name_the_view_once() -> None:
    assert [unit_label(unit) for unit in (WHOLE, EXPERTS, ("smooth-pgd-50", "smooth"))] == [
        *("pgd-50", "pgd-50 on experts"),
        "smooth-pgd-50",
    ]


def test_an_empty_store_has_definitions_and_says_that_there_are_no_results() -> None:
    files = render(FakeStore())
    assert "holds no results of an attack yet" in files["attacks.html"]
    assert "<bdi>autoattack</bdi>" in files["attacks.html"]
    assert files["data/attacks.csv"].count("\n") == files["data/overlap.csv"].count("\n") == 1


def test_evidence_is_read_once_for_all_pages() -> None:
    store, asked = everything(20), Counter[int]()
    inner = store.outcomes

    def counting(result_id: int, /) -> object:
        asked[result_id] += 1
        return inner(result_id)

    store.outcomes = counting  # type: ignore[method-assign,assignment]
    render(store)
    assert set(asked.values()) == {1}
    assert Cached(store).results() == store.results()


def test_the_pages_are_made_without_torch() -> None:
    code = "import sys, moebench.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_wrong_from_the_start_is_broken_by_nobody() -> None:
    store = FakeStore()
    for attack in ("autoattack", "fgsm"):
        store.add(model("a"), attack, first_broken(N, 5))
        wrong_clean(store, broke(0, 1, 10))
    made = section_of(store).overlap
    assert made.left[AUTO, FGSM].broken == 3
    assert made.subjects[0].right == N - 3
