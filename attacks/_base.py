"""What an attack is: a start and a step over a state whose tensors all have the sample as first dimension.

The engine owns the loop. It asks an attack to start rows (a row is one sample, or one sample and one target class),
advances all running rows by one step at a time, judges every image that the attack looked at, drops rows that are
broken or at their end, and fills the places with rows that wait. Because each row carries its own state and its own
random key, a row's trajectory does not depend on its neighbours.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from moebench.errors import UsageError
from moebench.registry import Registry, attack_registry, decorator_for
from moebench.schema import PaperCard, ThreatModel

Loss = Callable[[Tensor, "Rows"], Tensor]


@dataclass
class Rows:
    """The fixed facts of each running row.

    Attributes:
        index: (R,) number of the sample in the evaluated data.
        x: (R, C, H, W) clean image.
        y: (R,) label.
        target: (R,) class that the row aims at, -1 for untargeted rows.
        key: (R,) random key, see `_random`.
        rank: (R,) how many targets of the sample come before this one.
    """

    index: Tensor
    x: Tensor
    y: Tensor
    target: Tensor
    key: Tensor
    rank: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def take(self, rows: Tensor) -> Rows:
        return Rows(*(getattr(self, item.name)[rows] for item in fields(self)))

    def join(self, other: Rows) -> Rows:
        return Rows(*(torch.cat((getattr(self, item.name), getattr(other, item.name))) for item in fields(self)))


@dataclass
class State:
    """Base of an attack's state: every field is a tensor with the row as first dimension."""

    def take(self, rows: Tensor) -> Self:
        return type(self)(*(getattr(self, item.name)[rows] for item in fields(self)))

    def join(self, other: Self) -> Self:
        return type(self)(*(torch.cat((getattr(self, item.name), getattr(other, item.name))) for item in fields(self)))


class Oracle(ABC):
    """What an attack may ask of the model: always through the engine, which counts passes and judges the images."""

    threat: ThreatModel

    @property
    @abstractmethod
    def room(self) -> int:
        """Rows that run together; an attack may fill places that its own rows leave free."""

    @property
    @abstractmethod
    def repeatable(self) -> bool:
        """Whether the same image always gets the same logits."""

    @abstractmethod
    def logits(self, x: Tensor, rows: Rows, *, propose: bool = True) -> Tensor:
        """Logits (R, K) at x (R, C, H, W), without a gradient.

        `propose=False` leaves it to the attack to say which of the images are worth judging, by `propose`.
        """

    @abstractmethod
    def propose(self, x: Tensor, rows: Rows, logits: Tensor) -> None:
        """Has images judged that `logits` was asked for with `propose=False`."""

    @abstractmethod
    def gradient(self, x: Tensor, rows: Rows, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (R, K), loss (R,) and the gradient (R, C, H, W) of the summed loss at x."""


@dataclass(frozen=True)
class Attack(ABC):
    """An attack's settings; the fields of a subclass are its parameters, written to the store as they are."""

    @property
    @abstractmethod
    def stage(self) -> str:
        """Name of the stage in the store; also the name of the attack's random stream."""

    @property
    def view(self) -> str | None:
        """The view that this stage needs, whatever the attack runs on; None for the attack's own."""
        return None

    def unfit(self, model: nn.Module) -> str | None:
        """Why this stage would add nothing on a model; None where it has something to do."""
        return None

    def targets(self, logits: Tensor, y: Tensor) -> Tensor | None:
        """Target classes per sample in the order they are tried, (B, T); None for an untargeted attack.

        Args:
            logits: (B, K) of the attacked view on the clean images; B may be 0.
            y: (B,) labels.
        """
        return None

    @abstractmethod
    def start(self, rows: Rows, oracle: Oracle) -> State:
        """State before the first step."""

    @abstractmethod
    def step(self, state: Any, rows: Rows, oracle: Oracle) -> Tensor:
        """Advances each row by one iteration, in place; returns which rows have come to their end, (R,) bool."""

    @abstractmethod
    def final(self, state: Any) -> Tensor:
        """The image to keep of a row that was not broken (the one of highest loss), (R, C, H, W)."""

    @abstractmethod
    def budget(self) -> tuple[int, int]:
        """The most forward and backward passes that one sample can cost on the whole model."""

    def parameters(self) -> dict[str, Any]:
        """Every setting, defaults included."""
        return asdict(self)


Fit = Callable[[tuple[Attack, ...], nn.Module], tuple[Attack, ...]]
"""The stages for a model, made from those of the plan."""


@dataclass(frozen=True)
class AttackPlan:
    """A registered attack: the programs that run one after the other on the samples still standing.

    `views` is None for an attack that runs on the views the user asks for, or the only views it is defined on. `fit`
    gives the stages for a model where they depend on it, and `skipped` says by stage what was left out, and why.
    """

    name: str
    summary: str
    stages: tuple[Attack, ...]
    views: tuple[str, ...] | None = None
    paper: PaperCard | None = None
    min_classes: int = 2
    fit: Fit | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    def fitted(self, model: nn.Module) -> AttackPlan:
        """The plan as it runs on a model, without the stages that have nothing to do there.

        Raises:
            UsageError: no stage is left.
        """
        stages = self.stages if self.fit is None else self.fit(self.stages, model)
        reasons = {stage.stage: stage.unfit(model) for stage in stages}
        skipped = {name: why for name, why in reasons.items() if why is not None}
        kept = tuple(stage for stage in stages if stage.stage not in skipped)
        if not kept:
            raise UsageError(f"attack {self.name!r} has nothing to do on this model: {next(iter(skipped.values()))}")
        return replace(self, stages=kept, fit=None, skipped=skipped)

    def parameters(self) -> dict[str, Any]:
        """Every setting by stage; of a stage that was left out, the reason."""
        run: dict[str, Any] = {stage.stage: stage.parameters() for stage in self.stages}
        return run | {name: {"skipped": why} for name, why in self.skipped.items()}


@dataclass(frozen=True)
class AttackEntry:
    """What the decorator registers: builds the plan; keyword arguments of `settings` can be overridden.

    `pattern` makes it a family of attacks (see `Registry`): its named groups are settings that stand in the name, and
    `takes` says in words what they can be.
    """

    name: str
    summary: str
    build: Callable[..., tuple[Attack, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    views: tuple[str, ...] | None = None
    paper: PaperCard | None = None
    min_classes: int = 2
    fit: Fit | None = None
    pattern: str | None = None
    takes: str = ""

    def named(self, name: str) -> AttackEntry:
        """The attack of that name, which matches the family's pattern; whole numbers in it become integers."""
        match = re.fullmatch(self.pattern or "", name)
        assert match is not None
        found = {key: int(text) if text.isdigit() else text for key, text in match.groupdict().items()}
        return replace(self, name=name, settings={**self.settings, **found}, pattern=None)

    def plan(self, **settings: Any) -> AttackPlan:
        """The attack with all its settings bound.

        Raises:
            UsageError: a setting does not exist.
        """
        known = self.build.__kwdefaults__ or {}
        for key in settings:
            if key not in known:
                raise UsageError(
                    f"attack {self.name!r} has no setting {key!r}; it has {', '.join(sorted(known)) or 'none'}"
                )
        stages = self.build(**{**self.settings, **settings})
        return AttackPlan(self.name, self.summary, stages, self.views, self.paper, self.min_classes, self.fit)


ATTACKS: Registry[AttackEntry] = attack_registry()


def _entry(build: Callable[..., tuple[Attack, ...]], name: str, facts: dict[str, Any]) -> AttackEntry:
    return AttackEntry(name=name, build=build, **facts)


register_attack = decorator_for(lambda: ATTACKS, _entry)
"""Declares a function `f(*, setting=default, …) -> tuple[Attack, …]` as an attack.

The first argument is the attack's name; keyword arguments are the fields of `AttackEntry`.
"""
