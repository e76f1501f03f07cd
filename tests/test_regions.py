"""Routing in depth: which regions are tried, and what soft weights of later layers are measured on."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from small_models import LayeredMoE
from torch import Tensor, nn
from toys import DeepMoE, TinyMoE, frozen

from moebench.attacks._regions import MOST, Regions, list_regions
from moebench.attacks._views import make_view
from moebench.models._moe import MoELayer, mixes_all, record, soft_route, split_forward
from moebench.routing import RoutingProbe


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def deep(top_k: int, experts: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return frozen(DeepMoE(top_k, experts))


def as_sets(regions: Regions, sample: int) -> list[tuple[tuple[int, ...], ...]]:
    """The regions of one sample as one set of experts per layer."""
    number = torch.arange(regions.count)
    masks = [regions.selected(layer, torch.full_like(number, sample), number) for layer in regions.masks]
    return [tuple(tuple(mask[at].nonzero().flatten().tolist()) for mask in masks) for at in range(regions.count)]


# Few regions.


@pytest.mark.parametrize(("top_k", "experts", "count"), [(1, 2, 4), (2, 3, 9), (2, 2, 1), (1, 8, 64)])
def test_few_regions_are_all_there_in_order(top_k: int, experts: int, count: int) -> None:
    regions = list_regions(deep(top_k, experts), images(5))
    assert regions.count == count and all(len(mask) == 1 for mask in regions.masks.values())
    found = as_sets(regions, 3)
    assert found == sorted(set(found)) and len(found) == count


# Many regions.


@pytest.mark.parametrize(("top_k", "experts"), [(1, 9), (2, 6), (3, 6)])
def test_many_regions_are_cut_to_the_likeliest_of_each_sample(top_k: int, experts: int) -> None:
    model, x = deep(top_k, experts), images(7)
    regions = list_regions(model, x)
    soft, own = record(model, x, soft=True), record(model, x)
    assert regions.count == MOST
    for sample in range(len(x)):
        found = as_sets(regions, sample)
        assert len(set(found)) == MOST and all(len(part) == top_k for region in found for part in region)
        clean = tuple(tuple(own[name].selected[sample].nonzero().flatten().tolist()) for name in own)
        assert found[0] == clean
        logs = [soft[name].weights[sample].double().log() for name in soft]
        everything = list(product(*(subsets(experts, top_k) for _ in logs)))
        likelihood = {
            region: sum(float(log[list(part)].sum()) for log, part in zip(logs, region, strict=True))
            for region in everything
        }
        ranked = sorted(everything, key=lambda region: -likelihood[region])
        # What is left of the list after its fixed parts goes to the likeliest ones.
        rest = MOST - 1 - MOST // 4 - MOST // 2
        assert set(ranked[:rest]) <= set(found)
        changed = [r for r in ranked if sum(a != b for a, b in zip(r, clean, strict=True)) == 1]
        assert set(changed[: MOST // 2]) <= set(found)
        for expert in range(experts):
            assert any(all(expert in part for part in region) for region in found)


def subsets(experts: int, top_k: int) -> list[tuple[int, ...]]:
    return [part for part in product(range(experts), repeat=top_k) if all(a < b for a, b in pairwise(part))]


def test_a_samples_list_does_not_hang_on_its_neighbours() -> None:
    model, x = deep(2, 6).double(), images(6).double()
    together, alone = list_regions(model, x), list_regions(model, x[4:5])
    # One sample alone shares its list with itself.
    assert as_sets(together, 4) == as_sets(alone, 0)


def test_layers_of_unlike_width_and_no_samples() -> None:
    model = LayeredMoE(5, 3, experts=9)
    model.second = MoELayer([nn.Linear(5, 3) for _ in range(12)], nn.Linear(5, 12), top_k=2)
    frozen(model)
    x = torch.rand(3, 1, 1, 5)
    regions = list_regions(model, x)
    assert [mask.shape for mask in regions.masks.values()] == [(3, MOST, 9), (3, MOST, 12)]
    assert list_regions(model, x[:0]).masks["second"].shape == (0, MOST, 12)


def test_the_region_of_the_clean_route_is_the_model() -> None:
    model, x = deep(2, 6), images(5)
    view = make_view("region", model)
    view.prepare(x)
    shown = view.aimed(x, torch.arange(5), torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(shown[:, :-1], model(x))
    assert bool((shown[:, -1] > 0).all())
    index = torch.tensor([3, 3, 0])
    others = view.aimed(x[index], index, torch.tensor([10, 170, 20]))
    assert bool((others[:, -1] <= 0).all())


def test_which_models_mix_all_experts() -> None:
    assert mixes_all(TinyMoE(top_k=2, experts=2)) and not mixes_all(TinyMoE(top_k=2, experts=3))
    assert mixes_all(DeepMoE(2, 2)) and not mixes_all(DeepMoE(1, 2)) and not mixes_all(nn.Linear(2, 2))


# Soft weights in depth.


def hard_features(model: LayeredMoE, x: Tensor) -> Tensor:
    return torch.tanh(model.first(x.flatten(1)))


def test_soft_weights_of_a_later_layer_are_those_on_the_features_of_the_hard_pass() -> None:
    model = LayeredMoE().eval()
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    tape = record(model, x, soft=True)
    torch.testing.assert_close(tape["first"].weights, model.first.probabilities(x))
    torch.testing.assert_close(tape["second"].weights, model.second.probabilities(hard_features(model, x)))
    assert torch.equal(tape["second"].weights.argmax(1), record(model, x)["second"].weights.argmax(1))
    mixed = torch.tanh(
        sum(w.unsqueeze(1) * e(x) for w, e in zip(tape["first"].weights.t(), model.first.experts, strict=True))
    )
    assert not torch.allclose(tape["second"].weights, model.second.probabilities(mixed), atol=1e-3)


def test_the_probe_measures_entropy_and_load_on_the_same_features() -> None:
    model = LayeredMoE().eval()
    x = torch.randn(12, 1, 1, 5, generator=torch.Generator().manual_seed(0))
    probe = RoutingProbe(model, x, batch_size=5)
    probe.look(x, torch.arange(12))
    second = probe.layers()[1]
    probs = model.second.probabilities(hard_features(model, x)).detach()
    entropy = float(-(probs * probs.log()).sum(1).mean())
    assert second.entropy_clean == second.entropy_adv == pytest.approx(entropy, rel=1e-5)
    load = torch.nn.functional.one_hot(probs.argmax(1), 3).double().mean(0)
    assert second.load_clean == pytest.approx(load.tolist())


def test_the_router_view_differentiates_through_the_routing_before() -> None:
    """Values are those of the hard pass; the gradient takes every earlier layer straight through."""
    model = LayeredMoE().eval()
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    tape = soft_route(model, x)
    torch.testing.assert_close(tape["second"].weights, record(model, x, soft=True)["second"].weights)
    direction = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad((tape["second"].weights * direction).sum(), x)
    probs = model.first.probabilities(x)
    weights = model.first.own_routing(x).weights.detach() + probs - probs.detach()
    outputs = torch.stack([expert(x) for expert in model.first.experts], dim=1)
    features = torch.tanh((weights.unsqueeze(2) * outputs).sum(1))
    (expected,) = torch.autograd.grad((model.second.probabilities(features) * direction).sum(), x)
    torch.testing.assert_close(found, expected)
    (blind,) = torch.autograd.grad((record(model, x, soft=True)["second"].weights * direction).sum(), x)
    assert not torch.allclose(found, blind, atol=1e-4)


def test_the_router_view_of_layers_is_the_split_forward() -> None:
    model, clean, moved = deep(1, 2), images(4), images(4, seed=1)
    view = make_view("router", model)
    view.prepare(clean)
    index = torch.tensor([2, 0])
    expected = split_forward(model, moved[index], clean[index], soft=True)
    torch.testing.assert_close(view.logits(moved[index], index), expected)
