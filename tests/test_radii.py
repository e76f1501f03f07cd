from __future__ import annotations

import csv
import io
import shlex
import signal
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import DENSE, MOE, Terminal
from fake_store import FakeStore, first_broken, model, protocol
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import attack, digits, trained_conv

from moebench import cells
from moebench.attacks import load_attack
from moebench.attacks._engine import Engine
from moebench.attacks.pgd import PGD
from moebench.commands._tables import curve_lines
from moebench.errors import UsageError
from moebench.evaluation import EvalSpec, Progress
from moebench.radii import sweep
from moebench.registry import attack_registry
from moebench.report import render, tables
from moebench.report.curves import COLUMNS, curves, curves_csv
from moebench.report.evidence import attack_key
from moebench.schema import WARM_START, Outcomes, StoredResult, ThreatModel, parse_radii
from moebench.store import Store

RADII = (0.1, 0.2, 0.4, 0.9)
"""On these FGSM alone is no falling curve for the model: its single step goes too far."""
LIST = ",".join(map(str, RADII))
WORDS = ("--view", "whole", "--no-trust", "--eps", LIST)


Found = dict[tuple[str, float, bool], tuple[StoredResult, Outcomes]]


def stored(path: str = "results.db") -> Found:
    """The newest results with their evidence by attack, radius, and whether they had a warm start."""
    with Store.open(path, write=False) as store:
        assert store.check() == []
        return {
            (one.cell.attack, one.protocol.threat.eps, WARM_START in one.cell.parameters): (
                one,
                store.outcomes(one.result_id),
            )
            for one in store.results()
        }


def verdicts(found: Found) -> dict[Any, Any]:
    return {
        key: [one.cell.fingerprint, *(getattr(out, name).tolist() for name in ("broken", "adv_pred", "distance"))]
        for key, (one, out) in found.items()
    }


# Radii.


@given(st.lists(st.floats(1e-9, 1e9) | st.integers(1, 300), min_size=1, max_size=8))
def test_a_list_of_radii_is_sorted_and_holds_each_once(numbers: list[float]) -> None:
    texts = [f"{number}/255" if isinstance(number, int) else repr(number) for number in numbers]
    values = {number / 255 if isinstance(number, int) else number for number in numbers}
    found = parse_radii(" , ".join(texts))
    assert list(found) == sorted(values) and set(found.values()) <= set(texts)
    assert parse_radii(",".join(found.values())) == found


@given(
    st.lists(st.sampled_from(["0.1", "8/255", "1"])), st.sampled_from(["", " ", "0", "-1", "nan", "1/0", "x", "1;2"])
)
def test_one_bad_radius_spoils_the_list(good: list[str], bad: str) -> None:
    with pytest.raises(UsageError, match="eps must be a positive number such as 8/255"):
        parse_radii(",".join([*good, bad]))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--eps 0.1,", "eps must be a positive number such as 8/255 or 0.03, got ''"),
        ("--eps 0.1,0", "eps must be a positive number such as 8/255 or 0.03, got '0'"),
        ("--eps 0.1,8", "eps must be at most 1 for Linf on [0, 1] images, got 8"),
        ("--eps 0.1,0.2 --save-adv a.npz", "--save-adv takes the images of one eps"),
        ("--eps 0.1,0.2 --attack pgd-0", "pgd-N takes a whole number of steps from 1 to 9999"),
        ("--eps 0.1,0.2 --n 0", "n must be at least 1"),
    ],
)
def test_a_wrong_sweep_is_answered_in_one_line_and_leaves_nothing(
    moebench: Terminal, words: str, expected: str
) -> None:
    assert expected in moebench.refuses("evaluate", "--model", DENSE, *words.split())


def test_a_sweep_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one eps"):
        sweep(EvalSpec(DENSE), [])


# Cold and warm.


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """FGSM and PGD on one model, cold and warm, from a database of the library's own interface."""
    path = str(tmp_path_factory.mktemp("both") / "r.db")
    spec = EvalSpec(MOE, attacks=("fgsm", "pgd-2"), views=("whole", "router"), n=40, db=path)
    for cold in (True, False):
        found = sweep(spec, [*RADII[::-1], RADII[0]], cold=cold)
        assert [summary.eps for summary in found.summaries] == list(RADII)
    with Store.open(path, write=False) as store:
        assert len(store.results()) == 2 * 2 * (2 * len(RADII) - 1)
        return {
            (f"{one.cell.attack} {one.cell.view}", one.protocol.threat.eps, WARM_START in one.cell.parameters): (
                one,
                store.outcomes(one.result_id),
            )
            for one in store.results()
        }


ATTACKS = [f"{name} {view}" for name in ("fgsm", "pgd-2") for view in ("whole", "router")]


@pytest.mark.parametrize("name", ATTACKS)
def test_a_warm_start_adds_what_smaller_radii_broke_and_changes_nothing_else(both: Found, name: str) -> None:
    union = both[name, RADII[0], False][1].broken
    for smaller, eps in pairwise(RADII):
        cold, (one, warm) = both[name, eps, False][1], both[name, eps, True]
        np.testing.assert_array_equal(warm.broken, cold.broken | union)
        taken = np.array([stage == WARM_START for stage in warm.stage])
        attacked = np.array([stage != "" for stage in warm.stage])
        np.testing.assert_array_equal(taken, union & attacked)
        assert taken.sum() == one.record.stages.get(WARM_START, {"broken": 0})["broken"]
        # The images are those of the smaller radius, and cost one pass to judge after the clean one.
        assert bool((warm.distance[taken] <= smaller + 1e-6).all())
        assert warm.forwards[taken].tolist() == [2] * int(taken.sum()) and not warm.backwards[taken].any()
        rest = ~taken & warm.broken
        np.testing.assert_array_equal(warm.adv_pred[rest], cold.adv_pred[rest])
        np.testing.assert_array_equal(warm.distance[rest], cold.distance[rest])
        union = warm.broken
    assert taken.any()


def test_warm_curves_fall_where_an_attack_alone_rises(both: Found) -> None:
    cold = [both["fgsm whole", eps, False][0].record.accuracy for eps in RADII]
    assert cold != sorted(cold, reverse=True), "the case below shows nothing if the attack's own curve falls"
    for name in ATTACKS:
        warm = [both[name, eps, eps != RADII[0]][0].record.accuracy for eps in RADII]
        assert warm == sorted(warm, reverse=True)


def test_a_warm_result_names_the_result_that_it_builds_on(both: Found) -> None:
    for name in ATTACKS:
        for smaller, eps in pairwise(RADII):
            below, here = both[name, smaller, smaller != RADII[0]][0], both[name, eps, True][0]
            assert here.cell.parameters[WARM_START] == {"eps": smaller, "fingerprint": below.cell.fingerprint}
            cold = both[name, eps, False][0]
            assert {key: value for key, value in here.cell.parameters.items() if key != WARM_START} == dict(
                cold.cell.parameters
            )
    assert len({one.cell.fingerprint for one, _ in both.values()}) == len(both)


def test_a_point_of_a_cold_sweep_is_the_evaluation_at_its_radius(moebench: Terminal) -> None:
    words = ("fgsm,pgd-3", 30, "--view", "whole")
    moebench.evaluate(MOE, *words, "--eps", "0.1,0.3", "--cold")
    for eps in (0.1, 0.3):
        moebench.evaluate(MOE, *words, "--eps", eps, "--db", "alone.db")
    assert verdicts(stored()) == verdicts(stored("alone.db"))
    said = moebench.evaluate(MOE, *words, "--eps", "0.1,0.3", "--cold", "--db", "alone.db")
    assert "All results were in the database already" in said.out


def test_the_reference_engine_starts_cold(moebench: Terminal) -> None:
    words = ("--view", "whole", "--no-trust", "--eps", "0.1,0.2", "--engine", "reference")
    moebench.evaluate(DENSE, "pgd-2", 12, *words)
    found = stored()
    assert set(found) == {("pgd-2", 0.1, False), ("pgd-2", 0.2, False)}
    assert [one.command.split()[-5] for one, _ in found.values()] == ["0.1", "0.2"]


# Reuse and resuming.


def counts(path: str = "results.db") -> list[int]:
    with Store.open(path, write=False) as store:
        return [run.reused for run in store.runs()]


def test_a_sweep_again_computes_nothing_and_a_single_radius_is_another_question(moebench: Terminal) -> None:
    moebench.evaluate(MOE, "fgsm", 30, "--view", "whole", "--no-trust", "--eps", RADII[0])
    first = moebench.evaluate(MOE, "fgsm", 30, *WORDS, "--json").json
    again = moebench.evaluate(MOE, "fgsm", 30, *WORDS, "--json").json
    assert counts() == [0, 1, 0, 0, 0, 1, 1, 1, 1]
    for one, other in zip(first["curves"][0]["points"], again["curves"][0]["points"], strict=True):
        assert {**one, "run_id": 0} == {**other, "run_id": 0} and one["run_id"] != other["run_id"]
    moebench.evaluate(MOE, "fgsm", 30, "--view", "whole", "--no-trust", "--eps", RADII[-1])
    assert counts()[-1] == 0
    moebench.evaluate(MOE, "fgsm", 30, *WORDS, "--fresh")
    assert counts()[-4:] == [0] * 4
    with Store.open("results.db", write=False) as store:
        found = store.results(newest_only=False)
        by_cell = [[store.outcomes(one.result_id) for one in found if one.cell.fingerprint == name] for name in
                   {one.cell.fingerprint for one in found}]  # fmt: skip
    assert sorted(map(len, by_cell)) == [1, 2, 2, 2, 2]
    for old in by_cell:
        np.testing.assert_array_equal(old[0].broken, old[-1].broken)
        np.testing.assert_array_equal(old[0].distance, old[-1].distance)


def test_a_longer_sweep_builds_on_what_is_stored(moebench: Terminal) -> None:
    """No images are stored, so those of reused radii are made again, and must be the same."""
    words = ("fgsm,pgd-2", 20, "--view", "whole,router", "--no-trust", "--eps")
    for length in (1, 3):
        moebench.evaluate(MOE, *words, ",".join(map(str, RADII[:length])))
    moebench.evaluate(MOE, *words, LIST)
    assert counts() == [0, 4, 0, 0, 4, 4, 4, 0]
    moebench.evaluate(MOE, *words, LIST, "--db", "at once.db")
    assert verdicts(stored()) == verdicts(stored("at once.db"))


def test_an_interrupted_sweep_goes_on_to_the_same_verdicts(moebench: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops at each commit once: after every step the samples decided in it are committed."""
    monkeypatch.setattr(cells, "Engine", partial(Engine, flush_seconds=0.0))
    words = ("pgd-2", 15, "--view", "whole", "--no-trust", "--eps", "0.1,0.2")
    moebench.evaluate(MOE, *words, "--db", "undisturbed.db")
    real, limit = Store.append_chunk, 0

    def limited(store: Store, *what: Any) -> None:
        nonlocal limit
        limit -= 1
        if limit < 0:
            raise KeyboardInterrupt
        real(store, *what)

    monkeypatch.setattr(Store, "append_chunk", limited)
    stops = 0
    while True:
        limit = 1
        said = moebench.evaluate(MOE, *words)
        if said.code == 0:
            break
        assert said.code == 1 and "the same command goes on from there" in said.err
        stops += 1
    assert stops >= 5, "each radius has a clean chunk and some of its attack, the second also what it takes over"
    assert verdicts(stored()) == verdicts(stored("undisturbed.db"))
    for (one, out), (other, same) in zip(stored().values(), stored("undisturbed.db").values(), strict=True):
        assert one.record.accuracy == other.record.accuracy and out.stage == same.stage
        np.testing.assert_array_equal(out.forwards, same.forwards)


SUICIDAL = """
import os, signal, sys
from moebench.cli import main
from moebench.store import Store

real, left = Store.append_chunk, 4

def append(store, *what):
    global left
    real(store, *what)
    left -= 1
    if left == 0:  # the clean chunk of the second radius and what it takes over are committed, its attack is not
        os.kill(os.getpid(), signal.SIGKILL)

Store.append_chunk = append
main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_killed_sweep_goes_on_to_the_same_verdicts(moebench: Terminal) -> None:
    words = (
        "evaluate",
        "--model",
        MOE,
        "--attack",
        "pgd-3",
        "--view",
        "whole",
        "--no-trust",
        "--n",
        "30",
        "--eps",
        "0.1,0.2,0.3",
    )
    moebench(*words, "--db", "undisturbed.db")
    killed = subprocess.run([sys.executable, "-c", SUICIDAL, *words], check=False)
    assert killed.returncode == -signal.SIGKILL
    with Store.open("results.db", write=False) as store:
        assert [run.status for run in store.runs()] == ["done", "running"] and store.check() == []
    assert len(moebench(*words, "--json").json["runs"]) == 3 and counts() == [0, 0, 1, 0, 0]
    assert verdicts(stored()) == verdicts(stored("undisturbed.db"))


# What is printed.


def test_json_of_a_sweep(moebench: Terminal) -> None:
    said = moebench.evaluate(MOE, "fgsm,pgd-2", 20, "--eps", "0.2,0.1", "--json")
    found = said.json
    assert said.err == "" and said.out.count("\n") == 1
    assert list(found) == ["model", "dataset", "n", "norm", "suite", "runs", "curves"]
    assert (found["model"], found["dataset"], found["n"], found["norm"]) == (MOE, "digits", 20, "Linf")
    single = moebench.evaluate(MOE, "fgsm,pgd-2", 20, "--eps", "0.1,0.1", "--json").json
    low, high = found["runs"]
    assert list(single) == list(low) == list(high) and (low["eps"], high["eps"]) == (0.1, 0.2)
    assert {**single, "run_id": 0, "seconds": 0} == {**low, "run_id": 0, "seconds": 0}
    assert all("warm_start" not in item for item in low["results"])
    assert [item["warm_start"]["eps"] for item in high["results"]] == [0.1] * 6
    assert [(curve["attack"], curve["view"]) for curve in found["curves"]] == [
        (item["attack"], item["view"]) for item in low["results"]
    ]
    for place, curve in enumerate(found["curves"]):
        for point, one in zip(curve["points"], found["runs"], strict=True):
            item = one["results"][place]
            assert list(point) == ["eps", "accuracy", "ci_low", "ci_high", "n", "run_id"]
            assert point == {"eps": one["eps"], "run_id": one["run_id"], **{key: item[key] for key in list(point)[1:5]}}


def test_a_sweep_is_printed_as_a_table_over_eps(moebench: Terminal) -> None:
    said = moebench.evaluate(MOE, "fgsm", 20, "--eps", "0.2,8/255,0.1")
    lines = said.out.splitlines()
    found = moebench.evaluate(MOE, "fgsm", 20, "--eps", "0.2,8/255,0.1", "--json").json
    head = next(at for at, line in enumerate(lines) if line.startswith("attack"))
    assert lines[head].split() == ["attack", "view", "8/255", "0.1", "0.2"]
    for line, curve in zip(lines[head + 1 :], found["curves"], strict=False):
        numbers = [f"{100 * point['accuracy']:.2f}" for point in curve["points"]]
        assert line.split() == [curve["attack"], curve["view"], *numbers]
    worst = [f"{100 * run['ra_worst']:.2f}" for run in found["runs"]]
    assert next(line for line in lines if line.startswith("RA-worst")).split()[-3:] == worst
    assert [line.split(", ")[1] for line in lines if line.startswith("run ")] == ["Linf 8/255", "Linf 0.1", "Linf 0.2"]


@given(st.integers(20, 90))
@settings(deadline=None, max_examples=20)
def test_a_narrow_terminal_gets_the_radii_in_blocks(width: int) -> None:
    lines = [line.replace("[bold]", "").replace("[/bold]", "") for line in curve_lines(SWEPT(), width)]
    heads = [line.split()[2:] for line in lines if line.startswith("attack")]
    assert [eps for head in heads for eps in head] == ["0.1", "0.2", "0.4", "0.9"]
    assert all(len(line) <= width or len(head) == 1 for line in lines for head in heads[:1])


class SWEPT:
    """As much of a sweep as the table looks at."""

    summaries = [type("One", (), {"eps": eps, "ra_worst": 0.5})() for eps in RADII]  # noqa: RUF012
    curves = {("pgd-20", "whole"): [type("One", (), {"accuracy": 0.5})()] * 4}  # noqa: RUF012


def test_a_run_with_a_warm_start_says_so_and_its_command_repeats_it(moebench: Terminal) -> None:
    found = moebench.evaluate(MOE, "fgsm", 30, *WORDS, "--json").json
    last = found["runs"][-1]
    said = moebench("show", last["run_id"])
    taken = sum(stage == WARM_START for stage in stored()["fgsm", 0.9, True][1].stage)
    source = last["results"][0]["warm_start"]["fingerprint"]
    assert f"fgsm on whole: warm start, {taken} samples taken over from eps 0.4 (result {source[:16]}" in said.out
    assert "warm start" not in moebench("show", found["runs"][0]["run_id"]).out
    for place, run in [(0, found["runs"][0]), (2, found["runs"][2])]:
        with Store.open("results.db", write=False) as store:
            words = shlex.split(store.run(run["run_id"]).command)[1:]
        again = moebench(*words, "--json", "--db", f"{place}.db").json
        again = again["runs"][-1] if place else again
        assert again["eps"] == run["eps"] and again["ra"] == run["ra"]
        assert [one.get("warm_start") for one in again["results"]] == [one.get("warm_start") for one in run["results"]]


def test_a_dry_run_of_a_sweep_writes_nothing_and_its_bound_holds(moebench: Terminal) -> None:
    planned = moebench.evaluate(MOE, "fgsm", 30, *WORDS, "--dry-run", "--json").json
    assert moebench.files() == {} and [level["eps"] for level in planned["radii"]] == list(RADII)
    for level, run in zip(planned["radii"], moebench.evaluate(MOE, "fgsm", 30, *WORDS, "--json").json["runs"],
                          strict=True):  # fmt: skip
        (cell,), (result,) = level["cells"], run["results"]
        assert not cell["stored"] and result["backwards"] <= cell["backwards"]
        assert result["forwards"] - 30 <= cell["forwards"], "30 clean passes come on top"
    said = moebench.evaluate(MOE, "fgsm", 30, "--view", "whole", "--no-trust", "--eps", f"{LIST},1", "--dry-run")
    assert said.out.count("stored already") == 4 and "eps 1: fgsm on view whole, 30 samples: at most " in said.out


def test_a_listener_of_a_sweep_is_told_the_place_in_the_whole(tmp_path: Path) -> None:
    told: list[Progress] = []
    spec = EvalSpec(MOE, attacks=("fgsm", "pgd-2"), views=("whole",), n=20, db=str(tmp_path / "r.db"))
    sweep(spec, [0.1, 0.2], listener=told.append)
    assert {step.number for step in told} == {1, 2, 3, 4} and {step.total for step in told} == {4}
    assert [step.number for step in told] == sorted(step.number for step in told)
    assert {step.attack for step in told if step.number > 2} == {"eps 0.2: fgsm", "eps 0.2: pgd-2"}


# Any number of steps.


@given(st.integers(1, 9999))
def test_pgd_of_any_length_is_the_same_program(steps: int) -> None:
    for name, views in ((f"pgd-{steps}", None), (f"smooth-pgd-{steps}", ("smooth",))):
        plan = load_attack(name)
        assert (plan.name, plan.views, plan.stages) == (name, views, (PGD(steps=steps),))
        assert name in attack_registry()
    # Results of the names that have always been there stay valid.
    assert load_attack(f"pgd-{steps}").parameters() == {
        "pgd": {"steps": steps, "step_fraction": 0.25, "random_start": True}
    }


@pytest.mark.parametrize("name", ["pgd-0", "pgd-07", "pgd-10000", "pgd--1", "pgd-1.5", "pgd-N", "pgd-", "smooth-pgd-0"])
def test_what_is_no_number_of_steps_is_no_name(name: str) -> None:
    assert name not in attack_registry()
    with pytest.raises(UsageError, match="pgd-N takes a whole number of steps from 1 to 9999"):
        load_attack(name)


def test_more_steps_break_more_of_the_same_samples() -> None:
    threat, samples, network = ThreatModel("Linf", 0.1), digits(60), trained_conv()
    found = [attack(network, samples, threat, load_attack(f"pgd-{steps}").stages) for steps in (1, 2, 4, 9, 30)]
    for fewer, more in pairwise(found):
        assert bool((more.broken | ~fewer.broken).all())
        # Broken by the very same image: the trajectories are one.
        assert bool((more.x_adv[fewer.broken] == fewer.x_adv[fewer.broken]).all())
    assert found[0].broken.sum() < found[2].broken.sum() <= found[-1].broken.sum()


def test_step_sweeps_share_their_stored_results(moebench: Terminal) -> None:
    found = moebench.evaluate(MOE, "pgd-1,pgd-5,pgd-12", 30, "--view", "whole", "--json").json
    left = [item["accuracy"] for item in found["results"]]
    assert left == sorted(left, reverse=True) and left[0] > left[-1]
    moebench.evaluate(MOE, "pgd-5", 30, "--view", "whole")
    assert counts() == [0, 1]


# Curves of the report.


def read(text: str) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(text)))
    assert all(None not in row and None not in row.values() for row in rows)
    return rows


def test_the_report_has_the_curves_of_the_store(moebench: Terminal) -> None:
    moebench.evaluate(MOE, "pgd-2,pgd-6", 30, "--view", "whole", "--no-trust", "--eps", "0.1,0.2")
    moebench.evaluate(MOE, "fgsm", 30, "--view", "whole", "--no-trust", "--eps", "0.1")
    moebench.evaluate(MOE, "pgd-2", 30, "--view", "whole", "--no-trust", "--eps", "0.3")
    moebench("report", "--out", "out")
    text = Path("out/data/curves.csv").read_text()
    assert text.splitlines()[0] == ",".join(COLUMNS)
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in read(text):
        found.setdefault((row["axis"], row["start"], row["attack"]), []).append(row)
    shape = {key: [(float(row["eps"]), int(row["steps"])) for row in rows] for key, rows in found.items()}
    assert shape == {
        ("eps", "warm", "pgd-2"): [(0.1, 2), (0.2, 2)],
        ("eps", "warm", "pgd-6"): [(0.1, 6), (0.2, 6)],
        ("eps", "cold", "pgd-2"): [(0.1, 2), (0.3, 2)],
        ("steps", "cold", "pgd-N"): [(0.1, 2), (0.1, 6)],
        ("steps", "warm", "pgd-N"): [(0.2, 2), (0.2, 6)],
    }
    evidence = stored()
    for (_, start, _), rows in found.items():
        accuracies = [float(row["accuracy"]) for row in rows]
        assert accuracies == sorted(accuracies, reverse=True)
        for row in rows:
            key = (f"pgd-{row['steps']}", float(row["eps"]), start == "warm" and row["eps"] == "0.2")
            one, outcomes = evidence[key]
            assert row["accuracy"] == f"{np.mean(~outcomes.broken):.6f}" and row["n"] == "30"
            assert row["command"] == one.command and row["checkpoint_sha256"] == one.checkpoint.sha256
            assert float(row["ci_low"]) <= float(row["accuracy"]) <= float(row["ci_high"])
    assert "warm start from eps 0.1" in Path(f"out/models/{MOE}.html").read_text()


def test_points_of_unlike_settings_make_no_curve() -> None:
    store = FakeStore()
    for eps, who, name, n in ((0.1, "a", "pgd-10", 200), (0.2, "b", "pgd-10", 200), (0.3, "a", "fgsm", 200)):
        store.add(model(who), name, first_broken(n, 50), on=protocol(eps=eps))
    store.add(model("a"), "pgd-10", first_broken(100, 50), on=protocol(eps=0.2, n=100))
    store.add(model("a"), "pgd-10", first_broken(200, 50), on=protocol(norm="L2", eps=0.2))
    store.add(model("a"), "pgd-10", first_broken(200, 50), on=protocol(eps=0.2), engine="reference")
    assert curves(store.results()) == [] and read(curves_csv(store.results())) == []
    store.add(model("a"), "pgd-10", first_broken(200, 50), on=protocol(eps=0.2))
    (curve,) = curves(store.results())
    assert [one.protocol.threat.eps for one in curve.points] == [0.1, 0.2]


def test_pgd_of_unusual_length_counts_but_has_no_column() -> None:
    store = FakeStore()
    for steps, broken in ((7, 150), (20, 60), (100, 90)):
        store.add(model("a"), f"pgd-{steps}", first_broken(200, broken))
    (board,) = tables.build(store).boards
    assert board.attacks == ("pgd-20",) and board.rows[0].ra.measure is not None
    assert board.rows[0].ra.measure.k == 50
    names = ["autoattack", "pgd-100", "fgsm", "pgd-7", "apgd-ce", "pgd-20"]
    assert sorted(names, key=attack_key) == ["fgsm", "pgd-7", "pgd-20", "pgd-100", "apgd-ce", "autoattack"]


def test_the_radius_of_the_data_set_leads_and_the_others_are_folded() -> None:
    store = FakeStore()
    for eps, command in ((0.1, "… --eps 0.1"), (0.2, "moebench evaluate --model a"), (0.3, "… --eps 0.3")):
        for name in ("a", "b") if eps != 0.2 else ("a",):
            one = store.add(model(name), "autoattack", first_broken(200, 50), on=protocol(eps=eps))
            store.stored[-1] = type(one)(**{**vars(one), "command": command})
    boards = tables.build(store).boards
    assert [(board.protocol.threat.eps, board.main) for board in boards] == [(0.2, True), (0.1, False), (0.3, False)]
    page = render(store)["index.html"]
    assert page.count('<details class="radius">') == 2 and "digits, Linf ≤ 0.1: 2 models" in page
    assert page.index("Linf ≤ 0.2") < page.index('<details class="radius">')


def test_the_number_of_an_attack_is_its_own_where_it_was_run_alone() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 50))
    warm = store.add(model("a"), "autoattack", first_broken(200, 80))
    parameters = {**warm.cell.parameters, WARM_START: {"eps": 0.1, "fingerprint": "f"}}
    cell = type(warm.cell)(**{**vars(warm.cell), "parameters": parameters, "fingerprint": "warm"})
    store.stored[-1] = type(warm)(**{**vars(warm), "cell": cell})
    row = tables.build(store).boards[0].rows[0]
    assert row.attacks[0].measure is not None and row.attacks[0].measure.k == 150
    assert row.ra.measure is not None and row.ra.measure.k == row.worst.measure.k == 120  # type: ignore[union-attr]
