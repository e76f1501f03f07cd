"""`torchattacks:NAME`: every class of the library works within the threat model, or is refused in one line."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchattacks  # type: ignore[import-untyped]
from commands import DENSE, Terminal
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import EPS, digits, make_engine, trained_moe

from moebench.attacks import load_attack
from moebench.attacks._base import AttackPlan
from moebench.attacks._engine import Finished, Samples
from moebench.attacks._library import LibraryAttack, bind_library, library_plan, owners, parameters_of
from moebench.attacks._reference import run_reference
from moebench.errors import RunError, UsageError
from moebench.registry import check_attack_name, library_classes
from moebench.schema import NORMS, Norm, ThreatModel
from moebench.threat import within

GREY = (1, 8, 8)
FEW = {"steps": 2, "num_iter_set": 2, "n_queries": 8, "max_iterations": 10, "binary_search_steps": 1, "nb_sample": 2}
ANY_NORM = {"APGD", "APGDT", "AutoAttack", "CW", "DeepFool", "EADEN", "EADL1", "FAB", "GN", "Square"}
LINF = {
    *("BIM", "DIFGSM", "EOTPGD", "FFGSM", "FGSM", "Jitter", "MIFGSM", "NIFGSM", "PGD", "PGDRS", "RFGSM", "SINIFGSM"),
    *("SPSA", "TPGD", "UPGD", "VMIFGSM", "VNIFGSM"),
}
COLOUR_ONLY = {"TIFGSM", "PIFGSM", "PIFGSMPP"}
WORKING: dict[Norm, set[str]] = {"Linf": ANY_NORM | LINF, "L2": ANY_NORM | {"PGDL2", "PGDRSL2"}}


def small(kind: str, **changes: Any) -> AttackPlan:
    """A class with a budget of a few steps."""
    known = parameters_of(kind)
    few = {"version": "rand"} if kind == "AutoAttack" else {key: few for key, few in FEW.items() if key in known}
    return load_attack(f"torchattacks:{kind}", **{**few, **changes})


def bound(
    plan: AttackPlan, norm: Norm = "Linf", shape: tuple[int, int, int] = GREY, classes: int = 10, batch: int = 5
) -> LibraryAttack:
    stage = bind_library(plan, ThreatModel(norm, EPS[norm]), shape, classes, batch).stages[0]
    assert isinstance(stage, LibraryAttack)
    return stage


def run(
    stage: LibraryAttack, samples: Samples, view: str = "whole", seed: int = 0, model: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the stage makes of the samples: images and verdicts."""
    assert stage.setting is not None
    setting = stage.setting
    engine = make_engine(
        model or trained_moe(), samples, setting.threat, view, batch_size=setting.batch_size, seed=seed
    )
    x_adv, broken = samples.x.clone(), torch.zeros_like(samples.y, dtype=torch.bool)

    def sink(done: Finished) -> None:
        x_adv[done.index], broken[done.index] = done.x_adv, done.broken

    run_reference(stage, engine, torch.arange(len(samples)), sink)
    return x_adv, broken


# The classes.


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", library_classes())
def test_every_class_works_or_says_why_not(kind: str, norm: Norm) -> None:
    if kind not in WORKING[norm]:
        with pytest.raises(UsageError, match=rf"^attack 'torchattacks:{kind}' [^\n]+$"):
            bound(load_attack(f"torchattacks:{kind}"), norm)
        return
    samples = digits(8)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]
    stage = bound(small(kind), norm)
    x_adv, broken = run(stage, samples)
    assert bool(within(x_adv, samples.x, ThreatModel(norm, EPS[norm])).all())
    model = trained_moe()
    with torch.no_grad():
        assert torch.equal(model(x_adv).argmax(1)[broken] != samples.y[broken], broken[broken])
    torch.rand(1)
    torch.set_rng_state(before[0])
    again, verdicts = run(stage, samples)
    assert torch.equal(again, x_adv) and torch.equal(verdicts, broken)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]  # type: ignore[index]


@pytest.mark.parametrize("kind", sorted(COLOUR_ONLY))
def test_classes_for_colour_images_work_on_them(kind: str) -> None:
    grey = digits(4)
    samples = Samples(grey.x.repeat(1, 3, 1, 1), grey.y, grey.ids)
    model = torch.nn.Sequential(torch.nn.AvgPool3d((3, 1, 1)), trained_moe()).eval()
    x_adv, _ = run(bound(small(kind), shape=(3, 8, 8)), samples, model=model)
    assert bool(within(x_adv, samples.x, ThreatModel("Linf", EPS["Linf"])).all())
    assert not torch.equal(x_adv, samples.x)


def test_too_few_classes_are_refused_before_the_work() -> None:
    with pytest.raises(UsageError, match="does not work on images of 1×8×8 in 2 classes"):
        bound(load_attack("torchattacks:APGDT"), classes=2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchattacks:MIFGM", "did you mean torchattacks:MIFGSM"),
        ("torchattacks:mifgsm", "did you mean torchattacks:MIFGSM"),
        ("torchattacks:zzzzzz", "classes: VANILA, GN, FGSM"),
        ("torchattacks:", "write torchattacks:NAME"),
        ("torchattacks", "write torchattacks:NAME"),
        ("torchattack:PGD", "unknown attack 'torchattack:PGD'"),
    ],
)
def test_wrong_names_are_answered(name: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        check_attack_name(name)


def test_names_are_checked_without_torch() -> None:
    code = (
        "import sys; from moebench.registry import check_attack_name; check_attack_name('torchattacks:VMIFGSM'); "
        "assert 'torch' not in sys.modules and 'torchattacks' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_setting_that_the_class_has_not_is_refused() -> None:
    with pytest.raises(UsageError, match="has no setting 'stpes'; it has alpha, random_start, steps"):
        load_attack("torchattacks:PGD", stpes=3)
    with pytest.raises(UsageError, match="has no setting 'eps'"):
        load_attack("torchattacks:PGD", eps=0.3)


# What is handed to the library, and what comes back.


@pytest.mark.parametrize(
    ("kind", "norm", "ratio"), [("PGD", "Linf", 0.25), ("FFGSM", "Linf", 1.25), ("PGDL2", "L2", 0.2)]
)
def test_the_step_size_keeps_the_ratio_of_the_class(kind: str, norm: Norm, ratio: float) -> None:
    arguments = bound(load_attack(f"torchattacks:{kind}"), norm).arguments()
    assert arguments["eps"] == EPS[norm] and arguments["alpha"] == pytest.approx(ratio * EPS[norm])


def test_all_that_decides_the_result_is_recorded() -> None:
    found = bound(load_attack("torchattacks:APGDT"), "L2", classes=7, batch=3).parameters()
    assert found == {
        **{"library": "torchattacks", "version": torchattacks.__version__, "class": "APGDT", "batch_size": 3},
        **{"norm": "L2", "eps": 0.5, "steps": 10, "n_restarts": 1, "eot_iter": 1, "rho": 0.75, "n_classes": 7},
    }


def test_the_class_does_what_it_does_when_called_directly() -> None:
    samples, model, eps = digits(5), trained_moe(), EPS["Linf"]
    stage = bound(small("MIFGSM"))
    direct = torchattacks.MIFGSM(model, eps=eps, alpha=eps / 4, steps=2)(samples.x, samples.y)
    x_adv, broken = run(stage, samples, model=model)
    assert torch.equal(x_adv[~broken], direct[~broken])


def test_another_seed_and_another_batch_draw_other_numbers() -> None:
    samples = digits(8)
    stage = bound(small("PGD"))
    first, _ = run(stage, samples)
    assert not torch.equal(first, run(stage, samples, seed=1)[0])
    assert stage.setting is not None
    assert not torch.equal(first, run(replace(stage, setting=replace(stage.setting, batch_size=4)), samples)[0])


class Looking(torchattacks.attack.Attack):  # type: ignore[misc]
    """Looks at a given image of every sample, and gives back another."""

    shown: torch.Tensor
    given: torch.Tensor

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__("Looking", model)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.get_logits(self.shown[: len(images)])
        return self.given[: len(images)]


@pytest.mark.parametrize("last", [float("nan"), float("inf"), -7.0])
def test_every_image_that_the_library_looks_at_counts(monkeypatch: pytest.MonkeyPatch, last: float) -> None:
    monkeypatch.setattr(torchattacks, "Looking", Looking, raising=False)
    samples = digits(8)
    shown, broken = run(bound(small("APGD"), batch=8), samples)
    assert bool(broken.any()) and not bool(broken.all())
    monkeypatch.setattr(Looking, "shown", shown, raising=False)
    monkeypatch.setattr(Looking, "given", torch.full_like(shown, last), raising=False)
    x_adv, verdicts = run(bound(library_plan("torchattacks:Looking"), batch=8), samples)
    assert bool(verdicts[broken].all()) and torch.equal(x_adv[broken], shown[broken])
    assert bool(within(x_adv, samples.x, ThreatModel("Linf", EPS["Linf"])).all())


def test_what_the_library_raises_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = bound(small("PGD"))
    monkeypatch.setattr(torchattacks.PGD, "forward", lambda self, *_: 1 / 0)
    with pytest.raises(RunError, match="torchattacks:PGD failed: ZeroDivisionError: division by zero"):
        run(stage, digits(2))


@given(data=st.data(), batch=st.integers(1, 6), copies=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_images_find_the_sample_they_were_made_from(data: st.DataObject, batch: int, copies: int) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    clean = torch.rand(batch, 1, 3, 3, generator=generator) + 3 * torch.arange(batch).view(-1, 1, 1, 1)
    order = torch.arange(batch)
    ways = [order.repeat(copies), order.repeat_interleave(copies), torch.randperm(batch, generator=generator)[:-1]]
    expected = data.draw(st.sampled_from([way for way in ways if len(way)]))
    noise = torch.rand(len(expected), 1, 3, 3, generator=generator)
    assert torch.equal(owners(clean[expected] + noise, clean), expected)


# On the command line.


def test_evaluate_runs_it_on_every_view_and_stores_it(moebench: Terminal) -> None:
    words = ("rt-er-official", "torchattacks:PGD", 12)
    found = moebench.evaluate(*words, "--json").json
    accuracy = {result["view"]: result["accuracy"] for result in found["results"]}
    # The router of this model is its weak spot: found only if the view knows the sample's clean routing.
    assert accuracy["router"] < accuracy["whole"] <= found["sa"]
    assert "All results were in the database already" in moebench.evaluate(*words).out
    other = moebench.evaluate(*words, "--view", "whole", "--batch-size", 6)
    assert other.code == 0 and "already" not in other.out


def test_a_dry_run_bounds_the_passes(moebench: Terminal) -> None:
    words = (DENSE, "torchattacks:VMIFGSM,torchattacks:DeepFool", 6)
    planned = moebench.evaluate(*words, "--dry-run", "--json").json["cells"]
    done = moebench.evaluate(*words, "--json").json["results"]
    for plan, result in zip(planned, done, strict=True):
        assert 0 < result["backwards"] <= plan["backwards"] and result["forwards"] <= plan["forwards"] + 6


def test_a_class_that_does_not_work_here_is_one_line(moebench: Terminal) -> None:
    words = ("evaluate", "--model", DENSE, "--n", 5, "--attack")
    assert "searches the L2 ball, not that of Linf; give --norm L2" in moebench.refuses(*words, "torchattacks:PGDL2")
    assert "expected input[2, 1, 8, 8] to have 3 channels" in moebench.refuses(*words, "torchattacks:TIFGSM")
    assert "did you mean torchattacks:MIFGSM" in moebench.refuses(*words, "torchattacks:MIFGM")


def test_attacks_are_listed_in_one_row(moebench: Terminal) -> None:
    lines = moebench("list", "attacks").out.splitlines()
    assert [line.split()[0] for line in lines if "torchattacks" in line] == ["torchattacks:NAME"]
