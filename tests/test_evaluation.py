from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import DENSE, MOE, USER_MODELS, Terminal, shipped, write_npz
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from moebench.datasets import load_dataset
from moebench.dry_run import plan_only
from moebench.errors import UsageError
from moebench.evaluation import EvalSpec, Progress, evaluate
from moebench.models._base import MODELS
from moebench.models._weights import SHIPPED, save_weights
from moebench.schema import ThreatModel
from moebench.store import Store
from moebench.threat import within

CONVNET = """
import torch
from torch import nn

def make():
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(144, 10),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.1, generator=generator)
    return net
"""


def arrays(path: str | Path) -> dict[str, np.typing.NDArray[Any]]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def shipped_module(name: str) -> torch.nn.Module:
    model = MODELS.get(name).make(10, (1, 8, 8))
    model.load_state_dict(load_file(SHIPPED / "digits" / f"{name}.safetensors"))
    return model.eval()


# Adversarial images.


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("model", shipped(DENSE, MOE, "rt-er"))
def test_saved_images_are_what_the_verdicts_say(moebench: Terminal, model: str, norm: str) -> None:
    words = ("--norm", norm, "--no-trust", "--json", "--save-adv")
    found = moebench.evaluate(model, "fgsm,pgd-10", 25, *words, "ad v.npz").json
    saved = arrays("ad v.npz")
    assert list(saved) == ["x_adv", "y", "clean_pred", "adv_pred", "robust", "index"]
    assert saved["x_adv"].dtype == np.float32 and saved["x_adv"].shape == (25, 1, 8, 8)
    for name in ("y", "clean_pred", "adv_pred", "index"):
        assert saved[name].dtype == np.int64 and saved[name].shape == (25,), name
    assert saved["robust"].dtype == np.bool_
    x = clean_digits(25)
    x_adv = torch.from_numpy(saved["x_adv"])
    assert bool(within(x_adv, x, ThreatModel(norm, found["eps"])).all())  # type: ignore[arg-type]
    network = shipped_module(model)
    with torch.no_grad():
        predicted, clean = network(x_adv).argmax(1).numpy(), network(x).argmax(1).numpy()
    np.testing.assert_array_equal(clean, saved["clean_pred"])
    broken = ~saved["robust"]
    np.testing.assert_array_equal(predicted[broken], saved["adv_pred"][broken])
    np.testing.assert_array_equal(predicted != saved["y"], broken)
    assert saved["robust"].mean() == found["ra_worst"] and broken.any() and (saved["robust"].any() or model == MOE)
    again = moebench.evaluate(model, "fgsm,pgd-10", 25, *words, "again.npz").json
    assert again["results"] == found["results"]
    for name, array in arrays("again.npz").items():
        np.testing.assert_array_equal(array, saved[name], err_msg=name)
    assert set(moebench.files()) == {"ad v.npz", "again.npz", "results.db"}


def clean_digits(n: int) -> torch.Tensor:
    from moebench.datasets import load_dataset

    return torch.from_numpy(load_dataset("digits", n=n).images)


# Which results belong together.


def test_a_setting_makes_another_model_of_the_same_weights(moebench: Terminal) -> None:
    view = ("--view", "whole", "--no-trust", "--json")
    plain = moebench.evaluate(MOE, "pgd-20", 40, *view).json
    mixed = moebench.evaluate(MOE, "fgsm", 40, *view, "--set", "top_k=2").json
    assert plain["ra"] < mixed["ra"] == mixed["ra_worst"]
    weak = moebench.evaluate(MOE, "fgsm", 40, *view).json
    assert weak["ra_worst"] == plain["ra"]


def test_two_factories_of_one_file_are_two_models(moebench: Terminal) -> None:
    (moebench.folder / "mine.py").write_text(USER_MODELS)
    write_npz(moebench.folder / "data.npz", n=40)
    words = ("--dataset", "npz:data.npz", "--json")
    found = [moebench.evaluate(f"mine.py:{name}", "fgsm", 40, *words).json for name in ("good", "swapped")]
    assert found[0]["sa"] != found[1]["sa"]
    with Store.open("results.db", write=False) as store:
        assert [run.reused for run in store.runs()] == [0, 0] and store.check() == []


def test_a_changed_file_is_another_model(moebench: Terminal) -> None:
    path = moebench.folder / "mine.py"
    write_npz(moebench.folder / "data.npz", n=40)
    found = []
    for factor in (100.0, 0.001):
        path.write_text(USER_MODELS.replace("self.spoil(self", f"self.spoil({factor} * self"))
        found.append(moebench.evaluate("mine.py:good", "pgd-10", 40, "--dataset", "npz:data.npz", "--json").json)
    path.write_text(USER_MODELS.replace("self.linear(x.", "self.linear(0.0 * x."))
    last = moebench.evaluate("mine.py:good", "pgd-10", 40, "--dataset", "npz:data.npz", "--json").json
    assert found[0]["ra"] <= found[0]["sa"] and last["ra_worst"] == last["sa"] == 0.1
    with Store.open("results.db", write=False) as store:
        assert [run.reused for run in store.runs()] == [0, 0, 0]


def test_the_same_data_under_another_path_is_the_same_data(moebench: Terminal) -> None:
    (moebench.folder / "mine.py").write_text(USER_MODELS)
    path = write_npz(moebench.folder / "data.npz")
    names = ("npz:data.npz", "npz:./data.npz", f"npz:{path}")
    first, *others = (moebench.evaluate("mine.py:good", "fgsm", 12, "--dataset", name, "--json").json for name in names)
    for other, name in zip(others, names[1:], strict=True):
        assert other["results"] == first["results"] and other["dataset"] == name
    with Store.open("results.db", write=False) as store:
        assert [run.reused for run in store.runs()] == [0, 1, 1]


@pytest.mark.parametrize("attack", ["fgsm", "pgd-10", "apgd-ce"])
def test_the_batch_size_changes_no_verdict(moebench: Terminal, attack: str) -> None:
    verdicts = []
    for size in (1, 5, 256):
        moebench.evaluate(MOE, attack, 12, "--batch-size", size, "--no-trust", "--db", f"{size}.db")
        with Store.open(f"{size}.db", write=False) as store:
            verdicts.append([store.outcomes(one.result_id).broken.tolist() for one in store.results()])
    assert verdicts[0] == verdicts[1] == verdicts[2]


# The radius.


@pytest.mark.parametrize("model", shipped(DENSE, MOE))
def test_accuracy_falls_as_the_radius_grows(moebench: Terminal, model: str) -> None:
    radii, words = ("1e-6", "4/255", "0.1", "0.2", "1"), ("--view", "whole", "--no-trust", "--json", "--eps")
    found = [moebench.evaluate(model, "pgd-20", 40, *words, eps).json for eps in radii]
    left = [one["ra"] for one in found]
    assert left[0] == found[0]["sa"] == found[-1]["sa"] > 0.9
    assert left == sorted(left, reverse=True) and left[-1] == 0 and len(set(left)) >= 3
    assert found[1]["eps"] == 4 / 255


@given(eps=st.floats(max_value=0, exclude_max=True) | st.sampled_from([float("nan"), float("inf"), 1.0001, 8.0]))
@settings(deadline=None, max_examples=15)
def test_an_impossible_radius_is_refused_by_the_library_too(eps: float) -> None:
    with pytest.raises(UsageError, match="eps must be"):
        plan_only(EvalSpec(DENSE, attacks=("fgsm",), eps=eps, n=2))


def test_without_a_radius_every_right_image_stays_right(tmp_path: Path) -> None:
    summary = evaluate(EvalSpec(DENSE, attacks=("pgd-10",), eps=0.0, n=20, db=str(tmp_path / "r.db")))
    assert summary.headlines["ra"] == summary.sa == summary.ra_worst


def test_a_listener_is_told_the_truth(tmp_path: Path) -> None:
    told: list[Progress] = []
    summary = evaluate(EvalSpec(MOE, attacks=("fgsm", "pgd-10"), n=20, db=str(tmp_path / "r.db")), told.append)
    assert [step.number for step in told] == sorted(step.number for step in told)
    assert {step.number for step in told} == set(range(1, 7)) and {step.total for step in told} == {6}
    for number, record in enumerate(summary.results, start=1):
        last = [step for step in told if step.number == number][-1]
        assert (last.attack, last.view, last.done) == (record.attack, record.view, last.n)
        assert last.standing == round(20 * record.accuracy)


# Halves of a dual model.


def test_a_dual_model_has_the_accuracy_of_its_halves(moebench: Terminal) -> None:
    half = load_file(SHIPPED / "digits" / f"{MOE}.safetensors")
    state = {f"{name}.{key}": value.clone() for name in ("standard", "robust") for key, value in half.items()}
    card = {"model": "dual-moe", "num_classes": 10, "shape": [1, 8, 8], "settings": {}, "dataset": "digits"}
    save_weights(moebench.folder / "dual.safetensors", state, card)
    found = moebench.evaluate("dual-moe", "pgd-10", 20, "--weights", "dual.safetensors", "--json").json
    views = {item["view"]: item["accuracy"] for item in found["results"]}
    assert set(views) == {"whole", "router", "experts", "standard", "robust"}
    # Both halves are the same network, and so is their mixture.
    assert views["standard"] == views["robust"] == views["whole"] == found["ra"]
    said = moebench.evaluate("dual-moe", "pgd-10", 20, "--weights", "dual.safetensors")
    for label in ("RA-SMoE", "RA-RMoE", "RA-E", "RA-R"):
        assert any(line.split()[:1] == [label] for line in said.out.splitlines()), label
    assert "not applicable" not in said.out


# From nothing to a number, and against the authors' code.


def test_a_model_is_trained_and_then_evaluated(moebench: Terminal) -> None:
    trained = moebench("train", "--model", "resnet-st", "--epochs", 1, "--out", "my runs")
    assert trained.code == 0, trained.err
    (line,) = (line for line in trained.out.splitlines() if line.startswith("next: "))
    program, *words = line.removeprefix("next: ").split(" ")
    assert program == "moebench" and "evaluate" in words
    found = moebench.evaluate("resnet-st", "fgsm", 40, "--weights", "my runs/resnet-st.safetensors", "--json").json
    assert found["sa"] > 0.2 and found["ra"] <= found["sa"]
    assert sorted(moebench.files()) == [
        "my runs/resnet-st.json",
        "my runs/resnet-st.log.jsonl",
        "my runs/resnet-st.safetensors",
        "results.db",
    ]


def test_training_on_a_file_without_splits_says_that_it_is_no_test_set(moebench: Terminal) -> None:
    data = load_dataset("digits", split="train")
    np.savez(moebench.folder / "mine.npz", x=data.images.transpose(0, 2, 3, 1), y=data.labels)
    said = moebench("train", "--model", "resnet-st", "--dataset", "npz:mine.npz", "--epochs", 2)
    assert said.code == 0, said.err
    assert "npz:mine.npz has no test split: give images that were not trained on" in said.out
    assert "no test split" not in moebench("train", "--model", "resnet-st", "--epochs", 1, "--out", "others").out


@pytest.mark.parametrize(("model", "attack"), [(DENSE, "fgsm"), (DENSE, "pgd-10"), (MOE, "apgd-ce")])
def test_the_reference_engine_judges_alike(moebench: Terminal, model: str, attack: str) -> None:
    words = ("--view", "whole", "--json", "--engine")
    native, reference = (moebench.evaluate(model, attack, 30, *words, name).json for name in ("native", "reference"))
    assert native["sa"] == reference["sa"] and abs(native["ra"] - reference["ra"]) <= 2 / 30
    assert attack != "fgsm" or native["ra"] == reference["ra"]


def test_a_model_and_data_of_nobody_here_give_the_verdicts_of_autoattack(moebench: Terminal) -> None:
    from pyautoattack import AutoAttack  # type: ignore[import-untyped]

    (moebench.folder / "net.py").write_text(CONVNET)
    network = convnet(moebench.folder / "net.py")
    n, eps = 12, 2 / 255
    x = np.random.default_rng(1).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32) / np.float32(255))
    with torch.no_grad():
        y = network(images).argmax(1)
    y[0] = (y[0] + 1) % 10
    np.savez(moebench.folder / "data.npz", x=x, y=y.numpy())
    words = ("--dataset", "npz:data.npz", "--eps", "2/255", "--json", "--save-adv", "adv.npz")
    found = moebench("evaluate", "--model", "net.py:make", *words).json
    saved = arrays("adv.npz")
    assert found["results"][0]["attack"] == "autoattack" and found["n"] == n and found["sa"] == (n - 1) / n
    attack = AutoAttack(network, norm="Linf", eps=eps, version="standard", seed=0, device="cpu")
    x_adv, _ = attack.run_standard_evaluation(images, y, batch_size=n)
    with torch.no_grad():
        robust = (network(x_adv).argmax(1) == y).numpy()
    np.testing.assert_array_equal(saved["robust"], robust)
    assert 0 < robust.mean() < (n - 1) / n and found["ra"] == robust.mean()


def convnet(path: Path) -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location("net_for_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: torch.nn.Module = module.make()
    return network.eval().requires_grad_(False)


def test_autoattack_is_at_least_as_strong_as_its_parts(moebench: Terminal) -> None:
    found = moebench.evaluate(DENSE, "apgd-ce,autoattack", 8, "--json").json
    weak, strong = (item["accuracy"] for item in found["results"])
    assert strong <= weak and found["ra"] == strong
