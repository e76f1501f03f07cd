from __future__ import annotations

import numpy as np
import pytest
from fake_store import FakeStore, first_broken, model
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom  # type: ignore[import-untyped]

from moebench.metrics import Paired, paired
from moebench.report import render, tables
from moebench.report.missed import Missed


def test_counts_of_samples_that_only_one_attack_breaks() -> None:
    first = np.array([True, True, False, False, True])
    second = np.array([True, False, True, False, False])
    found = paired(first, second)
    assert (found.only_first, found.only_second, found.discordant) == (1, 2, 3)


@given(st.integers(0, 60), st.integers(0, 60))
def test_p_is_the_exact_binomial_tail_and_symmetric(one: int, other: int) -> None:
    n = one + other
    tail = float(binom.cdf(min(one, other), n, 0.5)) if n else 1.0
    assert Paired(one, other).p == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    assert Paired(one, other).p == Paired(other, one).p


def test_unlike_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="same samples twice, got 3 and 2"):
        paired(np.ones(3, bool), np.ones(2, bool))


# The table of the report.


def store() -> FakeStore:
    made = FakeStore()
    made.add(model("both"), "autoattack", first_broken(200, 100), stage="apgd-ce")
    made.add(model("both"), "moe-adaptive", first_broken(200, 130), stage="region")
    made.add(model("half_done"), "autoattack", first_broken(200, 90))
    made.add(model("mine.py:<b>&", "external"), "autoattack", first_broken(200, 80))
    made.add(model("mine.py:<b>&", "external"), "moe-adaptive", first_broken(200, 80))
    made.add(model("dense", "dense"), "autoattack", first_broken(200, 60))
    made.add(model("mean", "ensemble"), "autoattack", first_broken(200, 60))
    return made


def rows() -> dict[str, Missed]:
    (board,) = tables.build(store()).boards
    return {one.label: one for one in board.missed}


def test_who_has_routing_is_listed_and_what_is_missing_has_a_reason() -> None:
    found = rows()
    assert set(found) == {"both", "half_done", "mine.py:<b>&"}
    both, half, same = found["both"], found["half_done"], found["mine.py:<b>&"]
    assert both.paired == Paired(0, 30) and both.points == pytest.approx(-15.0) and both.found == (("region", 30),)
    assert half.paired is None and half.points is None and half.why == "moe-adaptive has not been run"
    assert half.standard is not None and half.adaptive is None
    assert same.points == 0 and same.found == () and same.paired is not None and same.paired.p == 1.0


def test_a_sample_that_several_results_break_counts_once() -> None:
    made = store()
    made.add(model("both"), "moe-adaptive", first_broken(200, 110), stage="apgd-t")
    (board,) = tables.build(made).boards
    both = next(one for one in board.missed if one.label == "both")
    assert both.found == (("region", 20), ("apgd-t", 10)) and both.paired == Paired(0, 30)


def test_the_page_and_the_table_say_it_escaped() -> None:
    files = render(store())
    page = files["index.html"]
    section = page[page.index("What AutoAttack misses") : page.index('<h2 id="models">')]
    assert "-15.0" in section and "&lt; 0.001" in section and "region 30" in section
    assert "mine.py:&lt;b&gt;&amp;" in section and "<b>" not in section
    assert section.count('<abbr title="moe-adaptive has not been run">—</abbr>') == 6
    table = files["tables/missed-digits-Linf.tex"]
    (row,) = [line for line in table.splitlines() if line.startswith("both &")]
    assert r"$\underline{50.0}{\scriptstyle\,\pm\,6.9}$ & $\underline{35.0}{\scriptstyle\,\pm\,6.8}$" in row
    assert row.endswith(r" & $-15.0$ & 30 & 0 & \ensuremath{<} 0.001 \\")
    assert r"half\_done & $55.0{\scriptstyle\,\pm\,6.9}$ & --- & --- & --- & --- & --- \\" in table
    assert "% A dash: half_done: moe-adaptive has not been run." in table


def test_a_board_without_routing_has_no_such_section() -> None:
    made = FakeStore()
    made.add(model("dense", "dense"), "autoattack", first_broken(200, 60))
    files = render(made)
    assert "What AutoAttack misses" not in files["index.html"]
    assert not any("missed" in name for name in files)


def test_stages_with_nothing_to_do_are_on_the_models_page() -> None:
    made = FakeStore()
    stored = made.add(model("gate"), "moe-adaptive", first_broken(200, 60), stage="apgd-ce", stages={"apgd-ce": {}})
    stored.cell.parameters["region"] = {"skipped": "one <region> only"}  # type: ignore[index]
    page = render(made)["models/gate.html"]
    assert "region (one &lt;region&gt; only)" in page
