"""Published protocols: each switch against a reference written by hand, and all of them off against our own attacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import (
    EPS,
    Gated,
    attack,
    digits,
    frozen,
    make_rows,
    trained_conv,
    trained_moe,
)
from typing_extensions import override

from moebench.attack_names import AttackName, options_of
from moebench.attacks import list_protocols, load_attack
from moebench.attacks._base import Attack, Oracle, Rows, State
from moebench.attacks._engine import Finished, Samples
from moebench.attacks._projections import random_start
from moebench.attacks._protocol import Protocol, Walk, run_protocol
from moebench.errors import RunError, UsageError
from moebench.models._base import Normalize
from moebench.models._moe import MoELayer
from moebench.published import CARDS, card_of, describe, explain, shared_settings, variants
from moebench.schema import ThreatModel, is_protocol

LINF = ThreatModel("Linf", EPS["Linf"])


@dataclass
class Scored:
    """What a protocol said of each sample."""

    broken: Tensor
    prediction: Tensor
    x_adv: Tensor
    forwards: Tensor
    backwards: Tensor


def score(
    protocol: Protocol | str, model: nn.Module, samples: Samples, threat: ThreatModel = LINF, **options: Any
) -> Scored:
    """Runs a protocol, by its name or as it is, on all samples."""
    stage = load_attack(protocol).stages[0] if isinstance(protocol, str) else protocol
    assert isinstance(stage, Protocol)
    n = len(samples)
    index = options.pop("index", torch.arange(n))
    out = Scored(
        torch.zeros(n, dtype=torch.bool), samples.y.clone(), samples.x.clone(), *torch.zeros(2, n, dtype=torch.int64)
    )
    seen = torch.zeros(n, dtype=torch.int64)

    def sink(done: Finished) -> None:
        seen.index_add_(0, done.index, torch.ones_like(done.index))
        out.broken[done.index] = done.broken
        out.prediction[done.index] = done.adv_pred
        out.x_adv[done.index] = done.x_adv
        out.forwards[done.index] = done.forwards
        out.backwards[done.index] = done.backwards

    run_protocol(stage, model, samples, threat, index, sink, **{"batch_size": 7, "seed": 0, **options})
    assert torch.equal(seen, torch.isin(torch.arange(n), index).long())
    return out


def walk_by_hand(
    model: nn.Module, samples: Samples, start: Tensor, steps: int, size: float, bound: Callable[[Tensor], Tensor]
) -> Tensor:
    """The last image of sign-gradient ascent on the cross-entropy."""
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(model(x_adv), samples.y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = bound(x_adv.detach() + size * gradient.sign())
    return x_adv


def in_ball(x: Tensor, *, project: bool = True, clip: bool = True) -> Callable[[Tensor], Tensor]:
    def bound(x_adv: Tensor) -> Tensor:
        x_adv = torch.min(torch.max(x_adv, x - LINF.eps), x + LINF.eps) if project else x_adv
        return x_adv.clamp(0, 1) if clip else x_adv

    return bound


# All switches off.


@pytest.mark.parametrize(
    ("protocol", "ours"),
    [
        ("published:rt-er[fp16=off,start=random,score=any,steps=8]", "pgd-8"),
        ("published:adv-moe[router_weight=0,straight_through=off,score=any,steps=8]", "pgd-8"),
        ("published:v-moe[start=random,step_fraction=1/4,project=on,clip=on,score=any,steps=8]", "pgd-8"),
        ("published:robust-experts[score=any,steps=8]", "pgd-8"),
        ("published:robust-experts[score=any,steps=1,start=clean,step_fraction=1]", "fgsm"),
        ("published:rt-er-autoattack[fp16=off,start=random,steps=12]", "apgd-ce[steps=12]"),
        ("published:rt-er-autoattack[fp16=off,start=random,steps=12,loss=dlr]", "apgd-dlr[steps=12]"),
    ],
)
def test_without_departures_a_protocol_is_our_attack(protocol: str, ours: str) -> None:
    model, samples = trained_moe(), digits(60)
    theirs = score(protocol, model, samples, seed=5)
    judged = attack(model, samples, LINF, load_attack(ours).stages, seed=5)
    assert torch.equal(theirs.broken, judged.broken) and bool(theirs.broken.any()) and not bool(theirs.broken.all())
    assert torch.equal(theirs.x_adv[theirs.broken], judged.x_adv[judged.broken])
    assert torch.equal(theirs.prediction, judged.adv_pred)


def test_all_off_is_what_the_last_row_of_an_ablation_runs() -> None:
    names = {card.name: variants(card)[-1].attack for card in CARDS}
    for card in CARDS:
        off = load_attack(names[card.name]).stages[0]
        assert isinstance(off, Protocol)
        assert (off.fp16, off.score, off.mode, off.router_weight, off.straight_through) == (
            *(False, "any", "eval", 0.0, False),
        )
        if isinstance(off.search, Walk):
            (ours,) = load_attack(card.counterpart).parameters().values()
            walk = off.search.parameters()
            assert walk == {**walk, "start": "random", "project": True, "clip": True}
            assert (walk["steps"], walk["step_fraction"]) == (ours["steps"], ours["step_fraction"])


# Each departure alone.


def test_only_the_last_image_counts() -> None:
    model, samples = trained_moe(), digits(80)
    common = "published:robust-experts[step_fraction=1,steps=4"
    last, on_the_way = score(f"{common}]", model, samples), score(f"{common},score=any]", model, samples)
    assert torch.equal(last.prediction, model(last.x_adv).argmax(dim=1))
    assert torch.equal(last.broken, last.prediction != samples.y)
    assert bool((on_the_way.broken >= last.broken).all()) and bool(last.broken.any())
    assert torch.equal(model(on_the_way.x_adv).argmax(dim=1) != samples.y, on_the_way.broken)


@dataclass
class ScriptState(State):
    x: Tensor
    step: Tensor


@dataclass(frozen=True)
class Script(Attack):
    """Looks at given offsets from the image, one after the other, and ends at the last without looking at it."""

    offsets: tuple[float, ...]

    stage = "script"

    @override
    def start(self, rows: Rows, oracle: Oracle) -> ScriptState:
        return ScriptState(rows.x + self.offsets[0], torch.zeros_like(rows.index))

    @override
    def step(self, state: ScriptState, rows: Rows, oracle: Oracle) -> Tensor:
        oracle.logits(state.x, rows)
        state.step = state.step + 1
        state.x = rows.x + self.offsets[int(state.step[0])]
        return state.step == len(self.offsets) - 1

    @override
    def final(self, state: ScriptState) -> Tensor:
        return state.x

    @override
    def budget(self) -> tuple[int, int]:
        return len(self.offsets), 0


class Bright(nn.Module):
    """Says class 1 to an image that is brighter than 1/2 on average."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(dim=1)
        return torch.stack((torch.zeros_like(mean), 10 * (mean - 0.5)), dim=1)


@pytest.mark.parametrize(
    ("offsets", "rule", "broken", "shown"),
    [
        ((0.4, 0.4, 0.0), "final", False, 0.0),
        ((0.4, 0.4, 0.0), "stale", True, 0.0),
        ((0.4, 0.4, 0.0), "any", True, 0.4),
        ((0.4, 0.0, 0.0), "stale", False, 0.0),
        ((0.4, 0.0, 0.0), "any", True, 0.4),
        ((0.0, 0.0, 0.4), "final", True, 0.4),
        ((0.0, 0.0, 0.4), "stale", False, 0.4),
        ((0.0, 0.0, 0.4), "any", True, 0.4),
        ((0.0, 0.3, 0.4), "any", True, 0.3),
    ],
)
def test_which_image_decides(offsets: tuple[float, ...], rule: Any, broken: bool, shown: float) -> None:
    samples = Samples(torch.full((3, 1, 2, 2), 0.3), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    found = score(Protocol("script", Script(offsets), score=rule), Bright(), samples)
    assert found.broken.tolist() == [broken] * 3 and found.prediction.tolist() == [int(broken)] * 3
    torch.testing.assert_close(found.x_adv, samples.x + shown)


def test_a_wrong_sample_that_the_attack_puts_right_counts_as_right() -> None:
    """As published code counts; moebench takes what is wrong without an attack for broken."""
    samples = Samples(torch.full((1, 1, 2, 2), 0.6), torch.zeros(1, dtype=torch.int64), torch.arange(1))
    found = score(Protocol("script", Script((0.0, -0.3))), Bright(), samples)
    assert found.broken.tolist() == [False] and found.prediction.tolist() == [0]


def test_the_stale_output_is_that_before_the_last_update() -> None:
    model, samples = trained_conv(), digits(60)
    walk = Walk(steps=3, step_fraction=1.0, start_at="clean")
    stale = score(Protocol("t", walk, score="stale"), model, samples)
    before = walk_by_hand(model, samples, samples.x, 2, LINF.eps, in_ball(samples.x))
    assert torch.equal(stale.prediction, model(before).argmax(dim=1))
    after = model(stale.x_adv).argmax(dim=1)
    assert bool((after != stale.prediction).any())


def test_the_constant_start_is_one_point_and_costs_a_step() -> None:
    model, samples = trained_conv(), digits(20)
    name = "published:rt-er[fp16=off,steps=3,step_fraction=0.1"
    one, two = score(f"{name}]", model, samples, seed=0), score(f"{name}]", model, samples, seed=1)
    assert torch.equal(one.x_adv, two.x_adv)
    lowest = (samples.x - LINF.eps).clamp(0, 1)
    by_hand = walk_by_hand(model, samples, lowest, 2, 0.1 * LINF.eps, in_ball(samples.x))
    torch.testing.assert_close(one.x_adv, by_hand, rtol=0, atol=1e-7)
    assert one.backwards.tolist() == [2] * 20
    one, two = (score(f"{name},start=random]", model, samples, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.x_adv, two.x_adv)
    start = random_start(samples.x, make_rows(samples, stream="pgd").key, LINF)
    by_hand = walk_by_hand(model, samples, start, 3, 0.1 * LINF.eps, in_ball(samples.x))
    torch.testing.assert_close(one.x_adv, by_hand, rtol=0, atol=1e-7)
    only = score("published:rt-er[fp16=off,steps=1]", model, samples)
    assert torch.equal(only.x_adv, lowest) and only.backwards.tolist() == [0] * 20


def test_where_the_constant_start_comes_from() -> None:
    """Noise mapped by (noise - mean) / std instead of noise / std, one step of any gradient, the first projection."""
    generator = torch.Generator().manual_seed(0)
    x, normalize, eps = torch.rand(5, 1, 8, 8, generator=generator), Normalize(), 8 / 255
    noise = (2 * torch.rand(x.shape, generator=generator) - 1) * eps
    z = normalize(x) + normalize(noise) + (eps / 4 / normalize.std) * torch.randn(x.shape, generator=generator).sign()
    low, high = normalize(x - eps), normalize(x + eps)
    pixels = torch.min(torch.max(z, low), high) * normalize.std + normalize.mean
    torch.testing.assert_close(pixels, x - eps)


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_projection_and_clipping_are_apart(project: bool, clip: bool) -> None:
    model, samples = trained_conv(), digits(20)
    words = f"step_fraction=1/2,steps=4,project={'on' if project else 'off'},clip={'on' if clip else 'off'}"
    found = score(f"published:v-moe[{words}]", model, samples)
    by_hand = walk_by_hand(model, samples, samples.x, 4, 0.5 * LINF.eps, in_ball(samples.x, project=project, clip=clip))
    torch.testing.assert_close(found.x_adv, by_hand, rtol=0, atol=1e-7)
    moved = float((found.x_adv - samples.x).abs().max())
    assert (moved <= LINF.eps + 1e-6) == project
    assert (float(found.x_adv.min()) >= 0 and float(found.x_adv.max()) <= 1) == clip


def test_the_published_v_moe_protocol_stays_in_the_ball_and_leaves_the_box() -> None:
    model, samples = trained_conv(), digits(20)
    found = score("published:v-moe", model, samples)
    # Forty additions in float32 already end 2e-6 outside, which our judge would refuse.
    assert float((found.x_adv - samples.x).abs().max()) <= LINF.eps + 1e-5
    assert float(found.x_adv.min()) < 0


# Float16.


class OneLayer(nn.Module):
    """z = W x + b, W of ones, so that float16 adds nothing but the rounding of the gradient at the logits."""

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]]))
            self.linear.bias.copy_(torch.tensor([margin, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        return logits


@pytest.mark.parametrize(
    ("settings", "moves"),
    [
        ("", False),
        ("fp16=off", True),
        ("batch=1", True),
        ("batch=4", True),
        ("batch=64", False),
        ("loss_scale=65536", True),
        ("fp16=off,batch=1", True),
    ],
)
def test_small_gradients_vanish_in_float16_unless_they_are_scaled(settings: str, moves: bool) -> None:
    """The label's logit leads by 13.5: 1 - p is 1.4e-6, and 2^-25 = 3e-8 is where float16 rounds to 0."""
    samples = Samples(torch.full((2, 1, 2, 2), 0.25), torch.zeros(2).long(), torch.arange(2))
    given = ",".join(filter(None, ("start=clean,steps=2", settings)))
    found = score(f"published:rt-er[{given}]", frozen(OneLayer(11.5)), samples)
    wanted = samples.x - 2 * 0.25 * LINF.eps if moves else samples.x
    torch.testing.assert_close(found.x_adv, wanted)


def test_the_gradient_at_the_logits_is_rounded_to_float16() -> None:
    """(p - y) / 512, by hand: some images of a confident model keep a gradient and some lose it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(200, 1, 2, 2, generator=generator)
    samples = Samples(x, torch.zeros(200).long(), torch.arange(200))
    model = frozen(OneLayer(8.0))
    found = score("published:rt-er[start=clean,steps=1]", model, samples)
    logits = model(x.half().float()).half().float()
    rounded = ((logits.softmax(dim=1) - F.one_hot(samples.y, 2)) / 512).half().float()
    moved = ((found.x_adv - x).flatten(1).abs().amax(dim=1) > 0) | (x.flatten(1).amin(dim=1) == 0)
    assert torch.equal(moved, (rounded[:, 0] - rounded[:, 1]) != 0)
    assert 0.1 < float(moved.float().mean()) < 0.9


def test_the_surer_a_network_the_fewer_images_move() -> None:
    model, samples = trained_conv(), digits(40)
    still = []
    for factor in (1.0, 3.0, 10.0):
        louder = trained_conv()
        louder.fc.weight.data *= factor  # type: ignore[union-attr,operator]
        louder.fc.bias.data *= factor  # type: ignore[union-attr,operator]
        found = score("published:rt-er[start=clean,steps=1]", louder, samples)
        still.append(float((found.x_adv == samples.x).flatten(1).all(dim=1).float().mean()))
    assert still[0] < still[1] < still[2] and still[2] > 0.5
    scaled = score("published:rt-er[start=clean,steps=1,fp16=off]", model, samples)
    assert not bool((scaled.x_adv == samples.x).flatten(1).all(dim=1).any())


def test_an_overflow_moves_nothing() -> None:
    samples = Samples(torch.full((1, 1, 2, 2), 0.5), torch.ones(1).long(), torch.arange(1))
    found = score("published:rt-er[start=clean,steps=2,batch=1,loss_scale=1000000]", frozen(OneLayer(2.0)), samples)
    assert bool(torch.isfinite(found.x_adv).all())


# The router.


def gated_samples() -> Samples:
    x = torch.tensor([[0.7, 0.8, 0.5, 0.5], [0.3, 0.8, 0.5, 0.5], [0.6, 0.2, 0.5, 0.5], [0.45, 0.4, 0.5, 0.5]])
    return Samples(x.view(4, 1, 2, 2), torch.tensor([1, 0, 0, 1]), torch.arange(4))


@pytest.mark.parametrize("weight", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("straight", [False, True])
def test_the_loss_on_the_router(weight: float, straight: bool) -> None:
    model, samples = frozen(Gated()), gated_samples()
    assert isinstance(model, Gated)
    words = f"router_weight={weight:g},straight_through={'on' if straight else 'off'},start=clean,steps=1"
    found = score(f"published:adv-moe[{words}]", model, samples)
    x = samples.x.clone().requires_grad_()
    probs = model.moe.router(x).softmax(dim=1)
    chosen = F.one_hot(probs.argmax(dim=1), 2)
    weights = chosen + (probs - probs.detach()) * chosen if straight else chosen
    outputs = torch.stack([expert(x) for expert in model.moe.experts], dim=1)
    logits = (weights.unsqueeze(2) * outputs).sum(dim=1)
    router = -probs.gather(1, (samples.y % 2).unsqueeze(1)).log().squeeze(1)
    loss = F.cross_entropy(logits, samples.y, reduction="none") + weight * router
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    wanted = (samples.x + 0.25 * LINF.eps * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(found.x_adv, wanted)
    gate_moves = bool((found.x_adv[:, 0, 0, 0] != samples.x[:, 0, 0, 0]).any())
    assert gate_moves == (weight > 0 or straight)


def test_a_loss_spent_on_the_router_breaks_less() -> None:
    model, samples = trained_moe(), digits(100)
    spent = score("published:adv-moe[straight_through=off]", model, samples)
    whole = score("published:adv-moe[straight_through=off,router_weight=0]", model, samples)
    assert int(spent.broken.sum()) < int(whole.broken.sum())


def test_a_dense_model_has_no_router() -> None:
    with pytest.raises(UsageError, match="its loss is about a router, and a dense model has none"):
        load_attack("published:adv-moe").fitted(trained_conv())
    load_attack("published:adv-moe").fitted(trained_moe())


def test_a_loss_of_whole_images_does_not_fit_routed_tokens() -> None:
    """Told before anything runs: the published model decides once per image."""
    model = nn.Sequential(MoELayer([nn.Linear(4, 4), nn.Linear(4, 4)], nn.Linear(4, 2), per_token=True))
    for name in ("published:adv-moe", "published:adv-moe[router_weight=0]"):
        with pytest.raises(UsageError, match="this model routes each token of an image"):
            load_attack(name).fitted(model)
    load_attack("published:adv-moe[router_weight=0,straight_through=off]").fitted(model)
    load_attack("published:v-moe").fitted(model)


def test_a_protocol_without_a_routers_loss_fits_any_model() -> None:
    load_attack("published:rt-er").fitted(trained_conv())


# Train mode.


def test_train_mode_couples_the_samples_of_a_block_and_leaves_the_model_alone() -> None:
    model, samples = trained_conv(), digits(24)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    name = "published:robust-experts[mode=train,batch=8,start=clean,steps=3,step_fraction=0.1]"
    found = score(name, model, samples, batch_size=5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()) and not model.training
    for at in torch.arange(24).split(8):
        part = Samples(samples.x[at], samples.y[at], samples.ids[at])
        own = trained_conv().train()
        by_hand = walk_by_hand(own, part, part.x, 3, 0.1 * LINF.eps, in_ball(part.x))
        torch.testing.assert_close(found.x_adv[at], by_hand, rtol=0, atol=1e-6)
    assert torch.equal(found.prediction, model(found.x_adv).argmax(dim=1))
    assert not torch.equal(found.x_adv, score(name.replace("mode=train,", ""), model, samples).x_adv)
    # A resumed run asks for some samples only, and meets the same blocks.
    some = torch.tensor([3, 9, 10, 23])
    again = score(name, model, samples, index=some)
    assert torch.equal(again.x_adv[some], found.x_adv[some])


@pytest.mark.parametrize("name", [*list_protocols(), "published:robust-experts[mode=train,batch=10]"])
def test_the_same_seed_gives_the_same_bits_and_leaves_no_trace(name: str) -> None:
    model, samples = trained_moe(), digits(20)
    kept = samples.x.clone()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    short = load_attack(name, steps=3)
    assert isinstance(short.stages[0], Protocol)
    one, two = (score(short.stages[0], model, samples) for _ in range(2))
    assert torch.equal(one.x_adv, two.x_adv) and torch.equal(one.broken, two.broken)
    assert torch.equal(samples.x, kept) and torch.equal(torch.get_rng_state(), state)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert one.x_adv.dtype == torch.float32


@pytest.mark.parametrize("name", ["published:rt-er[fp16=off,steps=5]", "published:v-moe[steps=5]"])
def test_a_samples_verdict_does_not_depend_on_its_neighbours(name: str) -> None:
    model, samples = trained_moe(), digits(30)
    all_at_once, alone = score(name, model, samples, batch_size=30), score(name, model, samples, batch_size=1)
    assert torch.equal(all_at_once.broken, alone.broken)
    torch.testing.assert_close(all_at_once.x_adv, alone.x_adv, rtol=0, atol=1e-5)


# What is said of them.


def test_every_protocol_has_a_card_and_every_switch_a_setting() -> None:
    assert [card.name for card in CARDS] == list_protocols()
    for card in CARDS:
        options = options_of(card.name)
        told = {key for switch in card.switches for key in switch.corrected}
        assert told | set(card.options) == set(options), card.name
        for switch in card.switches:
            defaults = {key: options[key].default for key in switch.corrected}
            assert defaults != switch.corrected or switch.present, switch.label
            assert switch.does and switch.changes
        (parameters,) = load_attack(card.name).parameters().values()
        assert {key: parameters[key] for key in options} == {key: option.default for key, option in options.items()}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_rows_of_an_ablation_differ_in_what_they_say(card: Any) -> None:
    rows = variants(card)
    assert (rows[0].attack, rows[0].kind, rows[-1].kind) == (card.name, "published", "none")
    plans = {row.attack: load_attack(row.attack) for row in rows}
    assert all(plan.name == name for name, plan in plans.items())
    whole = load_attack(rows[-1].attack)
    for switch in card.switches:
        (without,) = (row for row in rows if row.label == f"without: {switch.label}")
        (only,) = (row for row in rows if row.label == f"only: {switch.label}")
        for key, value in switch.corrected.items():
            (settings,) = plans[without.attack].parameters().values()
            assert settings[key] == value
            (settings,) = plans[only.attack].parameters().values()
            assert settings[key] != value
        (settings,), (clean,) = plans[only.attack].parameters().values(), whole.parameters().values()
        assert {key for key in clean if clean[key] != settings[key]} == set(switch.corrected)


def test_settings_given_with_an_ablation_hold_in_all_rows() -> None:
    card = card_of("published:rt-er[steps=7]")
    assert card is not None
    for row in variants(card, {"steps": 7}):
        assert "steps=7" in row.attack


def test_settings_that_a_switch_is_about_are_told_from_those_that_rows_share() -> None:
    assert shared_settings("published:rt-er[fp16=off,start=clean,steps=7]") == {"steps": 7}
    assert shared_settings("published:v-moe[project=on,steps=7]") == {"steps": 7}
    for card in CARDS:
        assert all(shared_settings(row.attack) == {} for row in variants(card))


def test_what_is_as_published_is_told_from_what_is_not() -> None:
    (parameters,) = load_attack("published:rt-er[fp16=off]").parameters().values()
    said = list(explain("published:rt-er[fp16=off]", {"rt-er": parameters}))
    assert "fp16=off  corrected: float16 gradients, loss not scaled" in said
    assert "start=constant  as published: constant start" in said
    assert any(line.startswith("steps=50") for line in said)
    assert list(explain("pgd-50", {"pgd": {"steps": 50}})) == []
    assert describe("published:rt-er[fp16=off]")[0] == "published:rt-er[fp16=off]"


def test_names_of_protocols_are_told_from_names_of_attacks() -> None:
    assert all(map(is_protocol, list_protocols()))
    assert is_protocol("published:rt-er[fp16=off]") and not is_protocol("pgd-50")
    assert str(AttackName("published:rt-er", {"fp16": False})) == "published:rt-er[fp16=off]"


def test_a_protocol_is_no_program_of_the_engine() -> None:
    with pytest.raises(RunError, match="scored by its own rule"):
        attack(trained_conv(), digits(3), LINF, load_attack("published:v-moe").stages)
