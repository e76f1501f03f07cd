"""The report: ranks and marks, what is escaped where, what the files do in LaTeX and in a browser."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_store import FakeStore, claim, demo, first_broken, model, paper, protocol, routing
from hypothesis import given
from hypothesis import strategies as st

from moebench.errors import UsageError
from moebench.metrics import Measure
from moebench.report import exports, html, latex_text, render, tables, text, write_report
from moebench.report.claims import our_attack, same_threat
from moebench.report.evidence import Evidence
from moebench.schema import Flag, RoutingLayer, ThreatModel

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_ARGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "100% & more_$#{}~^\\input{x}",
    "=cmd()",
    "+1+1",
    "-2",
    "@SUM(A1)",
    "\t=1",
    "[starts with a bracket]",
    "專家混合 αβ – Łukasz Böhm 🤖",
    "../../etc/passwd",
    "{{ 7 * 7 }}{% raw %}",
    "x" * 200,
    "{{'a'}}``''--<<>>",
    "CON",
    "a\nb\r% c",
)


def board_of(store: FakeStore, which: int = 0) -> tables.Board:
    return tables.build(store).boards[which]


def row_of(store: FakeStore, name: str) -> tables.Row:
    return next(row for row in board_of(store).rows if row.model.name == name)


# Ranks


def test_ranks_follow_the_worst_case_and_not_the_whole_model() -> None:
    store = FakeStore()
    for name, whole, experts in (("flattered", 40, 90), ("honest", 60, 50)):
        for attack in ("autoattack", "moe-adaptive"):
            store.add(model(name), attack, first_broken(200, whole))
        store.add(model(name), "pgd-50", first_broken(200, experts), "experts")
    board = board_of(store)
    assert [(row.model.name, row.rank) for row in board.ranked] == [("honest", 1), ("flattered", 2)]
    assert board.ranked[1].ra.measure == Measure(160, 200)
    assert board.ranked[1].worst.measure == Measure(110, 200)


def test_ra_is_the_sample_wise_worst_over_whole_view_attacks() -> None:
    store, first = FakeStore(), first_broken(200, 50)
    store.add(model("a"), "autoattack", first)
    store.add(model("a"), "pgd-50", first[::-1].copy())
    row = row_of(store, "a")
    assert row.ra.measure == Measure(100, 200)
    assert [cell.measure for cell in row.attacks] == [Measure(150, 200)] * 2
    assert board_of(store).attacks == ("pgd-50", "autoattack")


def test_equal_numbers_share_a_rank_and_the_next_one_counts_both() -> None:
    store = FakeStore()
    for name, broken in (("a", 10), ("b", 10), ("c", 20)):
        store.add(model(name, "dense"), "autoattack", first_broken(200, broken))
    assert [row.rank for row in board_of(store).ranked] == [1, 1, 3]


@pytest.mark.parametrize("view", ["whole", "experts"])
def test_without_autoattack_on_the_whole_model_there_is_no_rank(view: str) -> None:
    store = FakeStore()
    store.add(model("a"), "pgd-50" if view == "whole" else "autoattack", first_broken(200, 0), view)
    store.add(model("b", "dense"), "autoattack", first_broken(200, 150))
    board = board_of(store)
    assert [(row.model.name, row.rank) for row in board.rows] == [("b", 1), ("a", None)]
    assert board.unranked[0].unranked == "autoattack and moe-adaptive have not been run on the whole model"
    assert "Not ranked: autoattack and moe-adaptive have not been run" in render(store)["index.html"]


@pytest.mark.parametrize(
    ("family", "layers", "routed"),
    [
        *(("moe", (), True), ("dual", (), True), ("external", (routing(),), True)),
        *(("dense", (), False), ("ensemble", (), False), ("external", (), False)),
    ],
)
def test_a_model_with_routing_takes_a_rank_only_with_moe_adaptive_on_the_whole(
    family: str, layers: tuple[RoutingLayer, ...], routed: bool
) -> None:
    store, who = FakeStore(), model("a", family)
    store.add(who, "autoattack", first_broken(200, 20), layers=layers)
    store.add(who, "moe-adaptive", first_broken(200, 20), "experts")
    row = row_of(store, "a")
    assert row.unranked == ("moe-adaptive has not been run on the whole model" if routed else None)
    assert row.rank == (None if routed else 1)
    store.add(who, "moe-adaptive", first_broken(200, 20))
    assert row_of(store, "a").rank == 1


def test_a_board_gives_every_reason_for_having_no_rank() -> None:
    store = FakeStore()
    for name, family, attack in (("a", "moe", "autoattack"), ("b", "dense", "pgd-50"), ("c", "dual", "autoattack")):
        store.add(model(name, family), attack, first_broken(200, 10))
    page = render(store)["index.html"]
    assert "Not ranked: autoattack has not been run on the whole model (1 model, at the end of the table); " in page
    assert "moe-adaptive has not been run on the whole model (2 models)." in page


@pytest.mark.parametrize("cell", [{"engine": "reference"}, {"precision": "bfloat16-only"}])
def test_other_engines_and_quick_looks_stay_out_of_the_table_but_on_the_page(cell: dict[str, Any]) -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 20))
    store.add(model("a"), "autoattack", first_broken(200, 199), **cell)
    assert row_of(store, "a").worst.measure == Measure(180, 200)
    assert board_of(store).left_out == 1
    files = render(store)
    assert "1 result of other engines or of quick looks in bfloat16 is not in this table" in files["index.html"]
    assert "not in the leaderboard" in files["models/a.html"]


@pytest.mark.parametrize(
    "other",
    [
        replace(protocol(), version="2"),
        replace(protocol(), split="train"),
        replace(protocol(), data_sha256="0" * 64),
        protocol("svhn"),
        protocol(norm="L2"),
        protocol(eps=0.1),
    ],
    ids=["version", "split", "data", "dataset", "norm", "eps"],
)
def test_numbers_of_unlike_protocols_are_never_ranked_together(other: Any) -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 20), on=protocol())
    store.add(model("b"), "autoattack", first_broken(200, 30), on=other)
    boards = tables.build(store).boards
    assert [len(board.rows) for board in boards] == [1, 1]
    assert len({board.anchor for board in boards}) == 2


def test_two_checkpoints_of_a_model_are_two_rows_told_apart_by_their_weights() -> None:
    store = FakeStore()
    store.add(model("a", "dense"), "autoattack", first_broken(200, 20), weights="one")
    store.add(model("a", "dense"), "autoattack", first_broken(200, 30), weights="two")
    labels = [row.label for row in board_of(store).ranked]
    assert len(set(labels)) == 2
    assert all(label.startswith("a · ") for label in labels)


# Marks, gaps and claims


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


def test_stages_are_listed_in_the_order_of_the_attack_with_those_that_broke_none() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 30), stage="square", stages={"apgd-ce": {}, "square": {}})
    (page,) = tables.build(store).models
    assert page.results[0].stages == (("apgd-ce", 0), ("square", 30))


def test_a_failed_run_is_on_the_page_and_takes_no_rank() -> None:
    store, scratch = FakeStore(), FakeStore()
    scratch.add(model("a"), "autoattack", first_broken(200, 10))
    store.add_run(scratch.stored[0], "failed", error="loss is NaN at step 3")
    files = render(store)
    assert "loss is NaN at step 3" in files["models/a.html"]
    assert "nothing to rank" in files["index.html"]


# Pure and atomic


def test_the_same_store_gives_the_same_bytes_in_whatever_order_it_answers(tmp_path: Path) -> None:
    store = demo(60)
    mixed = replace(store, stored=store.stored[::-1], published=store.published[::-1], made=store.made[::-1])
    first = {path.relative_to(tmp_path / "a"): path.read_bytes() for path in write_report(store, tmp_path / "a")}
    second = {path.relative_to(tmp_path / "b"): path.read_bytes() for path in write_report(mixed, tmp_path / "b")}
    assert first == second
    assert first == {
        path.relative_to(tmp_path / "a"): path.read_bytes() for path in write_report(store, tmp_path / "a")
    }


def test_the_written_paths_are_sorted_and_all_there_is(tmp_path: Path) -> None:
    written = write_report(demo(60), tmp_path)
    assert written == sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert {"index.html", "method.html", "leaderboard.csv", "results.jsonl"} <= {path.name for path in written}


def test_pages_of_rows_that_are_gone_go_and_foreign_files_stay(tmp_path: Path) -> None:
    store = FakeStore()
    store.add(model("old"), "autoattack", first_broken(200, 10))
    write_report(store, tmp_path)
    (tmp_path / "models" / "mine.html").write_text("<p>my notes</p>")
    (tmp_path / "tables" / "mine.tex").write_text("my table")
    write_report(FakeStore(), tmp_path)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["mine.html"]
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == ["mine.tex"]


def test_an_empty_store_gives_a_page_that_says_so(tmp_path: Path) -> None:
    write_report(FakeStore(), tmp_path)
    assert "holds no finished results yet" in (tmp_path / "index.html").read_text()
    assert (tmp_path / "data" / "results.jsonl").read_text() == ""


def test_a_file_in_the_way_is_one_line_and_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "reports").write_text("in the way")
    with pytest.raises(UsageError, match=r"^cannot write the report to .*reports.*--out$"):
        write_report(demo(20), tmp_path / "reports")
    (tmp_path / "out" / "index.html").mkdir(parents=True)
    with pytest.raises(UsageError, match="Is a directory"):
        write_report(demo(20), tmp_path / "out")
    assert not list(tmp_path.rglob("*.draft"))


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(FakeStore(), tmp_path)
    before = (tmp_path / "index.html").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UsageError, match="No space left on device"):
        write_report(demo(20), tmp_path)
    assert (tmp_path / "index.html").read_bytes() == before
    assert not list(tmp_path.rglob("*.draft"))


def test_a_disk_that_fills_up_leaves_the_old_report_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(FakeStore(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    real, written = Path.write_text, 0

    def filling(path: Path, *words: Any, **options: Any) -> int:
        nonlocal written
        written += 1
        if written == 8:
            real(path, "half of it")
            raise OSError(28, "No space left on device")
        return real(path, *words, **options)

    monkeypatch.setattr(Path, "write_text", filling)
    with pytest.raises(UsageError, match="No space left on device"):
        write_report(demo(20), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="Permission denied"):
        write_report(FakeStore(), tmp_path)


# Escaping


class Tags(HTMLParser):
    """Collects the elements of a page and the text outside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.scripts += [dict(attrs)][: tag == "script"]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] not in (["script"], ["style"]):
            self.words.append(data)


def hostile_store(name: str) -> FakeStore:
    store, digits = FakeStore(), replace(protocol(), dataset=name)
    who = model(name, "moe", summary=name, paper=replace(paper(name), authors=name, venue=name, arxiv=name))
    done = store.add(who, "autoattack", first_broken(200, 40), layers=(routing(name),), stage=name, stages={name: {}})
    store.add(who, name, first_broken(200, 90), name)
    store.add(who, "pgd-50", first_broken(200, 20), on=digits)
    store.add_run(done, "failed", flags=(Flag(name, name),), error=name)
    facts = {"model": name, "architecture": name, "attack_params": name, "source": name, "flag": name}
    store.published = [claim(name, 50.0, dataset="CIFAR-10", **facts), claim(name, 51.0, dataset=name or "?", **facts)]
    return store


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text_in_html(name: str, tmp_path: Path) -> None:
    harmless = {path: page for path, page in render(hostile_store("plain")).items() if path.endswith(".html")}
    wanted = {element for page in harmless.values() for element in parsed(page).tags}
    pages = {path: page for path, page in render(hostile_store(name)).items() if path.endswith(".html")}
    assert len(pages) == len(harmless)
    for page in pages.values():
        seen = parsed(page)
        assert set(seen.tags) <= wanted
        assert all(is_own(script) for script in seen.scripts)
        assert not any(attribute.startswith("on") for attribute in seen.attributes)
    index = " ".join("".join(parsed(pages["index.html"]).words).split())
    assert " ".join(name.split()) in index
    for path in write_report(hostile_store(name), tmp_path):
        assert path.resolve().is_relative_to(tmp_path.resolve())


def is_own(script: dict[str, str | None]) -> bool:
    """Whether a script is one of the files that ship with the report, or data, which no browser runs."""
    source = script.get("src")
    return script == {"type": "application/json"} if source is None else source.removeprefix("../") in html.assets()


def parsed(page: str) -> Tags:
    seen = Tags()
    seen.feed(page)
    return seen


@pytest.mark.parametrize("name", HOSTILE)
def test_the_link_to_a_model_leads_to_its_page(name: str, tmp_path: Path) -> None:
    write_report(hostile_store(name), tmp_path)
    (page,) = (tmp_path / "models").iterdir()
    assert f'href="models/{page.name}"' in (tmp_path / "index.html").read_text()


def test_an_arxiv_identifier_becomes_a_link_only_if_it_is_one() -> None:
    assert html.arxiv_url("2502.06832") == "https://arxiv.org/abs/2502.06832"
    assert html.arxiv_url("javascript:alert(1)") is None
    assert html.arxiv_url("2502.06832\n") is None
    assert html.arxiv_url(None) is None


@pytest.mark.parametrize("name", HOSTILE)
def test_no_csv_field_is_a_formula_and_every_row_has_all_columns(name: str) -> None:
    rows = list(csv.reader(io.StringIO(render(hostile_store(name))["data/leaderboard.csv"], newline="")))
    assert len({len(row) for row in rows}) == 1
    assert len(rows) == 3
    assert not [field for row in rows for field in row if field.lstrip().startswith(("=", "+", "-", "@"))]
    assert any(field.removeprefix("'") == name for row in rows[1:] for field in row)


def test_csv_numbers_are_fractions_and_gaps_are_told_apart() -> None:
    store = FakeStore()
    for attack in ("autoattack", "moe-adaptive"):
        store.add(model("a", "moe"), attack, first_broken(200, 40))
    (row,) = csv.DictReader(io.StringIO(render(store)["data/leaderboard.csv"]))
    assert (row["rank"], row["ra_worst"], row["sa"], row["ra[autoattack]"]) == ("1", "0.800000", "0.950000", "0.800000")
    assert float(row["ra_low"]) < 0.8 < float(row["ra_high"])
    assert (row["ra_e"], row["ra_smoe"]) == ("", "n/a")


def test_json_lines_hold_every_result_in_order_without_what_identifies_a_machine() -> None:
    store = demo(60)
    store.superseded = {1}
    lines = render(store)["data/results.jsonl"].splitlines()
    rows = [json.loads(line) for line in lines]
    assert sorted(row["result_id"] for row in rows) == [one.result_id for one in store.stored]
    assert all(list(row) == sorted(row) for row in rows)
    assert "secret-host" not in "".join(str(content) for content in render(store).values())
    assert rows[0]["environment"] == {"device": "cpu", "moebench": "0.1.0", "torch": "2.9.0"}
    assert rows[0]["outcomes"]["n"] == 60


def test_json_lines_are_strict_where_a_number_is_not_finite() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 4), layers=(replace(routing(), iou=float("nan")),))
    files = render(store)
    (line,) = files["data/results.jsonl"].splitlines()
    row = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert row["record"]["routing"][0]["iou"] is None
    assert "nan" not in files["models/a.html"].split("<h2>Routing</h2>")[1].split("<h2")[0]


def test_the_digest_of_outcomes_changes_with_any_verdict() -> None:
    store = FakeStore()
    for broken in (first_broken(50, 3), first_broken(50, 3), first_broken(50, 4)):
        store.add(model("a"), "autoattack", broken)
    first, same, other = (exports.outcomes_digest(store.outcomes(number)) for number in (1, 2, 3))
    assert first == same != other


@given(st.text(max_size=80), st.text(max_size=80))
def test_slugs_are_safe_and_tell_names_apart(one: str, other: str) -> None:
    name = text.slug(one)
    assert name.isascii()
    assert 0 < len(name) <= 80
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789._-")
    assert name[0] not in ".-"
    assert name.split(".")[0] not in text.RESERVED
    assert (name == text.slug(other)) == (one == other)


@given(st.text(max_size=60))
def test_escaped_latex_is_ascii_on_one_line_with_balanced_braces(raw: str) -> None:
    escaped = latex_text.escape(raw)
    assert escaped.isascii()
    assert not set(escaped) & set("\n\r\t")
    bare = escaped.replace(r"\{", "").replace(r"\}", "")
    assert bare.count("{") == bare.count("}")
    assert len(latex_text.shorten(raw)) <= latex_text.MAX_NAME


def test_numbers_are_written_for_readers() -> None:
    assert [text.quantity(count) for count in (None, 0, 999, 1000, 11_200_000, 999_999)] == [
        *("—", "0", "999", "1.00 k", "11.2 M"),
        "1.00 M",
    ]
    assert [text.seconds(time) for time in (None, 0.42, 59.0, 65.0, 7800.0)] == [
        *("—", "0.42 s", "59 s", "1 min 05 s"),
        "2 h 10 min",
    ]
    assert (text.percent(0.5, 10), text.percent(0.5, 1000), text.percent(float("nan"), 10)) == ("50.0", "50.00", "—")


# LaTeX


def test_the_best_ranked_number_is_bold_and_an_overstated_one_never() -> None:
    store = FakeStore()
    for name, whole, experts in (("flattered", 40, 90), ("honest", 60, 50)):
        for attack in ("autoattack", "moe-adaptive"):
            store.add(model(name), attack, first_broken(200, whole))
        store.add(model(name), "pgd-50", first_broken(200, experts), "experts")
    store.add(model("unranked"), "pgd-50", first_broken(200, 1))
    table = render(store)["tables/leaderboard-digits-Linf.tex"]
    honest, flattered, unranked = [line for line in table.splitlines() if line.endswith(r"\\") and "&" in line[:6]][1:]
    assert r"$\mathbf{70.0}{\scriptstyle\,\pm\,6.7}$" in honest
    assert r"$80.0{" in flattered
    assert "mathbf{80.0}" not in flattered
    assert r"\dagger" in flattered
    assert "mathbf" not in unranked
    assert table.startswith("% moebench: \\usepackage{booktabs}\n")


def test_boards_that_share_a_file_name_get_files_of_their_own() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 40), on=protocol(eps=0.2))
    store.add(model("a"), "autoattack", first_broken(200, 40), on=protocol(eps=0.1))
    assert sum(name.startswith("tables/leaderboard-digits-Linf") for name in render(store)) == 2


def test_a_claims_table_shows_only_the_columns_that_have_claims() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 100), on=protocol("cifar-10"))
    store.published = [
        claim("a", 60.0),
        claim("a", 64.5, flag="too good"),
        claim("b", 70.0, metric="mIoU", dataset="A2D2"),
    ]
    files = {name: content for name, content in render(store).items() if name.startswith("tables/claims")}
    (table,) = files.values()
    assert r"Model & RA (PGD) & SA & RA & RA-worst \\" in table
    shares = [r"$95.0{\scriptstyle\,\pm\,4.0}$", *[r"$50.0{\scriptstyle\,\pm\,6.9}$"] * 2]
    assert " & ".join(["a", "60.00--64.50*", *shares]) + r" \\" in table


DOCUMENT = r"""\documentclass[10pt%s]{article}
\usepackage{booktabs}%s
\begin{document}
%s
\end{document}
"""


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
@pytest.mark.parametrize("columns", ["", ",twocolumn"])
def test_every_table_compiles_and_fits_its_line(columns: str, tmp_path: Path) -> None:
    stores = [demo(60), *(hostile_store(name) for name in HOSTILE)]
    files: list[str] = []
    for number, store in enumerate(stores):
        for name, content in sorted(render(store).items()):
            if name.startswith("tables/"):
                files.append(f"t{number}-{len(files)}.tex")
                (tmp_path / files[-1]).write_text(content, encoding="ascii")
    body = "\n".join(rf"\begin{{table}}[h]\centering\input{{{name}}}\end{{table}}\clearpage" for name in files)
    (tmp_path / "doc.tex").write_text(DOCUMENT % (columns, r"\usepackage{graphicx}", body))
    assert "Overfull" not in compiled(tmp_path / "doc.tex")
    (tmp_path / "bare.tex").write_text(DOCUMENT % (columns, "", body))
    compiled(tmp_path / "bare.tex")


def compiled(document: Path) -> str:
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", document.name]
    done = subprocess.run(command, cwd=document.parent, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_ARGS)
        yield running
        running.close()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    store = demo(60)
    awkward = hostile_store(HOSTILE[0])
    store.stored += [replace(one, result_id=1000 + one.result_id) for one in awkward.stored]
    store.evidence |= {1000 + number: one for number, one in awkward.evidence.items()}
    write_report(store, tmp_path)
    return tmp_path


def opened(browser: Any, page_file: Path, **context: Any) -> tuple[Any, list[str]]:
    """A page that has been read, and all that it complained about or asked the network for."""
    problems: list[str] = []
    page = browser.new_context(**context).new_page()
    page.on("console", lambda message: problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("dialog", lambda dialog: problems.append("dialog"))
    page.on("request", lambda request: problems.extend([request.url][: not request.url.startswith("file://")]))
    page.goto(page_file.as_uri())
    return page, problems


def test_pages_open_without_complaint_or_network_and_fit_every_width(browser: Any, site: Path) -> None:
    for file in [site / "index.html", site / "method.html", *sorted((site / "models").glob("*.html"))]:
        for width in (390, 1280):
            page, problems = opened(browser, file, viewport={"width": width, "height": 800})
            assert problems == [], file.name
            assert page.evaluate("document.documentElement.scrollWidth") <= width, file.name
            page.context.close()


def names_in(page: Any) -> list[str]:
    found: list[str] = page.locator("table").first.locator("tbody tr th a").all_inner_texts()
    return found


def sorted_by(page: Any, label: str, direction: str) -> list[str]:
    """The names, once the table says that it is sorted so."""
    head = page.get_by_role("columnheader", name=label, exact=True)
    head.and_(page.locator(f'[aria-sort="{direction}"]')).wait_for()
    return names_in(page)


def test_clicking_a_header_sorts_by_value_and_clicking_again_turns_it_round(browser: Any, tmp_path: Path) -> None:
    store = FakeStore()
    for name, broken, clean in (("a", 10, 0.9), ("b", 190, 1.0), ("c", 100, 0.95)):
        store.add(model(name, "dense"), "autoattack", first_broken(200, broken), clean=clean)
    store.add(model("z-unranked"), "pgd-50", first_broken(200, 0), clean=0.99)
    write_report(store, tmp_path)
    page, problems = opened(browser, tmp_path / "index.html")
    assert sorted_by(page, "RA-worst", "descending") == ["a", "c", "b", "z-unranked"]
    page.locator('th[data-key="sa"]').click()
    assert sorted_by(page, "SA", "descending") == ["b", "c", "a", "z-unranked"]
    page.locator('th[data-key="sa"]').click()
    assert sorted_by(page, "SA", "ascending") == ["a", "c", "b", "z-unranked"]
    page.locator('th[data-key="ra_worst"] .dt-column-order').focus()
    page.keyboard.press("Enter")
    assert sorted_by(page, "RA-worst", "descending") == ["a", "c", "b", "z-unranked"]
    page.keyboard.press("Space")
    assert sorted_by(page, "RA-worst", "ascending") == ["b", "c", "a", "z-unranked"]
    assert page.locator(".ranking th[aria-sort]").count() == 1
    assert problems == []


def test_everything_is_there_without_scripts(browser: Any, site: Path) -> None:
    page, _ = opened(browser, site / "index.html", java_script_enabled=False)
    for name in ("rt-er", "st-moe", "Reasons for doubt", "over-stated RA"):
        assert page.get_by_text(name).first.is_visible()


def test_text_has_enough_contrast_in_both_schemes(browser: Any, site: Path) -> None:
    for scheme in ("light", "dark"):
        page, _ = opened(browser, site / "index.html", color_scheme=scheme)
        for ink, ground in (
            ("--ink", "--page"),
            ("--soft", "--stripe"),
            ("--link", "--stripe"),
            ("--warn-ink", "--warn-page"),
        ):
            style = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
            assert contrast(page.evaluate(style, ink), page.evaluate(style, ground)) >= 4.5, (scheme, ink, ground)


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2 between two #rrggbb colours."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    channels = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_the_libraries_come_with_their_licences() -> None:
    shipped = html.assets()
    for library, words in (("datatables", "Permission is hereby granted"), ("echarts", "Apache License")):
        assert f"assets/vendor/{library}.min.js" in shipped
        assert words in shipped[f"assets/vendor/{library}.LICENSE"]


def test_overstated_needs_an_attack_on_the_whole_model() -> None:
    store = FakeStore()
    store.add(model("a"), "pgd-50", first_broken(200, 90), "experts")
    assert tables.overstated([Evidence(store.stored[0], store.outcomes(1))]) == []
    assert row_of(store, "a").ra.state == "missing"
