from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LayeredMoE, TwoExperts, fill
from torch import Tensor, nn

from moebench.errors import UsageError
from moebench.models._moe import (
    MoELayer,
    Routing,
    combine,
    forced_forward,
    join,
    moe_layers,
    record,
    replay,
    routed_by,
    smooth_forward,
    split_forward,
)
from moebench.models.rt_er import ClassifierMoE, DualModel

SHAPE = (1, 8, 8)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, *SHAPE, generator=torch.Generator().manual_seed(seed))


def classifier_moe(top_k: int = 1, seed: int = 0) -> ClassifierMoE:
    torch.manual_seed(seed)
    return ClassifierMoE(10, SHAPE, experts=4, top_k=top_k, router="trained").eval()


def dual_model(top_k: int = 1) -> DualModel:
    return DualModel(classifier_moe(top_k, seed=1), classifier_moe(top_k, seed=2), 0.7).eval()


def plain_mixture(experts: nn.ModuleList, x: Tensor, routing: Routing) -> Tensor:
    """The definition: sample by sample, expert by expert."""
    rows = []
    for b in range(len(x)):
        outputs = [expert(x[b : b + 1])[0] for expert in experts]
        total = 0 * outputs[0]
        for i, output in enumerate(outputs):
            if routing.selected[b, i]:
                total = total + routing.weights[b, i] * output
        rows.append(total)
    return torch.stack(rows)


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    """Any selection of experts, also nobody's favourite and samples without one, with weights of any sign."""
    batch, experts = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    selected = torch.tensor(draw(st.lists(st.booleans(), min_size=batch * experts, max_size=batch * experts)))
    weights = normal(batch, experts, seed=draw(st.integers(0, 1000))).double()
    return Routing(weights, selected.view(batch, experts))


def make_experts(count: int, *, spatial: bool) -> nn.ModuleList:
    """Linear experts (B, 4) -> (B, 3), or convolutions (B, 2, 3, 3) -> (B, 4, 3, 3)."""
    experts = [nn.Conv2d(2, 4, 3, padding=1) if spatial else nn.Linear(4, 3) for _ in range(count)]
    return nn.ModuleList([fill(expert, seed).double() for seed, expert in enumerate(experts)])


class Watch:
    """Notes what each expert is given."""

    def __init__(self, experts: nn.ModuleList) -> None:
        self.inputs: list[list[Tensor]] = [[] for _ in experts]
        for number, expert in enumerate(experts):
            expert.register_forward_pre_hook(self._hook(number))

    def _hook(self, number: int) -> Any:
        return lambda module, given: self.inputs[number].append(given[0].detach().clone())


# --- combine


@settings(deadline=None, max_examples=60)
@given(routings(), st.booleans())
def test_combine_is_the_plain_sum_with_its_gradients(routing: Routing, spatial: bool) -> None:
    batch, count = routing.weights.shape
    experts = make_experts(count, spatial=spatial)
    x = (normal(batch, 2, 3, 3) if spatial else normal(batch, 4)).double().requires_grad_()
    weights = routing.weights.requires_grad_()
    found, expected = combine(experts, x, routing), plain_mixture(experts, x, routing)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)
    direction = normal(*found.shape, seed=1).double()
    assert found.requires_grad
    for one, other in zip(
        torch.autograd.grad((found * direction).sum(), (x, weights)),
        torch.autograd.grad((expected * direction).sum(), (x, weights), materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@settings(deadline=None, max_examples=60)
@given(routings())
def test_each_selected_expert_runs_once_and_sees_only_its_samples(routing: Routing) -> None:
    batch, count = routing.weights.shape
    experts = make_experts(count, spatial=False)
    watch = Watch(experts)
    x = normal(batch, 4).double()
    combine(experts, x, routing)
    somebody = bool(routing.selected.any())
    for number, seen in enumerate(watch.inputs):
        own = x[routing.selected[:, number]]
        if len(own):
            assert len(seen) == 1
            assert torch.equal(seen[0], own)
        elif somebody:
            assert seen == []
        else:
            assert sum(map(len, seen)) == 0


def test_selected_expert_of_weight_zero_still_carries_the_gradient() -> None:
    experts = make_experts(2, spatial=False)
    weights = torch.tensor([[1.0, 0.0]], dtype=torch.double, requires_grad=True)
    x = normal(1, 4).double()
    torch.autograd.backward(combine(experts, x, Routing(weights, torch.tensor([[True, True]]))).sum())
    assert weights.grad is not None
    torch.testing.assert_close(weights.grad[0, 1], experts[1](x).sum())


# --- a layer's own routing


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_own_routing_is_top_k_of_the_softmax(batch: int, count: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, count))
    layer = MoELayer([nn.Linear(4, 3) for _ in range(count)], fill(nn.Linear(4, count), 7), top_k=top_k).double()
    x = normal(batch, 4, seed=data.draw(st.integers(0, 1000))).double()
    watch = Watch(layer.experts)
    routing = layer.own_routing(x)
    probs = layer.router(x).softmax(1).detach()
    for b in range(batch):
        order = sorted(range(count), key=lambda i: -float(probs[b, i]))
        winners = set(order[:top_k])
        assert set(routing.selected[b].nonzero().flatten().tolist()) == winners
        total = sum(float(probs[b, i]) for i in winners)
        for i in range(count):
            expected = (1.0 if top_k == 1 else float(probs[b, i]) / total) if i in winners else 0.0
            assert float(routing.weights[b, i].detach()) == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(batch).double())
    out = layer(x)
    assert [[len(part) for part in seen] for seen in watch.inputs] == [
        [n] if n else [] for n in routing.selected.sum(0)
    ]
    torch.testing.assert_close(out, plain_mixture(layer.experts, x, layer.own_routing(x)))


def test_top_one_weight_is_exactly_one_in_eval_mode() -> None:
    layer = LayeredMoE().eval().first
    assert set(layer.own_routing(normal(50, 5)).weights.flatten().tolist()) == {0.0, 1.0}


def test_soft_and_forced_routing() -> None:
    layer = LayeredMoE().first
    x = normal(6, 5)
    soft = layer.soft_routing(x)
    torch.testing.assert_close(soft.weights, layer.router(x).softmax(1))
    assert soft.selected.all()
    forced = layer.forced_routing(x, 2)
    assert torch.equal(forced.weights, torch.tensor([0.0, 0.0, 1.0]).expand(6, 3))
    assert torch.equal(forced.selected, forced.weights.bool())


def test_straight_through_has_hard_values_and_soft_gradients() -> None:
    layer = LayeredMoE().eval().first
    x = normal(8, 5)
    hard, soft, both = layer.own_routing(x), layer.soft_routing(x), layer.straight_through_routing(x)
    torch.testing.assert_close(both.weights, hard.weights)
    direction = normal(8, 3, seed=3)
    (found,) = torch.autograd.grad((both.weights * direction).sum(), layer.router.get_parameter("weight"))
    (expected,) = torch.autograd.grad((soft.weights * direction).sum(), layer.router.get_parameter("weight"))
    torch.testing.assert_close(found, expected)


def test_training_gives_the_router_the_gradient_of_the_winners_weight() -> None:
    layer = LayeredMoE().first.train()
    x, direction = normal(8, 5), normal(8, 5, seed=3)
    out = layer(x)
    layer.eval()
    torch.testing.assert_close(out, layer(x))
    (found,) = torch.autograd.grad((out * direction).sum(), layer.router.get_parameter("weight"))
    winner = layer.own_routing(x).selected
    answers = torch.stack([expert(x) for expert in layer.experts], dim=1).detach()
    probs = layer.router(x).softmax(1)
    surrogate = ((probs * winner).unsqueeze(2) * answers).sum(1)
    (expected,) = torch.autograd.grad((surrogate * direction).sum(), layer.router.get_parameter("weight"))
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0


def test_frozen_router_and_eval_mode_get_no_gradient() -> None:
    frozen = LayeredMoE(router="frozen").first.train()
    frozen(normal(8, 5)).sum().backward()
    assert [p.requires_grad for p in frozen.router.parameters()] == [False, False]
    assert all(p.grad is None for p in frozen.router.parameters())
    assert any(p.grad is not None for p in frozen.experts.parameters())
    evaluated = LayeredMoE(router="trained").first.eval()
    evaluated(normal(8, 5)).sum().backward()
    assert all(p.grad is None for p in evaluated.router.parameters())


@pytest.mark.parametrize("top_k", [0, 3, -1])
def test_impossible_top_k(top_k: int) -> None:
    with pytest.raises(UsageError, match=f"top_k must be between 1 and the 2 experts, got {top_k}"):
        MoELayer([nn.Identity(), nn.Identity()], nn.Linear(2, 2), top_k=top_k)


def test_impossible_router_mode() -> None:
    mode: Any = "froze"
    with pytest.raises(UsageError, match="'trained' or 'frozen', got 'froze'"):
        MoELayer([nn.Identity()], nn.Linear(2, 1), router_mode=mode)


def test_take_and_join() -> None:
    layer = LayeredMoE(top_k=2).first
    x = normal(5, 5)
    routing = layer.own_routing(x)
    rows = torch.tensor([4, 0])
    assert torch.equal(routing.take(rows).weights, layer.own_routing(x[rows]).weights)
    joined = join(routing.take(torch.tensor([0, 1])), routing.take(torch.tensor([2, 3, 4])))
    assert torch.equal(joined.weights, routing.weights)
    assert torch.equal(joined.selected, routing.selected)


# --- record, replay and what follows from them


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_replaying_the_record_gives_the_models_own_logits(top_k: int) -> None:
    model = LayeredMoE(top_k=top_k).eval()
    x = normal(9, 5)
    tape = record(model, x)
    assert list(tape) == ["first", "second"]
    torch.testing.assert_close(replay(model, x, tape), model(x))
    torch.testing.assert_close(split_forward(model, x, x), model(x))


def test_replay_obeys_the_tape() -> None:
    model = LayeredMoE().eval()
    x, other = normal(9, 5), normal(9, 5, seed=1)
    tape = record(model, other)
    hidden = torch.tanh(plain_mixture(model.first.experts, x, tape["first"]))
    torch.testing.assert_close(replay(model, x, tape), plain_mixture(model.second.experts, hidden, tape["second"]))
    assert not torch.allclose(replay(model, x, tape), model(x))


@pytest.mark.parametrize("make", [classifier_moe, dual_model])
@pytest.mark.parametrize("top_k", [1, 2])
def test_shortcuts_of_whole_classifier_experts_agree_with_the_general_way(make: Any, top_k: int) -> None:
    model, x = make(top_k), images(12)
    with torch.no_grad():
        for soft in (False, True):
            short, general = model.route(x, soft=soft), record(model, x, soft=soft)
            assert list(short) == list(general) == list(moe_layers(model))
            for name in short:
                torch.testing.assert_close(short[name].weights, general[name].weights)
                assert torch.equal(short[name].selected, general[name].selected)
        outputs = model.expert_outputs(x)
        torch.testing.assert_close(model.mix(outputs, model.route(x)), model(x))
        soft = model.route(x, soft=True)
        torch.testing.assert_close(model.mix(outputs, soft), smooth_forward(model, x))


def test_split_forward_has_gradients_to_both_inputs() -> None:
    model = LayeredMoE().eval()
    x_router, x_expert = normal(4, 5).requires_grad_(), normal(4, 5, seed=1).requires_grad_()
    soft = torch.autograd.grad(split_forward(model, x_router, x_expert, soft=True).sum(), (x_router, x_expert))
    assert all(gradient.abs().sum() > 0 for gradient in soft)
    logits = split_forward(model, x_router, x_expert)
    (hard,) = torch.autograd.grad(logits.sum(), x_router, allow_unused=True, retain_graph=True)
    assert hard is None
    (expert,) = torch.autograd.grad(logits.sum(), x_expert)
    assert expert.abs().sum() > 0


def test_smooth_forward_mixes_all_experts_and_straight_through_keeps_hard_values() -> None:
    model = LayeredMoE().eval()
    x = normal(7, 5)
    hidden = torch.tanh(plain_mixture(model.first.experts, x, model.first.soft_routing(x)))
    expected = plain_mixture(model.second.experts, hidden, model.second.soft_routing(hidden))
    torch.testing.assert_close(smooth_forward(model, x), expected)
    torch.testing.assert_close(smooth_forward(model, x, straight_through=True), model(x))


def test_forced_forward_is_that_expert_alone() -> None:
    model, x = classifier_moe(), images(6)
    with torch.no_grad():
        for number, expert in enumerate(model.moe.experts):
            torch.testing.assert_close(forced_forward(model, x, number), expert(model.normalize(x)))
    layered, z = LayeredMoE().eval(), normal(6, 5)
    hidden = torch.tanh(layered.first.experts[2](z))
    torch.testing.assert_close(forced_forward(layered, z, 2, "first"), layered.second(hidden))
    torch.testing.assert_close(forced_forward(layered, z, 2), layered.second.experts[2](hidden))


def test_forced_forward_refuses_what_is_not_there() -> None:
    model, x = LayeredMoE(), normal(2, 5)
    with pytest.raises(UsageError, match="no MoE layer 'third' in this model; it has first, second"):
        forced_forward(model, x, 0, "third")
    for expert in (-1, 3):
        with pytest.raises(UsageError, match=f"no expert {expert} in layer 'first': it has experts 0 to 2"):
            forced_forward(model, x, expert)


# --- policies and names


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken expert")


def test_policies_are_taken_out_after_an_exception() -> None:
    model = LayeredMoE()
    x = normal(3, 5)
    tape = record(model, x)
    model.second.experts[0] = Broken()
    model.second.experts[1] = Broken()
    model.second.experts[2] = Broken()
    for call in (
        lambda: record(model, x),
        lambda: replay(model, x, tape),
        lambda: smooth_forward(model, x),
        lambda: forced_forward(model, x, 0),
    ):
        with pytest.raises(RuntimeError, match="broken expert"):
            call()
        assert [layer.policy for layer in moe_layers(model).values()] == [None, None]


def test_nested_policies_come_back_in_order() -> None:
    model = LayeredMoE().eval()
    x = normal(4, 5)

    def outer(layer: MoELayer, features: Tensor) -> Routing:
        return layer.forced_routing(features, 1)

    with routed_by(model, {"first": outer}):
        recorded = record(model, x)
        assert model.first.policy is outer
        assert model.second.policy is None
    assert model.first.policy is None
    assert torch.equal(recorded["first"].weights, model.first.own_routing(x).weights)


def test_a_policy_for_an_unknown_layer_changes_nothing() -> None:
    model = LayeredMoE()
    with pytest.raises(KeyError), routed_by(model, {"first": MoELayer.own_routing, "nowhere": MoELayer.own_routing}):
        pass
    assert model.first.policy is None


def test_names_of_layers() -> None:
    assert list(moe_layers(classifier_moe())) == ["moe"]
    assert list(moe_layers(dual_model())) == ["standard.moe", "robust.moe"]
    assert list(moe_layers(TwoExperts())) == ["moe"]
    assert moe_layers(nn.Linear(2, 2)) == {}
