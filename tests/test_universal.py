"""Universal perturbations: closed forms, promises that hold for every model, files, and the command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import DENSE, MOE, USER_MODELS, Terminal, write_npz
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from toys import LinearClassifier, attack, digits, frozen, make_training, trained_conv, trained_moe

from moebench.attacks import load_attack
from moebench.attacks._engine import Samples
from moebench.attacks._training import TrainedAttack, Training
from moebench.attacks._views import make_view
from moebench.attacks.universal import OneDelta, UniversalFGSM, UniversalPGD, delta_norm, into_ball
from moebench.delta_file import DeltaFile, read_delta, write_delta
from moebench.delta_picture import Example, to_pixels, write_picture
from moebench.errors import RunError
from moebench.evaluation import EvalSpec, Progress, evaluate
from moebench.fitting import shared_out
from moebench.schema import NORMS, Norm, ThreatModel
from moebench.store import Store
from moebench.threat import within

QUICK = UniversalPGD(epochs=3, restarts=1)
radii = st.floats(min_value=1e-4, max_value=1.0)


def make(stage: TrainedAttack, training: Training) -> Tensor:
    fitted = stage.fit(training).fitted
    assert fitted is not None
    return fitted.delta


# Norm, range, determinism.


@given(seed=st.integers(0, 2**16), eps=radii, scale=st.floats(1e-3, 1e3), norm=st.sampled_from(NORMS))
@settings(deadline=None, max_examples=60)
def test_the_ball_is_never_left(seed: int, eps: float, scale: float, norm: Norm) -> None:
    delta = scale * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed))
    threat = ThreatModel(norm, eps)
    inside = into_ball(delta, threat)
    assert delta_norm(inside, threat) <= eps and inside.dtype == torch.float32
    assert torch.equal(into_ball(inside, threat), inside)
    if delta_norm(delta, threat) <= eps:
        assert torch.equal(inside, delta)
    else:
        assert delta_norm(inside, threat) >= eps * (1 - 1e-5)


@given(eps=radii, norm=st.sampled_from(NORMS), seed=st.integers(0, 2**16), view=st.sampled_from(["whole", "router"]))
@settings(deadline=None, max_examples=8)
@pytest.mark.parametrize("stage", [UniversalFGSM(), QUICK], ids=lambda stage: stage.stage)
def test_every_image_gets_the_same_perturbation_inside_the_threat_model(
    stage: TrainedAttack, eps: float, norm: Norm, seed: int, view: str
) -> None:
    model, samples, threat = trained_moe(), digits(9), ThreatModel(norm, eps)
    delta = make(stage, make_training(model, threat, view, seed=seed))
    assert delta.shape == samples.x.shape[1:] and bool(torch.isfinite(delta).all())
    assert delta_norm(delta, threat) <= eps
    out = attack(model, samples, threat, [stage], view, seed=seed)
    torch.testing.assert_close(out.x_adv, (samples.x + delta).clamp(0, 1), rtol=0, atol=1e-6)
    assert bool(within(out.x_adv, samples.x, threat).all())


@pytest.mark.parametrize("norm", NORMS)
def test_the_same_seed_gives_the_same_perturbation(norm: Norm) -> None:
    model, threat = trained_conv(), ThreatModel(norm, 0.2)
    one, same, other = (make(QUICK, make_training(model, threat, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    first, second = (make(UniversalFGSM(), make_training(model, threat, seed=seed)) for seed in (1, 2))
    assert torch.equal(first, second)


def test_an_attack_that_was_not_fitted_says_so() -> None:
    (stage,) = load_attack("universal-pgd").stages
    assert isinstance(stage, OneDelta)
    with pytest.raises(RunError, match="'universal-pgd' has to be fitted on training data"):
        _ = stage.delta


def test_the_perturbation_is_no_setting() -> None:
    fitted = QUICK.fit(make_training(trained_conv(), ThreatModel("Linf", 0.1)))
    assert fitted.parameters() == QUICK.parameters() and "fitted" not in QUICK.parameters() and fitted == QUICK


def test_every_pass_over_the_data_is_counted() -> None:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += len(_[1][0])

    model, n = trained_moe(), 60
    handle = model.register_forward_hook(count)
    for stage in (UniversalFGSM(), UniversalPGD(epochs=2, restarts=2)):
        calls = 0
        fitted = stage.fit(make_training(model, ThreatModel("Linf", 0.2), n=n)).fitted
        assert fitted is not None and (fitted.forwards, fitted.n) == (calls, n)
        forwards, backwards = stage.fit_budget(n)
        assert fitted.forwards <= forwards and fitted.backwards == backwards
    handle.remove()


@given(total=st.integers(0, 10**9), parts=st.integers(1, 500))
def test_a_cost_is_shared_out_completely(total: int, parts: int) -> None:
    shares = shared_out(total, parts)
    assert shares.sum() == total and len(shares) == parts and shares.max() - shares.min() <= 1


# Strength, where pencil and paper know the best that is possible.


def two_sided(norm: Norm, eps: float, right: float) -> tuple[LinearClassifier, Samples, list[float]]:
    """A linear model of two classes, samples of which `right` are of class 1, and what ±δ* fool.

    Every δ shifts the difference of the logits by the same amount for all images, at most by eps times the dual norm of
    its weights, so the best δ is the steepest direction or its opposite, and it fools images of one class only.
    """
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(1, 16, generator=generator)
    model = LinearClassifier(torch.cat((-weight, weight)), torch.zeros(2))
    model.bias.data = -model.weight.sum(dim=1) * 0.5
    x = 0.5 + 0.1 * torch.randn(3000, 1, 4, 4, generator=generator).clamp(-2, 2)
    y = model(x).argmax(dim=1)
    keep = torch.cat(((y == 1).nonzero()[: round(400 * right)], (y == 0).nonzero()[: round(400 * (1 - right))]))
    x, y = x[keep.squeeze(1)], y[keep.squeeze(1)]
    near = model.distance(x, norm) < eps
    shares = [float((near & (y == number)).float().mean()) for number in (0, 1)]
    return model, Samples(x, y, torch.arange(len(x))), shares


@pytest.mark.parametrize("right", [0.1, 0.35, 0.65, 0.9])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.03), ("L2", 0.15)])
def test_the_best_possible_perturbation_of_a_linear_model_is_found(norm: Norm, eps: float, right: float) -> None:
    model, samples, shares = two_sided(norm, eps, right)
    assert 0.02 < max(shares) < 0.9 and min(shares) > 0
    threat = ThreatModel(norm, eps)

    def training() -> Training:
        return Training(samples, make_view("whole", frozen(model)), model, threat, 0)

    fitted = UniversalPGD().fit(training()).fitted
    assert fitted is not None
    assert fitted.fooling_rate == pytest.approx(max(shares), abs=1 / 400)
    one = UniversalFGSM().fit(training()).fitted
    assert one is not None and min(abs(one.fooling_rate - share) for share in shares) <= 1 / 400


def test_epochs_beat_one_step_on_an_undefended_network() -> None:
    model, threat = trained_conv(), ThreatModel("Linf", 0.1)
    rates = []
    for stage in (UniversalFGSM(), UniversalPGD()):
        fitted = stage.fit(make_training(model, threat, n=300)).fitted
        assert fitted is not None
        rates.append(fitted.fooling_rate)
    assert rates[0] + 0.05 < rates[1]


# Inside an evaluation.


def test_the_batch_size_of_the_evaluation_changes_nothing(moebench: Terminal) -> None:
    saved = []
    for size in (1, 7, 256):
        words = ("--batch-size", size, "--train-n", 12, "--db", f"{size}.db", "--save", f"{size}.npz", "--json")
        found = moebench("universal", "--model", DENSE, "--n", 30, *words).json
        saved.append((found["universal"]["delta_sha256"], found["ra"], found["results"][0]["forwards"]))
    assert saved[0] == saved[1] == saved[2]


def test_what_it_costs_is_stored_and_bounded(moebench: Terminal) -> None:
    words = ("--view", "whole", "--train-n", 12, "--json")
    planned = moebench.evaluate(MOE, "universal-fgsm,universal-pgd", 20, *words, "--dry-run").json["cells"]
    found = moebench.evaluate(MOE, "universal-fgsm,universal-pgd", 20, *words).json
    for cell, result in zip(planned, found["results"], strict=True):
        assert result["forwards"] <= cell["forwards"] + 20 and result["backwards"] == cell["backwards"] > 0
    assert found["ra"] <= min(result["accuracy"] for result in found["results"]) and found["ra"] == found["ra_worst"]
    with Store.open("results.db", write=False) as store:
        assert store.check() == []
        for result in store.results():
            stages = result.record.stages
            name = result.record.attack
            assert list(stages) == ["clean", f"{name} crafting", name] and stages[f"{name} crafting"]["train_n"] == 12
            assert result.cell.parameters["training data"]["n"] == 12
    assert "All results were in the database" in moebench.evaluate(MOE, "universal-fgsm", 20, *words[:-1]).out


def test_training_data_is_part_of_the_fingerprint_of_these_attacks_alone(moebench: Terminal) -> None:
    for n in (50, 60, 50):
        moebench.evaluate(DENSE, "universal-fgsm,fgsm", 10, "--train-n", n)
    with Store.open("results.db", write=False) as store:
        assert [run.reused for run in store.runs()] == [0, 1, 2]
        assert {result.cell.attack: "training data" in result.cell.parameters for result in store.results()} == {
            "fgsm": False,
            "universal-fgsm": True,
        }


def test_a_killed_run_goes_on_to_the_same_verdicts(tmp_path: Path) -> None:
    spec = EvalSpec(MOE, attacks=("universal-fgsm",), views=("router",), n=12, train_n=60, db=str(tmp_path / "r.db"))

    def stop(step: Progress) -> None:
        if step.stage == "universal-fgsm":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(spec, stop)
    resumed = evaluate(spec)
    straight = evaluate(replace(spec, db=str(tmp_path / "other.db")))
    (one,), (other,) = resumed.results, straight.results
    assert (one.accuracy, one.forwards, one.backwards) == (other.accuracy, other.forwards, other.backwards)
    with Store.open(spec.db, write=False) as store:
        assert [run.status for run in store.runs()] == ["failed", "done"] and store.check() == []


def test_data_without_a_train_split_needs_some(moebench: Terminal) -> None:
    (moebench.folder / "mine.py").write_text(USER_MODELS)
    write_npz(moebench.folder / "test.npz", n=30)
    rng = np.random.default_rng(1)
    np.savez(moebench.folder / "train.npz", x=rng.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8), y=np.arange(60) % 10)
    np.savez(moebench.folder / "large.npz", x=np.zeros((4, 9, 9, 1), np.uint8), y=np.arange(4))
    np.savez(
        moebench.folder / "named.npz",
        x=np.zeros((4, 8, 8, 1), np.uint8),
        y=np.arange(4),
        class_names=list("abcdefghij"),
    )
    words = ("evaluate", "--model", "mine.py:good", "--dataset", "npz:test.npz", "--attack", "universal-fgsm")
    line = moebench.refuses(*words)
    assert "has no split 'train'; it has all; name some with --train-data" in line
    assert "30 of the 30 training images" in moebench.refuses(*words, "--train-data", "npz:test.npz")
    assert "images of 9×9" in moebench.refuses(*words, "--train-data", "npz:large.npz").replace("1×", "")
    assert "classes of the training data" in moebench.refuses(*words, "--train-data", "npz:named.npz")
    assert "--train-n must be at most 60" in moebench.refuses(*words, "--train-data", "npz:train.npz", "--train-n", 61)
    found = moebench(*words, "--train-data", "npz:train.npz", "--json").json
    assert found["results"][0]["backwards"] == 60
    with Store.open("results.db", write=False) as store:
        assert "--train-data npz:train.npz" in store.runs()[-1].command


# Files.


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "format": "moebench universal perturbation 1",
        "model": "m",
        "weights_sha256": "ab",
        "dataset": "digits",
        "training_sha256": "cd",
        "training_n": 5,
        "attack": "universal-pgd",
        "parameters": {"epochs": 3},
        "view": "whole",
        "norm": "Linf",
        "eps": 0.2,
        "seed": 0,
        "train_fooling_rate": 0.25,
    } | changes


@given(seed=st.integers(0, 2**16), eps=radii, norm=st.sampled_from(NORMS), channels=st.integers(1, 4))
@settings(deadline=None, max_examples=25)
def test_a_file_gives_back_what_went_in(
    tmp_path_factory: pytest.TempPathFactory, seed: int, eps: float, norm: Norm, channels: int
) -> None:
    path = tmp_path_factory.mktemp("files") / "d.npz"
    delta = torch.randn(channels, 3, 2, generator=torch.Generator().manual_seed(seed))
    file = DeltaFile(into_ball(delta, ThreatModel(norm, eps)).numpy(), facts(norm=norm, eps=eps))
    write_delta(path, file)
    again = read_delta(path)
    np.testing.assert_array_equal(again.delta, file.delta)
    assert again.facts == file.facts and again.sha256 == file.sha256 and again.threat == ThreatModel(norm, eps)
    assert [item.name for item in path.parent.iterdir()] == ["d.npz"]


def test_a_saved_perturbation_is_judged_alike_and_elsewhere(moebench: Terminal) -> None:
    making = ("universal", "--attack", "universal-fgsm", "--n", 60)
    made = moebench(*making, "--model", DENSE, "--eps", "0.25", "--save", "d.npz", "--json").json
    assert made["eps"] == 0.25 and made["universal"]["delta_norm"] <= 0.25 and not made["universal"]["transfer"]
    load = ("universal", "--n", 60, "--load", "d.npz", "--json")
    same = moebench(*load, "--model", DENSE).json
    assert (same["ra"], same["eps"]) == (made["ra"], 0.25) and not same["universal"]["transfer"]
    assert same["universal"]["delta_sha256"] == made["universal"]["delta_sha256"]
    other = moebench(*load, "--model", MOE).json
    assert other["universal"]["transfer"] and other["universal"]["source"] == DENSE and other["universal"]["routing"]
    right = other["universal"]["n"]
    assert other["universal"]["fooling_rate"] == pytest.approx((right - 60 * other["ra"]) / right)
    with Store.open("results.db", write=False) as store:
        results = {(result.model.name, result.cell.attack): result for result in store.results()}
        assert store.check() == []
    parameters = results[MOE, "universal-file"].cell.parameters["universal-file"]
    assert parameters["sha256"] == read_delta(Path("d.npz")).sha256 and parameters["source"]["model"] == DENSE
    assert "--load d.npz" in results[MOE, "universal-file"].command
    shutil.copy("d.npz", "copy.npz")
    said = moebench("universal", "--n", 60, "--load", "copy.npz", "--model", MOE)
    assert "in the database already" in said.out and "a transfer" in said.out
    write_delta(Path("other.npz"), DeltaFile(-read_delta(Path("d.npz")).delta, read_delta(Path("d.npz")).facts))
    assert "in the database already" not in moebench("universal", "--n", 60, "--load", "other.npz", "--model", MOE).out


DELTA = np.full((1, 8, 8), 0.1, np.float32)


def written(**arrays: Any) -> dict[str, Any]:
    return {"delta": DELTA, "metadata": np.array(json.dumps(facts())), **arrays}


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        (written(delta=DELTA.astype(np.float64)), "delta must be float32, got float64"),
        (written(delta=DELTA[0]), "delta must have shape C×H×W, got (8, 8)"),
        (written(delta=DELTA[:0]), "delta must have shape C×H×W, got (0, 8, 8)"),
        (written(delta=DELTA * np.float32("nan")), "holds NaN or infinite numbers"),
        (written(delta=DELTA * np.float32("inf")), "holds NaN or infinite numbers"),
        (written(delta=3 * DELTA), "the Linf norm of delta is 0.3, more than eps 0.2"),
        (written(delta=np.zeros((1, 9, 8), np.float32)), "delta is for images of 1×9×8, and digits has 1×8×8"),
        (written(delta=np.array([{}])), "holds pickled objects, which are never loaded"),
        (written(metadata=np.array([{}])), "holds pickled objects, which are never loaded"),
        (written(metadata=np.zeros(3)), "metadata must be one JSON text"),
        (written(metadata=np.array("{")), "the metadata is no JSON text"),
        (written(metadata=np.array("[]")), "the metadata must be a JSON object, got list"),
        (written(metadata=np.array("{}")), "the metadata does not say format"),
        (written(metadata=np.array(json.dumps(facts(eps="0.2")))), "eps in the metadata must be a number, got '0.2'"),
        (written(metadata=np.array(json.dumps(facts(eps=True)))), "eps in the metadata must be a number"),
        (written(metadata=np.array(json.dumps(facts(eps=float("inf"))))), "Infinity is no number"),
        (written(metadata=np.array(json.dumps(facts(eps=-1)))), "eps must be finite and not negative"),
        (written(metadata=np.array(json.dumps(facts(norm="L1")))), "unknown norm 'L1'"),
        (written(metadata=np.array(json.dumps(facts(format="x")))), "is of format 'x'"),
        ({"delta": DELTA}, "no array metadata in it, it holds delta"),
        ({"x": DELTA}, "no array delta and metadata in it, it holds x"),
    ],
)
def test_files_that_are_refused(moebench: Terminal, arrays: dict[str, Any], expected: str) -> None:
    np.savez(moebench.folder / "d.npz", **arrays)
    assert expected in moebench.refuses("universal", "--model", DENSE, "--load", "d.npz")


@pytest.mark.parametrize("damage", ["cut", "bits", "text", "folder", "missing"])
def test_damaged_files_get_one_line(moebench: Terminal, damage: str) -> None:
    path = moebench.folder / "d.npz"
    write_delta(path, DeltaFile(DELTA, facts()))
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "bits":
        path.write_bytes(whole[:60] + bytes(byte ^ 255 for byte in whole[60:90]) + whole[90:])
    elif damage == "text":
        path.write_text("no archive")
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    assert "d.npz: " in moebench.refuses("universal", "--model", DENSE, "--load", "d.npz")


def test_a_perturbation_made_on_the_test_images_is_refused(moebench: Terminal) -> None:
    from moebench.datasets import load_dataset

    tested = load_dataset("digits", n=40).sha256
    write_delta(moebench.folder / "d.npz", DeltaFile(DELTA, facts(training_sha256=tested)))
    words = ("universal", "--model", DENSE, "--load", "d.npz")
    assert "was made on the very images" in moebench.refuses(*words, "--n", 40)
    assert "more than eps 0.05" in moebench.refuses(*words, "--n", 20, "--eps", "0.05")
    assert moebench(*words, "--n", 20, "--eps", "0.15", "--json").json["eps"] == 0.15


# The command.


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--attack fgsm", "'fgsm' makes one perturbation per image; universal takes universal-fgsm or universal-pgd"),
        ("--attack universal", "unknown attack 'universal'; did you mean universal-"),
        ("--view wohle", "unknown view 'wohle'; did you mean whole"),
        ("--view router", "'router' needs a model with routing"),
        ("--train-n 0", "--train-n must be at least 1, got 0"),
        ("--train-n 1001", "--train-n must be at most 1000, the size of data set digits, got 1001"),
        ("--load d.npz", "d.npz: there is no such file; --load wants one that --save wrote"),
        ("--load d.npz --attack universal-fgsm", "--attack is about making a perturbation"),
        ("--load d.npz --train-n 3", "--train-n is about making a perturbation"),
        ("--load d.npz --save e.npz", "that of --load is in its file already"),
        ("--save a.npz --picture a.npz", "--save and --picture both name a.npz"),
        ("--save .", "--save takes a file, and . is a folder"),
        ("--picture none/p.png", "choose another place for --picture"),
        ("--eps 8", "write 8/255"),
    ],
)
def test_refusals(moebench: Terminal, words: str, expected: str) -> None:
    assert expected in moebench.refuses("universal", "--model", "resnet-at", *words.split())


def test_other_attacks_take_no_training_data_and_no_library_has_these(moebench: Terminal) -> None:
    words = ("evaluate", "--model", DENSE, "--n", 5, "--attack")
    assert "--train-n is for attacks" in moebench.refuses(*words, "fgsm", "--train-n", 5)
    assert "--train-data is for attacks" in moebench.refuses(*words, "fgsm", "--train-data", "digits")
    assert "no reference implementation" in moebench.refuses(*words, "universal-pgd", "--engine", "reference")


def test_the_command_stores_what_evaluate_stores(moebench: Terminal) -> None:
    words = ("--model", MOE, "--attack", "universal-fgsm", "--view", "router", "--n", 40, "--json")
    one = moebench("universal", *words).json
    two = moebench("evaluate", *words).json
    assert one["results"] == two["results"] and list(one)[:-1] == list(two)
    with Store.open("results.db", write=False) as store:
        assert [run.reused for run in store.runs()] == [0, 1]
    again = moebench("universal", *words[:-1])
    assert "in the database already" in again.out and "fooling rate:" in again.out
    assert "on the 1000 training samples: " in again.out and "routes changed" in again.out


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_shows_the_perturbation(tmp_path: Path, channels: int) -> None:
    delta = np.zeros((channels, 4, 4), np.float32)
    delta[:, 0, 0], delta[:, 3, 3] = -0.1, 0.1
    image = np.full((channels, 4, 4), 0.25, np.float32)
    example = Example(image, image + 0.5, "a long name of a class ✓ " * 4, "naïve", "zwölf")
    path = tmp_path / "p.png"
    with path.open("wb") as file:
        write_picture(file, delta, [example, example])
    with Image.open(path) as picture:
        picture.verify()
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    assert picture.format == "PNG" and pixels.shape[2] == 3
    assert [tuple(pixels[at, at]) for at in (10, 60, 115)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]
    assert to_pixels(image).shape == (4, 4, 3) and int(to_pixels(image).max()) == 64


def test_a_picture_comes_with_the_command(moebench: Terminal) -> None:
    (moebench.folder / "net.py").write_text(
        "import torch\nfrom torch import nn\n\ndef make():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(48, 4))\n"
    )
    rng = np.random.default_rng(0)
    for name in ("test", "train"):
        np.savez(
            moebench.folder / f"{name}.npz", x=rng.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8), y=np.arange(12) % 4
        )
    words = ("--dataset", "npz:test.npz", "--train-data", "npz:train.npz", "--norm", "L2", "--picture", "p.png")
    said = moebench("universal", "--model", "net.py:make", *words)
    assert said.code == 0 and "picture: p.png" in said.out, said.err
    with Image.open(moebench.folder / "p.png") as picture:
        assert picture.format == "PNG" and picture.size[0] > 500


def test_channels_that_no_picture_shows() -> None:
    from moebench.delta_picture import check_channels
    from moebench.errors import UsageError

    with pytest.raises(UsageError, match="images of 1 or 3 channels, these have 2"):
        check_channels(2)
