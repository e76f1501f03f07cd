"""What every registered attack promises, whatever its mathematics."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import EPS, Attacked, attack, digits, distinct_attacks, reduced, subset, trained_moe

from moebench.attacks import list_attacks, load_attack
from moebench.attacks._engine import Samples
from moebench.attacks._views import applicable_views
from moebench.attacks.apgd import APGD
from moebench.attacks.fab import FAB
from moebench.attacks.square import Square, patch_sides
from moebench.errors import UsageError
from moebench.models._moe import MoELayer
from moebench.schema import NORMS, Norm, ThreatModel
from moebench.threat import distances

VIEWS = ["whole", "router", "experts", "smooth", "straight-through", "expert[0]", "expert[1]"]
N = 14


def combinations(views_each: int = len(VIEWS)) -> list[tuple[str, str, Norm]]:
    """Every attack on the whole model, every kind of attack on the first views that it runs on.

    What is done for a norm is the same on all views, so that Linf alone is tried on each.
    """
    kinds = distinct_attacks()
    plans = {name: load_attack(name).views for name in list_attacks()}
    shown = {name: list(views or VIEWS)[: views_each if name in kinds else 1] for name, views in plans.items()}
    return [
        (name, view, norm)
        for name, views in shown.items()
        for view in views
        for norm in (NORMS if view == views[0] else NORMS[:1])
    ]


def run(name: str, view: str, norm: Norm, samples: Samples, **options: Any) -> tuple[nn.Module, Attacked]:
    model = trained_moe()
    threat = options.pop("threat", ThreatModel(norm, EPS[norm]))
    return model, attack(model, samples, threat, reduced(name).stages, view, **options)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that an attack could leave changed in a model."""
    tensors: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors[f"{name} asks for"] = (parameter.requires_grad, parameter.grad is None)
    for name, module in model.named_modules():
        tensors[f"{name} mode"] = module.training
        tensors[f"{name} hooks"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
        if isinstance(module, MoELayer):
            tensors[f"{name} policy"] = module.policy
    return tensors


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def test_the_views_above_are_all_that_the_toy_has() -> None:
    assert applicable_views(trained_moe()) == VIEWS


@pytest.mark.parametrize(("name", "view", "norm"), combinations())
def test_images_are_valid_and_nothing_else_changes(name: str, view: str, norm: Norm) -> None:
    samples = digits(N)
    copies = Samples(samples.x.clone(), samples.y.clone(), samples.ids.clone())
    model, threat = trained_moe(), ThreatModel(norm, EPS[norm])
    before = state_of(model)
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    out = attack(model, samples, threat, reduced(name).stages, view, batch_size=5)

    assert out.x_adv.shape == samples.x.shape and out.x_adv.dtype == torch.float32
    assert out.adv_pred.shape == samples.y.shape and out.adv_pred.dtype == torch.int64
    assert bool(torch.isfinite(out.x_adv).all())
    assert float(out.x_adv.min()) >= 0 and float(out.x_adv.max()) <= 1
    assert float(distances(out.x_adv, samples.x, threat).max()) <= threat.eps * (1 + 1e-5)
    # What counts is the whole model, whatever the view.
    prediction = model(out.x_adv).argmax(dim=1)
    assert torch.equal(out.adv_pred[out.broken], prediction[out.broken])
    assert bool((out.adv_pred[out.broken] != samples.y[out.broken]).all())
    assert torch.equal(out.adv_pred[~out.broken], samples.y[~out.broken])

    after = state_of(model)
    assert list(after) == list(before)
    assert [key for key in before if not same(before[key], after[key])] == []
    for item in ("x", "y", "ids"):
        assert torch.equal(getattr(samples, item), getattr(copies, item)), item
    assert not samples.x.requires_grad and not out.x_adv.requires_grad
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", distinct_attacks())
def test_each_stage_hands_over_each_standing_sample_once(name: str, norm: Norm) -> None:
    view = (load_attack(name).views or ["whole"])[0]
    # Handing over after every step is the hardest case for the book-keeping.
    for flush_seconds in (0.0, 1000.0):
        _, out = run(name, view, norm, digits(N), batch_size=4, flush_seconds=flush_seconds)
        assert torch.equal(out.handed[0], torch.ones(N, dtype=torch.int64))
        for stage in out.handed[1:]:
            assert bool((stage <= 1).all())
        assert bool((out.handed[-1][~out.broken] == 1).all())


@pytest.mark.parametrize(("name", "view", "norm"), combinations(3))
def test_the_same_seed_gives_the_same_bits(name: str, view: str, norm: Norm) -> None:
    _, one = run(name, view, norm, digits(N), seed=11)
    _, two = run(name, view, norm, digits(N), seed=11)
    assert torch.equal(one.broken, two.broken)
    assert torch.equal(one.adv_pred, two.adv_pred)
    assert torch.equal(one.x_adv, two.x_adv)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", distinct_attacks())
def test_another_seed_gives_other_images_where_an_attack_is_random(name: str, norm: Norm) -> None:
    view = (load_attack(name).views or ["whole"])[0]
    model = trained_moe()
    correct = model(digits(60).x).argmax(dim=1) == digits(60).y
    samples = subset(digits(60), correct.nonzero().squeeze(1)[:N])
    _, one = run(name, view, norm, samples, seed=0)
    _, two = run(name, view, norm, samples, seed=1)
    moved = bool((one.x_adv != two.x_adv).any())
    assert moved == (not name.endswith(("fgsm", "fab-t")))


@pytest.mark.parametrize(("name", "view", "norm"), combinations())
def test_eps_zero_leaves_the_clean_accuracy(name: str, view: str, norm: Norm) -> None:
    samples = digits(40)
    model = trained_moe()
    wrong = model(samples.x).argmax(dim=1) != samples.y
    assert bool(wrong.any()) and not bool(wrong.all())
    _, out = run(name, view, norm, samples, threat=ThreatModel(norm, 0.0))
    assert torch.equal(out.broken, wrong)
    torch.testing.assert_close(out.x_adv, samples.x, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "view", "norm"), combinations(3))
def test_one_sample_is_enough(name: str, view: str, norm: Norm) -> None:
    for number in (0, 1):
        _, out = run(name, view, norm, subset(digits(2), [number]))
        assert out.x_adv.shape == (1, 1, 8, 8)
    _, out = run(name, view, norm, digits(3), batch_size=1)
    assert torch.equal(out.handed[0], torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("name", list_attacks())
def test_no_sample_is_no_work(name: str) -> None:
    view = (load_attack(name).views or ["whole"])[0]
    _, out = run(name, view, "Linf", subset(digits(2), []))
    assert len(out.broken) == 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [name for name in list_attacks() if load_attack(name).views is None])
def test_every_attack_does_something(name: str, norm: Norm) -> None:
    """At a radius of half the pixel range hardly a sample of an undefended model stands."""
    eps = 0.5 if norm == "Linf" else 4.0
    _, out = run(name, "whole", norm, digits(40), threat=ThreatModel(norm, eps))
    # One perturbation for all images is weaker than one per image.
    assert out.accuracy < (0.65 if name.startswith("universal") else 0.3)


@pytest.mark.parametrize("name", list_attacks())
def test_settings_can_be_read_and_only_existing_ones_be_changed(name: str) -> None:
    plan = load_attack(name)
    assert plan.name == name and plan.summary and plan.stages
    assert list(plan.parameters()) == [stage.stage for stage in plan.stages]
    with pytest.raises(UsageError, match=f"attack {name!r} has no setting 'radius'"):
        load_attack(name, radius=3)


def test_a_setting_reaches_the_attack() -> None:
    assert load_attack("pgd-10", steps=3).parameters()["pgd"]["steps"] == 3
    assert load_attack("fab-t", target_classes=2).parameters()["fab-t"]["target_classes"] == 2
    with pytest.raises(UsageError, match="did you mean pgd-50"):
        load_attack("pgd-5O")


# Standard settings.


def test_autoattack_is_the_standard_version() -> None:
    """Against the attributes of the authors' own object, and once more in numbers."""
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    from pyautoattack import AutoAttack  # type: ignore[import-untyped]

    reference = AutoAttack(nn.Identity(), norm="Linf", eps=0.1, version="standard")
    stages = load_attack("autoattack").stages
    assert [stage.stage for stage in stages] == reference.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    apgd_ce, apgd_t, fab_t, square = stages

    assert apgd_ce == APGD(loss="ce", steps=100, rho=0.75, target_classes=9)
    assert (reference.apgd.n_iter, reference.apgd.thr_decr, reference.apgd.n_restarts) == (100, 0.75, 1)
    assert reference.apgd.eot_iter == 1 and not reference.apgd.use_largereps

    assert apgd_t == APGD(loss="dlr-targeted", steps=100, rho=0.75, target_classes=9)
    targeted = reference.apgd_targeted
    assert (targeted.n_iter, targeted.thr_decr, targeted.n_restarts) == (100, 0.75, 1)
    assert targeted.n_target_classes == 9 and targeted.loss == "dlr-targeted"

    assert fab_t == FAB(steps=100, alpha_max=0.1, eta=1.05, beta=0.9, target_classes=9)
    fab = reference.fab
    assert (fab.n_iter, fab.alpha_max, fab.eta, fab.beta) == (100, 0.1, 1.05, 0.9)
    assert (fab.n_restarts, fab.n_target_classes) == (1, 9)

    assert square == Square(queries=5000, p_init=0.8)
    assert (reference.square.n_queries, reference.square.p_init) == (5000, 0.8)
    assert reference.square.n_restarts == 1 and not reference.square.rescale_schedule
    assert reference.square.loss == "margin"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [8, 32, 224])
def test_square_shrinks_its_patches_like_the_authors(norm: Norm, size: int) -> None:
    from pyautoattack.square import SquareAttack  # type: ignore[import-untyped]

    reference = SquareAttack(nn.Identity(), norm=norm, eps=0.1, resc_schedule=False)
    sides = patch_sides(5000, 0.8, 1 if norm == "Linf" else 3, size, size, torch.device("cpu"))
    for query in (*range(60), 199, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001, 4999):
        side = max(round((reference.p_selection(query) * size * size) ** 0.5), 1 if norm == "Linf" else 3)
        side += norm == "L2" and side % 2 == 0
        assert int(sides[query]) == min(side, size), query


@pytest.mark.parametrize(("name", "steps"), [("fgsm", 1), ("pgd-10", 10), ("pgd-20", 20), ("pgd-50", 50)])
def test_pgd_has_the_settings_of_its_name(name: str, steps: int) -> None:
    fraction, start = (1.0, False) if name == "fgsm" else (0.25, True)
    (parameters,) = load_attack(name).parameters().values()
    assert parameters == {"steps": steps, "step_fraction": fraction, "random_start": start}


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"])
def test_single_attacks_have_the_standard_budget(name: str) -> None:
    (parameters,) = load_attack(name).parameters().values()
    standard = {**load_attack("autoattack").parameters(), "apgd-dlr": {**parameters, "steps": 100, "rho": 0.75}}
    assert parameters == standard[name]
