"""`moebench compare`: models of one database held against each other on the same samples."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import DENSE, MOE, Terminal
from fake_store import FakeStore, first_broken, model, protocol

from moebench.evaluation import EvalSpec, evaluate
from moebench.metrics import paired
from moebench.report import tables
from moebench.report.comparison import Wanted, compare
from moebench.store import Store

N = 40


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models under two attacks, and one of them under a third and at another radius as well."""
    path = tmp_path_factory.mktemp("compared") / "results.db"
    basics = EvalSpec(DENSE, attacks=("fgsm", "pgd-3"), n=N, db=str(path), trust=False)
    changes: list[dict[str, Any]] = [{}, {"model": MOE}, {"attacks": ("pgd-10",)}, {"attacks": ("fgsm",), "eps": 0.1}]
    for change in changes:
        evaluate(replace(basics, **change))
    return path


@pytest.fixture
def measured(moebench: Terminal, database: Path) -> Terminal:
    """A folder with a copy of that database."""
    shutil.copy(database, moebench.folder)
    return moebench


def test_every_line_is_the_paired_test_of_the_stored_verdicts(measured: Terminal) -> None:
    found = measured("compare", "--models", f"{DENSE},{MOE}", "--json").json
    facts = {"dataset": "digits", "split": "test", "n": N, "norm": "Linf", "eps": 0.2, "view": "whole"}
    assert {key: found[key] for key in facts} == facts
    assert [one["attack"] for one in found["contests"]] == ["clean", "fgsm", "RA-worst"]
    asked = measured("compare", "--models", f"{MOE},{DENSE}", "--attack", "pgd-3", "--eps", "0.2", "--json").json
    with Store.open(write=False) as store:
        broken = {
            (one.model.name, one.cell.attack): store.outcomes(one.result_id).broken
            for one in store.results()
            if one.cell.view == "whole" and one.protocol.threat.eps == 0.2
        }
        worst = {row.model.name: row.standing for row in tables.build(store).boards[0].rows}
        labels = store.labels(store.results()[0].protocol)
        clean = {one.model.name: store.outcomes(one.result_id).clean_pred == labels for one in store.results()}
    for contest, attack in ((found["contests"][1], "fgsm"), (asked["contests"][1], "pgd-3")):
        one, other = (~broken[name, attack] for name in contest["models"])
        test = paired(one, other)
        assert contest["attack"] == attack and contest["p"] == test.p
        assert contest["wrong_alone"] == [test.only_first, test.only_second]
        assert [side["value"] for side in contest["accuracies"]] == [one.mean(), other.mean()]
    for contest, left in ((found["contests"][0], clean), (found["contests"][2], worst)):
        assert [side["value"] for side in contest["accuracies"]] == [left[name].mean() for name in contest["models"]]
    assert asked["contests"][1]["models"] == [MOE, DENSE]


def test_a_table_for_people(measured: Terminal) -> None:
    said = measured("compare", "--models", f"{DENSE},{MOE}")
    assert said.code == 0 and said.out.startswith(f"digits, n = {N}, Linf 0.2\n")
    (line,) = (line.split() for line in said.out.splitlines() if line.strip().startswith("fgsm"))
    assert line[1:3] == [DENSE, MOE] and line[-3:-1] != ["0", "0"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"--models {DENSE}", "two different models or more, got resnet-at"),
        (f"--models {DENSE},{DENSE}", "two different models or more"),
        (f"--models {DENSE},st-mo", "unknown model 'st-mo'; did you mean st-moe"),
        (f"--models {DENSE},{MOE} --attack pgd-10", "no result of pgd-10 on the view whole for st-moe; `moebench eval"),
        (f"--models {DENSE},{MOE} --attack fgsm --view router", "no result of fgsm on the view router for resnet-at"),
        (f"--models {DENSE},{MOE} --eps 0.1", "nothing was measured on the same samples and threat model for all of"),
        (f"--models {DENSE},{MOE} --n 7", "nothing was measured on the same samples"),
        (f"--models {DENSE},{MOE} --view wohle", "did you mean whole"),
        (f"--models {DENSE},{MOE} --eps much", "eps must be a positive number"),
        (f"--models {DENSE},{MOE} --db none.db", "there is no database 'none.db'"),
    ],
)
def test_wrong_input_is_one_line(measured: Terminal, words: str, message: str) -> None:
    assert message in measured.refuses("compare", *words.split())


def test_every_two_of_several_models_on_the_protocol_that_they_share() -> None:
    store, far = FakeStore(), protocol(eps=0.4)
    for place, name in enumerate(("a", "b", "c")):
        store.add(model(name), "pgd-50", first_broken(200, 100 + 10 * place), on=protocol())
        store.add(model(name), "autoattack", first_broken(200, 120 + 10 * place), on=protocol())
        store.add(model(name), "published:rt-er", first_broken(200, 0), on=protocol())
        store.add(model(name), "pgd-50", first_broken(200, 200), on=far)
    found = compare(store, Wanted(("a", "b", "c")))
    assert found.protocol.threat.eps == 0.2
    lines = [(one.attack, *one.models) for one in found.contests]
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    assert lines == [(attack, *pair) for attack in ("clean", "pgd-50", "autoattack", "RA-worst") for pair in pairs]
    assert [one.test.only_second for one in found.contests if one.attack == "autoattack"] == [10, 20, 10]
    at_far = compare(store, Wanted(("a", "b"), eps=0.4))
    assert at_far.protocol == far and not np.any([m.k for m in at_far.contests[1].accuracies])
