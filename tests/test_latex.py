"""The report's tables in LaTeX: what is bold, what is escaped, and that each compiles and fits its line."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from fake_store import FakeStore, claim, demo, first_broken, model, protocol
from hostile import HOSTILE, hostile_store
from hypothesis import given
from hypothesis import strategies as st
from typesetting import DOCUMENT, LATEX, compiled

from moebench.report import latex_text, render


@given(st.text(max_size=60))
def test_escaped_latex_is_ascii_on_one_line_with_balanced_braces(raw: str) -> None:
    escaped = latex_text.escape(raw)
    assert escaped.isascii()
    assert not set(escaped) & set("\n\r\t")
    bare = escaped.replace(r"\{", "").replace(r"\}", "")
    assert bare.count("{") == bare.count("}")
    assert len(latex_text.shorten(raw)) <= latex_text.MAX_NAME


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


@cache
def every_table() -> tuple[str, ...]:
    """All tables of a populated store, and of one for each hostile name."""
    stores = [demo(60), *(hostile_store(name) for name in HOSTILE)]
    return tuple(
        str(content)
        for store in stores
        for name, content in sorted(render(store).items())
        if name.startswith("tables/")
    )


@LATEX
@pytest.mark.parametrize("columns", ["", ",twocolumn"])
def test_every_table_compiles_and_fits_its_line(columns: str, tmp_path: Path) -> None:
    files = [f"t{number}.tex" for number in range(len(every_table()))]
    for name, content in zip(files, every_table(), strict=True):
        (tmp_path / name).write_text(content, encoding="ascii")
    body = "\n".join(rf"\begin{{table}}[h]\centering\input{{{name}}}\end{{table}}\clearpage" for name in files)
    (tmp_path / "doc.tex").write_text(DOCUMENT % (columns, r"\usepackage{graphicx}", body))
    assert "Overfull" not in compiled(tmp_path / "doc.tex")
    (tmp_path / "bare.tex").write_text(DOCUMENT % (columns, "", body))
    compiled(tmp_path / "bare.tex")
