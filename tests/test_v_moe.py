"""V-MoE and ViT: sizes, routing of tokens, capacity and losses of training, and what attacks are shown of them."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from scipy.stats import norm  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from toys import attack, awake, cut, digits, frozen, make_engine

from moebench.attacks import load_attack
from moebench.attacks._views import applicable_views, default_views, make_view
from moebench.cards import model_card
from moebench.errors import UsageError
from moebench.loading import count_flops
from moebench.models import MODELS
from moebench.models._balancing import switch_loss
from moebench.models._moe import combine, forced_forward, moe_layers, record, replay, routes_tokens
from moebench.models.v_moe import (
    TokenMoE,
    VMoE,
    auxiliary_loss,
    gshard_loss,
    importance_loss,
    load_loss,
    within_capacity,
)
from moebench.optimizers import make_optimizer
from moebench.schema import ThreatModel
from moebench.training_adversary import TrainingAdversary

DIGITS, CIFAR, IMAGENET = (1, 8, 8), (3, 32, 32), (3, 224, 224)


@pytest.fixture(autouse=True)
def same_weights() -> None:
    """Fresh models are the same whatever ran before: a lopsided router would leave some tests nothing to see."""
    torch.manual_seed(0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(batch: int, shape: tuple[int, int, int] = DIGITS, seed: int = 0) -> Tensor:
    return torch.rand(batch, *shape, generator=torch.Generator().manual_seed(seed))


@lru_cache
def model(**settings: object) -> VMoE:
    """A V-MoE for the digits whose experts and head are no longer those of a fresh one, in float64, eval mode."""
    torch.manual_seed(0)
    made = frozen(awake(MODELS.get("v-moe").make(10, DIGITS, **settings)).double())
    assert isinstance(made, VMoE)
    return made


def layer(experts: int = 4, top_k: int = 2, hidden: int = 6, capacity: float = 1.05) -> TokenMoE:
    made = awake(TokenMoE(hidden, experts, top_k, capacity, 0.0)).double()
    assert isinstance(made, TokenMoE)
    return made


# Sizes.


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("vit", {"size": "S/32"}, 27_332_584),
        ("vit", {"size": "B/32"}, 88_224_232),
        ("vit", {"size": "B/16"}, 86_567_656),
        ("vit", {"size": "L/16"}, 304_326_632),
        ("vit", {"size": "B/16", "pre_logits": True}, 86_567_656 + 768 * 769),
        ("v-moe", {"size": "S/32"}, 27_332_584 + 2 * (7 * 2_099_712 + 4_096)),
        ("v-moe", {"size": "B/16", "where": "every-2"}, 86_567_656 + 6 * (7 * 4_722_432 + 6_144)),
        ("v-moe", {"size": "B/32", "where": "every-2", "experts": 32}, 88_224_232 + 6 * (31 * 4_722_432 + 24_576)),
    ],
)
def test_parameters_of_the_papers_sizes(name: str, settings: dict[str, object], count: int) -> None:
    """Per block 12 h² + 13 h, per MLP 8 h² + 5 h, a router h E; B/16 and L/16 are those of Dosovitskiy et al."""
    with torch.device("meta"):
        made = MODELS.get(name).make(1000, IMAGENET, **settings)
    assert sum(parameter.numel() for parameter in made.parameters()) == count


@pytest.mark.parametrize(
    ("name", "settings", "millions"),
    [
        ("vit", {"size": "S/32"}, 36.5),
        ("vit", {"size": "B/16"}, 100.5),
        ("vit", {"size": "L/16"}, 323.1),
        ("v-moe", {"size": "S/32", "where": "every-2", "experts": 32}, 296.9),
        ("v-moe", {"size": "B/16", "where": "every-2", "experts": 32}, 979.0),
    ],
)
def test_parameters_as_published(name: str, settings: dict[str, object], millions: float) -> None:
    """Riquelme et al., 2021, count them with the head of JFT-300M's 18,291 classes behind a layer of pre-logits."""
    with torch.device("meta"):
        made = MODELS.get(name).make(18_291, IMAGENET, pre_logits=True, **settings)
    assert round(sum(parameter.numel() for parameter in made.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("size", "blocks", "hidden", "heads"),
    [("B+/32", 15, 832, 13), ("B++/32", 18, 896, 14), ("B+++/32", 21, 960, 15), ("L/32", 24, 1024, 16)],
)
def test_the_dense_ladder(size: str, blocks: int, hidden: int, heads: int) -> None:
    with torch.device("meta"):
        made = MODELS.get("vit-wide").make(1000, IMAGENET, size=size)
    dense = blocks * (12 * hidden**2 + 13 * hidden)
    rest = 3 * 32 * 32 * hidden + hidden + 50 * hidden + hidden + 2 * hidden + 1000 * (hidden + 1)
    assert sum(parameter.numel() for parameter in made.parameters()) == dense + rest
    assert made.get_submodule("blocks.0.attention").heads == heads


def test_the_digits_model_is_small_and_the_wide_one_costs_as_much() -> None:
    for shape in (DIGITS, CIFAR):
        wide, moe, plain = (
            count_flops(MODELS.get(name).make(10, shape), shape) for name in ("vit-wide", "v-moe", "vit")
        )
        assert wide is not None and moe is not None and plain is not None
        assert abs(wide / moe - 1) < 0.05 and plain < 0.85 * moe
    large = [
        MODELS.get(name).make(1000, (3, 64, 64), size=size) for name, size in (("vit", "S+/32"), ("v-moe", "S/32"))
    ]
    costs = [count_flops(one, (3, 64, 64)) for one in large]
    assert costs[0] is not None and costs[1] is not None and abs(costs[0] / costs[1] - 1) < 0.05


@pytest.mark.parametrize(
    ("where", "size", "blocks"),
    [
        ("last-2", "auto", [1, 3]),
        ("every-2", "B/2", [1, 3, 5, 7, 9, 11]),
        ("last-1", "auto", [3]),
        ("every-4", "auto", [3]),
    ],
)
def test_which_blocks_are_moe(where: str, size: str, blocks: list[int]) -> None:
    with torch.device("meta"):
        made = MODELS.get("v-moe").make(10, DIGITS, where=where, size=size)
    assert list(moe_layers(made)) == [f"blocks.{number}.mlp" for number in blocks]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "C/16"}, "size must be auto or NAME/PATCH such as S/32, NAME one of digits, .*; got 'C/16'"),
        ({"size": "B"}, "got 'B'"),
        ({"size": 3}, "got 3"),
        ({"size": "S/32"}, "images of 8×8 cannot be cut into patches of 32×32"),
        (
            {"where": "last-3"},
            r"where must be last-N \(N up to 2\) or every-N \(N up to 4\) for 4 blocks, got 'last-3'",
        ),
        ({"where": "first"}, "got 'first'"),
        ({"experts": 0}, "experts must be a whole number >= 1, got 0"),
        ({"top_k": 5}, "top_k must be between 1 and the 4 experts, got 5"),
        ({"capacity": 0}, "capacity must be a positive number, got 0"),
        ({"expert_dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_settings_are_one_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        MODELS.get("v-moe").make(10, DIGITS, **settings)
    assert "\n" not in str(caught.value)


# A fresh model is the paper's.


def test_fresh_experts_are_alike_and_the_head_says_nothing() -> None:
    torch.manual_seed(0)
    made = MODELS.get("v-moe").make(10, DIGITS).eval()
    for moe in moe_layers(made).values():
        first, *others = (expert.state_dict() for expert in moe.experts)
        assert all(torch.equal(first[key], other[key]) for other in others for key in first)
        assert len({expert.get_parameter("0.weight").data_ptr() for expert in moe.experts}) == len(moe.experts)
        assert moe.router.get_parameter("weight").shape == (4, 48) and "bias" not in moe.router.state_dict()
    torch.testing.assert_close(made(images(3)), torch.full((3, 10), -math.log(10)))


def test_the_dense_vit_is_torchvisions() -> None:
    """With the same weights: norm first, class token, learned positions, last norm, pre-logits with tanh."""
    ours = frozen(awake(MODELS.get("vit").make(10, (3, 8, 8), pre_logits=True)).double())
    theirs = torchvision.models.VisionTransformer(
        image_size=8, patch_size=2, num_layers=4, num_heads=3, hidden_dim=48, mlp_dim=192, num_classes=10,
        representation_size=48,
    )  # fmt: skip
    state = {key: value for key, value in ours.state_dict().items() if not key.startswith("normalize.")}
    for own, other in (
        (r"^embedding", "conv_proj"), (r"^positions", "encoder.pos_embedding"), (r"^norm", "encoder.ln"),
        (r"^head", "heads.head"), (r"^pre_logits\.0", "heads.pre_logits"),
        (r"^blocks\.", "encoder.layers.encoder_layer_"),
        (r"\.norm(\d)", r".ln_\1"), (r"attention\.qkv\.", "self_attention.in_proj_"),
        (r"attention\.out", "self_attention.out_proj"),
    ):  # fmt: skip
        state = {re.sub(own, other, key): value for key, value in state.items()}
    theirs.load_state_dict(state)
    for block in theirs.encoder.layers:
        block.mlp[1] = nn.GELU("tanh")  # flax's default
    x = images(4, (3, 8, 8)).double()
    torch.testing.assert_close(ours(x), theirs.double().eval()(2 * x - 1))


# Routing of tokens.


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_dispatch_equals_a_loop_over_tokens(top_k: int) -> None:
    moe, x = layer(top_k=top_k).eval(), normal(3, 5, 6).double()
    out = moe(x)
    for b in range(3):
        for t in range(5):
            probs = moe.router(x[b, t]).softmax(0).detach()
            best = sorted(range(4), key=lambda i, probs=probs: -float(probs[i]))[:top_k]
            expected = sum(probs[i] * moe.experts[i](x[b, t]) for i in best)
            torch.testing.assert_close(out[b, t], expected)
    seen: list[int] = []
    for expert in moe.experts:
        expert.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    moe(x)
    assert sum(seen) == 3 * 5 * top_k and len(seen) <= 4


def test_weights_are_the_softmax_values_themselves() -> None:
    moe, x = layer().eval(), normal(3, 5, 6).double()
    routing = moe.own_routing(x)
    probs = moe.router(x).softmax(-1)
    torch.testing.assert_close(routing.weights, probs * routing.selected)
    assert bool((routing.weights.sum(-1) < 1).all()) and bool((routing.selected.sum(-1) == 2).all())
    assert torch.equal(moe.soft_routing(x).weights, probs)
    torch.testing.assert_close(moe.straight_through_routing(x).weights, routing.weights)
    forced = moe.forced_routing(x, 2)
    assert forced.weights.shape == (3, 5, 4) and float(forced.weights[..., 2].min()) == float(
        forced.weights.sum(-1).max()
    )
    (found,) = torch.autograd.grad((combine(moe.experts, x, routing)).sum(), moe.router.get_parameter("weight"))
    assert float(found.abs().max()) > 0


def test_an_image_does_not_hang_on_its_neighbours() -> None:
    x = images(9).double()
    together = model()(x)
    for at in range(9):
        torch.testing.assert_close(model()(x[at : at + 1])[0], together[at], rtol=0, atol=1e-12)
    assert torch.equal(together, model()(x))


def test_replaying_the_record_is_the_model() -> None:
    x, other = images(5).double(), images(5, seed=1).double()
    tape = record(model(), x)
    assert {name: routing.weights.shape for name, routing in tape.items()} == dict.fromkeys(
        ("blocks.1.mlp", "blocks.3.mlp"), (5, 17, 4)
    )
    torch.testing.assert_close(replay(model(), x, tape), model()(x))
    moved = replay(model(), x, record(model(), other))
    assert not torch.allclose(moved, model()(x), atol=1e-4)
    rows = torch.tensor([4, 1])
    taken = {name: routing.take(rows) for name, routing in tape.items()}
    torch.testing.assert_close(replay(model(), x[rows], taken), model()(x)[rows])


def test_forced_expert_is_that_mlp_for_every_token() -> None:
    x = images(4).double()
    alone = copy.deepcopy(model())
    for number in (1, 3):
        block = alone.get_submodule(f"blocks.{number}")
        block.mlp = block.get_submodule("mlp.experts.2")
    torch.testing.assert_close(forced_forward(model(), x, 2), alone(x))


def test_the_switch_loss_counts_tokens() -> None:
    probs = normal(3, 5, 4).softmax(-1)
    selected = torch.zeros_like(probs, dtype=torch.bool).scatter(2, probs.topk(2, 2).indices, True)
    assert switch_loss(probs, selected) == switch_loss(probs.view(15, 4), selected.view(15, 4))


def test_the_smooth_view_is_every_expert_by_its_softmax() -> None:
    class Dense(nn.Module):
        def __init__(self, moe: TokenMoE) -> None:
            super().__init__()
            self.moe = moe

        def forward(self, x: Tensor) -> Tensor:
            outputs = torch.stack([expert(x) for expert in self.moe.experts], dim=-1)
            return (outputs * self.moe.router(x).softmax(-1).unsqueeze(2)).sum(-1)

    x, alone = images(4).double(), copy.deepcopy(model())
    for number in (1, 3):
        block = alone.get_submodule(f"blocks.{number}")
        block.mlp = Dense(block.mlp)  # type: ignore[arg-type]
    torch.testing.assert_close(make_view("smooth", model()).logits(x, torch.arange(4)), alone(x))
    torch.testing.assert_close(make_view("straight-through", model()).logits(x, torch.arange(4)), model()(x))


# Training: noise, capacity, losses.


def test_capacity_is_the_papers() -> None:
    assert [layer(4, 2, capacity=1.05).room(tokens) for tokens in (850, 17, 1)] == [448, 12, 4]
    assert layer(8, 1, capacity=1.5).room(400) == 76


def test_first_choices_come_first_then_the_order_of_tokens() -> None:
    # All five tokens want expert 0 most; the last two want expert 1 next, the first three expert 2.
    probs = torch.tensor([[[0.6, 0.1, 0.3]] * 3 + [[0.6, 0.3, 0.1]] * 2])
    kept = within_capacity(probs, 2, 4)
    assert kept[0].int().tolist() == [[1, 0, 1], [1, 0, 1], [1, 0, 1], [1, 1, 0], [0, 1, 0]]
    # A first choice takes the place before a second choice of an earlier token.
    late = torch.tensor([[[0.6, 0.4]] * 3, [[0.4, 0.6]] * 3])
    kept = within_capacity(late, 2, 4).view(6, 2)
    assert kept.int().tolist() == [[1, 1], [1, 0], [1, 0], [1, 1], [0, 1], [0, 1]]
    assert within_capacity(late, 2, 6).all()


def test_what_overflows_keeps_its_shortcut_and_evaluation_drops_nothing() -> None:
    moe = layer(4, 1, capacity=0.01)
    x = normal(2, 10, 6).double()
    torch.manual_seed(0)
    routing, _, noisy = moe.train().noisy_routing(x)
    assert routing.selected.sum(dim=(0, 1)).max() == moe.room(20) == 4
    dropped = ~routing.selected.any(dim=-1)
    assert 0 < int(dropped.sum()) < 20
    torch.manual_seed(0)
    out = moe(x)
    assert not bool(out[dropped].any()) and bool(out[~dropped].any(dim=-1).all())
    torch.testing.assert_close(routing.weights, noisy.softmax(-1) * routing.selected)
    assert bool(moe.eval().own_routing(x).selected.any(dim=-1).all())


def test_noise_has_the_spread_of_one_over_the_experts_and_is_for_training_only() -> None:
    moe, x = layer(5, 1).train(), normal(40, 50, 6).double()
    torch.manual_seed(1)
    _, logits, noisy = moe.noisy_routing(x)
    assert float((noisy - logits).detach().std()) == pytest.approx(1 / 5, rel=0.02)
    assert not torch.equal(moe.own_routing(x).weights, moe.own_routing(x).weights)
    moe.eval()
    assert torch.equal(moe.own_routing(x).weights, moe.own_routing(x).weights)


def test_importance_in_closed_form() -> None:
    uniform, single = torch.full((2, 3, 4), 0.25), F.one_hot(torch.zeros(2, 3, dtype=torch.int64), 4).float()
    assert float(importance_loss(uniform)) == 0
    # One of E has all: the variance of (n, 0, …, 0) over its squared mean is E - 1.
    assert float(importance_loss(single)) == pytest.approx(3)
    assert float(gshard_loss(uniform)) == pytest.approx(1) and float(gshard_loss(single)) == pytest.approx(4)


@pytest.mark.parametrize(("experts", "top_k"), [(3, 1), (4, 2)])
def test_load_in_closed_form(experts: int, top_k: int) -> None:
    logits = normal(2, 3, experts).double()
    noisy = logits + normal(2, 3, experts, seed=1).double() / experts
    means = [0.0] * experts
    for clean, loud in zip(logits.flatten(0, 1).tolist(), noisy.flatten(0, 1).tolist(), strict=True):
        threshold = sorted(loud, reverse=True)[top_k - 1]
        for i in range(experts):
            means[i] += (1 - norm.cdf((threshold - clean[i]) * experts)) / 6
    mean = sum(means) / experts
    expected = sum((one - mean) ** 2 for one in means) / experts / mean**2
    assert float(load_loss(logits, noisy, top_k)) == pytest.approx(expected, rel=1e-9)
    both = importance_loss(logits.softmax(-1)) + load_loss(logits, noisy, top_k)
    torch.testing.assert_close(auxiliary_loss(logits, noisy, top_k), both)


def test_two_experts_have_gshards_loss() -> None:
    logits = normal(2, 3, 2)
    noisy = logits + normal(2, 3, 2, seed=1)
    torch.testing.assert_close(auxiliary_loss(logits, noisy, 1), 2 * gshard_loss(noisy.softmax(-1)))


def test_the_objective_is_cross_entropy_and_half_a_percent_of_the_losses_of_the_same_pass() -> None:
    entry = MODELS.get("v-moe")
    made, x, y = model(), images(6).double(), torch.arange(6)
    assert entry.recipe is not None and entry.recipe.balance == 0.005
    noted: list[Tensor] = []
    originals = {moe: moe.noisy_routing for moe in moe_layers(made).values() if isinstance(moe, TokenMoE)}
    made.train()
    try:
        adversary = TrainingAdversary(made, ThreatModel("Linf", 0.1), entry.recipe, seed=0)
        torch.manual_seed(3)
        found = entry.objective[0].loss(made, x, y, adversary, entry.recipe)
        torch.manual_seed(3)
        for moe, original in originals.items():
            moe.noisy_routing = lambda features, original=original: noted.append(original(features)) or noted[-1]  # type: ignore[func-returns-value,method-assign,arg-type]
        expected = F.cross_entropy(made(x), y)
    finally:
        for moe in originals:
            del moe.noisy_routing
        made.eval()
    terms = [auxiliary_loss(logits, noisy, 2) for _, logits, noisy in noted]
    assert len(terms) == 2
    torch.testing.assert_close(found, expected + 0.005 * sum(terms))


SGD = {"optimizer": "sgd", "momentum": 0.0}
"""Without a state of its own, so that the largest models stay below 4 GB."""


@pytest.mark.parametrize(
    ("name", "shape", "settings", "changes"),
    [
        ("v-moe-at", CIFAR, {}, {}),
        ("vit-at", CIFAR, {}, {}),
        ("v-moe-at", IMAGENET, {"expert_dropout": 0.2}, {}),
        ("vit-at", IMAGENET, {"pre_logits": True}, {}),
        pytest.param("v-moe", IMAGENET, {"size": "B/16", "where": "every-2"}, SGD, marks=pytest.mark.slow),
        pytest.param("v-moe", IMAGENET, {"size": "B/32", "where": "every-2"}, SGD, marks=pytest.mark.slow),
        pytest.param("vit", IMAGENET, {"size": "B/16"}, SGD, marks=pytest.mark.slow),
        pytest.param("vit-wide", IMAGENET, {"size": "L/32"}, SGD, marks=pytest.mark.slow),
    ],
)
def test_one_step_of_training_at_the_papers_sizes(
    name: str, shape: tuple[int, int, int], settings: dict[str, object], changes: dict[str, Any]
) -> None:
    """Without a size, images of 224 pixels get S/32 with 8 experts in blocks 5 and 7."""
    entry = MODELS.get(name)
    assert entry.recipe is not None
    recipe = replace(entry.recipe, attack_steps=1, **changes)
    torch.manual_seed(0)
    made = entry.make(1000, shape, **settings).train()
    with torch.no_grad():
        made.get_parameter("head.weight").normal_(0, 0.02)
    # Copies of all of them would be as large as the model.
    before = {key: value.clone() for key, value in made.named_parameters() if value.numel() <= 2**20}
    adversary = TrainingAdversary(made, ThreatModel("Linf", 8 / 255), recipe, seed=0)
    optimizer = make_optimizer(list(made.parameters()), recipe)
    loss = entry.objective[-1].loss(made, images(3, shape), torch.arange(3), adversary, recipe)
    torch.autograd.backward(loss)
    optimizer.step()
    assert bool(torch.isfinite(loss)) and made.training
    still = {key for key, value in before.items() if torch.equal(made.get_parameter(key), value)}
    dead = {key for key, value in made.named_parameters() if value.grad is None or not value.grad.any()}
    assert still <= dead, "a parameter with a gradient did not move"
    layers = moe_layers(made)
    last = f"blocks.{len(made.get_submodule('blocks')) - 1}"  # type: ignore[arg-type]
    assert not dead & {"embedding.weight", "class_token", "positions", "head.weight", f"{last}.norm2.weight"}
    assert not dead & {f"{layer}.router.weight" for layer in layers}
    # A fresh expert may get no token of three images; no other part of a block may be left out.
    assert all(".mlp.experts." in key for key in dead)
    assert all(
        not {f"{layer}.experts.{number}.0.weight" for number in range(len(moe.experts))} <= dead
        for layer, moe in layers.items()
    )


@pytest.mark.parametrize("name", ["v-moe-at", "vit-at"])
def test_adversarial_training_comes_to_its_radius_by_steps(name: str) -> None:
    entry = MODELS.get(name)
    assert entry.recipe is not None
    spans = [phase.span for phase in entry.objective]
    assert (spans[0][0], spans[-1][1]) == (0, 1) and all(a[1] == b[0] for a, b in pairwise(spans))
    seen: list[Tensor] = []
    made, x, y = entry.make(10, DIGITS).train(), images(4), torch.arange(4)
    made.register_forward_pre_hook(lambda module, given: seen.append(given[0]))

    def adversary(forward: object, clean: Tensor, loss: object, **options: object) -> Tensor:
        return clean / 2

    for phase in entry.objective:
        phase.loss(made, x, y, adversary, entry.recipe)
    for given, share in zip(seen, (0, 0.25, 0.5, 0.75, 1), strict=True):
        torch.testing.assert_close(given, x - share * x / 2)


def test_adamw_decays_kernels_only() -> None:
    recipe = MODELS.get("vit").recipe
    assert recipe is not None and recipe.optimizer == "adamw"
    made = MODELS.get("vit").make(10, DIGITS)
    decayed, plain = make_optimizer(list(made.parameters()), recipe).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (recipe.weight_decay, 0.0)
    shapes = {len(parameter.shape) for parameter in decayed["params"]}
    assert shapes == {2, 4} and made.get_parameter("positions") in set(plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(made.parameters()))


# Attacks.


def test_every_view_carries_an_attack() -> None:
    views = applicable_views(model())
    assert views[:5] == ["whole", "router", "experts", "smooth", "straight-through"] and len(views) == 5 + 2 * 4
    assert default_views(model()) == ["whole", "router", "experts"] and routes_tokens(model())
    made, samples = frozen(awake(MODELS.get("v-moe").make(10, DIGITS))), digits(6)
    samples = replace(samples, y=made(samples.x).argmax(dim=1))
    threat = ThreatModel("Linf", 0.3)
    for view in (*views, "expert[3]"):
        (stage,) = cut(load_attack("pgd-10"), steps=2).stages
        out = attack(made, samples, threat, [stage], view)
        assert float((out.x_adv - samples.x).abs().max()) <= 0.3 + 1e-6 and bool((out.x_adv != samples.x).any()), view
        assert torch.equal(made(out.x_adv).argmax(dim=1) != samples.y, out.broken) or view != "whole"
        wrong = made(out.x_adv).argmax(dim=1) != samples.y
        assert bool(wrong[out.broken].all())


def test_an_expert_is_known_by_any_view_of_the_layer() -> None:
    x = images(3).double()
    index = torch.arange(3)
    engine = make_engine(model(), replace(digits(3), x=x), ThreatModel("Linf", 0.1), "expert[blocks.3.mlp:1]")
    expected = forced_forward(model(), x, 1, "blocks.3.mlp")
    torch.testing.assert_close(engine.view.logits(x, index), expected)


@pytest.mark.parametrize(("settings", "count"), [({}, 4), ({"where": "last-1", "experts": 3}, 3)])
def test_moe_adaptive_without_regions(settings: dict[str, object], count: int) -> None:
    plan = load_attack("moe-adaptive").fitted(model(**settings))
    experts = [f"apgd-ce on expert[{number}]" for number in range(count)]
    surrogates = ["apgd-ce on smooth", "apgd-t on straight-through"]
    assert [stage.stage for stage in plan.stages] == [
        "apgd-ce", *surrogates, "apgd-t", "fab-t", "square", "joint", *experts
    ]  # fmt: skip
    assert {name: "every token is routed by itself" in why for name, why in plan.skipped.items()} == {"region": True}
    standard = load_attack("autoattack").stages
    assert [stage for stage in plan.stages if stage in standard] == list(standard)


@pytest.mark.parametrize("name", ["region", "route-flip"])
def test_attacks_on_regions_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"attack {name!r} has nothing to do on this model: every token is routed"):
        load_attack(name).fitted(model())


def test_a_soft_v_moe_is_attacked_as_one() -> None:
    plan = load_attack("moe-adaptive").fitted(model(top_k=4))
    assert "every expert always runs" in plan.skipped["region"] and "joint" in {stage.stage for stage in plan.stages}


def test_the_card_says_that_tokens_are_routed() -> None:
    assert "MoE layer blocks.3.mlp: 4 experts of 18,672 parameters, top-2 per token, router of 192" in model_card(
        "v-moe"
    )


def test_a_dense_vit_has_no_routing() -> None:
    made: nn.Module = MODELS.get("vit").make(10, DIGITS)
    assert moe_layers(made) == {} and applicable_views(made) == ["whole"]
