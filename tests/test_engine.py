"""The engine: verdicts that hang on nothing but the sample, and closed forms where pencil and paper know them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import (
    EPS,
    Attacked,
    Gated,
    InDouble,
    attack,
    digits,
    distinct_attacks,
    fitted,
    frozen,
    linear_problem,
    make_engine,
    reduced,
    subset,
    trained_conv,
    trained_moe,
)

from moebench.attacks import list_attacks, load_attack
from moebench.attacks._base import Attack, Rows
from moebench.attacks._engine import Engine, Finished, Judge, Samples
from moebench.attacks._passes import Passes
from moebench.attacks._search import search_copy
from moebench.attacks._views import make_view
from moebench.attacks.apgd import APGD
from moebench.attacks.fab import FAB
from moebench.attacks.pgd import PGD
from moebench.attacks.square import Square
from moebench.models import load_model
from moebench.schema import NORMS, Norm, ThreatModel
from moebench.threat import distances

BUDGET = {"steps": 8, "queries": 25, "target_classes": 3}


@lru_cache
def in_double() -> nn.Module:
    """The trained MoE in float64.

    In float32, a convolution's last bit depends on how many images run together, and a sign or a comparison in an
    attack can turn on that bit. In float64 it cannot, so that here every difference would be the engine's.
    """
    return frozen(InDouble(trained_moe()))


def run(name: str, norm: Norm, samples: Samples, view: str = "whole", **options: Any) -> Attacked:
    return attack(in_double(), samples, ThreatModel(norm, EPS[norm]), reduced(name, **BUDGET).stages, view, **options)


def assert_same(one: Attacked, other: Attacked) -> None:
    assert torch.equal(one.broken, other.broken)
    assert torch.equal(one.adv_pred, other.adv_pred)
    torch.testing.assert_close(one.x_adv, other.x_adv, rtol=0, atol=1e-5)


def pick(out: Attacked, index: Tensor) -> Attacked:
    return Attacked(out.broken[index], out.adv_pred[index], out.x_adv[index])


def views_of(name: str) -> tuple[str, ...]:
    return load_attack(name).views or ("whole", "router", "experts")


def single_stages() -> list[str]:
    """Attacks of one stage, each on the first of its views."""
    plans = [load_attack(name) for name in distinct_attacks()]
    first = {reduced(plan.name).stages: plan.name for plan in reversed(plans) if len(plan.stages) == 1}
    return sorted(first.values())


def cases() -> Iterator[tuple[str, str, Norm]]:
    """Every kind of attack on its views; which view it is makes no difference to what is done for a norm."""
    for name in distinct_attacks():
        yield from ((name, view, "Linf") for view in views_of(name))
        yield name, views_of(name)[0], "L2"


@pytest.mark.parametrize(("name", "view", "norm"), list(cases()))
def test_verdicts_do_not_depend_on_batches_neighbours_and_order(name: str, view: str, norm: Norm) -> None:
    """With 5 places rows are dropped and refilled all the time, with 1000 every target of every sample runs at once."""
    samples = digits(16)
    everything = run(name, norm, samples, view, batch_size=1000)
    if view != "router":
        assert 0 < int(everything.broken.sum()) < len(samples)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(1))
    assert_same(run(name, norm, subset(samples, order), view, batch_size=5), pick(everything, order))
    some = torch.tensor([13, 4, 11])
    assert_same(run(name, norm, subset(samples, some), view), pick(everything, some))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", single_stages())
def test_verdicts_do_not_depend_on_the_batch_size(name: str, norm: Norm) -> None:
    samples, view = digits(10), views_of(name)[0]
    everything = run(name, norm, samples, view, batch_size=1000)
    for batch_size in (1, 7):
        assert_same(run(name, norm, samples, view, batch_size=batch_size), everything)


@pytest.mark.parametrize("norm", NORMS)
def test_verdicts_hang_on_the_names_of_the_samples(norm: Norm) -> None:
    """The same images under other numbers draw other random numbers."""
    samples = digits(20)
    renamed = Samples(samples.x, samples.y, samples.ids + 1)
    assert not torch.equal(run("pgd-10", norm, samples).x_adv, run("pgd-10", norm, renamed).x_adv)


@pytest.mark.parametrize("name", ["pgd-10", "apgd-ce", "apgd-t", "fab-t", "square"])
def test_in_float32_rounding_changes_hardly_a_verdict(name: str) -> None:
    """Here convolutions of different batch sizes may differ in the last bit, so a sample on the edge may turn."""
    samples, threat = digits(80), ThreatModel("Linf", EPS["Linf"])
    model, stages = trained_conv(), reduced(name, steps=10, queries=50, target_classes=3).stages
    full = attack(model, samples, threat, stages, batch_size=1000)
    for batch_size in (5, 64):
        other = attack(model, samples, threat, stages, batch_size=batch_size)
        assert int((full.broken != other.broken).sum()) <= 2


def test_a_stage_sees_only_what_it_is_given() -> None:
    samples = digits(20)
    engine = make_engine(trained_conv(), samples, ThreatModel("Linf", 0.2), batch_size=6)
    given = torch.tensor([3, 17, 8])
    seen: list[Tensor] = []
    engine.run_stage(PGD(steps=5), given, lambda done: seen.append(done.index))
    assert sorted(torch.cat(seen).tolist()) == [3, 8, 17]
    others = torch.ones(20, dtype=torch.bool)
    others[given] = False
    assert not bool(engine.broken[others].any())
    assert int(engine.forwards[others].sum()) == 0
    assert torch.equal(engine.x_adv[others], samples.x[others])


class CountsPasses(nn.Module):
    """Counts the images that pass through a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = 0
        self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        self.backwards += len(x) * x.requires_grad
        out: Tensor = self.model(x)
        return out


@pytest.mark.parametrize("name", [name for name in list_attacks() if load_attack(name).views is None])
def test_the_passes_of_each_sample_are_counted(name: str) -> None:
    """Their sum is what the model saw, no sample costs more than the budget, and none is started after its end."""
    model, samples = CountsPasses(trained_conv()), digits(30)
    engine = make_engine(model, samples, ThreatModel("Linf", EPS["Linf"]), batch_size=8)
    for stage in reduced(name, **BUDGET).stages:
        stage = fitted(stage, model, engine.threat)
        model.forwards = model.backwards = 0
        done: list[Finished] = []
        engine.run_stage(stage, (~engine.broken).nonzero().squeeze(1), done.append)
        forwards, backwards = torch.cat([part.forwards for part in done]), torch.cat([part.backwards for part in done])
        assert int(forwards.sum()) == model.forwards
        assert int(backwards.sum()) == model.backwards
        most_forwards, most_backwards = stage.budget()
        # A row that ends beside others that go on makes one backward pass that it does not need.
        ends = 1 if stage.targets(torch.zeros(0, 10), samples.y[:0]) is None else BUDGET["target_classes"]
        assert int(backwards.max()) <= most_backwards + ends * (most_backwards > 0)
        # Every confirmation of a success is one pass more.
        assert int(forwards.max()) <= most_forwards + 1


def test_a_broken_sample_costs_nothing_more() -> None:
    """A misclassified sample is found at the first look."""
    model, samples = trained_conv(), digits(40)
    wrong = samples.y.clone().add_(1).remainder_(10)
    engine = make_engine(model, Samples(samples.x, wrong, samples.ids), ThreatModel("Linf", 0.0), batch_size=8)
    done: list[Finished] = []
    engine.run_stage(PGD(steps=50), torch.arange(40), done.append)
    broken, forwards = torch.cat([part.broken for part in done]), torch.cat([part.forwards for part in done])
    assert float(broken.float().mean()) > 0.9
    assert int(forwards[broken].max()) <= 2


@pytest.mark.parametrize("norm", NORMS)
def test_an_image_outside_the_threat_model_counts_for_nothing(norm: Norm) -> None:
    """The judge alone decides: an attack that leaves the ball or the box breaks no sample."""

    class Escapes(PGD):
        def step(self, state: Any, rows: Any, oracle: Any) -> Tensor:
            oracle.logits(1 - rows.x, rows)
            oracle.logits(rows.x + 100, rows)
            oracle.logits(torch.full_like(rows.x, float("nan")), rows)
            oracle.logits(torch.full_like(rows.x, float("inf")), rows)
            return torch.ones(len(rows), dtype=torch.bool)

    model = trained_conv()
    samples = digits(60)
    correct = (model(samples.x).argmax(dim=1) == samples.y).nonzero().squeeze(1)
    out = attack(model, subset(samples, correct), ThreatModel(norm, 0.05), [Escapes(steps=1)])
    assert not bool(out.broken.any())


@pytest.mark.parametrize("norm", NORMS)
def test_the_judge_alone_refuses_invalid_images(norm: Norm) -> None:
    samples, threat = digits(5), ThreatModel(norm, 0.05)
    wrong = Samples(samples.x, (samples.y + 1) % 10, samples.ids)
    judge = Judge(trained_conv(), wrong, threat, Passes(5, torch.device("cpu")))
    outside = samples.x + torch.tensor([0.0, 1.0, -1.0, float("nan"), float("inf")]).view(5, 1, 1, 1)
    rows = Rows(*(torch.arange(5), wrong.x, wrong.y, *[torch.zeros(5, dtype=torch.int64)] * 3))
    broken, prediction = judge(outside, rows)
    assert broken.tolist() == [True, False, False, False, False]
    assert prediction.shape == (5,)


# The copy that is searched on.


@pytest.mark.parametrize("make", [trained_conv, trained_moe, lambda: frozen(load_model("resnet-at"))])
def test_a_fused_copy_has_the_logits_of_the_model_and_no_batchnorm(make: Callable[[], nn.Module]) -> None:
    model, x = make(), digits(50).x
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copied = search_copy(model, x[:10]).module
    assert copied is not model
    assert not any(isinstance(part, nn.BatchNorm2d) for part in copied.modules())
    torch.testing.assert_close(copied(x), model(x), rtol=1e-4, atol=1e-3)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert any(isinstance(part, nn.BatchNorm2d) for part in model.modules())


def test_a_model_that_cannot_be_fused_is_searched_as_it_is() -> None:
    class Refuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(1)

        def __deepcopy__(self, memo: object) -> nn.Module:
            raise RuntimeError("not this one")

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    model, plain = Refuses().eval(), frozen(Gated())
    assert search_copy(model, digits(3).x).module is model
    assert search_copy(plain, torch.rand(3, 1, 2, 2)).module is plain


def test_verdicts_of_the_search_on_a_copy_are_confirmed_on_the_model() -> None:
    """A copy that is wrong everywhere costs forward passes, and breaks nothing that the model gets right."""
    model, samples = trained_conv(), digits(40)
    correct = subset(samples, (model(samples.x).argmax(dim=1) == samples.y).nonzero().squeeze(1))
    wrong = trained_conv()
    fc = wrong.get_submodule("fc")
    assert isinstance(fc, nn.Linear)
    fc.weight.neg_()
    view = make_view("whole", wrong)
    view.prepare(correct.x)
    engine = Engine(model, view, correct, ThreatModel("Linf", 0.001))
    engine.run_stage(PGD(steps=3), torch.arange(len(correct)), lambda done: None)
    assert not bool(engine.broken.any())


# Closed forms.


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "stage",
    [PGD(steps=40), APGD(loss="ce"), APGD(loss="ce", steps=30), FAB(steps=20)],
    ids=["pgd", "apgd-ce", "apgd-ce-30", "fab-t"],
)
def test_two_linear_classes_break_exactly_below_eps(stage: Attack, norm: Norm) -> None:
    eps = 0.05 if norm == "Linf" else 0.15
    model, samples = linear_problem(2, 80, norm, eps, gap=0.02)
    out = attack(model, samples, ThreatModel(norm, eps), [stage])
    assert torch.equal(out.broken, model.distance(samples.x, norm) < eps)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("stage", [APGD(loss="dlr-targeted"), FAB(steps=30)], ids=["apgd-t", "fab-t"])
@pytest.mark.parametrize("classes", [4, 6])
def test_targeted_attacks_reach_the_nearest_of_several_linear_classes(stage: Attack, norm: Norm, classes: int) -> None:
    eps = 0.05 if norm == "Linf" else 0.15
    model, samples = linear_problem(classes, 60, norm, eps, gap=0.02)
    out = attack(model, samples, ThreatModel(norm, eps), [stage])
    assert torch.equal(out.broken, model.distance(samples.x, norm) < eps)


def test_square_finds_the_corner_of_a_linear_problem() -> None:
    """Patches of one pixel set each pixel on its own, so enough of them reach the best corner of the Linf ball."""
    model, samples = linear_problem(2, 60, "Linf", 0.05, gap=0.02)
    out = attack(model, samples, ThreatModel("Linf", 0.05), [Square(queries=1500, whole_image=True)])
    assert torch.equal(out.broken, model.distance(samples.x, "Linf") < 0.05)


def test_square_gets_near_the_best_point_in_l2() -> None:
    """Its pyramids cannot form every direction; what is well within eps falls, what is beyond cannot."""
    model, samples = linear_problem(2, 60, "L2", 0.15, gap=0.02)
    distance = model.distance(samples.x, "L2")
    out = attack(model, samples, ThreatModel("L2", 0.15), [Square(queries=800, whole_image=True)])
    assert bool(out.broken[distance < 0.3 * 0.15].all())
    assert not bool(out.broken[distance > 0.15].any())


@pytest.mark.parametrize("norm", NORMS)
def test_fab_comes_close_to_the_nearest_adversarial_point(norm: Norm) -> None:
    """With eps far beyond it, the first crossing of a linear boundary is the overshot projection."""
    eps = 0.05 if norm == "Linf" else 0.15
    model, samples = linear_problem(2, 40, norm, eps, gap=0.02)
    out = attack(model, samples, ThreatModel(norm, 0.4 if norm == "Linf" else 4.0), [FAB(steps=5)])
    assert bool(out.broken.all())
    exact = model.distance(samples.x, norm)
    found = distances(out.x_adv, samples.x, ThreatModel(norm, 1.0))
    torch.testing.assert_close(found, 1.05 * exact, rtol=1e-3, atol=1e-5)


def gated_samples() -> Samples:
    """Every mix of near (0.05) and far (0.3) from the gate and from the experts' boundary, on all four sides."""
    places = [0.5 - 0.3, 0.5 - 0.05, 0.5 + 0.05, 0.5 + 0.3]
    x = torch.tensor([[gate, boundary, 0.5, 0.5] for gate in places for boundary in places]).view(-1, 1, 2, 2)
    return Samples(x, Gated()(x).argmax(dim=1), torch.arange(len(x)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "stage", [PGD(steps=1, step_fraction=1.0, random_start=False), PGD(steps=12, random_start=False), FAB(steps=10)]
)
def test_component_views_break_what_pencil_and_paper_say(stage: Attack, norm: Norm) -> None:
    """The experts always disagree: the router falls where the gate is near, the experts where their boundary is."""
    samples, threat = gated_samples(), ThreatModel(norm, 0.1)
    gate_near = (samples.x[:, 0, 0, 0] - 0.5).abs() < 0.1
    boundary_near = (samples.x[:, 0, 0, 1] - 0.5).abs() < 0.1
    model = frozen(Gated())
    broken = {view: attack(model, samples, threat, [stage], view).broken for view in ("router", "experts", "whole")}
    assert torch.equal(broken["router"], gate_near)
    assert torch.equal(broken["experts"], boundary_near)
    # Hard routing shows no way through the gate: the whole model looks stronger than it is.
    assert torch.equal(broken["whole"], boundary_near)


@pytest.mark.parametrize("norm", NORMS)
def test_an_attack_on_the_whole_gated_model_needs_a_soft_view(norm: Norm) -> None:
    """Straight-through keeps the logits and lets the gate's gradient through, so that both weak spots are found."""
    samples, threat = gated_samples(), ThreatModel(norm, 0.1)
    near = (samples.x[:, 0, 0, :] - 0.5).abs().amin(dim=1) < 0.1
    gate_only = (samples.x[:, 0, 0, 1] - 0.5).abs() > 0.1
    out = attack(frozen(Gated()), samples, threat, [PGD(steps=20, random_start=False)], "straight-through")
    assert bool(out.broken[near & gate_only].all())
    assert not bool(out.broken[~near].any())


def test_success_is_judged_on_the_whole_model_not_on_the_view() -> None:
    """Expert 1 forced is wrong wherever expert 0 rules, but an image breaks only if the routed model is wrong."""
    samples = gated_samples()
    out = attack(frozen(Gated()), samples, ThreatModel("Linf", 0.01), [PGD(steps=5)], "expert[1]")
    assert not bool(out.broken.any())


@pytest.mark.parametrize(
    "stage",
    [PGD(steps=20, step_fraction=0.06, random_start=False), APGD(loss="dlr-targeted", steps=10, target_classes=3)],
    ids=["pgd", "apgd-t"],
)
def test_broken_samples_are_flushed_while_others_run(stage: Attack) -> None:
    """With no delay, finished samples are handed over before the stage ends, and what is handed over is final."""
    samples = digits(40)
    engine = make_engine(trained_conv(), samples, ThreatModel("Linf", 0.15), batch_size=40, flush_seconds=0.0)
    parts: list[Finished] = []

    def sink(done: Finished) -> None:
        parts.append(done)
        handed = torch.zeros(40, dtype=torch.bool)
        handed[torch.cat([part.index for part in parts])] = True
        # A sample that its first target broke has nothing left to try.
        assert bool(handed[engine.broken & (engine.rank == 0)].all())

    engine.run_stage(stage, torch.arange(40), sink)
    assert len(parts) > 3
    # Samples fall at different times, so some fall after others have been handed over.
    assert sum(bool(part.broken.any()) for part in parts) > 3
    for part in parts:
        assert torch.equal(part.broken, engine.broken[part.index])
        assert torch.equal(part.adv_pred, engine.adv_pred[part.index])
        assert torch.equal(part.x_adv, engine.x_adv[part.index])


def test_one_engine_runs_several_stages() -> None:
    """The second stage starts from what the first left standing, with counters of its own."""
    samples = digits(40)
    engine = make_engine(trained_conv(), samples, ThreatModel("Linf", 0.08), batch_size=16)
    stage = PGD(steps=5)
    for current in (stage, replace(stage, random_start=False), Square(queries=30)):
        standing = (~engine.broken).nonzero().squeeze(1)
        parts: list[Finished] = []
        engine.run_stage(current, standing, parts.append)
        assert sorted(torch.cat([part.index for part in parts]).tolist()) == standing.tolist()
        assert int(torch.cat([part.forwards for part in parts]).min()) >= 1
        assert int(torch.cat([part.forwards for part in parts]).max()) <= current.budget()[0] + 1
