"""`moebench sweep`: only what is missing, on past failures, and what it says of it."""

from __future__ import annotations

import shlex
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from commands import Terminal

import moebench.evaluation
import moebench.suite
from moebench.errors import GoneError
from moebench.schema import SUITES
from moebench.store import Store

QUICK = ("--n", 10, "--models", "resnet-st,st-moe")
"""Two models that every attack breaks at once."""

SUITE = ("fgsm", "pgd-3", "smooth-fgsm", "apgd-ce[steps=2]")
DENSE = ["fgsm", "pgd-3", "apgd-ce[steps=2]"]


@pytest.fixture
def moebench_(moebench: Terminal, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setitem(SUITES, "v1", SUITE)  # type: ignore[arg-type]
    return moebench


def attacks_of(where: str = "results.db") -> dict[str, set[str]]:
    """Per model the attacks that the store has results of."""
    with Store.open(where, write=False) as store:
        results = store.results()
    found: dict[str, set[str]] = {}
    for one in results:
        found.setdefault(one.model.name, set()).add(one.cell.attack)
    return found


def test_a_sweep_runs_what_is_missing_and_nothing_twice(moebench_: Terminal) -> None:
    first = moebench_("sweep", *QUICK, "--json").json
    assert (first["suite"], first["complete"], first["failures"]) == ("v1", 0, [])
    assert [run["model"] for run in first["runs"]] == ["resnet-st", "st-moe"]
    assert attacks_of() == {"resnet-st": set(DENSE), "st-moe": set(SUITES["v1"])}
    again = moebench_("sweep", *QUICK, "--json").json
    assert (again["complete"], again["runs"]) == (2, [])
    with Store.open("results.db", write=False) as store:
        commands = [run.command for run in store.runs()]
    attacks = shlex.quote(",".join(DENSE))
    assert commands[0] == f"moebench evaluate --model resnet-st --dataset digits --attack {attacks} --n 10"
    repeated = moebench_(*shlex.split(commands[1])[1:])
    assert repeated.code == 0 and "All results were in the database already" in repeated.out


def test_results_of_single_evaluations_count(moebench_: Terminal) -> None:
    moebench_.evaluate("resnet-st", "fgsm,pgd-3", 10)
    planned = moebench_("sweep", *QUICK, "--dry-run", "--json").json
    stored = {cell["attack"]: cell["stored"] for cell in planned["models"][0]["cells"]}
    assert stored == {"fgsm": True, "pgd-3": True, "apgd-ce[steps=2]": False}
    assert set(attacks_of()) == {"resnet-st"}, "a dry run writes nothing"
    table = moebench_("sweep", *QUICK, "--dry-run").out.splitlines()
    row = next(line.split() for line in table if line.startswith("resnet-st"))
    assert row[2:6] == ["apgd-ce[steps=2]", "1", "of", "3"]


def test_dry_run_without_a_database_leaves_none(moebench_: Terminal) -> None:
    assert moebench_("sweep", *QUICK, "--dry-run").code == 0
    assert not list(moebench_.folder.iterdir())


def test_a_failing_attack_stops_neither_its_model_nor_the_next(
    moebench_: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = moebench.evaluation.run_cell

    def failing(work: Any, *rest: Any, **options: Any) -> Any:
        if work.cell.attack == "pgd-3" and not work.cell.view.startswith("rout"):
            raise FloatingPointError("the power\nis out")
        return real(work, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(moebench.evaluation, "run_cell", failing)
        said = moebench_("sweep", *QUICK)
    assert said.code == 1
    assert "pgd-3 on resnet-st, digits: FloatingPointError: the power is out" in said.out
    assert "failed: pgd-3 on st-moe, digits: FloatingPointError: the power is out" in said.err
    assert "2 could not be done:" in said.out and "Traceback" not in said.err
    found = attacks_of()
    assert found == {"resnet-st": set(DENSE) - {"pgd-3"}, "st-moe": set(SUITES["v1"]) - {"pgd-3"}}
    # What failed is what the same command then finds missing.
    assert moebench_("sweep", *QUICK).code == 0
    assert attacks_of() == {"resnet-st": set(DENSE), "st-moe": set(SUITES["v1"])}


def test_a_database_that_cannot_be_written_is_said_once(moebench_: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    with sqlite3.connect("results.db") as connection:
        connection.execute("CREATE TABLE users (id int)")
    assert "is a database of something else" in moebench_.refuses("sweep", *QUICK)
    Path("results.db").unlink()

    def full(self: Store, result_id: int, chunk: Any) -> None:
        raise GoneError("'results.db' could not be written; is the disk full?")

    monkeypatch.setattr(Store, "append_chunk", full)
    said = moebench_("sweep", *QUICK)
    assert (said.code, said.out) == (1, "")
    assert said.err == "moebench: 'results.db' could not be written; is the disk full?\n"


def test_a_cancelled_run_ends_the_sweep(moebench_: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Store.append_chunk

    def cancelling(self: Store, result_id: int, chunk: Any) -> None:
        self.cancel_runs([self.runs()[-1].run_id])
        real(self, result_id, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "append_chunk", cancelling)
        said = moebench_("sweep", *QUICK)
    assert (said.code, said.out, said.err.count("\n")) == (1, "", 1)
    assert "was cancelled; what was finished is kept, and the same command goes on" in said.err
    with Store.open("results.db", write=False) as store:
        assert [(run.status, run.error) for run in store.runs()] == [("failed", "cancelled")]


def test_an_interruption_ends_the_sweep(moebench_: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(moebench.evaluation, "run_cell", interrupted)
    said = moebench_("sweep", *QUICK)
    assert said.code == 1
    assert said.err.splitlines()[-1].startswith("moebench: interrupted; what was finished is kept")
    with Store.open("results.db", write=False) as store:
        assert [run.model.name for run in store.runs()] == ["resnet-st"]


def test_a_model_that_cannot_be_loaded_is_told_and_the_others_go_on(moebench_: Terminal) -> None:
    said = moebench_("sweep", "--n", 10, "--models", "nothing.py:model,resnet-st", "--datasets", "digits,digits")
    assert said.code == 1
    assert "nothing.py" in said.out.split("could not be done:")[1]
    assert set(attacks_of()) == {"resnet-st"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--models", "resnet-at,resnet-ta"), "resnet-at"),
        (("--suite", "v9"), "'v9' is not"),
        (("--eps", "0"), "eps must be a positive number"),
        (("--eps", "2"), "eps must be at most 1"),
        (("--n", "0"), "n must be at least 1, got 0"),
        (("--models", "resnet-st", "--batch-size", "0"), "batch size must be at least 1, got 0"),
        (("--datasets", "npz:none.npz"), "no weights are shipped for npz:none.npz; name models with --models"),
    ],
)
def test_wrong_input(moebench_: Terminal, words: tuple[str, ...], expected: str) -> None:
    assert expected in moebench_.refuses("sweep", *words)


def test_some_attacks_run_on_the_whole_model_alone(moebench_: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moebench.suite, "WHOLE_ONLY", frozenset({"fgsm"}))
    said = moebench_("sweep", "--n", 10, "--models", "st-moe", "--json").json
    assert [sorted({(one["attack"], one["view"]) for one in run["results"]}) for run in said["runs"]] == [
        [
            *(("apgd-ce[steps=2]", view) for view in ("experts", "router", "whole")),
            *(("pgd-3", view) for view in ("experts", "router", "whole")),
            ("smooth-fgsm", "smooth"),
        ],
        [("fgsm", "whole")],
    ]
    with Store.open("results.db", write=False) as store:
        (command,) = [run.command for run in store.runs() if len(run.results) == 1]
    assert command == "moebench evaluate --model st-moe --dataset digits --attack fgsm --view whole --n 10"
