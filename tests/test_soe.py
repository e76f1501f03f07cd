from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import Noted
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from moebench.errors import UsageError
from moebench.loading import idle_parameters
from moebench.models import MODELS
from moebench.models._moe import forced_forward, record, replay, smooth_forward, split_forward
from moebench.models.soe import SoE, SoERecipe, TwoTrunks, soe_loss, synergy_loss

SHAPE = (1, 8, 8)
RECIPE = SoERecipe(epochs=1, beta=1.0)


def soe(seed: int = 0, **settings: Any) -> SoE:
    """In eval mode, with logits so large that the confidences differ."""
    torch.manual_seed(seed)
    model = MODELS.get("soe").make(10, SHAPE, **settings).eval()
    assert isinstance(model, SoE)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.Linear):
                part.weight.mul_(20)
    return model


def images(batch: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(batch, *SHAPE, generator=torch.Generator().manual_seed(seed))


def labels(batch: int = 12) -> Tensor:
    return torch.arange(batch) % 10


@torch.no_grad()
def rectified(model: SoE, x: Tensor) -> list[list[float]]:
    """R_i(x) by hand, sample by sample."""
    table = []
    for image in x:
        row = []
        for expert in model.moe.experts:
            answer = expert(2 * image.unsqueeze(0) - 1)[0]
            row.append(float(answer[:-1].softmax(0).max() / (1 + (-answer[-1]).exp())))
        table.append(row)
    return table


class Calls:
    """Counts the experts' forward passes."""

    def __init__(self, model: SoE) -> None:
        self.count = 0
        for expert in model.moe.experts:
            expert.register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


# --- architecture and selection


@pytest.mark.parametrize("confidence", ["simple", "complex"])
@torch.no_grad()
def test_the_surest_sub_model_answers(confidence: str) -> None:
    model, x = soe(confidence=confidence), images(20)
    table = rectified(model, x)
    chosen = [row.index(max(row)) for row in table]
    assert len(set(chosen)) > 1
    for b, expert in enumerate(chosen):
        answer = model.moe.experts[expert](2 * x[b : b + 1] - 1)[0]
        torch.testing.assert_close(model(x)[b], answer[:-1])
    assert model.route(x)["moe"].selected.long().argmax(1).tolist() == chosen
    soft = model.route(x, soft=True)["moe"].weights
    torch.testing.assert_close(soft, torch.tensor(table).softmax(1))


@torch.no_grad()
def test_the_three_attacks_of_the_paper_are_views() -> None:
    model, x = soe(), images()
    outputs = model.answers(x)[..., :-1]
    weights = torch.tensor(rectified(model, x)).softmax(1)
    torch.testing.assert_close(smooth_forward(model, x), (weights.unsqueeze(2) * outputs).sum(1))
    for expert in range(3):
        torch.testing.assert_close(forced_forward(model, x, expert), outputs[:, expert])


def test_temperature_sharpens_the_mixture_and_leaves_the_choice() -> None:
    x = images()
    plain, sharp = soe(), soe(temperature=50.0)
    torch.testing.assert_close(plain(x), sharp(x))
    one, other = (model.route(x, soft=True)["moe"].weights for model in (plain, sharp))
    torch.testing.assert_close(other, (50 * torch.tensor(rectified(plain, x))).softmax(1))
    assert bool((other.amax(1) > one.amax(1)).all())


def test_experts_run_once_for_routing_and_output() -> None:
    model, x = soe(), images()
    calls = Calls(model)
    model(x)
    assert calls.count == 3
    smooth_forward(model, x, straight_through=True)
    assert calls.count == 6
    tape = record(model, x)
    assert calls.count == 9
    one = replay(model, x, {"moe": tape["moe"].take(torch.zeros(12, dtype=torch.int64))})
    assert calls.count == 10, "a replayed choice runs the chosen expert only"
    assert one.shape == (12, 10)


def test_nothing_of_a_pass_is_kept() -> None:
    """The same tensor with other values, or other weights, gives another answer."""
    model, x = soe(), images()
    before = model(x)
    x.mul_(0.5)
    torch.testing.assert_close(model(x), soe()(x))
    assert not torch.allclose(model(x), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    assert not torch.allclose(model(x), soe()(x))
    with pytest.raises(RuntimeError):
        model(torch.rand(2, 3, 8, 8))
    assert model.moe._kept is None


@torch.no_grad()
def test_one_image_routes_and_another_passes() -> None:
    model, a, b = soe(), images(seed=1), images(seed=2)
    chosen = [row.index(max(row)) for row in rectified(model, a)]
    expected = torch.stack([model.moe.experts[i](2 * b[n : n + 1] - 1)[0, :-1] for n, i in enumerate(chosen)])
    torch.testing.assert_close(split_forward(model, a, b), expected)


def test_all_sub_models_count_as_active() -> None:
    assert idle_parameters(soe()) == 0
    assert idle_parameters(MODELS.get("adv-moe").make(10, SHAPE)) == 3 * 24_666


def test_complex_confidence_has_a_trunk_of_its_own() -> None:
    model, x = soe(confidence="complex"), images()
    expert = model.moe.experts[0]
    assert isinstance(expert, TwoTrunks)
    before = expert(x)
    with torch.no_grad():
        for part in (expert.stages, expert.fc):
            for parameter in part.parameters():
                parameter.mul_(0.7)
    after = expert(x)
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])
    with torch.no_grad():
        expert.classes.conv1.weight.mul_(0.5)
    assert not torch.allclose(expert(x)[:, -1], after[:, -1]), "the stem is shared"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"confidence": "hard"}, "confidence must be 'simple' or 'complex', got 'hard'"),
        ({"temperature": 0}, "temperature must be a finite number > 0, got 0"),
        ({"experts": 0}, "top_k must be between 1 and the 0 experts"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MODELS.get("soe").make(10, SHAPE, **settings)


@pytest.mark.parametrize("change", [{"adversary": "both"}, {"weights": "even"}])
def test_impossible_recipes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="of a recipe must be"):
        replace(RECIPE, **change)


# --- objective


def by_hand(answers: Tensor, y: Tensor, temperature: float, recipe: SoERecipe) -> float:
    """The loss, number by number."""
    first = second = 0.0
    batch, count, _ = answers.shape
    for b in range(batch):
        losses, scores = [], []
        for i in range(count):
            p = answers[b, i, :-1].softmax(0)
            r = float(p.max() * answers[b, i, -1].sigmoid())
            true = float(p[y[b]])
            losses.append(-float(p[y[b]].log()))
            scores.append(temperature * r if recipe.weights == "confidence" else -losses[-1])
            second -= (true * torch.tensor(r).log().item() + (1 - true) * torch.tensor(1 - r).log().item()) / count
        weights = torch.tensor(scores).softmax(0).tolist()
        first += sum(w * loss for w, loss in zip(weights, losses, strict=True))
    return (first + recipe.beta * second) / batch


def answers_of(batch: int = 5, experts: int = 3, seed: int = 0) -> Tensor:
    return 2 * torch.randn(batch, experts, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weights", ["confidence", "loss"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_loss_is_its_formula(weights: Any, temperature: float) -> None:
    recipe = replace(RECIPE, beta=0.7, weights=weights)
    answers, y = answers_of(), torch.tensor([0, 1, 2, 3, 0])
    assert synergy_loss(answers, y, temperature, recipe).item() == pytest.approx(
        by_hand(answers, y, temperature, recipe), rel=1e-5
    )


def test_gradients_stop_where_the_paper_stops_them() -> None:
    """One image, two sub-models, the first right and the second wrong."""
    answers = torch.tensor([[[2.0, 0.0, 0.5], [0.0, 1.0, -0.3]]], requires_grad=True)
    y = torch.tensor([0])
    (found,) = torch.autograd.grad(synergy_loss(answers, y, 1.0, replace(RECIPE, beta=2.0)), answers)
    p = answers.detach()[0, :, :2].softmax(1)
    sure = answers.detach()[0, :, 2].sigmoid()
    r = p.amax(1) * sure
    weights = r.softmax(0)
    for i in range(2):
        # Cross-entropy: w (p - onehot). BCE with target t: (r - t) / (r (1 - r)) for r, a mean over two sub-models.
        expected = weights[i] * (p[i] - F.one_hot(y[0], 2))
        slope = (r[i] - p[i, 0]) / (r[i] * (1 - r[i]))
        if i == 1:
            largest = p[i, 1]
            expected = expected + slope * sure[i] * largest * (torch.tensor([0.0, 1.0]) - p[i])
        torch.testing.assert_close(found[0, i, :2], expected)
        torch.testing.assert_close(found[0, i, 2], slope * p[i].max() * sure[i] * (1 - sure[i]))


class Watch(TorchFunctionMode):
    """Notes under which circumstances binary cross-entropy is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, set[torch.dtype]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.binary_cross_entropy:
            self.seen.append((torch.is_autocast_enabled("cpu"), {part.dtype for part in args[:2]}))
        return func(*args, **(kwargs or {}))


def test_confidences_are_learnt_in_float32_under_autocast() -> None:
    """On a GPU, autocast raises an error for binary cross-entropy."""
    model, x, y = soe(), images(6), labels(6)
    exact = soe_loss(model, x, y, Noted(0.2), RECIPE)
    with Watch() as watch, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        found = soe_loss(model, x, y, Noted(0.2), RECIPE)
    assert watch.seen == [(False, {torch.float32})] * 2
    torch.testing.assert_close(found, exact, rtol=0.2, atol=0.2)
    torch.autograd.backward(found)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("adversary", ["together", "one-by-one"])
def test_total_is_clean_plus_adversarial(adversary: Any) -> None:
    model, x, y = soe(temperature=2.0), images(6), labels(6)
    recipe = replace(RECIPE, adversary=adversary)
    deltas = [0.2] if adversary == "together" else [0.2, -0.1, 0.3]
    noted = Noted(*deltas)
    found = soe_loss(model, x, y, noted, recipe)
    adv = torch.cat([(x + delta).clamp(0, 1) for delta in deltas])
    expected = synergy_loss(model.answers(x), y, 2.0, recipe)
    expected = expected + synergy_loss(model.answers(adv), y.repeat(len(deltas)), 2.0, recipe)
    torch.testing.assert_close(found, expected)
    assert noted.asked == [{"random_start": False}] * len(deltas)
    shown = [model(x)] if adversary == "together" else list(model.answers(x)[..., :-1].unbind(1))
    for forward, logits in zip(noted.forwards, shown, strict=True):
        torch.testing.assert_close(forward(x), logits)
    torch.autograd.backward(found)
    assert all(parameter.grad is not None for parameter in model.parameters())
