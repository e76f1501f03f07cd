"""Views: what an attack is shown of a model, on every registered MoE and on one that is known by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from toys import Gated, LinearClassifier, TinyMoE, awake, frozen

from moebench.attacks._views import applicable_views, default_views, make_view
from moebench.errors import UsageError
from moebench.models import list_models, load_model
from moebench.models._moe import (
    MoELayer,
    RoutedModel,
    forced_forward,
    moe_layers,
    record,
    replay,
    route,
    routes_tokens,
    smooth_forward,
    split_forward,
)

SHAPE = (1, 8, 8)


@lru_cache
def fresh(name: str) -> nn.Module:
    """A registered model or a toy with fresh weights and lively BatchNorm statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        toys = {"toy": TinyMoE(), "toy-top2": TinyMoE(top_k=2, experts=3), "toy-soft": TinyMoE(top_k=2)}
        model: nn.Module = toys[name] if name in toys else load_model(name, shape=SHAPE, dataset=None)
        if routes_tokens(model):
            awake(model)
        model.train()
        model(images(64, seed=5))
        return frozen(model)


def images(n: int = 24, seed: int = 0) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


ROUTED = [name for name in list_models() if moe_layers(load_model(name, shape=SHAPE, dataset=None))]


def architecture(name: str) -> str:
    """What tells fresh models apart; how they are trained does not."""
    model = load_model(name, shape=SHAPE, dataset=None)
    return f"{model} {[(layer.top_k, layer.router_mode) for layer in moe_layers(model).values()]}"


MOES = [*{architecture(name): name for name in reversed(ROUTED)}.values(), "toy", "toy-top2", "toy-soft"]
"""One registered model of each architecture."""


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_there_are_registered_moes() -> None:
    assert {"rt-er", "dual-moe"} <= set(ROUTED)


@pytest.mark.parametrize("name", MOES)
def test_splitting_an_input_from_itself_changes_nothing(name: str) -> None:
    model, x = fresh(name), images()
    close(split_forward(model, x, x), model(x))


@pytest.mark.parametrize("name", MOES)
def test_routing_and_experts_are_really_split(name: str) -> None:
    """With two different inputs the logits are neither of the two models'."""
    model, a, b = fresh(name), images(seed=1), images(seed=2)
    mixed = split_forward(model, a, b, soft=True)
    soft_a, soft_b = smooth_forward(model, a), smooth_forward(model, b)
    assert not torch.allclose(mixed, soft_b, atol=1e-5) and not torch.allclose(mixed, soft_a, atol=1e-5)
    assert isinstance(model, RoutedModel)
    # Layers behind each other weigh what hard routing gives them, and the smooth model what soft routing does.
    if not routes_tokens(model) and (len(moe_layers(model)) == 1 or model.expert_outputs(b) is not None):
        close(replay(model, b, route(model, b, soft=True)), soft_b)


@pytest.mark.parametrize("name", MOES)
@pytest.mark.parametrize("soft", [False, True])
def test_a_shortcut_for_routing_records_what_the_model_does(name: str, soft: bool) -> None:
    model, x = fresh(name), images()
    short, long = route(model, x, soft=soft), record(model, x, soft=soft)
    assert list(short) == list(long) == list(moe_layers(model))
    for layer, routing in long.items():
        close(short[layer].weights, routing.weights)
        assert torch.equal(short[layer].selected, routing.selected)
        total = routing.weights.sum(dim=-1)
        if soft or moe_layers(model)[layer].renormalize:
            close(total, torch.ones_like(total))
        else:
            assert bool((total < 1).all())


@pytest.mark.parametrize("name", MOES)
def test_experts_view_at_the_clean_image_is_the_model(name: str) -> None:
    model, x = fresh(name), images()
    view = make_view("experts", model)
    view.prepare(x)
    index = torch.tensor([3, 0, 17, 3])
    close(view.logits(x[index], index), model(x[index]))


@pytest.mark.parametrize("name", MOES)
def test_experts_view_holds_the_clean_routing(name: str) -> None:
    model, x, moved = fresh(name), images(seed=1), images(seed=2)
    view = make_view("experts", model)
    view.prepare(x)
    index = torch.tensor([5, 2, 23])
    close(view.logits(moved[index], index), split_forward(model, x[index], moved[index]))


@pytest.mark.parametrize("name", MOES)
def test_router_view_holds_the_clean_experts(name: str) -> None:
    """For models that keep their experts' outputs this compares the shortcut with the plain definition."""
    model, x, moved = fresh(name), images(seed=1), images(seed=2)
    view = make_view("router", model)
    view.prepare(x)
    index = torch.tensor([5, 2, 23, 5])
    close(view.logits(moved[index], index), split_forward(model, moved[index], x[index], soft=True))


def test_both_kinds_of_router_view_are_covered() -> None:
    kinds = set()
    for name in MOES:
        model = fresh(name)
        assert isinstance(model, RoutedModel)
        kinds.add(model.expert_outputs(images(2)) is None)
    assert kinds == {True, False}


@pytest.mark.parametrize("name", [name for name in MOES if not routes_tokens(fresh(name))])
def test_smooth_view_weighs_all_experts_by_the_softmax(name: str) -> None:
    model, x = fresh(name), images()
    everything = torch.arange(len(x))
    logits = make_view("smooth", model).logits(x, everything)
    outputs = model.expert_outputs(x) if isinstance(model, RoutedModel) else None
    if outputs is not None:
        assert isinstance(model, RoutedModel)
        close(logits, model.mix(outputs, model.route(x, soft=True)))
    elif isinstance(model, TinyMoE):
        layer = moe_layers(model)["moe"]
        features = torch.relu(model.stem(x))
        weights = layer.router(features).softmax(dim=1)
        experts = torch.stack([expert(features) for expert in layer.experts], dim=1)
        mixed = torch.relu((weights[:, :, None, None, None] * experts).sum(dim=1))
        close(logits, model.fc(mixed.flatten(1)))
    elif any(isinstance(expert, nn.ModuleList) for layer in moe_layers(model).values() for expert in layer.experts):
        pytest.skip("its experts are filters inside every convolution; test_adv_moe.py mixes those by hand")
    else:
        # Layers behind each other, each of which mixes what the one before it has mixed.
        def soft(layer: MoELayer) -> Callable[[Tensor], Tensor]:
            def forward(z: Tensor) -> Tensor:
                weights = layer.router(z).softmax(dim=1)
                outputs = torch.stack([expert(z) for expert in layer.experts], dim=1)
                return (weights.view(*weights.shape, *[1] * (outputs.dim() - 2)) * outputs).sum(dim=1)

            return forward

        for layer in moe_layers(model).values():
            layer.forward = soft(layer)  # type: ignore[method-assign]
        try:
            close(logits, model(x))
        finally:
            for layer in moe_layers(model).values():
                del layer.forward


@pytest.mark.parametrize("name", MOES)
def test_straight_through_view_has_the_logits_of_the_model(name: str) -> None:
    model, x = fresh(name), images()
    logits = make_view("straight-through", model).logits(x, torch.arange(len(x)))
    torch.testing.assert_close(logits, model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MOES)
@pytest.mark.parametrize("view_name", ["whole", "router", "experts", "smooth", "straight-through"])
def test_gradients_reach_the_image(name: str, view_name: str) -> None:
    """Each image has a gradient of its own and none from another."""
    model, clean = fresh(name), images(6)
    view = make_view(view_name, model)
    view.prepare(clean)
    x = images(6, seed=3).requires_grad_()
    logits = view.logits(x, torch.arange(6))
    (gradient,) = torch.autograd.grad(logits[2].square().sum(), x)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient[2].abs().max()) > 0
    assert float(gradient[[0, 1, 3, 4, 5]].abs().max()) == 0


def test_gradients_tell_the_views_apart() -> None:
    """On the hand-made model the router looks at pixel 0 only and the experts at pixel 1 only."""
    model = frozen(Gated())
    clean = torch.tensor([0.6, 0.8, 0.5, 0.5]).view(1, 1, 2, 2)
    looks = {
        "whole": {1},
        "experts": {1},
        "router": {0},
        "smooth": {0, 1},
        "straight-through": {0, 1},
        "expert[1]": {1},
    }
    for name, pixels in looks.items():
        view = make_view(name, model)
        view.prepare(clean)
        x = clean.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            view.logits(x, torch.zeros(1, dtype=torch.int64)) @ torch.tensor([-1.0, 1.0]), x
        )
        assert set(gradient.flatten().nonzero().flatten().tolist()) == pixels, name


def test_views_of_the_hand_made_model_are_what_pencil_and_paper_give() -> None:
    model = frozen(Gated())
    clean = torch.tensor([[0.6, 0.8, 0.1, 0.2], [0.3, 0.8, 0.9, 0.4]]).view(2, 1, 2, 2)
    moved = torch.tensor([[0.45, 0.7, 0.3, 0.3], [0.7, 0.1, 0.0, 0.0]]).view(2, 1, 2, 2)
    index = torch.arange(2)

    def at(name: str) -> Tensor:
        view = make_view(name, model)
        view.prepare(clean)
        return view.logits(moved, index)

    # Expert 0 gives (0, x_1 - 0.5), expert 1 gives (x_1 - 0.5, 0); expert 0 runs where x_0 > 0.5.
    close(at("whole"), torch.tensor([[0.2, 0.0], [0.0, -0.4]]))
    close(at("experts"), torch.tensor([[0.0, 0.2], [-0.4, 0.0]]))
    p = torch.sigmoid(torch.tensor([20 * (0.45 - 0.5), 20 * (0.7 - 0.5)]))
    close(at("router"), torch.stack(((1 - p) * 0.3, p * 0.3), dim=1))
    close(at("smooth"), torch.stack(((1 - p) * torch.tensor([0.2, -0.4]), p * torch.tensor([0.2, -0.4])), dim=1))
    close(at("expert[0]"), torch.tensor([[0.0, 0.2], [0.0, -0.4]]))
    close(at("expert[1]"), torch.tensor([[0.2, 0.0], [-0.4, 0.0]]))


@pytest.mark.parametrize("name", [name for name in MOES if len(moe_layers(fresh(name))) == 1])
def test_a_forced_expert_is_that_expert_alone(name: str) -> None:
    model, x = fresh(name), images()
    assert isinstance(model, RoutedModel)
    outputs = model.expert_outputs(x)
    for number in range(len(next(iter(moe_layers(model).values())).experts)):
        forced = forced_forward(model, x, number)
        close(make_view(f"expert[{number}]", model).logits(x, torch.arange(len(x))), forced)
        if outputs is not None:
            close(forced, next(iter(outputs.values()))[:, number])
        elif isinstance(model, TinyMoE):
            expert = model.moe.experts[number]
            close(forced, model.fc(torch.relu(expert(torch.relu(model.stem(x)))).flatten(1)))


def test_an_expert_can_be_forced_in_one_layer_or_in_all() -> None:
    model, x = fresh("dual-moe"), images()
    assert isinstance(model, RoutedModel)
    outputs = model.expert_outputs(x)
    assert outputs is not None
    alone = {half: outputs[f"{half}.moe"][:, 2] for half in ("standard", "robust")}
    everything = torch.arange(len(x))
    close(make_view("expert[2]", model).logits(x, everything), 0.3 * alone["standard"] + 0.7 * alone["robust"])
    own = model.get_submodule("standard")(x)
    close(make_view("expert[robust.moe:2]", model).logits(x, everything), 0.3 * own + 0.7 * alone["robust"])


def test_halves_of_a_dual_model() -> None:
    model, x = fresh("dual-moe"), images()
    for half in ("standard", "robust"):
        close(make_view(half, model).logits(x, torch.arange(len(x))), model.get_submodule(half)(x))
    assert default_views(model) == ["whole", "router", "experts", "standard", "robust"]


def test_views_leave_no_policy_behind_even_where_the_model_fails() -> None:
    model = TinyMoE()
    view = make_view("smooth", model)
    with pytest.raises(RuntimeError):
        view.logits(torch.rand(2, 3, 8, 8), torch.arange(2))
    assert model.moe.policy is None
    for name in applicable_views(model):
        shown = make_view(name, model)
        shown.prepare(images(4))
        shown.logits(images(4), torch.arange(4))
    assert model.moe.policy is None


@pytest.mark.parametrize("name", MOES)
def test_every_applicable_view_can_be_made(name: str) -> None:
    model, x = fresh(name), images(3)
    names = applicable_views(model)
    assert len(set(names)) == len(names) and set(default_views(model)) <= set(names)
    for view_name in names:
        view = make_view(view_name, model)
        view.prepare(x)
        assert view.logits(x, torch.arange(3)).shape == (3, 10)
        assert view.is_whole == (view_name == "whole")


def test_a_dense_model_has_one_view() -> None:
    model = LinearClassifier(torch.ones(3, 4), torch.zeros(3))
    assert applicable_views(model) == default_views(model) == ["whole"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rooter", "unknown view 'rooter'; did you mean router?"),
        ("expert[x]", r"unknown view 'expert\[x\]'"),
        ("expert[2]", r"view 'expert\[2\]' does not exist on this model; it has whole, .*expert\[1\]"),
        ("expert[moe:0]", "does not exist on this model"),
        ("robust", "view 'robust' does not exist on this model"),
    ],
)
def test_views_that_a_model_lacks_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_view(name, fresh("toy"))


@pytest.mark.parametrize("name", ["router", "experts", "smooth", "expert[0]", "standard"])
def test_component_views_of_a_dense_model_are_refused(name: str) -> None:
    model = LinearClassifier(torch.ones(3, 4), torch.zeros(3))
    with pytest.raises(UsageError, match="needs a model with routing; this one is dense"):
        make_view(name, model)
    with pytest.raises(UsageError, match="unknown view"):
        make_view("experts ", model)


def test_forcing_what_does_not_exist_is_refused() -> None:
    model, x = fresh("toy"), images(2)
    with pytest.raises(UsageError, match="no expert 2 in layer 'moe': it has experts 0 to 1"):
        forced_forward(model, x, 2)
    with pytest.raises(UsageError, match="no MoE layer 'router' in this model; it has moe"):
        forced_forward(model, x, 0, "router")
