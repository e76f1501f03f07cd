"""What a paper's file declares: builders with their names, recipes and training objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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

    @property
    def eps(self) -> float:
        """The radius in force where a call names no other."""
        ...

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
        from_clean: bool = False,
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
            from_clean: add each step to x instead of to the point where its gradient was taken.
        """
        ...

    def carried(self, x: Tensor) -> Tensor:
        """The images x + δ, with one δ that all batches share and hand on (Free AT); its place in the batch is fixed.

        What is computed from them is part of the loss: the backward pass that gives the weights their gradient also
        moves δ, by one ascent step of eps inside the ball. δ begins at 0.

        Args:
            x: images in [0, 1], (B, C, H, W).
        Returns: images in [0, 1] within eps of x, same shape.
        """
        ...


class AdversaryOn:
    """An adversary whose attacks are made on other forward passes than those that the objective asks for.

    Args:
        adversary: makes the attacks.
        change: from the objective's forward pass to the one that is attacked.
    """

    def __init__(self, adversary: Adversary, change: Callable[[Forward], Forward]) -> None:
        self._adversary = adversary
        self._change = change

    @property
    def eps(self) -> float:
        """As the adversary's."""
        return self._adversary.eps

    def __call__(self, forward: Forward, x: Tensor, loss: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
        """As the adversary, on the changed pass."""
        return self._adversary(self._change(forward), x, loss, **options)

    def carried(self, x: Tensor) -> Tensor:
        """As the adversary's: the pass is the objective's own."""
        return self._adversary.carried(x)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: plain data, printed by `moebench show` and stored with the weights.

    A paper with settings of its own subclasses it. Schedules run over the span of a phase: "triangular" swings between
    `lr_low` and `lr_high`, a triangle per `1 / cycles` of it, as in RT-ER's code; the others start at `lr_high`, rise
    to it over `warmup` of the span, and fall to `lr_low` by a cosine, by the power 0.9 ("poly"), to a tenth of the way
    at half and again at three quarters ("step"), or not at all. The digits' rates are ten to twenty times RT-ER's,
    because a digits run has a third of its optimiser steps.

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
        ema: decay, per batch, of the moving average of the weights that is validated and saved; 0 for none.
        replays: optimiser steps in a row on each batch (m of Free AT).
        eps_fraction: radius of the attacks in training as a share of the threat model's; validation keeps to that.
        fast_step, fast_from: step of Fast AT in units of eps, and whether it is added to the random "start" (Wong et
            al.) or to the "clean" image.
        validate_every: epochs from one validation to the next; the last epoch is always validated.
        precision: of the optimiser's passes (autocast); attacks in training and validation stay in float32.
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
    schedule: Literal["triangular", "cosine", "poly", "step", "constant"] = "triangular"
    warmup: float = 0.0
    clip: float = 0.0
    flip: bool = False
    ema: float = 0.0
    replays: int = 1
    eps_fraction: float = 1.0
    fast_step: float = 1.25
    fast_from: Literal["start", "clean"] = "start"
    validate_every: int = 1
    precision: Literal["float32", "float16", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 0), ("batch_size", 1), ("cycles", 1), ("attack_steps", 0), ("translate", 0), ("replays", 1),
            ("validate_every", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UsageError(f"{name} of a recipe must be a whole number >= {least}, got {value!r}")
        for name in (
            "lr_low", "lr_high", "step_fraction", "beta", "balance", "momentum", "weight_decay", "warmup", "clip",
            "ema", "eps_fraction", "fast_step",
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise UsageError(f"{name} of a recipe must be a finite number >= 0, got {value!r}")
        if self.ema >= 1:
            raise UsageError(f"ema of a recipe must be less than 1, got {self.ema!r}")
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
    "schedule": ("triangular", "cosine", "poly", "step", "constant"),
    "fast_from": ("start", "clean"),
    "precision": ("float32", "float16", "bfloat16"),
}


def _either(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


PhaseLoss = Callable[[Any, Tensor, Tensor, Adversary, Any], Tensor]


@dataclass(frozen=True)
class Phase:
    """One optimiser step per batch, with an optimiser of its own.

    Attributes:
        loss: maps (model, images, labels, adversary, recipe) to the scalar to lower.
        part: the part of the model that it trains, "" for all of it.
        without: a part of that part that it leaves alone, "" for none.
        span: when it is active, as shares of the epochs: (0, 0.6) is pre-training, (0.6, 1) what follows it. The
            epoch that is kept comes from those in which the last phase is active.
        rate: share of the recipe's learning rates that it trains with, given the recipe.
    """

    loss: PhaseLoss
    part: str = ""
    span: tuple[float, float] = (0.0, 1.0)
    without: str = ""
    rate: Callable[[Any], float] | None = None

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        module = model.get_submodule(self.part) if self.part else model
        left = {id(one) for one in model.get_submodule(self.without).parameters()} if self.without else set()
        return [one for one in module.parameters() if one.requires_grad and id(one) not in left]

    def paced(self, recipe: Recipe) -> Recipe:
        """The recipe with the phase's own learning rates."""
        share = 1.0 if self.rate is None else self.rate(recipe)
        return recipe if share == 1 else replace(recipe, lr_low=share * recipe.lr_low, lr_high=share * recipe.lr_high)


@dataclass(frozen=True)
class ModelEntry:
    """A registered model: its builder with the settings that make this variant, its recipe and its objective.

    `version` is raised when the same weights compute something else than before; stored results then no longer count.
    `regularize` adds the model's own terms (such as its load-balancing losses) to the phases of a general objective
    that is put on it; by default `recipe.balance` times the switch loss.
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
    regularize: Callable[[tuple[Phase, ...]], tuple[Phase, ...]] | None = None

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
