"""Small models of which everything is known, or that train in a moment, and the shortest way to attack them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from moebench.attacks import AttackPlan, list_attacks, load_attack
from moebench.attacks._base import Attack, Loss, Oracle, Rows
from moebench.attacks._engine import Engine, Finished, Samples, to_samples
from moebench.attacks._random import sample_keys
from moebench.attacks._training import TrainedAttack, Training
from moebench.attacks._views import View, make_view
from moebench.datasets import load_dataset
from moebench.models._moe import MoELayer, RoutedModel
from moebench.models.rt_er import ClassifierMoE, DualModel
from moebench.schema import Norm, ThreatModel

EPS: dict[Norm, float] = {"Linf": 0.1, "L2": 0.5}
"""Radii at which the trained toys lose some of their samples, not all."""


class LinearClassifier(nn.Module):
    """z = W x + b on the pixels as they are."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.bias = nn.Parameter(bias.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = x.flatten(1) @ self.weight.t() + self.bias
        return logits

    def distance(self, x: Tensor, norm: Norm) -> Tensor:
        """Distance of each image to the nearest decision boundary, (B,), where the box is far away."""
        z = self(x).double()
        best = z.argmax(dim=1)
        normals = self.weight.double()[best].unsqueeze(1) - self.weight.double()
        # Hölder: a step of norm d changes a linear form by at most d times the dual norm of its weights.
        dual = normals.abs().sum(dim=2) if norm == "Linf" else normals.square().sum(dim=2).sqrt()
        distance: Tensor = (z.gather(1, best.unsqueeze(1)) - z) / dual
        return distance.masked_fill(F.one_hot(best, z.shape[1]).bool(), float("inf")).amin(dim=1)


def linear_problem(classes: int, n: int, norm: Norm, eps: float, gap: float) -> tuple[LinearClassifier, Samples]:
    """A linear classifier and n samples whose distance to its boundary is not within `gap` (a share) of eps.

    Pixels stay so far from 0 and 1 that the box never matters at that radius.
    """
    generator = torch.Generator().manual_seed(7)
    model = LinearClassifier(torch.randn(classes, 16, generator=generator), torch.zeros(classes))
    x = 0.5 + 0.25 * torch.randn(60 * n, 1, 4, 4, generator=generator).clamp(-1, 1)
    model.bias.data = -model.weight.sum(dim=1) * 0.5
    distance = model.distance(x, norm)
    inside = (distance < eps * (1 - gap)).nonzero()[: n // 2]
    beyond = ((distance > eps * (1 + gap)) & (distance < 3 * eps)).nonzero()[: n // 2]
    assert len(inside) == len(beyond) == n // 2
    x = x[torch.cat((inside, beyond)).squeeze(1)]
    return model, Samples(x, model(x).argmax(dim=1), torch.arange(100, 100 + len(x)))


class Gated(RoutedModel):
    """Two linear experts and a linear gate on four pixels (1×2×2); two classes; everything by hand.

    Expert 0 says class 1 where x_1 > 0.5, expert 1 says class 0 there, and the gate sends an image to expert 0 where
    x_0 > 0.5. x_2 and x_3 are not looked at.
    """

    SLOPE = 20.0

    def __init__(self) -> None:
        super().__init__()
        gate = LinearClassifier(torch.tensor([[self.SLOPE, 0, 0, 0], [0.0, 0, 0, 0]]), torch.tensor([-10.0, 0]))
        plus = LinearClassifier(torch.tensor([[0.0, 0, 0, 0], [0, 1, 0, 0]]), torch.tensor([0.0, -0.5]))
        minus = LinearClassifier(torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 0]]), torch.tensor([-0.5, 0.0]))
        self.moe = MoELayer([plus, minus], gate)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.moe(x)
        return logits


class TinyConv(nn.Module):
    """Two convolutions, the first with BatchNorm, and a linear head, for 1×8×8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.fc = nn.Linear(12 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        logits: Tensor = self.fc(out.flatten(1))
        return logits


class TinyMoE(RoutedModel):
    """A top-1 layer of two convolutional experts inside a network; its routing depends on features, not on pixels."""

    def __init__(self, top_k: int = 1, experts: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.moe = MoELayer(
            [nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)) for _ in range(experts)],
            nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, experts)),
            top_k=top_k,
        )
        self.fc = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.moe(F.relu(self.stem(x))))
        logits: Tensor = self.fc(out.flatten(1))
        return logits


class DeepMoE(nn.Module):
    """A convolutional network with two MoE layers, the second behind the first; no shortcuts, no RoutedModel."""

    def __init__(self, top_k: int = 1, experts: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.first = self._layer(6, 8, 64, top_k, experts)
        self.second = self._layer(8, 8, 16, top_k, experts)
        self.fc = nn.Linear(8 * 4, 10)

    @staticmethod
    def _layer(channels: int, out: int, pixels: int, top_k: int, experts: int) -> MoELayer:
        return MoELayer(
            [nn.Conv2d(channels, out, 3, stride=2, padding=1) for _ in range(experts)],
            nn.Sequential(nn.Flatten(), nn.Linear(channels * pixels, experts)),
            top_k=top_k,
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.second(F.relu(self.first(F.relu(self.stem(x))))))
        logits: Tensor = self.fc(out.flatten(1))
        return logits


class InDouble(nn.Module):
    """A model that computes in float64, so that its logits do not depend on how a batch of convolutions is split."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x.double())
        return logits.float()


def soft_moe() -> ClassifierMoE:
    """Two whole classifiers under a soft gate."""
    return ClassifierMoE(10, (1, 8, 8), experts=2, top_k=2, router="trained")


def dual_moe() -> DualModel:
    """A dual model of two top-1 MoEs of two classifiers, mixed in the probabilities."""
    halves = [ClassifierMoE(10, (1, 8, 8), experts=2, top_k=1, router="trained") for _ in range(2)]
    return DualModel(halves[0], halves[1], 0.7, "probabilities")


def fit(model: nn.Module, epochs: int = 6) -> nn.Module:
    """Trains on the digits' train split for a second or two; returns the model frozen, in eval mode."""
    data = load_dataset("digits", split="train")
    x, y = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).view(-1, 50):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return frozen(model)


def frozen(model: nn.Module) -> nn.Module:
    """As the evaluation hands models to the engine."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return model.eval()


@lru_cache
def _trained(make: Callable[[], nn.Module], epochs: int = 6) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fit(make(), epochs)


def trained(make: Callable[[], nn.Module], epochs: int = 6) -> nn.Module:
    """What `make` makes, trained on the digits from a fixed seed; each caller gets its own copy."""
    return copy.deepcopy(_trained(make, epochs))


def trained_conv() -> nn.Module:
    """A `TinyConv` that knows the digits; each caller gets its own copy."""
    return trained(TinyConv)


def trained_moe() -> nn.Module:
    """A `TinyMoE` that knows the digits; each caller gets its own copy."""
    return trained(TinyMoE)


def digits(n: int) -> Samples:
    """The first n test digits."""
    data = load_dataset("digits", n=n)
    return to_samples(data.images, data.labels, data.ids, "cpu")


def subset(samples: Samples, index: Tensor | Sequence[int]) -> Samples:
    """Some of the samples, with their names."""
    at = torch.as_tensor(index, dtype=torch.int64)
    return Samples(samples.x[at], samples.y[at], samples.ids[at])


def make_rows(samples: Samples, *, stream: str = "test", target: Tensor | None = None, seed: int = 0) -> Rows:
    """One row per sample, keyed as the engine keys the first row of a stage's samples."""
    everything = torch.arange(len(samples))
    aim = torch.full_like(samples.y, -1) if target is None else target
    return Rows(
        **_known(
            Rows,
            index=everything,
            x=samples.x,
            y=samples.y,
            target=aim,
            key=sample_keys(seed, f"{stream}/0", samples.ids),
            rank=torch.zeros_like(everything),
        )
    )


def _known(kind: type[Any], **values: Any) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


class PlainOracle(Oracle):
    """Answers from the model alone: nothing is judged or dropped, so every row runs to its end."""

    room = 1
    repeatable = False

    def __init__(self, model: nn.Module, threat: ThreatModel) -> None:
        self.model = model
        self.threat = threat

    @override
    def logits(self, x: Tensor, rows: Rows, *, propose: bool = True) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.model(x)
        return out

    @override
    def propose(self, x: Tensor, rows: Rows, logits: Tensor) -> None:
        return

    @override
    def gradient(self, x: Tensor, rows: Rows, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = self.model(x)
        value = loss(out, rows)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        return out.detach(), value.detach(), gradient


@dataclass
class Attacked:
    """What came out, by sample; `handed` counts how often each stage handed each sample over."""

    broken: Tensor
    adv_pred: Tensor
    x_adv: Tensor
    handed: list[Tensor] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return float((~self.broken).float().mean())


def make_engine(model: nn.Module, samples: Samples, threat: ThreatModel, view: str = "whole", **options: Any) -> Engine:
    """An engine on a view of any model, with the view prepared."""
    shown: View = make_view(view, model)
    shown.prepare(samples.x)
    return Engine(model, shown, samples, threat, **options)


def attack(
    model: nn.Module,
    samples: Samples,
    threat: ThreatModel,
    stages: Sequence[Attack],
    view: str = "whole",
    **options: Any,
) -> Attacked:
    """Runs the stages one after the other on the samples still standing, as an evaluation does.

    Stages that learn are fitted on the first training digits.
    """
    engine = make_engine(model, samples, threat, view, **options)
    n = len(samples)
    out = Attacked(torch.zeros(n, dtype=torch.bool), samples.y.clone(), samples.x.clone())
    for stage in stages:
        stage = fitted(stage, model, threat, view, seed=options.get("seed", 0))
        handed = torch.zeros(n, dtype=torch.int64)
        out.handed.append(handed)

        def sink(done: Finished, handed: Tensor = handed) -> None:
            out.broken[done.index] = done.broken
            out.adv_pred[done.index] = done.adv_pred
            out.x_adv[done.index] = done.x_adv
            handed.index_add_(0, done.index, torch.ones_like(done.index))

        engine.run_stage(stage, (~out.broken).nonzero().squeeze(1), sink)
    return out


def fitted(stage: Attack, model: nn.Module, threat: ThreatModel, view: str = "whole", *, seed: int = 0) -> Attack:
    """The stage as it is run: fitted on the first training digits, if it is one that learns."""
    if isinstance(stage, TrainedAttack):
        return stage.fit(make_training(model, threat, view, seed=seed))
    return stage


def make_training(
    model: nn.Module, threat: ThreatModel, view: str = "whole", *, n: int = 60, seed: int = 0
) -> Training:
    """The first n training digits, as a stage that learns sees them."""
    return Training(training_digits(n), make_view(view, model), model, threat, seed)


@lru_cache
def training_digits(n: int) -> Samples:
    data = load_dataset("digits", split="train", n=n)
    return to_samples(data.images, data.labels, data.ids, "cpu")


SMALL = {"steps": 4, "queries": 25, "target_classes": 3, "pairs": 6, "epochs": 3, "restarts": 1}
"""A budget under which every attack still goes through all its motions."""


def distinct_attacks() -> list[str]:
    """One name of each kind of attack: pgd-10, pgd-20 and pgd-50 are the same once their budget is cut."""
    kinds = {(reduced(name).stages, load_attack(name).views): name for name in reversed(list_attacks())}
    return sorted(kinds.values())


def reduced(name: str, **budget: int) -> AttackPlan:
    """A registered attack with every stage's budget cut."""
    return cut(load_attack(name), **budget)


def cut(plan: AttackPlan, **budget: int) -> AttackPlan:
    """A plan with every stage's budget cut."""
    budget = budget or SMALL
    stages = tuple(replace(stage, **_known(type(stage), **budget)) for stage in plan.stages)
    return replace(plan, stages=stages)


def awake(model: nn.Module) -> nn.Module:
    """The model with noise on every parameter: a fresh V-MoE has equal experts and a head of zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model
