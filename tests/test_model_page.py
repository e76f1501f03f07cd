"""The model page as a whole: its order, its results, what they cost and where they come from."""

from __future__ import annotations

import re
from dataclasses import replace

from fake_store import FakeStore, demo, example, first_broken, model, protocol
from report_parts import html_of, one_model, page_of, setting_of

from moebench.report import render, tables


def test_stages_are_listed_in_the_order_of_the_attack_with_those_that_broke_none() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 30), stage="square", stages={"apgd-ce": {}, "square": {}})
    (page,) = tables.build(store).models
    assert page.results[0].stages == (("apgd-ce", 0), ("square", 30))


def test_losses_are_shown_where_they_were_kept_and_else_a_dash_with_the_reason() -> None:
    store = FakeStore()
    stages = {"clean": {"loss": 0.1234, "loss_attacked": 2.5}}
    store.add(model("a"), "pgd-50", first_broken(200, 40), stages=stages)
    store.add(model("a"), "autoattack", first_broken(200, 50))
    page = html_of(store)
    assert '<td class="num" data-sort="0.1234">0.123</td>' in page
    assert '<td class="num" data-sort="2.5">2.500</td>' in page
    assert page.count('title="this result was made before losses were kept">—</abbr>') == 2


def test_the_cost_of_an_attack_is_also_told_per_sample() -> None:
    page = html_of(one_model(("autoattack",)))
    assert '<td class="num" data-sort="271.605">272</td>' in page
    assert '<td class="num" data-sort="0.0625">62.5 ms</td>' in page


def test_provenance_tells_what_results_share_and_where_they_differ() -> None:
    store = one_model()
    store.stored[1] = replace(store.stored[1], environment={**store.stored[1].environment, "device": "cuda"})
    git = {"commit": "abc123", "dirty": True}
    store.stored = [replace(one, environment={**one.environment, "git": git}) for one in store.stored]
    facts = dict(setting_of(store).origins)
    assert facts["device"] == ("cpu", "cuda")
    assert facts["git commit"] == ("abc123 with changes",)
    assert facts["finished"] == ("2026-01-02 03:04:01 UTC to 2026-01-02 03:04:02 UTC",)
    assert not {"host", "process"} & set(facts)


def test_the_page_reads_from_the_headline_to_the_details() -> None:
    store = demo(60)
    page = html_of(store, "st-moe")
    order = ["standing", "attacks", "curves", "classes", "experts", "routing", "examples", "claims", "results", "cost"]
    order += ["training", "reproduce", "provenance"]
    places = [page.index(f'<section id="{name}">') for name in order]
    assert places == sorted(places)
    assert page.index("RA-worst: all attacks together") < page.index("Reasons for doubt") < places[1]
    links = set(re.findall(r'href="#([\w-]+)"', page)) - {"content"}
    assert links >= set(order)
    assert all(f'id="{link}"' in page for link in links)


def test_other_radii_are_folded_and_the_leading_one_is_first() -> None:
    store = FakeStore()
    for eps in (0.1, 0.2, 0.3):
        store.add(model("a"), "autoattack", first_broken(200, 40), on=protocol(eps=eps))
    own = store.stored[1]
    assert "--eps" not in own.command
    for place in (0, 2):
        one = store.stored[place]
        store.stored[place] = replace(one, command=f"{one.command} --eps {one.protocol.threat.eps}")
    pages = page_of(store).details.settings
    assert [page.setting.protocol.threat.eps for page in pages] == [0.2, 0.1, 0.3]
    assert [page.setting.leads for page in pages] == [True, False, False]
    assert "<summary>digits, Linf 0.1</summary>" in html_of(store)


def test_a_model_that_only_failed_has_a_page() -> None:
    store, scratch = FakeStore(), FakeStore()
    scratch.add(model("a"), "autoattack", first_broken(200, 10))
    store.add_run(scratch.stored[0], "failed", error="loss is NaN")
    page = html_of(store)
    assert "loss is NaN" in page
    assert 'id="attacks"' not in page


def test_results_of_other_engines_alone_make_no_figures() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 10), engine="reference")
    assert page_of(store).details.settings == ()
    assert "not in the leaderboard" in html_of(store)


def test_the_same_store_gives_the_same_pages_in_whatever_order_it_answers() -> None:
    store = demo(60)
    store.pictures = {one.result_id: (example(1, 1, 2), example(2, 2, 5)) for one in store.stored}
    mixed = replace(store, stored=store.stored[::-1], published=store.published[::-1], made=store.made[::-1])
    assert render(store) == render(mixed)
