"""Exported LaTeX: what is bold, what is escaped, and that pdflatex compiles and fits every table."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_store import FakeStore, claim, demo, first_broken, model, paper, protocol
from test_export import NAMES, with_transfer
from typesetting import DOCUMENT, LATEX, compiled

from moebench.report import latex, tables
from moebench.report.bibliography import bibliography
from moebench.report.export import Choice, export
from moebench.report.grid import Grid
from moebench.report.grids import KINDS, grids


def hostile() -> FakeStore:
    """Every hostile name as model, data set and claim, on one board each, with all kinds of tables."""
    store = with_transfer()
    for name in NAMES:
        for attack, k in (("autoattack", 40), ("moe-adaptive", 60), ("pgd-50", 20)):
            store.add(model(name, paper=paper(name)), attack, first_broken(200, k), stage="apgd-ce")
            on = protocol(name, 50)
            store.add(model(name, paper=paper(name)), attack, first_broken(50, k // 4), on=on, stage="region")
        store.add(model(name), "pgd-50", first_broken(200, 100), "experts")
        store.published += [claim(name, 60.0, dataset=name), claim(name, 61.5, dataset=name, flag=f"{name}: no")]
    return store


def all_grids(store: FakeStore) -> list[Grid]:
    return grids(store, tables.build(store))


def row_of(table: str, name: str) -> str:
    (line,) = [line for line in table.splitlines() if f"& {name} &" in line or line.startswith(f"{name} &")]
    return line


# What is written


def test_best_is_bold_second_underlined_and_ties_are_all_best() -> None:
    store = FakeStore()
    for name, k in (("a", 20), ("b", 20), ("c", 40), ("d", 60)):
        store.add(model(name, "dense"), "autoattack", first_broken(200, k))
    store.add(model("unranked", "dense"), "pgd-50", first_broken(200, 1))
    table = latex.table(all_grids(store)[0], style=latex.Style(columns=("model", "ra_worst"), interval="none"))
    assert row_of(table, "a") == r"a & $\mathbf{90.0}$ \\"
    assert row_of(table, "b") == r"b & $\mathbf{90.0}$ \\"
    assert row_of(table, "c") == r"c & $\underline{80.0}$ \\"
    assert row_of(table, "d") == r"d & $70.0$ \\"
    assert row_of(table, "unranked") == r"unranked & $99.5$ \\"


def test_plus_minus_covers_the_interval_and_the_file_says_so() -> None:
    store = FakeStore()
    store.add(model("a", "dense"), "autoattack", first_broken(200, 199))
    grid = all_grids(store)[0]
    columns = ("model", "ra_worst")
    plus_minus = latex.table(grid, style=latex.Style(columns=columns))
    assert r"$\mathbf{0.5}{\scriptstyle\,\pm\,2.3}$" in plus_minus
    assert "+- reaches to the farther end of the 95 % Wilson interval" in plus_minus
    ends = latex.table(grid, style=latex.Style(columns=columns, interval="ends"))
    assert r"${\mathbf{0.5}}_{-0.4}^{+2.3}$" in ends
    assert "Sub- and superscripts reach to the ends" in ends


def test_caption_label_and_wide_make_a_float_and_nothing_does_not() -> None:
    grid = all_grids(demo(60))[0]
    bare = latex.table(grid)
    assert r"\begin{table" not in bare and r"\caption" not in bare
    given = latex.table(grid, style=latex.Style(caption="100% of a_b", label="tab:x"))
    assert r"\begin{table}[t]" in given
    assert r"\caption{100\% of a\_b}\label{tab:x}" in given
    wide = latex.table(grid, style=latex.Style(wide=True))
    assert r"\begin{table*}[t]" in wide and wide.rstrip().endswith(r"\end{table*}")
    assert r"$\ell_\infty \leq" in wide and "Best in bold, second underlined." in wide


def test_only_booktabs_is_needed() -> None:
    for content in latex.files(all_grids(hostile())).values():
        assert content.startswith("% moebench: \\usepackage{booktabs}\n")
        assert r"\hline" not in content and r"\usepackage{" not in content.split("\n", 1)[1]


def test_rows_cite_the_entries_that_bibtex_gives() -> None:
    (table,) = export(demo(30), Choice("latex", ("leaderboard",), dataset="digits", cite=True)).files.values()
    (entries,) = export(demo(30), Choice("bibtex", ("leaderboard",), dataset="digits")).files.values()
    cited = set(re.findall(r"\\cite\{([^}]+)\}", table.decode()))
    assert cited
    assert cited <= set(re.findall(r"^@\w+\{([^,]+),", entries.decode(), re.MULTILINE))


@pytest.mark.parametrize("name", NAMES)
def test_names_stand_escaped_in_one_cell(name: str) -> None:
    store = FakeStore()
    store.add(model(name, "dense"), "autoattack", first_broken(200, 10))
    table = latex.table(all_grids(store)[0], style=latex.Style(columns=("model", "sa", "ra")))
    assert table.isascii()
    (row,) = [line for line in table.splitlines() if line.endswith(r"\\") and "Model" not in line]
    assert len(re.findall(r"(?<!\\)&", row)) == 2


def test_tables_that_would_share_a_file_get_files_of_their_own() -> None:
    store = FakeStore()
    for eps in (0.1, 0.2):
        store.add(model("a"), "autoattack", first_broken(200, 40), on=protocol(eps=eps))
    assert sum(name.startswith("leaderboard-digits-Linf") for name in latex.files(all_grids(store))) == 2


# What LaTeX makes of it


@LATEX
@pytest.mark.parametrize("columns", ["", ",twocolumn"], ids=["one-column", "two-columns"])
def test_every_table_compiles_and_fits(columns: str, tmp_path: Path) -> None:
    shown = [*all_grids(demo(60)), *all_grids(hostile())]
    assert {grid.kind for grid in shown} == set(KINDS)
    styles = (latex.BARE, latex.Style(wide=True), latex.Style(caption="C.", label="tab:c", interval="ends"))
    inputs = []
    for number, style in enumerate(styles):
        for name, content in latex.files(shown, style=style).items():
            (tmp_path / f"{number}-{name}").write_text(content, encoding="ascii")
            put = rf"\input{{{number}-{name}}}"
            inputs.append(put if style.floats else rf"\begin{{table}}[t]\centering{put}\end{{table}}")
            inputs.append(r"\clearpage" if len(inputs) % 8 == 7 else "")
    (tmp_path / "doc.tex").write_text(DOCUMENT % (columns, r"\usepackage{graphicx}", "\n".join(inputs)))
    assert "Overfull \\hbox" not in compiled(tmp_path / "doc.tex")


@LATEX
def test_tables_compile_without_graphicx_and_every_citation_is_found(tmp_path: Path) -> None:
    if shutil.which("bibtex") is None:
        pytest.skip("bibtex is not installed")
    shown = all_grids(hostile())
    books = bibliography(card for grid in shown for card in grid.cited)
    style = latex.Style(wide=True, keys=books.keys)
    for name, content in latex.files(shown, books, style).items():
        (tmp_path / name).write_text(content, encoding="ascii")
    inputs = "\n".join(rf"\input{{{path.name}}}\clearpage" for path in sorted(tmp_path.glob("*.tex")))
    (tmp_path / "all.bib").write_text(books.text, encoding="utf-8")
    ending = r"\nocite{*}\bibliographystyle{plain}\bibliography{all}"
    (tmp_path / "doc.tex").write_text(DOCUMENT % ("", "", f"{inputs}\n{ending}"))
    compiled(tmp_path / "doc.tex")
    done = subprocess.run(["bibtex", "doc"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "error" not in done.stdout.lower(), done.stdout
    compiled(tmp_path / "doc.tex")
    said = compiled(tmp_path / "doc.tex")
    assert "undefined" not in said


def test_the_same_tables_are_in_a_report_and_in_an_export() -> None:
    from moebench.report import render

    store = demo(60)
    reported = {name.removeprefix("tables/"): text for name, text in render(store).items() if name.endswith(".tex")}
    exported = {name: text.decode() for name, text in export(store, Choice("latex", together=True)).files.items()}
    assert reported == exported
