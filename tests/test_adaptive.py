"""moe-adaptive and joint on every kind of routing: what they contain, what they weigh, and what AutoAttack misses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from toys import (
    EPS,
    Attacked,
    DeepMoE,
    InDouble,
    TinyMoE,
    attack,
    cut,
    digits,
    dual_moe,
    frozen,
    make_engine,
    make_rows,
    soft_moe,
    subset,
    trained,
)

from moebench.attacks import AttackPlan, list_attacks, load_attack
from moebench.attacks._engine import Samples
from moebench.attacks._views import make_view
from moebench.attacks.joint import Joint
from moebench.dry_run import plan_only
from moebench.errors import UsageError
from moebench.evaluation import EvalSpec, prepare
from moebench.models._moe import MoELayer, split_forward
from moebench.planning import parse_attacks
from moebench.registry import attack_registry
from moebench.schema import NORMS, Norm, ThreatModel
from moebench.threat import distances

KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "top-1": (TinyMoE, 6),
    "top-2": (partial(TinyMoE, 2, 3), 3),
    "soft": (soft_moe, 2),
    "dual": (dual_moe, 2),
    "layers": (DeepMoE, 6),
}
SOME = {"steps": 6, "queries": 40, "target_classes": 2, "pairs": 6}


@lru_cache
def of_kind(kind: str) -> nn.Module:
    make, epochs = KINDS[kind]
    return trained(make, epochs)


@lru_cache
def fitted(name: str, kind: str) -> AttackPlan:
    return load_attack(name).fitted(of_kind(kind))


def run(name: str, kind: str, samples: Samples) -> Attacked:
    stages = cut(fitted(name, kind), **SOME).stages
    return attack(of_kind(kind), samples, ThreatModel("Linf", EPS["Linf"]), stages)


# What it is made of.


@pytest.mark.parametrize("kind", KINDS)
def test_breaks_all_that_autoattack_breaks(kind: str) -> None:
    samples = digits(24)
    standard, adaptive = run("autoattack", kind, samples), run("moe-adaptive", kind, samples)
    assert bool((~standard.broken).any())
    assert not bool((standard.broken & ~adaptive.broken).any())


@pytest.mark.parametrize("kind", KINDS)
def test_the_stages_of_autoattack_are_in_it_as_they_are_and_no_name_twice(kind: str) -> None:
    stages = fitted("moe-adaptive", kind).stages
    standard = load_attack("autoattack").stages
    assert [stage for stage in stages if stage in standard] == list(standard)
    assert len({stage.stage for stage in stages}) == len(stages)


HARD = ["apgd-ce", "region", "apgd-ce on smooth", "apgd-t on straight-through", "apgd-t", "fab-t", "square"]
PLANS = {
    "top-1": HARD,
    "top-2": HARD,
    "dual": [*HARD, "apgd-ce on standard", "apgd-ce on robust"],
    "layers": [*HARD, "apgd-ce on expert[0]", "apgd-ce on expert[1]"],
    "soft": [
        *("apgd-ce", "apgd-t", "joint", "apgd-ce on router", "apgd-ce on experts"),
        *("apgd-ce on expert[0]", "apgd-ce on expert[1]", "fab-t", "square"),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_plan_by_kind_of_routing(kind: str) -> None:
    assert [stage.stage for stage in fitted("moe-adaptive", kind).stages] == PLANS[kind]


def test_what_is_left_out_is_recorded_with_its_reason() -> None:
    for kind in KINDS:
        skipped = {
            name: facts["skipped"]
            for name, facts in fitted("moe-adaptive", kind).parameters().items()
            if "skipped" in facts
        }
        if kind != "soft":
            assert skipped == {}, kind
            continue
        assert set(skipped) == {"region", "apgd-ce on smooth", "apgd-t on straight-through"}
        assert all("every expert always runs" in why for why in skipped.values())


@pytest.mark.parametrize("name", ["region", "route-flip"])
def test_an_attack_on_regions_of_a_soft_gate_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"attack {name!r} has nothing to do on this model: every expert always runs"):
        fitted(name, "soft")


ROUTED = [
    name
    for name in list_attacks()
    if name.startswith(("smooth-", "straight-through-")) or name in ("joint", "region", "route-flip", "moe-adaptive")
]


@pytest.mark.parametrize("name", ROUTED)
def test_a_dense_model_is_refused_in_one_line(name: str) -> None:
    message = f"attack '{name}' needs a model with routing; resnet-at has none"
    with pytest.raises(UsageError, match=message):
        plan_only(EvalSpec("resnet-at", attacks=(name,), n=2))


@pytest.mark.parametrize("surrogate", ["smooth", "straight-through"])
@pytest.mark.parametrize("name", ["fgsm", "pgd-10", "pgd-20", "pgd-50", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t"])
def test_each_gradient_attack_has_its_surrogates(surrogate: str, name: str) -> None:
    plan, plain = load_attack(f"{surrogate}-{name}"), load_attack(name)
    assert plan.stages == plain.stages and plan.views == (surrogate,)
    assert (plan.min_classes, plan.paper) == (plain.min_classes, plain.paper)
    (facts,) = (one.facts for one in attack_registry().declarations() if one.name == plan.name)
    assert facts["summary"] == plan.summary and facts["views"] == (surrogate,)


# Books.


def test_the_plan_that_runs_is_what_the_store_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "soft.py").write_text(
        "import torch\nfrom moebench.models.rt_er import ClassifierMoE\n\n"
        "def make():\n    torch.manual_seed(0)\n"
        "    return ClassifierMoE(10, (1, 8, 8), experts=2, top_k=2, router='trained')\n"
    )
    monkeypatch.chdir(tmp_path)
    prepared = prepare(EvalSpec("soft.py:make", attacks=("moe-adaptive",), n=4), parse_attacks(["moe-adaptive"]))
    ((plan, cell),) = prepared.cells
    assert [stage.stage for stage in plan.stages] == PLANS["soft"]
    assert set(cell.parameters) == {*PLANS["soft"], "region", "apgd-ce on smooth", "apgd-t on straight-through"}
    assert set(cell.parameters["region"]) == {"skipped"}


# The same for all, whoever stands beside.


@pytest.mark.parametrize("name", ["joint", "region", "moe-adaptive"])
@pytest.mark.parametrize("kind", ["top-1", "layers", "many regions"])
def test_verdicts_hang_on_neither_batch_nor_neighbours(name: str, kind: str) -> None:
    model = frozen(InDouble(known(kind)))
    samples, threat = digits(8), ThreatModel("Linf", 0.08)
    plan = cut(load_attack(name).fitted(model), steps=3, queries=10, target_classes=2, pairs=5)
    alike = attack(model, samples, threat, plan.stages, batch_size=64)
    for size in (1, 3):
        again = attack(model, samples, threat, plan.stages, batch_size=size)
        assert torch.equal(again.broken, alike.broken) and torch.equal(again.adv_pred, alike.adv_pred)
        assert torch.equal(again.x_adv, alike.x_adv)
    few = attack(model, subset(samples, [6, 1]), threat, plan.stages)
    assert torch.equal(few.broken, alike.broken[[6, 1]]) and torch.equal(few.x_adv, alike.x_adv[[6, 1]])


def known(kind: str) -> nn.Module:
    if kind != "many regions":
        return trained(*KINDS[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DeepMoE(top_k=2, experts=6)


@given(
    kind=st.sampled_from(sorted(KINDS)),
    norm=st.sampled_from(NORMS),
    eps=st.floats(0, 0.4),
    seed=st.integers(0, 2**31),
    share=st.floats(0, 1),
    whole=st.floats(0, 1),
)
@settings(deadline=None, max_examples=8)
def test_images_stay_in_the_ball_and_the_box(
    kind: str, norm: Norm, eps: float, seed: int, share: float, whole: float
) -> None:
    samples, threat, model = digits(4), ThreatModel(norm, eps), of_kind(kind)
    weighed = Joint(steps=3, shares=(share,), whole=whole)
    for stages in ([weighed], cut(fitted("moe-adaptive", kind), steps=2, queries=3, target_classes=1, pairs=2).stages):
        out = attack(model, samples, threat, stages, seed=seed)
        assert float(out.x_adv.min()) >= 0 and float(out.x_adv.max()) <= 1
        assert float(distances(out.x_adv, samples.x, threat).max()) <= eps * (1 + 1e-5) + 1e-6
        wrong = model(out.x_adv).argmax(dim=1) != samples.y
        assert bool(wrong[out.broken].all())


# Joint.


def loss_by_hand(model: nn.Module, x: Tensor, z: Tensor, y: Tensor, share: float, whole: float) -> Tensor:
    router = F.cross_entropy(split_forward(model, z, x, soft=True), y, reduction="none")
    experts = F.cross_entropy(split_forward(model, x, z), y, reduction="none")
    both = F.cross_entropy(model(z), y, reduction="none")
    return (1 - whole) * (share * router + (1 - share) * experts) + whole * both


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [0.0, 0.4])
def test_joint_climbs_the_loss_that_it_states(kind: str, whole: float) -> None:
    model, samples = of_kind(kind), digits(6)
    stage = Joint(shares=(0.25, 1.0, 0.6), whole=whole)
    engine = make_engine(model, samples, ThreatModel("Linf", 0.1))
    engine.view = make_view("joint", model)
    engine.view.prepare(samples.x)
    number = torch.tensor([0, 1, 2, 0, 1, 2])
    rows = make_rows(samples, target=number)
    z = (samples.x + 0.1 * (torch.rand(samples.x.shape, generator=torch.Generator().manual_seed(0)) - 0.5)).clamp(0, 1)
    _, value, gradient = engine.gradient(z, rows, stage._loss())
    for at, share in enumerate([0.25, 1.0, 0.6, 0.25, 1.0, 0.6]):
        moved = z[at : at + 1].clone().requires_grad_()
        expected = loss_by_hand(model, samples.x[at : at + 1], moved, samples.y[at : at + 1], share, whole)
        (slope,) = torch.autograd.grad(expected.sum(), moved)
        torch.testing.assert_close(value[at : at + 1], expected.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient[at : at + 1], slope, rtol=1e-3, atol=1e-5)


def test_targeted_joint_goes_through_every_pair_of_class_and_share() -> None:
    model, samples = of_kind("top-1"), digits(3)
    stage = Joint(loss="dlr-targeted", shares=(0.0, 1.0), target_classes=3)
    view = make_view("joint", model)
    view.prepare(samples.x)
    shown = view.logits(samples.x, torch.arange(3))
    targets = stage.targets(shown, samples.y)
    assert targets is not None and targets.shape == (3, 6)
    likely = model(samples.x).argsort(dim=1, descending=True)[:, 1:4]
    assert torch.equal(targets % 10, likely.repeat_interleave(2, dim=1))
    assert torch.equal(targets // 10, torch.tensor([0, 1] * 3).expand(3, -1))
    rows = make_rows(samples, target=targets[:, 1])
    alone = stage._loss()(shown, rows)
    plain = Joint(loss="dlr-targeted", shares=(1.0,))._loss()(shown, replace(rows, target=likely[:, 0]))
    torch.testing.assert_close(alone, plain)


@pytest.mark.parametrize(("shares", "whole"), [((), 0.0), ((0.5, 1.1), 0.0), ((float("nan"),), 0.0), ((0.5,), -0.1)])
def test_impossible_weights_are_refused(shares: tuple[float, ...], whole: float) -> None:
    with pytest.raises(UsageError, match="must be"):
        load_attack("joint", shares=shares, whole=whole)


# Routing that hides the gradient, in depth.

SIGNS = torch.where(torch.rand(64, generator=torch.Generator().manual_seed(3)) < 0.5, -1.0, 1.0)


class Says(nn.Module):
    """An expert that says the same of everything; its gradient exists and is zero."""

    def __init__(self, number: int, width: int) -> None:
        super().__init__()
        self.number, self.width = number, width

    def forward(self, x: Tensor) -> Tensor:
        said = F.one_hot(torch.tensor(self.number), self.width).to(x.dtype) * 5
        return said.expand(len(x), -1) + 0.0 * x.flatten(1).sum(dim=1, keepdim=True)


class Whispers(nn.Module):
    """The first router looks at the pixels, every later one at what the expert before it said; class 0 or 1.

    The model is right (class 0) where s·x + bias > 0, for one fixed sign s_i of every pixel.
    """

    def __init__(self, bias: float, depth: int) -> None:
        super().__init__()
        pixels, words = nn.Linear(64, 2), [nn.Linear(2, 2) for _ in range(depth - 1)]
        with torch.no_grad():
            pixels.weight.copy_(torch.stack((SIGNS, torch.zeros(64))) / 8)
            pixels.bias.copy_(torch.tensor([bias / 8, 0.0]))
            for word in words:
                word.weight.copy_(torch.eye(2))
                word.bias.zero_()
        self.layers = nn.ModuleList(
            MoELayer([Says(number, 4 if at == depth - 1 else 2) for number in range(2)], router)
            for at, router in enumerate((pixels, *words))
        )

    def forward(self, x: Tensor) -> Tensor:
        out = x.flatten(1)
        for layer in self.layers:
            out = layer(out)
        return out


def reach_of_stripes_with_a_patch() -> int:
    """The most of s·d that signs d can have which change at most twice along every column."""
    columns = SIGNS.view(8, 8).t()
    cuts = [(a, b) for a in range(9) for b in range(a, 9)]
    return sum(max(int(sum(part.sum().abs() for part in (c[:a], c[a:b], c[b:]))) for a, b in cuts) for c in columns)


@pytest.mark.parametrize("depth", [2, 7])
def test_autoattack_cannot_see_a_way_that_moe_adaptive_takes(depth: int) -> None:
    """The gradient of the whole model is exactly zero and its loss flat, so no attack ever leaves its start.

    APGD and FAB then try the clean image and random points of the ball, far from the corner they would need, and
    Square its stripes with one patch each. With seven layers there are 128 routes, more than are listed, and the only
    one besides the clean image's that exists is expert 1 everywhere.
    """
    x = 0.4 + 0.2 * torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    lead = x.flatten(1) @ SIGNS
    bias = float(5 - lead.min())
    lead = lead + bias
    model, samples = frozen(Whispers(bias, depth)), Samples(x, torch.zeros(12, dtype=torch.int64), torch.arange(12))
    eps = float(lead.max()) / 60
    assert bool((lead > eps * reach_of_stripes_with_a_patch()).all()) and eps < 0.4
    assert bool((model(x).argmax(dim=1) == 0).all())
    moved = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(moved).sum(), moved)
    assert float(gradient.abs().max()) == 0

    threat = ThreatModel("Linf", eps)
    budget = {"steps": 15, "queries": 200, "target_classes": 3, "pairs": 192}
    standard = attack(model, samples, threat, cut(load_attack("autoattack"), **budget).stages)
    assert not bool(standard.broken.any())
    adaptive = attack(model, samples, threat, cut(load_attack("moe-adaptive").fitted(model), **budget).stages)
    assert bool(adaptive.broken.all())
