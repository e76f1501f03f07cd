from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Flat, Noted, Shift
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.models._balancing import balanced, switch_loss
from moebench.models._base import Adversary, Phase, Recipe
from moebench.models._curriculum import PRE_TRAINING, from_clean_to_adversarial, from_clean_to_trades
from moebench.models._objectives import (
    adversarial_loss,
    cross_entropy_adversary,
    kl_divergence,
    standard_loss,
    trades_loss,
)
from moebench.models.rt_er import (
    JTD,
    RT_ER,
    RT_ER_OFFICIAL,
    RT_ER_SHARED,
    ClassifierMoE,
    DualModel,
    SecondAt,
    SecondAttack,
    rt_er_loss,
)

SHAPE = (1, 8, 8)
RECIPE = Recipe(epochs=1, beta=6.0)


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, *SHAPE, generator=torch.Generator().manual_seed(seed))


def labels(batch: int) -> Tensor:
    return torch.arange(batch) % 10


def classifier_moe(seed: int = 0, top_k: int = 1) -> ClassifierMoE:
    """In eval mode: without batch statistics, one pass over joined batches equals a pass for each.

    Large logits, so that the divergence of p from q is not nearly that of q from p.
    """
    torch.manual_seed(seed)
    model = ClassifierMoE(10, SHAPE, experts=4, top_k=top_k, router="trained").eval()
    with torch.no_grad():
        for expert in model.moe.experts:
            expert.get_parameter("fc.weight").mul_(30)
    return model


def normal(*shape: int, seed: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Kullback-Leibler divergence


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
def test_kl_is_torchs(batch: int, classes: int, seed: int) -> None:
    p, q = normal(batch, classes, seed=seed).double(), normal(batch, classes, seed=seed + 1).double()
    expected = F.kl_div(q.log_softmax(1), p.softmax(1), reduction="none").sum(1)
    found = kl_divergence(p, q)
    torch.testing.assert_close(found, expected)
    assert (found >= -1e-12).all()
    torch.testing.assert_close(kl_divergence(p, p + 5), torch.zeros(batch).double())


def test_kl_has_gradients_to_both_arguments() -> None:
    p, q = normal(3, 4, seed=0).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    for gradient in torch.autograd.grad(kl_divergence(p, q).sum(), (p, q)):
        assert gradient.abs().max() > 0


def test_kl_stays_finite_for_certain_predictions() -> None:
    p, q = torch.tensor([[500.0, 0.0]]).requires_grad_(), torch.tensor([[0.0, 500.0]]).requires_grad_()
    value = kl_divergence(p, q)
    assert value.item() == pytest.approx(500)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(value.sum(), (p, q)))


# --- standard, adversarial, TRADES


def test_standard_and_adversarial_loss() -> None:
    model, x, y = Flat(64, 10), images(6), labels(6)
    adversary = Shift(0.1)
    torch.testing.assert_close(standard_loss(model, x, y, adversary, RECIPE), F.cross_entropy(model(x), y))
    assert adversary.forwards == []
    found = adversarial_loss(model, x, y, adversary, RECIPE)
    torch.testing.assert_close(found, F.cross_entropy(model((x + 0.1).clamp(0, 1)), y))
    assert adversary.forwards == [model]


def test_cross_entropy_adversary_raises_the_loss_of_each_sample() -> None:
    model, x, y = Flat(64, 10), images(6), labels(6)
    adversary = Shift(0.1)
    cross_entropy_adversary(model, x, y, adversary)
    logits = normal(6, 10, seed=0)
    expected = torch.stack([F.cross_entropy(logits[i : i + 1], y[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(adversary.losses[0](logits), expected)


def test_trades_is_its_formula() -> None:
    model, x, y = Flat(64, 10), images(6), labels(6)
    adversary = Shift(0.1)
    found = trades_loss(model, x, y, adversary, replace(RECIPE, beta=2.5))
    clean, adv = model(x), model((x + 0.1).clamp(0, 1))
    divergence = F.kl_div(adv.log_softmax(1), clean.softmax(1), reduction="batchmean")
    expected = F.cross_entropy(clean, y) + 2.5 * divergence
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, list(model.parameters())),
        torch.autograd.grad(expected, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    # The inner maximisation raises the divergence from the clean prediction, which it holds fixed.
    logits = normal(6, 10, seed=0)
    loss = adversary.losses[0](logits)
    torch.testing.assert_close(loss, kl_divergence(clean, logits))
    assert not loss.requires_grad


def test_trades_by_steps_goes_part_of_the_way() -> None:
    model, x, y = Flat(64, 10), images(6), labels(6)
    phases = from_clean_to_trades()
    assert phases[0].span[0] == 0.0 and phases[-1].span[1] == 1.0
    assert [one.span[1] for one in phases[:-1]] == [one.span[0] for one in phases[1:]]
    recipe = replace(RECIPE, beta=2.5)
    torch.testing.assert_close(phases[0].loss(model, x, y, Shift(0.1), recipe), F.cross_entropy(model(x), y))
    for phase, share in zip(phases[1:], (0.25, 0.5, 0.75, 1.0), strict=True):
        clean, adv = model(x), model(x + share * ((x + 0.1).clamp(0, 1) - x))
        divergence = F.kl_div(adv.log_softmax(1), clean.softmax(1), reduction="batchmean")
        found = phase.loss(model, x, y, Shift(0.1), recipe)
        torch.testing.assert_close(found, F.cross_entropy(clean, y) + 2.5 * divergence)


@pytest.mark.parametrize(("attack", "steps"), [("pgd", None), ("fast", 1)])
def test_adversarial_training_by_steps_goes_part_of_the_way(attack: str, steps: int | None) -> None:
    model, x, y = Flat(64, 10), images(6), labels(6)
    phases = from_clean_to_adversarial(standard_loss, attack)
    assert [phase.span[0] for phase in phases] == pytest.approx([0, PRE_TRAINING, 0.5, 0.6, 0.7])
    assert [phase.span[1] for phase in phases] == pytest.approx([PRE_TRAINING, 0.5, 0.6, 0.7, 1])
    clean = Noted(0.1)
    torch.testing.assert_close(phases[0].loss(model, x, y, clean, RECIPE), F.cross_entropy(model(x), y))
    assert clean.asked == []
    for phase, share in zip(phases[1:], (0.25, 0.5, 0.75, 1.0), strict=True):
        adversary = Noted(0.1)
        found = phase.loss(model, x, y, adversary, RECIPE)
        x_adv = (x + 0.1).clamp(0, 1)
        torch.testing.assert_close(found, F.cross_entropy(model(x + share * (x_adv - x)), y))
        assert [asked.get("steps") for asked in adversary.asked] == [steps]


# --- RT-ER


@pytest.mark.parametrize("second_at", ["adversarial", "clean"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_rt_er_without_its_second_term_is_adversarial_training(second_at: SecondAt, top_k: int) -> None:
    model, x, y = classifier_moe(top_k=top_k), images(12), labels(12)
    found = rt_er_loss(model, x, y, Shift(0.3), replace(RECIPE, beta=0.0), second_at=second_at)
    torch.testing.assert_close(found, adversarial_loss(model, x, y, Shift(0.3), RECIPE))


@pytest.mark.parametrize(("second_at", "second_attack"), [*product(("adversarial", "clean"), ("own", "shared"))])
def test_rt_er_is_its_formula(second_at: SecondAt, second_attack: SecondAttack) -> None:
    model, x, y = classifier_moe(seed=3), images(12), labels(12)
    adversary, recipe = Shift(0.4, -0.2), replace(RECIPE, beta=3.0)
    found = rt_er_loss(model, x, y, adversary, recipe, second_at=second_at, second_attack=second_attack)
    x_adv = (x + 0.4).clamp(0, 1)
    x_second = (x - 0.2).clamp(0, 1) if second_attack == "own" else x_adv
    ranked_at = x_adv if second_at == "adversarial" else x
    second = model.runner_up(ranked_at)
    assert not torch.equal(model.runner_up(x), model.runner_up(x_adv)), "the two variants must differ here"

    def alone(z: Tensor) -> Tensor:
        experts = [model.moe.experts[int(number)] for number in second]
        return torch.stack([expert(model.normalize(z[i : i + 1]))[0] for i, expert in enumerate(experts)])

    divergence = F.kl_div(alone(x_second).log_softmax(1), alone(x).softmax(1), reduction="batchmean")
    torch.testing.assert_close(found, F.cross_entropy(model(x_adv), y) + 3.0 * divergence)
    # The first attack is on the whole MoE, the second on the second expert alone; both raise the cross-entropy.
    attacked = [model, alone] if second_attack == "own" else [model]
    for forward, expected in zip(adversary.forwards, attacked, strict=True):
        torch.testing.assert_close(forward(x), expected(x))
    logits = normal(12, 10, seed=0)
    for loss in adversary.losses:
        torch.testing.assert_close(loss(logits), F.cross_entropy(logits, y, reduction="none"))


def test_registered_variants_rank_and_attack_the_second_expert_as_they_say() -> None:
    model, x, y = classifier_moe(seed=3), images(12), labels(12)
    recipe = replace(RECIPE, balance=0.0)
    cases: list[tuple[tuple[Phase, ...], SecondAt, SecondAttack]] = [
        (RT_ER, "adversarial", "own"),
        (RT_ER_SHARED, "adversarial", "shared"),
        (RT_ER_OFFICIAL, "clean", "own"),
    ]
    for (phase,), second_at, attack in cases:
        expected = rt_er_loss(model, x, y, Shift(0.4, -0.2), recipe, second_at=second_at, second_attack=attack)
        torch.testing.assert_close(phase.loss(model, x, y, Shift(0.4, -0.2), recipe), expected)


def test_jtd_trains_the_robust_half_then_the_standard_half_on_the_dual_model() -> None:
    dual = DualModel(classifier_moe(seed=1), classifier_moe(seed=2), 0.7).eval()
    x, y = images(6), labels(6)
    assert [phase.part for phase in JTD] == ["robust", "standard"]
    recipe = replace(RECIPE, balance=0.0)
    robust, standard = (phase.loss(dual, x, y, Shift(0.1), recipe) for phase in JTD)
    expected = rt_er_loss(dual.robust, x, y, Shift(0.1), recipe, second_at="adversarial")
    torch.testing.assert_close(robust, expected)
    torch.testing.assert_close(standard, F.cross_entropy(dual(x), y))
    spread = replace(RECIPE, balance=2.0)
    for phase, half, plain in zip(JTD, (dual.robust, dual.standard), (robust, standard), strict=True):
        extra = phase.loss(dual, x, y, Shift(0.1), spread) - plain
        probs, chosen = half.route(x, soft=True)["moe"].weights, half.route(x)["moe"].selected
        torch.testing.assert_close(extra, 2.0 * switch_loss(probs, chosen))
    assert {id(p) for phase in JTD for p in phase.parameters(dual)} == {id(p) for p in dual.parameters()}
    assert {id(p) for p in JTD[0].parameters(dual)} == {id(p) for p in dual.robust.parameters()}


# --- the balancing loss


@pytest.mark.parametrize("experts", [1, 2, 4, 7])
def test_switch_loss_is_zero_when_even_and_largest_at_collapse(experts: int) -> None:
    even = torch.full((3 * experts, experts), 1 / experts)
    in_turn = torch.eye(experts).repeat(3, 1).bool()
    assert switch_loss(even, in_turn).item() == pytest.approx(0, abs=1e-6)
    assert switch_loss(in_turn.float(), in_turn).item() == pytest.approx(0, abs=1e-6)
    collapsed = torch.zeros(5, experts)
    collapsed[:, 0] = 1
    assert switch_loss(collapsed, collapsed.bool()).item() == pytest.approx(experts - 1)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_switch_loss_is_its_formula(batch: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    probs = normal(batch, experts, seed=data.draw(st.integers(0, 1000))).double().softmax(1).requires_grad_()
    chosen = torch.zeros_like(probs).scatter(1, probs.topk(top_k, 1).indices, 1.0).bool()
    value = switch_loss(probs, chosen)
    total = 0.0
    for i in range(experts):
        f = sum(int(row[i]) for row in chosen) / (batch * top_k)
        total += f * sum(float(row[i]) for row in probs.detach()) / batch
    assert value.item() == pytest.approx(experts * total - 1, abs=1e-6)
    assert -1 <= value.item() <= experts - 1 + 1e-6
    if experts > 1:
        (gradient,) = torch.autograd.grad(value, probs)
        # A step down the gradient takes weight from the experts that are chosen most.
        load = chosen.double().mean(0)
        expected = (experts * load / load.sum() / batch).expand(batch, experts)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def constant_loss(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    return torch.tensor(1.25)


def test_balanced_adds_the_switch_loss_of_every_layer() -> None:
    dual = DualModel(classifier_moe(seed=1), classifier_moe(seed=2), 0.7).eval()
    x, y = images(6), labels(6)
    (phase,) = balanced((Phase(constant_loss),))
    assert phase.loss(dual, x, y, Shift(0.1), replace(RECIPE, balance=0.0)).item() == 1.25
    value = phase.loss(dual, x, y, Shift(0.1), replace(RECIPE, balance=0.5))
    soft, hard = dual.route(x, soft=True), dual.route(x)
    terms = [switch_loss(soft[name].weights, hard[name].selected) for name in ("standard.moe", "robust.moe")]
    torch.testing.assert_close(value, 1.25 + 0.5 * (terms[0] + terms[1]))
    torch.autograd.backward(value)
    assert all(p.grad is not None for half in (dual.standard, dual.robust) for p in half.moe.router.parameters())
    assert all(p.grad is None for half in (dual.standard, dual.robust) for p in half.moe.experts.parameters())
