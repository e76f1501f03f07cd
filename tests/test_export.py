"""`moebench export`: what each format holds, and how wrong options are answered."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Said, Terminal
from fake_store import FakeStore, demo, first_broken, model, paper
from hypothesis import given
from hypothesis import strategies as st

from moebench.errors import UsageError
from moebench.metrics import Measure
from moebench.papers import AUTHORS, TITLE, attack_paper, own_paper, paper_cards, paper_of
from moebench.report import flat, markdown, tables
from moebench.report.bibliography import bibliography
from moebench.report.export import Choice, export
from moebench.report.grid import Column, Grid, Line, Share, narrowed, winners
from moebench.report.grids import grids
from moebench.report.results_json import pack_samples, results_json, schema_text, unpack_samples
from moebench.schema import PaperCard
from moebench.store import Store

HOSTILE = "a_b&c%$#"
LONG = "ä" * 200
SCRIPT = "<script>alert(1)</script>"
FORMULA = "=HYPERLINK(1)"
NAMES = (HOSTILE, LONG, SCRIPT, FORMULA, "專家 🤖 ±", "pipe | `code` *bold*")


@pytest.fixture
def moebench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    return Terminal(tmp_path, capfd)


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, moebench: Terminal) -> Callable[..., Said]:
    """`moebench export` on a store in memory."""

    def run(store: FakeStore, *words: object) -> Said:
        class Opened:
            def __enter__(self) -> FakeStore:
                return store

            def __exit__(self, *_: object) -> None:
                pass

        monkeypatch.setattr(Store, "open", classmethod(lambda *_, **__: Opened()))
        return moebench("export", *words)

    return run


def named(*names: str) -> FakeStore:
    store = FakeStore()
    for at, name in enumerate(names):
        store.add(model(name, "dense", paper=paper()), "autoattack", first_broken(200, 20 + 10 * at), stage="apgd-ce")
        store.add(model(name, "dense", paper=paper()), "pgd-50", first_broken(200, 10 + at), stage="pgd")
    return store


def with_transfer() -> FakeStore:
    """Two models, each judged under the examples made on both."""
    store = FakeStore()
    weights = {name: store.add(model(name), "autoattack", first_broken(100, 50), stage="x") for name in "ab"}
    for target in "ab":
        for source in "ab":
            broken = first_broken(100, 30 if source == target else 10)
            done = store.add(model(target), "transfer", broken, stage="from")
            made = {"source": source, "source_weights": weights[source].checkpoint.sha256, "attack": "pgd-50"}
            store.stored[-1] = replace(done, cell=replace(done.cell, parameters={"from": made}))
    return store


# Best, second, ties


def grid_of(*cells: Share, ranked: bool = True, best: Any = "high") -> Grid:
    lines = tuple(Line(f"m{at}", (cell,), ranked) for at, cell in enumerate(cells))
    return Grid("leaderboard", "t", "T.", (), (Column("ra", "RA", best=best),), lines)


def test_all_that_tie_are_best_and_second_is_the_next_number() -> None:
    shares = [Share(Measure(k, 100)) for k in (50, 50, 40, 40, 30)]
    assert winners(grid_of(*shares), 0) == ({0, 1}, {2, 3})
    assert winners(grid_of(*shares, best="low"), 0) == ({4}, {2, 3})


def test_shares_of_unlike_samples_are_compared_as_shares() -> None:
    assert winners(grid_of(Share(Measure(1, 2)), Share(Measure(60, 100))), 0) == ({1}, {0})


def test_doubted_unranked_and_zero_shares_win_nothing() -> None:
    shares = (Share(Measure(90, 100), doubted=True), Share(Measure(50, 100)), Share(Measure(0, 100)))
    assert winners(grid_of(*shares), 0) == ({1}, set())
    assert winners(grid_of(*shares, ranked=False), 0) == (set(), set())
    assert winners(grid_of(Share(Measure(0, 9)), Share(Measure(0, 9))), 0) == (set(), set())


# The tables


def test_stages_error_and_ra_make_a_hundred() -> None:
    store = FakeStore()
    done = store.add(model("a"), "autoattack", first_broken(200, 80), clean=0.9, stages={key: {} for key in "xyz"})
    stages = tuple("" if at < 20 or at >= 80 else "x" if at < 50 else "z" for at in range(200))
    store.evidence[done.result_id] = replace(store.outcomes(done.result_id), stage=stages)
    report = tables.build(store)
    (grid,) = grids(store, report, ("attacks",))
    (row,) = flat.flat([grid]).rows
    found = dict(zip(flat.flat([grid]).header, row, strict=True))
    assert [found[key] for key in ("ra[autoattack]", "clean_error")] == [0.6, 0.1]
    assert [found[f"autoattack[{stage}]"] for stage in "xyz"] == [0.15, 0.0, 0.15]


def test_a_transfer_matrix_counts_what_both_have_right() -> None:
    store = with_transfer()
    (grid,) = grids(store, tables.build(store), ("transfer",))
    cells = {line.model: line.cells for line in grid.lines}
    assert [column.key for column in grid.columns[:3]] == ["source", "success[a]", "success[b]"]
    assert cells["a"][1] == Share(Measure(30, 100), doubted=True, sign="ast")
    assert cells["a"][2] == Share(Measure(10, 100))
    assert winners(grid, 2) == ({0}, set())


def test_columns_are_chosen_by_key_and_by_the_name_of_an_attack() -> None:
    store = demo(60)
    grid = grids(store, tables.build(store), ("leaderboard",))[0]
    assert [one.key for one in narrowed(grid, ("model", "flops", "autoattack")).columns] == [
        *("model", "flops", "ra[autoattack]")
    ]
    with pytest.raises(UsageError, match=r"unknown column 'ra_wors'; did you mean ra_worst or"):
        narrowed(grid, ("ra_wors",))


def test_ranks_stay_those_among_all_when_models_are_chosen() -> None:
    store = named("a", "b", "c")
    (text,) = export(store, Choice("csv", ("leaderboard",), models=("C", "a"))).files.values()
    rows = list(csv.DictReader(io.StringIO(text.decode())))
    assert [(row["model"], row["rank"]) for row in rows] == [("a", "1"), ("c", "3")]


# Names from outside


@pytest.mark.parametrize("name", NAMES)
def test_names_survive_in_csv_and_markdown(name: str) -> None:
    store = named(name, "plain")
    report = tables.build(store)
    for kind in ("leaderboard", "attacks"):
        (text,) = export(store, Choice("csv", (kind,))).files.values()
        rows = list(csv.DictReader(io.StringIO(text.decode(), newline="")))
        assert [row["model"].removeprefix("'") for row in rows] == [name, "plain"]
        assert not [one for row in rows for one in row.values() if one.lstrip().startswith(("=", "+", "-", "@"))]
        (grid,) = grids(store, report, (kind,))
        lines = [line for line in markdown.table(grid).splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
        assert len(lines) == 4
        assert "<script" not in markdown.table(grid).replace(r"\<", "")


@given(st.text(max_size=60))
def test_markdown_is_one_line_without_markup(raw: str) -> None:
    escaped = markdown.escape(raw)
    assert "\n" not in escaped
    assert not set(re.sub(r"\\.", "", escaped)) & set("`*_[]<>|~$&\\")


def test_markdown_sets_the_best_bold_and_the_second_underlined() -> None:
    store = named("a", "b", "c")
    (text,) = export(store, Choice("markdown", ("leaderboard",))).files.values()
    lines = [line for line in text.decode().splitlines() if line.startswith("| ")][2:]
    assert "**90.0**" in lines[0]
    assert "<ins>85.0</ins>" in lines[1]
    assert lines[2].startswith("| 3 | c | 80.0 ± ")


# BibTeX


def test_moebench_is_cited_by_the_facts_of_its_citation_file() -> None:
    citation = (Path(__file__).resolve().parents[1] / "CITATION.cff").read_text(encoding="utf-8")
    assert f'title: "{TITLE}"' in citation
    assert f'- name: "{AUTHORS}"' in citation
    version = re.findall(r"^version: (.+)$", citation, re.MULTILINE)[0]
    assert f"version {version}," in own_paper().bibtex


def keys_of(text: str) -> list[str]:
    return re.findall(r"^@\w+\{([^,]+),", text, re.MULTILINE)


def test_all_papers_of_the_package_make_one_entry_each() -> None:
    books = bibliography(paper_cards())
    keys = keys_of(books.text)
    assert len(keys) == len(set(keys)) == len(books.entries)
    identities = {card.arxiv or card.title for card in paper_cards()}
    assert len(keys) == len(identities) + 1
    assert "moebench" in keys


def test_cards_of_one_paper_never_have_two_keys() -> None:
    by_paper: dict[str, set[str]] = {}
    for card in paper_cards():
        by_paper.setdefault(card.arxiv or card.title, set()).add(card.bibtex_key)
    assert [keys for keys in by_paper.values() if len(keys) > 1] == []


def test_attacks_are_cited_by_what_their_decorator_names() -> None:
    found = {name: attack_paper(name) for name in ("autoattack", "pgd-7", "apgd-ce[steps=3]", "torchattacks:MIFGSM")}
    keys = {name: card.bibtex_key for name, card in found.items() if card is not None}
    assert keys == {
        "autoattack": "croce2020reliable",
        "pgd-7": "madry2018towards",
        "apgd-ce[steps=3]": "croce2020reliable",
        "torchattacks:MIFGSM": "kim2020torchattacks",
    }
    assert attack_paper("no-such-attack") is None


def test_unlike_papers_with_one_key_get_two_and_like_ones_share_one() -> None:
    first = PaperCard("One", "A. Author", "ICML", 2025, None, "@misc{same,\n  title = {One}\n}")
    other = PaperCard("Two", "B. Author", "ICML", 2025, None, "@misc{Same,\n  title = {Two}\n}")
    again = PaperCard("Any", "A. Author", "ICML", 2025, "2502.06832", "@misc{another,\n  title = {Any}\n}")
    books = bibliography([first, other, again])
    assert (
        sorted(books.keys[card] for card in (first, other)) == ["Samea", "same"]
        or len({books.keys[card].lower() for card in (first, other)}) == 2
    )
    assert books.keys[again] == "zhang2025optimizing"
    assert len(keys_of(books.text)) == 4


@pytest.mark.parametrize(
    "bibtex",
    [
        r'@misc{x, title = {a}} @preamble{"\input{/etc/passwd}"}',
        r"@misc{x, title = {\input{/etc/passwd}}}",
        "@misc{x, title = {100% & more_}}",
        "@misc{x, title = {open}",
        "@string{x = {y}}",
        "nothing",
        "",
    ],
)
def test_what_is_no_sound_entry_is_made_anew_from_the_card(bibtex: str) -> None:
    card = PaperCard("100% & more_ {x}", "A. Böll and C. 專", "ICML", 2025, None, bibtex)
    books = bibliography([card])
    entry = next(one for one in books.entries if "moebench:" not in one and "@misc{moebench" not in one)
    assert entry.startswith(f"@misc{{{books.keys[card]},")
    assert r"100\% \& more\_" in entry
    assert "input" not in entry and "preamble" not in entry
    assert entry.isascii()


def test_a_claim_of_a_paper_without_a_card_is_cited_by_its_identifier() -> None:
    card = paper_of("9999.00001")
    assert bibliography([card]).keys[card] == "arxiv999900001"


# JSON


def test_the_document_follows_its_schema_and_holds_every_verdict() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    store = demo(60)
    document = json.loads(results_json(store, store.results(), "A lab"))
    schema = json.loads(schema_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(document)
    results = [one for run in document["runs"] for one in run["results"]]
    assert len(results) == len(store.stored)
    assert "secret-host" not in json.dumps(document)
    by_fingerprint = {one["cell"]["fingerprint"]: one for one in results}
    for stored in store.stored:
        written = by_fingerprint[stored.cell.fingerprint]
        found, told = unpack_samples(written["samples"]), store.outcomes(stored.result_id)
        assert found.stage == told.stage
        for name in ("index", "broken", "clean_pred", "adv_pred", "distance", "forwards", "backwards"):
            assert np.array_equal(getattr(found, name), getattr(told, name)), name


def test_the_encoding_is_what_the_schema_says() -> None:
    store = FakeStore()
    done = store.add(model("a"), "autoattack", first_broken(12, 3), stage="apgd-ce")
    samples = pack_samples(store.outcomes(done.result_id))
    assert base64.b64decode(samples["broken"]) == bytes([0b111, 0])
    assert samples["adv_pred"] == {"dtype": "uint8", "data": base64.b64encode(bytes([1] * 3 + [0] * 9)).decode()}
    assert samples["stages"] == ["apgd-ce"]


def test_the_same_results_give_the_same_bytes_in_any_order() -> None:
    store = demo(30)
    assert results_json(store, store.results()) == results_json(store, list(store.results())[::-1])


# Parquet and model_info


def test_parquet_has_numbers_where_there_are_numbers() -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pandas as pd

    (content,) = export(demo(60), Choice("parquet", ("leaderboard",))).files.values()
    table = pd.read_parquet(io.BytesIO(content))
    assert str(table["ra_worst"].dtype).lower().startswith("float")
    assert str(table["rank"].dtype).lower().startswith("int")
    assert table["ra_smoe"].isna().any()


def test_parquet_without_pyarrow_is_one_line(show: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebench.report.export.find_spec", lambda _: None)
    said = show(demo(30), "--format", "parquet", "--out", "t.parquet")
    assert said.code == 2
    assert said.err == "moebench: parquet needs pyarrow, which is not installed; pip install 'moebench[parquet]'\n"


ROBUSTBENCH = {
    "link": (str, type(None)),
    "name": (str,),
    "authors": (str, type(None)),
    "additional_data": (bool, type(None)),
    "number_forward_passes": (int,),
    "dataset": (str,),
    "venue": (str, type(None)),
    "architecture": (str,),
    "eps": (str,),
    "clean_acc": (str, type(None)),
    "reported": (str, type(None)),
    "autoattack_acc": (str,),
    "external": (str,),
    "unreliable": (bool,),
    "footnote": (str,),
}


def test_model_info_has_robustbenchs_keys_and_types() -> None:
    store = demo(60)
    found = export(store, Choice("model_info", together=True))
    assert any("autoattack has not been run" in note for note in found.notes)
    for path, content in found.files.items():
        facts = json.loads(content)
        assert set(facts) - {"external"} == set(ROBUSTBENCH) - {"external"}
        assert all(isinstance(value, ROBUSTBENCH[key]) for key, value in facts.items())
        assert path.startswith(f"{facts['dataset']}/Linf/")
    cifar = json.loads(found.files["cifar10/Linf/Author2025Routing_rt-er.json"])
    row = next(row for board in tables.build(store).boards for row in board.rows if board.protocol.n == 1000)
    assert (cifar["eps"], cifar["reported"]) == ("8/255", "54.40")
    assert row.attacks[-1].measure is not None
    assert cifar["autoattack_acc"] == f"{100 * row.attacks[-1].measure.value:.2f}"


# The command


def test_one_table_goes_to_standard_output_and_a_folder_takes_all(show: Callable[..., Said], tmp_path: Path) -> None:
    said = show(demo(30), "--format", "csv")
    assert said.code == 0
    assert said.out.startswith("dataset,split,n,")
    said = show(demo(30), "--format", "latex", "--out", f"{tmp_path}/t/")
    assert said.code == 0 and said.out == ""
    names = {path.name for path in (tmp_path / "t").iterdir()}
    assert {"leaderboard-digits-Linf.tex", "attacks-digits-Linf.tex", "missed-digits-Linf.tex"} <= names
    assert {"claims-cifar-10.tex", "leaderboard-cifar-10-Linf.tex"} <= names
    said = show(demo(30), "--format", "json", "--out", f"{tmp_path}/j/")
    assert sorted(path.name for path in (tmp_path / "j").iterdir()) == ["results.json", "results.schema.json"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--format", "latx"), "unknown format 'latx'; did you mean latex?"),
        (("--format", "csv", "--table", "leaderbord"), "unknown table 'leaderbord'; did you mean leaderboard?"),
        (("--format", "csv", "--dataset", "digts"), "unknown data set 'digts'; did you mean digits?"),
        (("--format", "csv", "--norm", "L3"), "unknown norm 'L3'; did you mean L2?"),
        (("--format", "csv", "--norm", "L2"), "nothing was measured under L2; there is Linf"),
        (("--format", "csv", "--eps", "0.3"), "nothing was measured at eps 0.3; there is 8/255, 0.2"),
        (("--format", "csv", "--n", "7"), "nothing was measured on 7 samples; there is 30, 1000"),
        (("--format", "csv", "--models", "rt-err"), "unknown model 'rt-err'; did you mean rt-er"),
        (("--format", "csv", "--columns", "ra_wrst"), "unknown column 'ra_wrst'; did you mean ra_worst"),
        (("--format", "csv", "--wide"), "--wide is for --format latex, not csv"),
        (("--format", "csv", "--caption", "x"), "--caption is for --format latex, not csv"),
        (("--format", "latex", "--interval", "sd"), "unknown interval 'sd'; there is pm, ends, none"),
        (("--format", "latex", "--label", "a}b"), "--label takes letters, digits and : . _ / + -, got 'a}b'"),
        (("--format", "latex"), "2 tables match: Robust accuracy on "),
        (("--format", "latex", "--table", "claims,missed"), "2 tables need a folder: --out DIR/"),
        (("--format", "latex", "--table", "transfer"), "the store has no transfer table to export"),
        (("--format", "json", "--table", "claims"), "--table is for latex, csv, markdown, parquet and bibtex; json"),
        (("--format", "json", "--from", " "), "--from takes a name of 1 to 40 printable characters, got ' '"),
        (("--format", "bibtex", "--columns", "sa"), "--columns is for latex, csv, markdown, parquet, not bibtex"),
        (("--format", "model_info"), "files need a folder: --out DIR/"),
        (("--format", "parquet"), "parquet is no text; name a file with --out FILE or a folder with --out DIR/"),
    ],
)  # fmt: skip
def test_a_wrong_choice_is_one_line(show: Callable[..., Said], words: tuple[str, ...], line: str) -> None:
    said = show(demo(30), *words)
    assert (said.code, said.out) == (2, "")
    assert said.err.count("\n") == 1 or "left out" in said.err
    assert line in said.err


def test_an_empty_store_has_nothing_but_moebenchs_own_entry(show: Callable[..., Said]) -> None:
    assert keys_of(show(FakeStore(), "--format", "bibtex").out) == ["moebench"]
    for kind in ("latex", "csv", "markdown", "json", "model_info"):
        said = show(FakeStore(), "--format", kind)
        assert (said.code, said.err.count("\n")) == (2, 1)


def test_a_folder_that_cannot_be_written_fails_in_one_line(show: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    said = show(demo(30), "--format", "csv", "--out", f"{tmp_path}/taken/t.csv")
    assert said.code == 1
    assert said.err.startswith("moebench: cannot write") and said.err.count("\n") == 1


def test_five_hundred_models_are_exported_in_seconds() -> None:
    store = FakeStore()
    draw = np.random.default_rng(0)
    for at in range(500):
        for attack in ("autoattack", "pgd-50"):
            store.add(model(f"m{at}", "dense"), attack, draw.random(50) < 0.5)
    (text,) = export(store, Choice("csv", ("leaderboard",))).files.values()
    assert text.count(b"\n") == 501
