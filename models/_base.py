"""What a paper's file declares: builders with their names, recipes and training objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from moebench.errors import UsageError
from moebench.registry import Registry, decorator_for, model_registry
from moebench.schema import ModelRecord, PaperCard

Shape = tuple[int, int, int]
Forward = Callable[[Tensor], Tensor]


class Adversary(Protocol):
    """The inner maximisation of adversarial training, given to an objective by the training loop."""

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        loss: Callable[[Tensor], Tensor],
        *,
        steps: int | None = None,
        eps: float | None = None,
        step_size: float | None = None,
        random_start: bool = True,
    ) -> Tensor:
        """Images inside the threat model around x that raise `loss(forward(x_adv))`, a (B,) tensor.

        Args:
            forward: from images (B, C, H, W) to what the loss takes.
            x: images in [0, 1].
            loss: to raise, per sample.
            steps: PGD steps instead of the recipe's; 1 with `step_size=eps` and no random start is FGSM.
            eps: radius instead of the threat model's.
            step_size: instead of the recipe's share of eps.
            random_start: start at a random point of the ball instead of x.
        """
        ...


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: plain data, printed by `moebench show` and stored with the weights.

    A paper with settings of its own subclasses it. Schedules run over the span of a phase: "triangular" swings between
    `lr_low` and `lr_high`, a triangle per `1 / cycles` of it, as in RT-ER's code; the others start at `lr_high`, rise
    to it over `warmup` of the span, and fall to `lr_low` by a cosine, by the power 0.9 ("poly"), or not at all. The
    digits' rates are ten to twenty times RT-ER's, because a digits run has a third of its optimiser steps.

    Attributes:
        epochs: passes over the training data; 0 for a model that is composed of trained ones.
        optimizer: "adam", "adamw" or "sgd" (Nesterov if `nesterov`), with `momentum` and `weight_decay`; adamw decays
            the weights of dense layers and convolutions only.
        clip: largest norm of the gradient, 0 for none.
        attack_steps, step_fraction: PGD's number of steps, of so much of eps each.
        beta: weight of the objective's second term.
        balance: weight of the loss that spreads the load over the experts.
        translate, flip: augmentation: shifts by up to so many pixels, horizontal flips.
        select: which validation number picks the epoch: clean accuracy, robust accuracy or their mean.
        init_from: models whose weights start a part of this one, by the part's name.
    """

    epochs: int
    batch_size: int = 50
    lr_low: float = 5e-4
    lr_high: float = 2e-3
    cycles: int = 4
    attack_steps: int = 10
    step_fraction: float = 0.25
    beta: float = 6.0
    balance: float = 0.0
    translate: int = 1
    select: Literal["clean", "robust", "mean"] = "robust"
    init_from: Mapping[str, str] = field(default_factory=dict)
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: Literal["triangular", "cosine", "poly", "constant"] = "triangular"
    warmup: float = 0.0
    clip: float = 0.0
    flip: bool = False

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch_size", 1), ("cycles", 1), ("attack_steps", 0), ("translate", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UsageError(f"{name} of a recipe must be a whole number >= {least}, got {value!r}")
        for name in (
            "lr_low", "lr_high", "step_fraction", "beta", "balance", "momentum", "weight_decay", "warmup", "clip",
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise UsageError(f"{name} of a recipe must be a finite number >= 0, got {value!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} of a recipe must be {_either(choices)}, got {getattr(self, name)!r}")
        for name in ("nesterov", "flip"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"{name} of a recipe must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.init_from, Mapping):
            raise UsageError(f"init_from of a recipe must map parts to model names, got {self.init_from!r}")


CHOICES: Mapping[str, tuple[str, ...]] = {
    "select": ("clean", "robust", "mean"),
    "optimizer": ("adam", "adamw", "sgd"),
    "schedule": ("triangular", "cosine", "poly", "constant"),
}


def _either(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


PhaseLoss = Callable[[Any, Tensor, Tensor, Adversary, Recipe], Tensor]


@dataclass(frozen=True)
class Phase:
    """One optimiser step per batch, with an optimiser of its own.

    Attributes:
        loss: maps (model, images, labels, adversary, recipe) to the scalar to lower.
        part: the part of the model that it trains, "" for all of it.
        span: when it is active, as shares of the epochs: (0, 0.6) is pre-training, (0.6, 1) what follows it. The
            epoch that is kept comes from those in which the last phase is active.
    """

    loss: PhaseLoss
    part: str = ""
    span: tuple[float, float] = (0.0, 1.0)

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        module = model.get_submodule(self.part) if self.part else model
        return [parameter for parameter in module.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class ModelEntry:
    """A registered model: its builder with the settings that make this variant, its recipe and its objective.

    `version` is raised when the same weights compute something else than before; stored results then no longer count.
    """

    name: str
    summary: str
    family: str
    training: str
    build: Callable[..., nn.Module]
    routing: str | None = None
    paper: PaperCard | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    objective: tuple[Phase, ...] = ()
    version: int = 1

    def make(self, num_classes: int, shape: Shape, **settings: Any) -> nn.Module:
        """A model with fresh weights for images of that shape.

        Raises:
            UsageError: a setting does not exist or has an impossible value.
        """
        known = self.build.__kwdefaults__ or {}
        for key in settings:
            if key not in known:
                raise UsageError(
                    f"model {self.name!r} has no setting {key!r}; it has {', '.join(sorted(known)) or 'none'}"
                )
        try:
            return self.build(num_classes, shape, **{**self.settings, **settings})
        except (TypeError, ValueError) as error:
            if not settings:
                raise
            given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
            raise UsageError(f"model {self.name!r} cannot be built with {given}: {error}") from error

    def record(self) -> ModelRecord:
        return ModelRecord(self.name, self.family, self.summary, self.training, self.routing, self.paper)


class Normalize(nn.Module):
    """Maps [0, 1] images to the network's zero-centred range; part of the model, so that attacks see pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float = 0.5, std: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class NormalizedClassifier(nn.Module):
    """A classifier for [0, 1] images: normalisation, then a network that gives logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalize(x))
        return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode (BatchNorm's running statistics) for a while; the mode from before comes back, whatever happens."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


MODELS: Registry[ModelEntry] = model_registry()


def _entry(build: Callable[..., nn.Module], name: str, facts: dict[str, Any]) -> ModelEntry:
    return ModelEntry(name=name, build=build, **facts)


register_model = decorator_for(lambda: MODELS, _entry)
"""Declares a builder `f(num_classes, shape, *, setting=default, …) -> nn.Module` as a model.

The first argument is the model's name; keyword arguments are the fields of `ModelEntry`. The builder is a plain
function whose keyword-only arguments are the model's settings.
"""
