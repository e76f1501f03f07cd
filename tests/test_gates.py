"""Gates on feature maps, and the noise and capacity of a layer that trains."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.errors import UsageError
from moebench.models._gates import GateName, NoisyMoELayer, assign_within, make_gate
from moebench.models._moe import MoELayer, top_experts

GATES: tuple[GateName, ...] = get_args(GateName)


def maps(batch: int, channels: int, side: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(seed))


def layer(top_k: int = 1, **options: Any) -> NoisyMoELayer:
    torch.manual_seed(0)
    return NoisyMoELayer([nn.Conv2d(6, 3, 1) for _ in range(4)], make_gate("gap-fc", 6, 4), top_k=top_k, **options)


# --- routing networks


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("side", [1, 2, 3, 4, 8])
def test_a_gate_gives_one_logit_per_expert_and_image(name: GateName, side: int) -> None:
    gate = make_gate(name, 16, 5).eval()
    x = maps(3, 16, side)
    logits = gate(x)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(logits[1:2], gate(x[1:2]))
    assert not torch.equal(logits[0], logits[1])


def test_gates_are_their_definitions() -> None:
    x = maps(3, 6, 4)
    linear = make_gate("gap-fc", 6, 4)
    weight, bias = linear.get_parameter("2.weight"), linear.get_parameter("2.bias")
    torch.testing.assert_close(linear(x), x.mean((2, 3)) @ weight.T + bias)
    kernel = make_gate("conv-gap", 6, 4)
    weight = kernel.get_parameter("conv.weight")
    assert weight.shape == (4, 6, 3, 3)
    corners = [x[:, :, i : i + 3, j : j + 3] for i in (0, 1) for j in (0, 1)]
    expected = sum(torch.einsum("bchw,echw->be", part, weight) for part in corners)
    torch.testing.assert_close(kernel(x), expected / 4)
    double = make_gate("double-conv-gap", 6, 4).eval()
    one, two = double.get_parameter("0.weight")[:, :, 0, 0], double.get_parameter("2.weight")[:, :, 0, 0]
    # BatchNorm is the identity at the start, up to its epsilon, and nothing between is non-linear.
    torch.testing.assert_close(double(x), x.mean((2, 3)) @ one.T @ two.T / math.sqrt(1 + 1e-5))
    assert sum(p.numel() for p in double.parameters()) == 6 * 8 + 2 * 8 + 8 * 4
    torch.testing.assert_close(make_gate("gap-first", 6, 4)(x), x.mean((2, 3))[:, :4])


def test_fixed_gates_learn_nothing_and_are_stored() -> None:
    gate, x = make_gate("gap-random", 6, 4), maps(3, 6, 4)
    torch.testing.assert_close(gate(x), torch.einsum("bchw,ec->be", x, gate.state_dict()["directions"]) / 16)
    assert make_gate("gap-random", 300, 40).state_dict()["directions"].std().item() == pytest.approx(1, rel=0.05)
    assert list(gate.parameters()) == [] and list(gate.state_dict()) == ["directions"]
    assert gate.state_dict()["directions"].std() > 0.3
    with pytest.raises(UsageError, match="one channel per expert; 7 experts and 6 channels"):
        make_gate("gap-first", 6, 7)


def test_unknown_gate() -> None:
    name: Any = "gap"
    with pytest.raises(UsageError, match=r"gate must be one of gap-fc, conv-gap, .*got 'gap'"):
        make_gate(name, 6, 4)


# --- noise and capacity


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 12), st.integers(1, 6), st.data())
def test_assignment_gives_everybody_k_experts_and_nobody_too_many(
    batch: int, experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    even = math.ceil(top_k * batch / experts)
    room = data.draw(st.integers(even, batch + 1))
    scores = torch.randn(batch, experts, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    selected = assign_within(scores, top_k, room)
    assert selected.sum(1).tolist() == [top_k] * batch
    if top_k == 1:
        assert int(selected.sum(0).max()) <= room
    plain = top_experts(scores, top_k)
    if int(plain.sum(0).max()) <= room:
        assert torch.equal(selected, plain)


def test_overflow_goes_to_the_next_best_expert() -> None:
    scores = torch.tensor([[9.0, 1, 0], [8, 0, 1], [7, 2, 1], [6, 5, 4]])
    # Expert 0 keeps images 0 and 1; images 2 and 3 both go on to expert 1.
    assert assign_within(scores, 1, 2).float().argmax(1).tolist() == [0, 0, 1, 1]
    # With room for one, expert 1 keeps image 3 of those who come on, and expert 2 then has image 1 of the rest.
    assert assign_within(scores, 1, 1).float().argmax(1).tolist() == [0, 2, 0, 1]


def test_noise_and_capacity_are_of_training_only() -> None:
    x = maps(32, 6, 4)
    plain = layer()
    for options in ({"noise": 5.0}, {"capacity": 1.0}, {"noise": 5.0, "capacity": 1.0}):
        noisy = layer(**options)
        state = torch.get_rng_state()
        expected = MoELayer.own_routing(plain.eval(), x)
        assert torch.equal(noisy.eval().own_routing(x).selected, expected.selected)
        assert torch.equal(torch.get_rng_state(), state)
        trained = noisy.train().own_routing(x)
        assert not torch.equal(trained.selected, expected.selected)
        assert trained.selected.sum(1).tolist() == [1] * 32
        if "capacity" in options:
            assert int(trained.selected.sum(0).max()) == 8


def test_training_without_noise_and_capacity_draws_nothing() -> None:
    quiet, state = layer().train(), torch.get_rng_state()
    quiet(maps(8, 6, 4))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("top_k", [1, 2])
def test_weights_of_noisy_selection_come_from_the_softmax(top_k: int) -> None:
    noisy = layer(top_k, noise=3.0).train()
    probs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)).softmax(1).requires_grad_()
    routing = noisy.assign(probs)
    kept = probs * routing.selected
    expected = routing.selected.float() if top_k == 1 else kept / kept.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights, expected)
    assert not torch.equal(routing.selected, top_experts(probs, top_k))
    if top_k == 1:
        # Straight-through: the gradient of each selected weight is that of its softmax.
        (gradient,) = torch.autograd.grad(routing.weights.sum(), probs)
        assert torch.equal(gradient, routing.selected.float())


@pytest.mark.parametrize("noise", [0.1, 0.4])
def test_noise_is_gaussian_on_scores_in_units_of_their_spread(noise: float) -> None:
    """Two experts whose scores differ by d change places with probability Φ(-d / (std · noise · sqrt 2))."""
    torch.manual_seed(0)
    noisy = NoisyMoELayer([nn.Conv2d(6, 3, 1) for _ in range(2)], make_gate("gap-fc", 6, 2), noise=noise).train()
    share = torch.tensor([0.51, 0.515, 0.525, 0.54, 0.56]).repeat_interleave(4000)
    probs = torch.stack([share, 1 - share], dim=1)
    spread = math.sqrt(float(((probs - 0.5) ** 2).mean()))
    changed = noisy.assign(probs).selected[:, 1].view(5, 4000).double().mean(1)
    for found, first in zip(changed.tolist(), (0.51, 0.515, 0.525, 0.54, 0.56), strict=True):
        expected = 0.5 * math.erfc((2 * first - 1) / (spread * noise * math.sqrt(2)) / math.sqrt(2))
        assert found == pytest.approx(expected, abs=4 * math.sqrt(max(expected * (1 - expected), 1e-4) / 4000))


@pytest.mark.parametrize(("top_k", "capacity", "most"), [(1, 1.5, 4), (1, 1.0, 3), (2, 1.0, 5), (2, 1.5, 8)])
def test_capacity_is_a_multiple_of_the_even_share_rounded_up(top_k: int, capacity: float, most: int) -> None:
    """ceil(k T / E · cf) for T = 10 images and E = 4 experts, all of whom like expert 0 best and then expert 1."""
    limited = layer(top_k, capacity=capacity).train()
    probs = torch.tensor([[0.6, 0.25, 0.1, 0.05]]).repeat(10, 1)
    load = limited.assign(probs).selected.sum(0).tolist()
    assert load[0] == most == math.ceil(top_k * 10 / 4 * capacity)
    assert sum(load) == 10 * top_k and max(load) == most


def test_a_soft_mixture_ignores_noise_and_capacity() -> None:
    both = layer(4, noise=1.0, capacity=1.0).train()
    x = maps(5, 6, 4)
    torch.testing.assert_close(both.own_routing(x).weights, both.router(x).softmax(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -0.1}, "noise of a gate must be a finite number >= 0, got -0.1"),
        ({"noise": math.inf}, "noise of a gate"),
        ({"capacity": 0.5}, "capacity of an expert must be at least 1, its even share, or None, got 0.5"),
        ({"capacity": math.nan}, "capacity of an expert"),
    ],
)
def test_impossible_noise_and_capacity(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        layer(**options)


def test_padding_is_for_maps_below_the_kernel_only() -> None:
    gate = make_gate("conv-gap", 2, 3)
    weight = gate.get_parameter("conv.weight")
    x = maps(2, 2, 2)
    torch.testing.assert_close(gate(x), F.conv2d(x, weight, padding=1).mean((2, 3)))
