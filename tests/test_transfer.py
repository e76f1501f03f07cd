"""Transfer: what is stored is what judging by hand gives; examples are kept, checked and made for other models."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import DENSE, MOE, USER_MODELS, Terminal, write_npz
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_models import LayeredMoE
from torch.nn.functional import cross_entropy
from toys import attack, digits, make_engine, reduced, trained_conv, trained_moe

from moebench.attacks._engine import Finished
from moebench.attacks._given import Given
from moebench.crafting import source_plan
from moebench.errors import UsageError
from moebench.example_cache import cache_folder, example_file, keep_examples, read_examples
from moebench.metrics import wilson
from moebench.models import load_model
from moebench.models._moe import forced_forward, moe_layers
from moebench.parts import part_of
from moebench.schema import ThreatModel, split_part
from moebench.store import Store
from moebench.threat import within
from moebench.transfer import TransferSpec, transfer

N = 30
EXPERT = f"{MOE}/expert[0]"
THREAT = ThreatModel("Linf", 0.2)


def examples() -> list[Path]:
    return sorted(cache_folder().rglob("*.safetensors"))


def predictions(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """By model, as a user would compute them."""
    dense, moe = load_model(DENSE), load_model(MOE)
    with torch.no_grad():
        return {
            DENSE: dense(x).argmax(1),
            MOE: moe(x).argmax(1),
            EXPERT: forced_forward(moe, x, 0).argmax(1),
        }


# The numbers.


@pytest.mark.parametrize("attack_name", ["pgd-10", "torchattacks:MIFGSM"])
def test_every_pair_is_what_judging_by_hand_gives(moebench: Terminal, attack_name: str) -> None:
    names = [DENSE, MOE, EXPERT]
    found = moebench("transfer", "--models", ",".join(names), "--attack", attack_name, "--n", N, "--json").json
    assert (found["sources"], found["targets"], found["n"], found["eps"]) == (names, names, N, 0.2)
    assert found["attack"] == attack_name and set(found["examples"].values()) == {"made"}
    samples = digits(N)
    clean = predictions(samples.x)
    images = {source_of(path): load_file(path)["x_adv"] for path in examples()}
    assert set(images) == set(names)
    for pair in found["matrix"]:
        x_adv = images[pair["source"]]
        assert bool(within(x_adv, samples.x, THREAT).all())
        right = clean[pair["target"]] == samples.y
        both = right & (clean[pair["source"]] == samples.y)
        wrong = predictions(x_adv)[pair["target"]] != samples.y
        k, n = int((wrong & both).sum()), int(both.sum())
        assert pair["accuracy"] == int((right & ~wrong).sum()) / N
        assert (pair["success_rate"], pair["success_n"]) == (k / n, n)
        assert (pair["success_ci_low"], pair["success_ci_high"]) == wilson(k, n)
        assert (pair["ci_low"], pair["ci_high"]) == wilson(int((right & ~wrong).sum()), N)
        assert pair["white_box"] == (pair["source"] == pair["target"])
    assert [(pair["source"], pair["target"]) for pair in found["matrix"]] == [(a, b) for a in names for b in names]


def source_of(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        name = json.loads(file.metadata()["made"])["source"]
    assert isinstance(name, str)
    return name


def test_the_worst_case_of_the_target_counts_it_and_that_of_its_expert_does_not(moebench: Terminal) -> None:
    words = ("--n", N, "--attack")
    moebench("transfer", "--models", DENSE, "--targets", f"{MOE},{EXPERT}", *words, "pgd-10", "--json")
    with Store.open("results.db", write=False) as store:
        by_model = {result.model.name: result for result in store.results()}
        assert set(by_model) == {MOE, EXPERT} and store.check() == []
        assert {result.cell.attack for result in by_model.values()} == {"transfer"}
        origin = by_model[MOE].cell.parameters[f"from {DENSE}"]
        assert origin["source"] == DENSE and origin["attack_parameters"]["pgd"]["steps"] == 10
        assert origin["source_weights"] == moebench_sha(DENSE)
        assert by_model[EXPERT].checkpoint.sha256 != by_model[MOE].checkpoint.sha256
        assert by_model[EXPERT].checkpoint.parameters < by_model[MOE].checkpoint.parameters / 3
        broken = store.outcomes(by_model[MOE].result_id).broken
    fgsm = moebench.evaluate(MOE, "fgsm", N, "--view", "whole", "--json").json
    with Store.open("results.db", write=False) as store:
        (own,) = [result for result in store.results(model=MOE) if result.cell.attack == "fgsm"]
        either = broken | store.outcomes(own.result_id).broken
    assert fgsm["ra_worst"] == float(np.mean(~either))


def moebench_sha(name: str) -> Any:
    from moebench.models._weights import SHIPPED

    return json.loads((SHIPPED / "digits" / f"{name}.json").read_text())["sha256"]


def test_a_model_evaluated_as_a_part_is_the_expert_alone(moebench: Terminal) -> None:
    found = moebench.evaluate(EXPERT, "fgsm", N, "--json").json
    right = predictions(digits(N).x)[EXPERT] == digits(N).y
    assert found["model"] == EXPERT and found["sa"] == int(right.sum()) / N
    assert [result["view"] for result in found["results"]] == ["whole"]


# Examples.


def test_a_source_attack_does_not_stop_at_its_first_success() -> None:
    model, samples, threat = trained_conv(), digits(40), ThreatModel("Linf", 0.15)
    stage = reduced("pgd-50", steps=20).stages[0]
    stopped = attack(model, samples, threat, [stage])
    engine = make_engine(model, samples, threat, stop_when_broken=False)
    gone_on = samples.x.clone()

    def sink(done: Finished) -> None:
        gone_on[done.index] = done.x_adv

    engine.run_stage(stage, torch.arange(40), sink)
    with torch.no_grad():
        early, late = (cross_entropy(model(x), samples.y, reduction="none") for x in (stopped.x_adv, gone_on))
    assert bool((late >= early - 1e-4).all()) and float(late.mean()) > float(early.mean()) + 1
    assert not bool(engine.broken.any()) and bool(within(gone_on, samples.x, threat).all())
    # What does not stop breaks all that what stops breaks.
    assert bool((model(gone_on).argmax(1) != samples.y)[stopped.broken].all())


@pytest.mark.parametrize("batch_size", [3, 64])
def test_of_several_target_classes_the_strongest_image_is_kept(batch_size: int) -> None:
    model, samples, threat = trained_conv(), digits(12), ThreatModel("Linf", 0.1)
    losses = []
    for classes in (1, 3):
        stage = reduced("apgd-t", steps=5, target_classes=classes).stages[0]
        engine = make_engine(model, samples, threat, stop_when_broken=False, batch_size=batch_size)
        engine.run_stage(stage, torch.arange(12), lambda done: None)
        with torch.no_grad():
            loss = cross_entropy(model(engine.x_adv), samples.y, reduction="none")
        torch.testing.assert_close(loss, engine.strength, rtol=1e-3, atol=1e-4)
        losses.append(loss)
    assert bool((losses[1] >= losses[0] - 1e-3).all()) and bool((losses[1] > losses[0] + 1e-2).any())


def test_examples_are_kept_for_other_targets_and_checked_when_read(moebench: Terminal) -> None:
    words = ("transfer", "--models", DENSE, "--attack", "pgd-10", "--n", N, "--json")
    first = moebench(*words, "--targets", DENSE).json
    (path,) = examples()
    data = path.read_bytes()
    assert moebench(*words, "--targets", MOE).json["examples"] == {DENSE: "kept from before"}
    assert examples() == [path] and path.read_bytes() == data
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert moebench(*words, "--targets", EXPERT).json["examples"] == {DENSE: "made"}
    assert load_file(path)["x_adv"].equal(torch.as_tensor(load_bytes(data)["x_adv"]))
    again = moebench(*words, "--targets", DENSE).json
    assert again["examples"] == {DENSE: "not needed"} and again["reused"] == 1
    fresh = moebench(*words, "--targets", DENSE, "--fresh").json
    assert fresh["examples"] == {DENSE: "made"} and fresh["reused"] == 0
    rows = [{**pair, "run_id": ""} for found in (first, again, fresh) for pair in found["matrix"]]
    assert rows[0] == rows[1] == rows[2]
    moebench(*words, "--seed", 1)
    assert len(examples()) == 2


def load_bytes(data: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(data)


def test_a_cache_that_cannot_be_written_is_only_a_note(moebench: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    (moebench.folder / "file").write_text("")
    monkeypatch.setenv("MOEBENCH_CACHE", str(moebench.folder / "file" / "below"))
    said = moebench("transfer", "--models", DENSE, "--attack", "fgsm", "--n", 5, "--json")
    assert said.json["examples"] == {DENSE: "made"} and "could not be kept" in said.err


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "moebench-cache"
    monkeypatch.delenv("MOEBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "moebench"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "moebench"


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7), cut=st.booleans())
@settings(max_examples=60, deadline=None)
def test_damaged_examples_are_never_used(place: int, bit: int, cut: bool) -> None:
    facts = {"seed": 3, "threat": THREAT}
    x_adv = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    path = keep_examples(facts, x_adv)
    kept = read_examples(facts, (3, 1, 2, 2))
    assert kept is not None and torch.equal(kept, x_adv)
    assert read_examples({**facts, "seed": 4}, (3, 1, 2, 2)) is None
    assert read_examples(facts, (3, 1, 4, 1)) is None
    data = bytearray(path.read_bytes())
    if cut:
        del data[place % len(data) :]
    else:
        data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    damaged = read_examples(facts, (3, 1, 2, 2))
    # Damage of the note on how they were made leaves the images what they are.
    assert damaged is None or torch.equal(damaged, x_adv)
    path.rename(example_file({"seed": 4}))
    assert read_examples({"seed": 4}, (3, 1, 2, 2)) is None


def test_given_images_are_judged_and_nothing_else() -> None:
    model, samples = trained_conv(), digits(20)
    threat = ThreatModel("Linf", 0.1)
    x_adv = attack(model, samples, threat, reduced("pgd-10").stages).x_adv
    # Every second image is far outside the ball, and wrong for sure where it is that of another class.
    x_adv[1::2] = samples.x[1::2].roll(1, 0)
    found = attack(model, samples, threat, [Given("given", {"a": 1}, lambda: x_adv)], batch_size=7)
    with torch.no_grad():
        wrong = model(x_adv).argmax(1) != samples.y
    assert torch.equal(found.broken, wrong & within(x_adv, samples.x, threat))
    assert not bool(found.broken[1::2].any()) and bool(wrong[1::2].any()) and bool(found.broken.any())


# Parts.


@pytest.mark.parametrize("part", ["expert[2]", "expert[first:1]", "expert[second:0]"])
def test_a_part_is_the_model_with_that_expert_forced(part: str) -> None:
    model = LayeredMoE()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alone = part_of(model, part, "toy")
    x = torch.rand(20, 5, generator=torch.Generator().manual_seed(1))
    layer, _, number = part[7:-1].rpartition(":")
    torch.testing.assert_close(alone(x), forced_forward(model, x, int(number), layer or None), rtol=0, atol=1e-6)
    assert len(moe_layers(alone)) == (1 if layer else 0) and len(moe_layers(model)) == 2
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    with pytest.raises(UsageError, match=r"toy has no part 'expert\[3\]'"):
        part_of(model, "expert[3]", "toy")


def test_a_model_that_is_a_layer_itself_has_parts() -> None:
    layer = trained_moe().get_submodule("moe")
    x = torch.rand(2, 6, 8, 8)
    expert = layer.get_submodule("experts.1")
    assert torch.equal(part_of(layer, "expert[1]", "toy")(x), expert(x))


@given(
    model=st.from_regex(r"[a-z][a-z0-9-]{0,8}|([a-z.]{1,5}/){0,2}(expert|[a-z]{1,5})\.py:[a-z]{1,5}", fullmatch=True),
    part=st.from_regex(r"expert\[([a-z.0-9]{1,6}:)?[0-9]{1,3}\]|standard|robust", fullmatch=True),
)  # fmt: skip
@settings(deadline=None)
def test_names_of_parts_come_apart_again(model: str, part: str) -> None:
    assert split_part(f"{model}/{part}") == (model, part)
    assert split_part(model) == (model, None)


# On the command line.


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--models", "resnet-ta"), "unknown model 'resnet-ta'; did you mean resnet-st or resnet-at"),
        (("--models", DENSE, "--targets", "nope"), "unknown model 'nope'"),
        (("--models", " , "), "no source model given"),
        (("--models", f"{MOE}/expert[4]"), f"{MOE} has no part 'expert[4]'"),
        (("--models", f"{DENSE}/expert[0]"), "this one is dense"),
        (("--models", f"{MOE}/robust"), "has no part 'robust'"),
        (("--models", f"{MOE}/experts[0]"), "did you mean expert[0]?"),
        (("--models", "none.py:good"), "no file none.py"),
        (("--models", "none.py"), "a file is given as none.py:FACTORY"),
        (("--models", DENSE, "--attack", "pgd-5O"), "did you mean pgd-50"),
        (("--models", DENSE, "--attack", "torchattacks:MIFGM"), "did you mean torchattacks:MIFGSM"),
        (("--models", DENSE, "--attack", "torchattacks:PGDL2"), "give --norm L2"),
        (("--models", DENSE, "--attack", "autoattack"), "it runs 4 attacks one after the other"),
        (("--models", DENSE, "--attack", "fab-t"), "looks for the nearest boundary"),
        (("--models", MOE, "--attack", "region"), "it attacks the routing"),
        (("--models", DENSE, "--attack", "smooth-pgd-50"), "needs a model with routing"),
        (("--models", f"{DENSE},mine.py:twelve"), "mine.py:twelve has 12 classes and resnet-at has 10"),
        (("--models", "mine.py:good,./mine.py:good"), "are both called mine.py:good"),
        (("--models", DENSE, "--out", "mine.py"), "--out takes a folder"),
        (("--models", DENSE, "--out", "mine.py/below"), "--out"),
        (("--models", DENSE, "--eps", "3"), "eps must be at most 1"),
        (("--models", DENSE, "--n", "0"), "n must be at least 1"),
        (("--models", DENSE, "--device", "tpu9"), "device 'tpu9' cannot be used here"),
    ],
)
def test_bad_input_is_answered_in_one_line(moebench: Terminal, words: tuple[str, ...], expected: str) -> None:
    (moebench.folder / "mine.py").write_text(USER_MODELS + "\ndef twelve(): return model(classes=12)\n")
    assert expected in moebench.refuses("transfer", *words, *(() if "--n" in words else ("--n", "5")))


def test_files_hold_the_matrix_and_no_formulas(moebench: Terminal) -> None:
    (moebench.folder / "=cmd.py").write_text(USER_MODELS)
    write_npz(moebench.folder / "data.npz")
    words = ("--models", "=cmd.py:good,=cmd.py:swapped", "--dataset", "npz:data.npz", "--attack", "fgsm")
    found = moebench("transfer", *words, "--out", "made/here", "--json").json
    assert json.loads((moebench.folder / "made/here/transfer.json").read_text()) == found
    with (moebench.folder / "made/here/transfer.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["source"] for row in rows] == ["'=cmd.py:good"] * 2 + ["'=cmd.py:swapped"] * 2
    assert [float(row["accuracy"]) for row in rows] == [pair["accuracy"] for pair in found["matrix"]]
    # The two say opposite classes: of most pairs there is no sample that both get right.
    assert all((row["success_rate"] == "") == (row["success_n"] == "0") for row in rows)


def test_the_matrix_is_printed(moebench: Terminal) -> None:
    words = ("transfer", "--models", f"{DENSE},{MOE}", "--attack", "fgsm", "--n", 20)
    out = moebench(*words).out
    matrix = moebench(*words, "--json").json["matrix"]
    for pair in matrix:
        shown = f"{100 * pair['success_rate']:.1f} [{100 * pair['success_ci_low']:.0f}, "
        assert shown in out
    assert out.count("]*") == 4 and "4 of 4 results were in the database already" in moebench(*words).out


def test_the_stored_command_gives_the_same_numbers(moebench: Terminal) -> None:
    words = ("transfer", "--models", EXPERT, "--targets", DENSE, "--attack", "pgd-10", "--n", 9)
    found = moebench(*words, "--eps", "1/10", "--seed", 3, "--batch-size", 4, "--json").json
    with Store.open("results.db", write=False) as store:
        (run,) = store.runs()
    import shlex

    again = moebench(*shlex.split(run.command)[1:], "--db", "other.db", "--json").json
    strip = [
        {key: value for key, value in pair.items() if key != "run_id"} for pair in found["matrix"] + again["matrix"]
    ]
    assert strip[0] == strip[1]


def test_the_report_ranks_no_parts_and_has_one_column(moebench: Terminal) -> None:
    moebench("transfer", "--models", f"{DENSE},{MOE},{EXPERT}", "--attack", "fgsm", "--n", 20)
    with Store.open("results.db", write=False) as store:
        run = store.runs()[-1]
    said = moebench("show", run.run_id).out
    assert all(f"transfer from {source} (fgsm)" in said for source in (DENSE, MOE, EXPERT))
    assert moebench("report", "--out", "reports").code == 0
    assert f"<bdi>{EXPERT}</bdi>" in Path("reports/transfer.html").read_text()
    with (moebench.folder / "reports/data/leaderboard.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {DENSE, MOE}
    assert [key for key in rows[0] if key.startswith("ra[")] == [
        "ra[transfer]",
        "ra[transfer]_low",
        "ra[transfer]_high",
    ]
    assert sorted(path.name for path in (moebench.folder / "reports/models").glob("*.html")) == [
        f"{DENSE}.html",
        f"{MOE}.html",
    ]
    assert EXPERT in (moebench.folder / "reports/data/results.jsonl").read_text()


def test_python_gives_what_the_command_gives(moebench: Terminal) -> None:
    found = transfer(TransferSpec((DENSE,), (MOE,), attack="fgsm", n=9))
    said = moebench("transfer", "--models", DENSE, "--targets", MOE, "--attack", "fgsm", "--n", 9, "--json").json
    assert found.matrix[0].accuracy == said["matrix"][0]["accuracy"] and said["reused"] == 1
    with pytest.raises(UsageError, match="makes no examples"):
        source_plan("moe-adaptive")
