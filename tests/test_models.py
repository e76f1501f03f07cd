from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from toys import awake

from moebench.errors import UsageError
from moebench.models import MODELS, list_models, load_model
from moebench.models._base import ModelEntry, Normalize, evaluating
from moebench.models._moe import MoELayer, moe_layers
from moebench.models._resnet import classifier, resnet8, resnet18
from moebench.models.ensemble import Ensemble
from moebench.models.rt_er import ClassifierMoE, DualModel
from moebench.registry import Declaration
from moebench.schema import ThreatModel
from moebench.training_adversary import TrainingAdversary

DIGITS, CIFAR = (1, 8, 8), (3, 32, 32)
NAMES = MODELS.names()
MEGABYTE = 1 << 20


def images(batch: int, shape: tuple[int, int, int] = DIGITS, seed: int = 0) -> Tensor:
    return torch.rand(batch, *shape, generator=torch.Generator().manual_seed(seed))


def architectures() -> list[str]:
    """One name for each builder and its settings; recipes do not matter to the architecture."""
    first: dict[str, str] = {}
    for name in NAMES:
        entry = MODELS.get(name)
        first.setdefault(f"{entry.build.__qualname__} {sorted(entry.settings.items())}", name)
    return list(first.values())


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def make(name: str, seed: int = 0, shape: tuple[int, int, int] = DIGITS) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS.get(name).make(10, shape)


# --- every registered model


def test_list_models_has_the_papers_models() -> None:
    assert list_models() == NAMES
    assert {"resnet-st", "resnet-at", "rt-er", "rt-er-official", "dual-moe", "jtd-moe", "ensemble-mean"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_builds_for_digits(name: str) -> None:
    model = awake(make(name)).eval()
    with torch.no_grad():
        logits = model(images(3))
    assert logits.shape == (3, 10)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits[0], logits[1])
    assert len(save({key: value.contiguous() for key, value in model.state_dict().items()})) <= MEGABYTE


@pytest.mark.parametrize("name", architectures())
def test_builds_for_cifar(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS.get(name).make(7, CIFAR).eval()
    with torch.no_grad():
        logits = model(images(2, CIFAR))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("declaration", MODELS.declarations(), ids=lambda declaration: declaration.name)
def test_facts_read_from_the_source_are_those_of_the_imported_entry(declaration: Declaration) -> None:
    entry = MODELS.get(declaration.name)
    assert {"summary", "family", "training"} <= set(declaration.facts)
    assert {key: getattr(entry, key) for key in declaration.facts} == declaration.facts
    assert entry.name == declaration.name
    assert declaration.module == entry.build.__module__


@pytest.mark.parametrize("name", NAMES)
def test_entry_is_consistent(name: str) -> None:
    entry = MODELS.get(name)
    assert entry.family in ("dense", "ensemble", "moe", "dual")
    assert entry.paper is not None and entry.paper.bibtex_key
    assert (entry.routing is not None) == bool(moe_layers(make(name)))
    assert set(entry.settings) <= set(entry.build.__kwdefaults__ or {})
    assert entry.recipe is not None
    assert bool(entry.objective) == (entry.recipe.epochs > 0)
    for part, source in entry.recipe.init_from.items():
        make(name).get_submodule(part).load_state_dict(make(source).state_dict(), strict=True)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    """Names of the trainable parameters that are not what they were."""
    return {name for name, value in module.named_parameters() if not torch.equal(before[name], value)}


@pytest.mark.parametrize("name", [name for name in NAMES if MODELS.get(name).objective])
def test_one_step_of_the_objective(name: str) -> None:
    entry = MODELS.get(name)
    assert entry.recipe is not None
    recipe = replace(entry.recipe, attack_steps=2)
    model = make(name).train()
    x, y = images(16), torch.arange(16) % 10
    adversary = TrainingAdversary(model, ThreatModel("Linf", 0.2), recipe, seed=0)
    for phase in entry.objective:
        optimizer = torch.optim.SGD(phase.parameters(model), lr=0.1)
        before = state(model)
        model.zero_grad(set_to_none=True)
        loss = phase.loss(model, x, y, adversary, recipe)
        assert loss.dim() == 0 and torch.isfinite(loss)
        torch.autograd.backward(loss)
        optimizer.step()
        moved = changed(before, model)
        assert moved
        assert all(key.startswith(phase.part) for key in moved)
        assert model.training
        for layer_name, layer in moe_layers(model).items():
            routers = {key for key in moved if key.startswith(f"{layer_name}.router")}
            trained = {id(parameter) for parameter in layer.router.parameters()}
            assert bool(routers) == any(id(parameter) in trained for parameter in phase.parameters(model))
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


# --- architectures


def test_resnet_18_is_the_papers() -> None:
    model = resnet18(10, 3)
    assert parameters(model) == 11_173_962
    strides = [module.stride for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(strides) == 20
    assert strides.count((2, 2)) == 6
    assert model.fc.in_features == 512


def test_image_size_picks_the_network() -> None:
    assert parameters(classifier(10, CIFAR)) == 11_173_962
    assert parameters(classifier(10, (3, 17, 17))) == 11_173_962
    assert parameters(classifier(10, (1, 16, 16))) == parameters(resnet8(10, 1)) == 24_666


def test_router_of_the_classifier_moe_is_linear_on_the_pixels() -> None:
    model = MODELS.get("rt-er").make(10, CIFAR)
    assert isinstance(model, ClassifierMoE)
    assert parameters(model.moe.router) == 12_292
    x = images(3, CIFAR)
    linear = model.moe.router.get_submodule("1")
    assert isinstance(linear, nn.Linear)
    expected = F.linear(((x - 0.5) / 0.5).flatten(1), linear.weight, linear.bias).softmax(1)
    torch.testing.assert_close(model.route(x, soft=True)["moe"].weights, expected)


def test_normalize_maps_to_minus_one_to_one() -> None:
    layer = Normalize()
    assert layer(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-1.0, 0.0, 1.0]
    assert set(layer.state_dict()) == {"mean", "std"}


def classifier_moe(top_k: int = 1, seed: int = 0) -> ClassifierMoE:
    torch.manual_seed(seed)
    return ClassifierMoE(10, DIGITS, experts=4, top_k=top_k, router="trained").eval()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_runner_up_is_the_best_expert_that_is_not_selected(top_k: int) -> None:
    model, x = classifier_moe(top_k), images(20)
    logits = model.moe.router(model.normalize(x))
    expected = [sorted(range(4), key=lambda i: -row[i])[top_k] for row in logits.tolist()]
    assert model.runner_up(x).tolist() == expected
    selected = model.route(x)["moe"].selected
    assert not selected[torch.arange(20), model.runner_up(x)].any()


def test_runner_up_needs_an_expert_that_is_left_over() -> None:
    model = MODELS.get("rt-er").make(10, DIGITS, experts=2, top_k=2)
    assert isinstance(model, ClassifierMoE)
    with pytest.raises(UsageError, match="selects all 2 experts"):
        model.runner_up(images(1))


@torch.no_grad()
def test_pick_sends_each_image_to_its_expert_alone() -> None:
    model, x = classifier_moe(), images(4)
    choice = torch.tensor([3, 0, 0, 2])
    routing = model.pick(choice)
    assert routing.weights.sum(1).tolist() == [1.0] * 4
    logits = model.forward_with(x, routing)
    for row, expert in enumerate(choice.tolist()):
        torch.testing.assert_close(logits[row], model.moe.experts[expert](model.normalize(x[row : row + 1]))[0])


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.5, 0.7, 1.0])
def test_dual_model_is_equation_3(alpha: float) -> None:
    standard, robust, x = classifier_moe(seed=1), classifier_moe(seed=2), images(5)
    dual = DualModel(standard, robust, alpha).eval()
    torch.testing.assert_close(dual(x), (1 - alpha) * standard(x) + alpha * robust(x))
    outputs = dual.expert_outputs(x)
    torch.testing.assert_close(dual.mix(outputs, dual.route(x)), dual(x))


@pytest.mark.parametrize("alpha", [0.49, 1.01, -1.0, float("nan")])
def test_dual_model_refuses_other_mixtures(alpha: float) -> None:
    with pytest.raises(UsageError, match=r"alpha must be in \[0.5, 1\]"):
        MODELS.get("dual-moe").make(10, DIGITS, alpha=alpha)


@torch.no_grad()
def test_ensembles_combine_their_members() -> None:
    torch.manual_seed(0)
    members: list[nn.Module] = [resnet8(10, 1) for _ in range(3)]
    x = images(4)
    single = torch.stack([member.eval()(2 * x - 1) for member in members])
    torch.testing.assert_close(Ensemble(members, "mean").eval()(x), single.mean(0))
    torch.testing.assert_close(Ensemble(members, "max").eval()(x), single.max(0).values)
    with pytest.raises(UsageError, match="combination must be 'mean', 'max' or 'vote', got 'median'"):
        MODELS.get("ensemble-mean").make(10, DIGITS, combination="median")


# --- building and loading by name


def test_settings_change_the_model() -> None:
    model = MODELS.get("rt-er").make(10, DIGITS, experts=6, top_k=2, router="frozen")
    (layer,) = moe_layers(model).values()
    assert isinstance(layer, MoELayer)
    assert (len(layer.experts), layer.top_k, layer.router_mode) == (6, 2, "frozen")
    (variant,) = moe_layers(MODELS.get("rt-er-top2").make(10, DIGITS)).values()
    assert (len(variant.experts), variant.top_k, variant.router_mode) == (4, 2, "trained")


def test_unknown_setting_is_refused() -> None:
    with pytest.raises(UsageError, match="model 'rt-er' has no setting 'depth'; it has expert, experts, router, top_k"):
        MODELS.get("rt-er").make(10, DIGITS, depth=3)
    with pytest.raises(UsageError, match="model 'resnet-at' has no setting 'width'; it has none"):
        MODELS.get("resnet-at").make(10, DIGITS, width=3)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rt-er", {"experts": "four"}),
        ("rt-er", {"experts": 2.5}),
        ("rt-er", {"top_k": 5}),
        ("rt-er", {"top_k": "x"}),
        ("rt-er", {"router": "free"}),
        ("dual-moe", {"alpha": "much"}),
        ("ensemble-mean", {"members": "x"}),
    ],
)
def test_impossible_setting_is_a_usage_error(name: str, settings: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        MODELS.get(name).make(10, DIGITS, **settings)
    assert "\n" not in str(caught.value)


def test_load_model_of_fresh_weights() -> None:
    model = load_model("rt-er", num_classes=7, shape=(3, 12, 12), dataset=None, experts=2)
    assert not model.training
    with torch.no_grad():
        assert model(images(2, (3, 12, 12))).shape == (2, 7)


def test_load_model_names_what_is_missing() -> None:
    with pytest.raises(UsageError, match="unknown model 'rt-err'; did you mean rt-er"):
        load_model("rt-err")
    with pytest.raises(UsageError, match=r"nowhere.resnet-at\.safetensors"):
        load_model("resnet-at", dataset="nowhere")


def test_record_is_what_the_store_keeps() -> None:
    entry = MODELS.get("rt-er")
    record = entry.record()
    for field in ("name", "family", "summary", "training", "routing", "paper"):
        assert getattr(record, field) == getattr(entry, field)
    assert isinstance(entry, ModelEntry)


def test_evaluating_restores_the_mode() -> None:
    model = resnet8(10, 1).train()
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not model.training
        assert not model.bn1.training
        raise RuntimeError("inside")
    assert model.training
    assert model.bn1.training
    with evaluating(model.eval()):
        pass
    assert not model.training
