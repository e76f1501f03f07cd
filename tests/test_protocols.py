"""Published protocols in an evaluation: stored apart, shown beside the claim, and counted nowhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from commands import DENSE, MOE, Terminal, shipped
from fake_store import FakeStore, claim, first_broken, model, protocol
from test_evaluation import shipped_module

from moebench.claims import load_claims
from moebench.datasets import load_dataset
from moebench.evaluation import EvalSpec, evaluate
from moebench.metrics import standing, worst_case
from moebench.published import card_of
from moebench.report import render, tables
from moebench.report.curves import curves
from moebench.side_by_side import claimed
from moebench.store import Store
from moebench.trust import passive_flags

N = 20
SHORT = "published:rt-er[fp16=off,steps=4]"


# What is stored.


def test_the_number_is_the_share_that_the_rule_calls_right(moebench: Terminal) -> None:
    found = moebench.evaluate(DENSE, SHORT, N, "--json").json
    data, network = load_dataset("digits", n=N), shipped_module(DENSE)
    x, y = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    x_adv = (x - 0.2).clamp(0, 1)
    for _ in range(3):
        x_adv = x_adv.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(network(x_adv), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x_adv)
        moved = x_adv.detach() + 0.25 * 0.2 * gradient.sign()
        x_adv = torch.min(torch.max(moved, x - 0.2), x + 0.2).clamp(0, 1)
    right = network(x_adv).argmax(dim=1) == y
    (result,) = found["results"]
    assert (result["attack"], result["view"]) == (SHORT, "whole")
    assert result["accuracy"] == pytest.approx(float(right.float().mean()))
    with Store.open(None, write=False) as store:
        (stored,) = store.results()
        outcomes = store.outcomes(stored.result_id)
        assert store.check() == []
    np.testing.assert_array_equal(standing(outcomes), right.numpy())
    np.testing.assert_array_equal(outcomes.adv_pred, network(x_adv).argmax(dim=1).numpy())
    assert stored.cell.parameters["rt-er"]["fp16"] is False and stored.cell.parameters["rt-er"]["start"] == "constant"


def test_it_counts_in_no_metric_and_raises_no_flag(moebench: Terminal) -> None:
    alone = moebench.evaluate(DENSE, SHORT, N, "--json").json
    assert [alone[key] for key in ("ra", "ra_e", "ra_r", "ra_worst")] == [None] * 4 and alone["sa"] > 0.9
    attacked = moebench.evaluate(DENSE, "pgd-5", N, "--json").json
    both = moebench.evaluate(DENSE, f"pgd-5,{SHORT},published:v-moe", N, "--json").json
    for key in ("sa", "ra", "ra_worst", "flags"):
        assert both[key] == attacked[key], key
    assert attacked["ra"] == attacked["ra_worst"] == attacked["results"][0]["accuracy"]
    said = moebench.evaluate(DENSE, f"pgd-5,{SHORT}", N).out
    assert "is scored by the paper's own rule and counts in none of the metrics above" in said


def test_switches_make_another_result_and_ways_to_write_them_do_not(moebench: Terminal) -> None:
    one = moebench.evaluate(DENSE, "published:v-moe[steps=3,clip=on]", N, "--json").json
    two = moebench.evaluate(DENSE, "published:v-moe[clip=yes, steps=3]", N, "--json").json
    assert one["results"] == two["results"]
    moebench.evaluate(DENSE, "published:v-moe[steps=3]", N)
    with Store.open(None, write=False) as store:
        cells = [(one.cell.attack, one.cell.parameters["v-moe"]["clip"]) for one in store.results()]
    assert sorted(cells) == [("published:v-moe[clip=on,steps=3]", True), ("published:v-moe[steps=3]", False)]
    same = moebench.evaluate(DENSE, "published:v-moe[steps=3],published:v-moe[steps=3,clip=off]", N, "--json").json
    assert len(same["results"]) == 1


class Killed(BaseException):
    """What ends the first process."""


@pytest.mark.parametrize("attack", [SHORT, "published:robust-experts[mode=train,batch=6,steps=3]"])
def test_a_killed_run_goes_on_where_it_stopped(
    moebench: Terminal, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = EvalSpec(DENSE, attacks=(attack,), n=N, batch_size=6, trust=False, db="killed.db")
    whole = evaluate(EvalSpec(**{**vars(spec), "db": "whole.db"})).results[0]
    append: Callable[..., Any] = Store.append_chunk
    calls = []

    def failing(*words: Any) -> None:
        calls.append(words)
        if len(calls) == 3:
            raise Killed
        append(*words)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "append_chunk", failing)
        with pytest.raises(Killed):
            evaluate(spec)
    with monkeypatch.context() as patched:
        patched.setattr("moebench.store.queries.is_busy", lambda *words, **options: False)
        again = evaluate(spec).results[0]
    assert (again.accuracy, again.forwards, again.changed_predictions) == (
        *(whole.accuracy, whole.forwards, whole.changed_predictions),
    )
    with Store.open("killed.db", write=False) as store:
        assert store.check() == [] and len(store.results()) == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--norm", "L2"), "leave out --norm L2"),
        (("--engine", "reference"), "leave out --engine reference"),
        (("--precision", "bfloat16"), "leave out --precision bfloat16"),
        (("--eot", 3), "leave out --eot"),
        (("--save-adv", "adv.npz"), "leave out --save-adv"),
        (("--view", "router"), "runs on view whole, not on 'router'"),
    ],
)
def test_what_makes_no_sense_of_a_protocol_is_refused(moebench: Terminal, words: tuple[object, ...], why: str) -> None:
    said = moebench.refuses("evaluate", "--model", MOE, "--attack", SHORT, "--n", N, *words)
    assert why in said


def test_other_commands_refuse_protocols(moebench: Terminal) -> None:
    said = moebench.refuses("transfer", "--models", MOE, "--attack", SHORT, "--n", N)
    assert "makes no examples for other models: it is a published protocol" in said
    said = moebench.refuses("universal", "--model", MOE, "--attack", SHORT, "--n", N)
    assert "universal takes" in said
    said = moebench.refuses("evaluate", "--model", DENSE, "--attack", "published:adv-moe", "--n", N)
    assert "needs" in said or "a dense model has none" in said


def test_a_sweep_warms_attacks_and_not_protocols(moebench: Terminal) -> None:
    words = ("--eps", "0.05,0.1", "--view", "whole", "--json")
    found = moebench.evaluate(MOE, f"fgsm,{SHORT}", N, *words).json
    assert [curve["attack"] for curve in found["curves"]] == ["fgsm", SHORT]
    with Store.open(None, write=False) as store:
        warm = {one.cell.attack for one in store.results() if "warm-start" in one.cell.parameters}
        assert warm == {"fgsm"}
        assert {curve.attack for curve in curves(store.results())} == {"fgsm"}
    said = moebench.evaluate(MOE, SHORT, N, "--eps", "0.03,0.06")
    assert said.code == 0 and "RA-worst" in said.out


def test_a_dry_run_counts_all_samples(moebench: Terminal) -> None:
    (cell,) = moebench.evaluate(MOE, SHORT, N, "--dry-run", "--json").json["cells"]
    found = moebench.evaluate(MOE, SHORT, N, "--json").json["results"][0]
    assert found["forwards"] <= cell["forwards"] and found["backwards"] <= cell["backwards"]
    assert cell["backwards"] == N * 4


@pytest.mark.parametrize("model", shipped("wrn-st"))
def test_float16_makes_an_undefended_network_look_robust(moebench: Terminal, model: str) -> None:
    """Gradients of a sure network, averaged over 512 images, round to 0 where nothing scales them."""
    names = [f"published:rt-er[{words}steps=10]" for words in ("", "fp16=off,", "loss_scale=65536,")]
    found = moebench.evaluate(model, ",".join(names), N, "--no-trust", "--json").json["results"]
    published, exact, scaled = (one["accuracy"] for one in found)
    assert published > 0.4 and exact < 0.1 and scaled < 0.1


# What is shown.


def test_show_explains_the_switches(moebench: Terminal) -> None:
    run_id = moebench.evaluate(DENSE, SHORT, N, "--json").json["run_id"]
    said = moebench("show", run_id).out
    assert "fp16=off  corrected: float16 gradients, loss not scaled" in said
    assert "start=constant  as published: constant start" in said and "no evidence of robustness" in said
    card = moebench("show", "published:adv-moe").out
    assert "router_weight=6  as published: loss spent on the router" in card
    assert "unknown attack 'published:adv'" in moebench.refuses("show", "published:adv")
    listed = moebench("list", "attacks").out
    assert "published:v-moe" in listed and "NAME[KEY=VALUE,…]" in listed


def test_show_puts_claim_protocol_and_measurement_side_by_side(moebench: Terminal) -> None:
    plain, off = "published:rt-er[steps=4]", SHORT
    moebench.evaluate(MOE, "fgsm,pgd-50", N, "--view", "whole", "--no-trust")
    found = moebench.evaluate(MOE, f"{plain},{off},published:rt-er[fp16=off,start=random,steps=4]", N, "--json").json
    said = moebench("show", found["run_id"]).out.splitlines()
    start = next(at for at, line in enumerate(said) if line.startswith("  published:rt-er[steps=4], percent"))
    lines = {line[4:52].strip(): line[52:].strip() for line in said[start + 1 : start + 7]}
    share = {one["attack"]: 100 * one["accuracy"] for one in found["results"]}
    base = share[plain]
    with Store.open(None, write=False) as store:
        ours = {one.cell.attack: 100 * one.record.accuracy for one in store.results() if one.cell.view == "whole"}
        worst = worst_case(
            [store.outcomes(one.result_id) for one in store.results() if "published" not in one.cell.attack]
        )
    left = 100 * float(worst.mean())
    assert lines == {
        "claimed (arXiv 2502.06832; other data)": "52.54 (CIFAR-10), 34.53 (TinyImageNet)",
        "published protocol": f"{base:.1f}",
        "without: float16 gradients, loss not scaled": f"{share[off]:.1f} ({share[off] - base:+.1f})",
        "published:rt-er[fp16=off,start=random,steps=4]": lines["published:rt-er[fp16=off,start=random,steps=4]"],
        "moebench: pgd-50": f"{ours['pgd-50']:.1f} ({ours['pgd-50'] - base:+.1f})",
        "moebench: RA-worst, every stored attack": f"{left:.1f} ({left - base:+.1f})",
    }
    assert sum("as published: constant start" in line for line in said) == 1


def test_what_is_not_stored_is_said(moebench: Terminal) -> None:
    run_id = moebench.evaluate(DENSE, SHORT, N, "--json").json["run_id"]
    said = moebench("show", run_id).out
    assert "without: float16 gradients, loss not scaled" in said and "published protocol" in said
    assert said.count("not run on these samples") == 2


@pytest.mark.parametrize(
    ("protocol", "name", "words"),
    [
        # Four tables repeat 69.09; other numbers of experts and other beta are models of their own.
        ("published:rt-er", "rt-er", "69.09 (CIFAR-10), 56.79 (TinyImageNet)"),
        ("published:rt-er", "rt-er[alpha=1]", "69.09 (CIFAR-10), 56.79 (TinyImageNet)"),
        ("published:rt-er", "rt-er-beta9", "10 (CIFAR-10)"),
        # A table of 26 variants, of which two agree by chance.
        ("published:robust-experts", "block-moe-switch", "15.31–22.69 (CIFAR-100, 26 variants)"),
        ("published:rt-er-autoattack", "st-moe", "14.25 (CIFAR-10), 14.24 (TinyImageNet)"),
        ("published:adv-moe", "adv-moe", "—"),
    ],
)
def test_what_is_claimed(protocol: str, name: str, words: str) -> None:
    card = card_of(protocol)
    assert card is not None and claimed(card, name, load_claims()) == words


def published_store() -> FakeStore:
    store, who = FakeStore(), model("rt-er")
    store.add(who, "autoattack", first_broken(40, 20))
    store.add(who, "pgd-50", first_broken(40, 15))
    one = store.add(who, "published:rt-er", first_broken(40, 5))
    one.cell.parameters.update({"rt-er": {"fp16": True, "batch": 512, "start": "constant", "score": "final"}})  # type: ignore[attr-defined]
    store.add(who, "published:v-moe", first_broken(40, 30))
    store.add(model("st-moe"), "published:rt-er", first_broken(40, 30))
    store.published += [claim("rt-er", 69.09), claim("rt-er", 64.0), claim("rt-er", 7.0, metric="RA-E")]
    return store


def test_a_page_shows_claim_protocol_and_measurement_side_by_side() -> None:
    report = tables.build(published_store())
    (page,) = (page for page in report.models if page.model.name == "rt-er")
    assert [row.stored.cell.attack for row in page.results] == ["pgd-50", "autoattack"]
    first, second = page.protocols
    assert first.measure is not None and first.counterpart is not None and first.worst is not None
    assert (first.measure.k, first.counterpart.k, first.worst.k) == (35, 25, 20)
    assert [(one.low, one.high, one.dataset) for one in first.claims] == [(64.0, 69.09, "CIFAR-10")]
    assert first.departures == "4 of 4 departures" and "constant start" in first.words
    assert second.claims == () and second.counterpart is None
    html = render(published_store())["models/rt-er.html"]
    for words in ("Published protocols", "claimed 64.00–69.09", ">87.5<", ">62.5<", ">50.0<", "it enters no metric"):
        assert words in html, words


def test_protocols_are_on_no_board_and_in_no_mark() -> None:
    with_, without = published_store(), published_store()
    without.stored = [one for one in without.stored if not one.cell.attack.startswith("published:")]
    one, two = tables.build(with_), tables.build(without)
    assert len(one.boards) == len(two.boards) == 1
    assert [row.model.name for row in one.boards[0].rows] == ["rt-er"] and one.boards[0].left_out == 0
    assert one.boards[0] == two.boards[0]
    files, others = render(with_), render(without)
    for name in ("data/leaderboard.csv", "data/curves.csv"):
        assert files[name] == others[name], name
    assert all(files[name] == others[name] for name in files if name.startswith("tables/"))
    assert "published:rt-er" in files["data/results.jsonl"]


def test_trust_compares_attacks_only() -> None:
    on, made = protocol(n=200), []

    def flags(attack: str, broken: int) -> list[str]:
        """What is said once an attack that is made like pgd-50 has broken the first samples."""
        store = FakeStore()
        one = store.add(model("st-moe"), attack, first_broken(200, broken), on=on)
        parameters = {"pgd": {"steps": 50, "step_fraction": 0.25, "random_start": True}}
        made.append((replace(one, cell=replace(one.cell, parameters=parameters)), store.evidence[1]))
        return [flag.code for flag in passive_flags(made)]

    assert flags("pgd-50", 20) == []
    assert flags("published:rt-er", 200) == flags("published:v-moe[clip=on]", 200) == []
    assert flags("smooth-pgd-50[step_fraction=0.9]", 200) == []
    assert flags("smooth-pgd-50", 200) == ["adaptive-wins"]


def test_settings_get_no_column() -> None:
    store = FakeStore()
    store.add(model("rt-er"), "pgd-50", first_broken(40, 15))
    store.add(model("rt-er"), "pgd-50[step_fraction=0.1]", first_broken(40, 35))
    (board,) = tables.build(store).boards
    assert board.attacks == ("pgd-50",)
    (row,) = board.rows
    assert row.worst.measure is not None and row.worst.measure.k == 5


# The ablation.


def test_an_ablation_runs_what_is_missing_and_prints_the_table(moebench: Terminal) -> None:
    words = ("ablation", "published:robust-experts[steps=2]", "--models", f"{MOE},{DENSE}", "--n", N)
    said = moebench(*words)
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert lines[2] == f"| row | {MOE} | {DENSE} |" and lines[3] == "| --- | --- | --- |"
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines[4:] if line.startswith("| ")}
    assert "published protocol" in rows and "without any of them" in rows and "moebench: pgd-20" in rows
    assert "only: network in train mode while it is attacked" in rows
    with Store.open(None, write=False) as store:
        before = len(store.results(newest_only=False))
        shares = {(one.model.name, one.cell.attack): one.record.accuracy for one in store.results()}
    found = moebench(*words, "--json").json
    with Store.open(None, write=False) as store:
        assert len(store.results(newest_only=False)) == before
    for row in found["rows"]:
        if row["kind"] not in ("claim", "moebench"):
            values = [shares[name, row["attack"]] for name in (MOE, DENSE)]
            assert [one["value"] for one in row["values"]] == pytest.approx(values)
    assert rows["published protocol"] == (
        "| published protocol | " + " | ".join(f"{100 * one['value']:.1f}" for one in found["rows"][1]["values"]) + " |"
    )
    assert json.dumps(found)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("pgd-50", "--models", MOE), "is no published protocol"),
        (("published:x", "--models", MOE), "unknown attack 'published:x'"),
        (("published:rt-er[fp16=3]", "--models", MOE), "takes on or off"),
        (("published:rt-er[fp16=off]", "--models", MOE), "an ablation sets fp16 itself"),
        (("published:rt-er", "--models", ","), "no model given"),
        (("published:rt-er", "--models", "st-mo"), "did you mean st-moe"),
        (("published:rt-er", "--models", MOE, "--against", "published:v-moe"), "--against takes attacks of moebench"),
        (("published:rt-er",), "Missing option '--models'"),
    ],
)
def test_what_an_ablation_refuses(moebench: Terminal, words: tuple[object, ...], why: str) -> None:
    assert why in moebench.refuses("ablation", *words)
