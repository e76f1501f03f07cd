"""Any attack class of torchattacks under its own name: `torchattacks:MIFGSM`.

Kim, "Torchattacks: A PyTorch Repository for Adversarial Attacks", 2020 (arXiv 2010.01950). The library works on whole
batches and draws from the global generators, so these attacks do not run as rows of the engine: `run_reference` hands
them batch after batch, each with a seed of its own, and shows every image that they look at to our judge.

eps is that of the threat model. A step size `alpha` keeps the class's own ratio of alpha to eps (1/4 for most, 1/5 for
PGDL2, 5/4 for FFGSM); all other settings are the class's defaults.
"""

from __future__ import annotations

import hashlib
import inspect
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from moebench.attacks._base import Attack, AttackPlan, Oracle, Rows, State
from moebench.attacks._projections import project
from moebench.errors import MoebenchError, RunError, UsageError
from moebench.registry import LIBRARY
from moebench.schema import NORMS, PaperCard, ThreatModel

KIM_2020 = PaperCard(
    title="Torchattacks: A PyTorch Repository for Adversarial Attacks",
    authors="Hoki Kim",
    venue="arXiv",
    year=2020,
    arxiv="2010.01950",
    bibtex="""@article{kim2020torchattacks,
  title = {Torchattacks: A PyTorch Repository for Adversarial Attacks},
  author = {Kim, Hoki},
  journal = {arXiv preprint arXiv:2010.01950},
  year = {2020}
}""",
)

UNUSABLE = {
    "LGV": "it trains models of its own and needs a training set; use it from Python",
    "MultiAttack": "it is made of other attacks; name those, separated by commas",
    "VANILA": "it returns the clean images, which every evaluation measures as SA",
}
"""Classes that are no attack on one model, and why."""

RADIUS = ("eps", "max_epsilon")
OURS = (*RADIUS, "norm", "n_classes", "seed", "verbose")
"""Parameters that the evaluation decides, and not the user or the class."""

PROBE = {"steps": 1, "num_iter_set": 1, "n_queries": 2, "max_iterations": 10, "binary_search_steps": 1, "nb_sample": 2}
"""The smallest budget with which a class still goes through its motions."""


@dataclass(frozen=True)
class Setting:
    """What an evaluation decides for a batch-wise attack."""

    threat: ThreatModel
    shape: tuple[int, int, int]
    classes: int
    batch_size: int


@dataclass(frozen=True)
class LibraryAttack(Attack):
    """One class of torchattacks.

    Args:
        kind: the class's name.
        changes: parameters of the class that differ from its defaults, as pairs.
        setting: what the evaluation decides; None until it is known.
    """

    kind: str
    changes: tuple[tuple[str, Any], ...] = ()
    setting: Setting | None = None

    @property
    @override
    def stage(self) -> str:
        return self.kind

    @override
    def parameters(self) -> dict[str, Any]:
        """The class, the library's version, the batch size, and every argument of the class but the seed."""
        facts = {"library": LIBRARY, "version": version(LIBRARY), "class": self.kind}
        if self.setting is None:
            return {**facts, **dict(self.changes)}
        return {**facts, "batch_size": self.setting.batch_size, **self.arguments()}

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the class, without the seed and what only concerns printing."""
        setting = self._bound()
        known = parameters_of(self.kind)
        chosen = {name: item.default for name, item in known.items() if name not in ("seed", "verbose")}
        radius = next((name for name in RADIUS if name in known), None)
        if radius is not None:
            if "alpha" in known:
                chosen["alpha"] = known["alpha"].default / known[radius].default * setting.threat.eps
            chosen[radius] = setting.threat.eps
        for name, value in (("norm", setting.threat.norm), ("n_classes", setting.classes)):
            if name in known:
                chosen[name] = value
        return {**chosen, **dict(self.changes)}

    def perturb(self, model: nn.Module, seed: int, ids: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The attack as a function of a batch's images (B, C, H, W) and labels (B,).

        Args:
            model: what the library attacks.
            seed: of the evaluation.
            ids: (B,) names of the batch's samples; with the seed they decide the random numbers.
        """
        names = f"{seed}/{self.kind}/{ids.tolist()}"
        own = int.from_bytes(hashlib.sha256(names.encode()).digest()[:4], "little")
        threat = self._bound().threat

        def run(x: Tensor, y: Tensor) -> Tensor:
            with seeded(own), torch.enable_grad():
                try:
                    x_adv: Tensor = self._made(model, own)(x.clone(), y.clone()).detach().to(x.dtype)
                except MoebenchError:
                    raise
                except Exception as error:
                    raise RunError(f"{LIBRARY}:{self.kind} failed: {_line(error)}") from error
            # A gradient of exactly zero makes some classes divide by zero.
            usable = torch.isfinite(x_adv).flatten(1).all(dim=1).view(-1, 1, 1, 1)
            return project(torch.where(usable, x_adv, x), x, threat)

        return run

    @override
    def budget(self) -> tuple[int, int]:
        """Passes on an image that cannot be broken, counted on a model that costs nothing."""
        changes = {**dict(self.changes), **({"abort_early": False} if "abort_early" in self.arguments() else {})}
        steps = self.arguments().get("steps", 0)
        forwards, backwards = _passes(replace(self, changes=tuple(changes.items())))
        # One for the clean image, one for the last, one to confirm a success.
        return max(forwards, steps) + 3, max(backwards, steps if backwards else 0)

    def _made(self, model: nn.Module, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
        known = parameters_of(self.kind)
        extra = {"seed": seed} if "seed" in known else {}
        made: Callable[[Tensor, Tensor], Tensor] = library_class(self.kind)(model, **self.arguments(), **extra)
        return made

    def _bound(self) -> Setting:
        if self.setting is None:
            raise RunError(f"{LIBRARY}:{self.kind} does not know its threat model yet; `bind_library` tells it")
        return self.setting

    # A whole batch is one call of the library: there are no steps that the engine could take.

    @override
    def start(self, rows: Rows, oracle: Oracle) -> State:
        self._whole_batches()

    @override
    def step(self, state: Any, rows: Rows, oracle: Oracle) -> Tensor:
        self._whole_batches()

    @override
    def final(self, state: Any) -> Tensor:
        self._whole_batches()

    def _whole_batches(self) -> NoReturn:
        raise RunError(f"{LIBRARY}:{self.kind} works on whole batches; `run_reference` runs it")


def library_plan(name: str, **changes: Any) -> AttackPlan:
    """The plan of `torchattacks:NAME`, with parameters of the class changed.

    Raises:
        UsageError: the class is no attack on one model, or has no such parameter.
    """
    kind = name.partition(":")[2]
    if kind in UNUSABLE:
        raise UsageError(f"attack {name!r} cannot be used here: {UNUSABLE[kind]}")
    known = parameters_of(kind)
    needed = [key for key, item in known.items() if item.default is inspect.Parameter.empty]
    if needed:
        raise UsageError(f"attack {name!r} cannot be used here: it needs {', '.join(needed)} of its own")
    if "L0" in norms_of(kind):
        raise UsageError(
            f"attack {name!r} cannot be used here: it changes few pixels by any amount (L0), and inside an Linf or L2 "
            "ball nothing of that is left"
        )
    free = sorted(set(known) - set(OURS))
    for key in changes:
        if key not in free:
            raise UsageError(f"attack {name!r} has no setting {key!r}; it has {', '.join(free) or 'none'}")
        _check_kind(name, key, changes[key], known[key].default)
    stage = LibraryAttack(kind, tuple(sorted(changes.items())))
    return AttackPlan(name, f"{kind} of torchattacks", (stage,), paper=KIM_2020)


def _check_kind(name: str, key: str, value: Any, default: Any) -> None:
    """Refuses a value that is of another kind than the class's default."""
    fitting = (int, float) if isinstance(default, float) else type(default)
    if default is None or (isinstance(value, fitting) and isinstance(value, bool) == isinstance(default, bool)):
        return
    raise UsageError(f"setting {key!r} of attack {name!r} takes a value like {default!r}, got {value!r}")


def bind_library(
    plan: AttackPlan, threat: ThreatModel, shape: tuple[int, int, int], classes: int, batch_size: int
) -> AttackPlan:
    """The plan with its classes of torchattacks told what they attack, and tried out on a model that costs nothing.

    Raises:
        UsageError: a class searches the ball of another norm, or does not work on such images or so many classes.
    """
    setting = Setting(threat, shape, classes, batch_size)
    stages = tuple(
        replace(stage, setting=setting) if isinstance(stage, LibraryAttack) else stage for stage in plan.stages
    )
    for stage in stages:
        if isinstance(stage, LibraryAttack):
            _check(stage, setting)
    return replace(plan, stages=stages)


def _check(stage: LibraryAttack, setting: Setting) -> None:
    name, norms = f"{LIBRARY}:{stage.kind}", norms_of(stage.kind)
    if any(radius in parameters_of(stage.kind) for radius in RADIUS) and setting.threat.norm not in norms:
        ours = [norm for norm in NORMS if norm in norms]
        hint = f"give --norm {ours[0]}" if ours else "it cannot be used here"
        shown = " or ".join(norms) or "an unknown norm"
        raise UsageError(f"attack {name!r} searches the {shown} ball, not that of {setting.threat.norm}; {hint}")
    known = parameters_of(stage.kind)
    small = {**dict(stage.changes), **{key: value for key, value in PROBE.items() if key in known}}
    try:
        _passes(replace(stage, changes=tuple(small.items())))
    except RunError as error:
        given = f"images of {'×'.join(map(str, setting.shape))} in {setting.classes} classes"
        cause = str(error).partition("failed: ")[2][:150]
        raise UsageError(f"attack {name!r} of {LIBRARY} {version(LIBRARY)} does not work on {given}: {cause}") from None


def _passes(stage: LibraryAttack) -> tuple[int, int]:
    """Forward and backward passes per image on a model whose verdict nothing changes."""
    setting = stage._bound()
    model = Unmoved(setting.shape, setting.classes)
    x, y = torch.full((2, *setting.shape), 0.5), torch.zeros(2, dtype=torch.int64)
    stage.perturb(model, 0, torch.arange(2))(x, y)
    return -(-model.forwards // 2), -(-model.backwards // 2)


class Unmoved(nn.Module):
    """Says class 0 to every image, by a little less the brighter it is; counts its passes."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.shape = shape
        self.forwards = 0
        self.backwards = 0
        slope = torch.linspace(-1.0, 1.0, classes)
        self.slope = nn.Parameter(slope, requires_grad=False)
        self.bias = nn.Parameter(10.0 * (slope == slope[0]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"it hands the model images of {'×'.join(map(str, x.shape[1:]))}")
        self.forwards += len(x)
        self.backwards += len(x) if x.requires_grad else 0
        return x.flatten(1).mean(dim=1, keepdim=True) * self.slope + self.bias


@lru_cache
def library_class(kind: str) -> type[Any]:
    """The class of that name."""
    import torchattacks  # type: ignore[import-untyped]

    found: type[Any] = getattr(torchattacks, kind)
    return found


@lru_cache
def parameters_of(kind: str) -> dict[str, inspect.Parameter]:
    """The parameters of a class but the model, by name."""
    parameters = inspect.signature(library_class(kind)).parameters
    return {name: item for name, item in parameters.items() if name != "model"}


@lru_cache
def norms_of(kind: str) -> tuple[str, ...]:
    """The norms that a class says it works in: `Distance Measure : Linf, L2` in its docstring; none for pure noise."""
    said = re.search(r"Distance Measure\s*:\s*(.*)", library_class(kind).__doc__ or "")
    return () if said is None else tuple(norm for norm in ("Linf", "L2", "L1", "L0") if norm in said[1])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of torch, NumPy and Python, and puts them back as they were."""
    devices = list(range(torch.cuda.device_count()))
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def owners(x: Tensor, clean: Tensor) -> Tensor:
    """Which image of a batch each image that the library asks about was made from, (m,).

    Args:
        x: (m, C, H, W) images that the library hands to the model.
        clean: (B, C, H, W) the batch.

    The library asks about the whole batch, about copies of it (one after the other, or image by image), or about some
    of its images; it does not say which. A wrong guess costs an attack strength, never soundness: an image counts
    only inside the ball of the sample that it is judged for.
    """
    batch = len(clean)
    order = torch.arange(batch, device=clean.device)
    if len(x) == batch:
        return order
    if x.shape[1:] != clean.shape[1:]:
        return order[:1].expand(len(x))
    if len(x) % batch == 0:
        ways = [order.repeat(len(x) // batch), order.repeat_interleave(len(x) // batch)]
        far = [float((x - clean[way]).square().nansum()) for way in ways]
        return ways[0] if far[0] <= far[1] else ways[1]
    return torch.cdist(x.flatten(1), clean.flatten(1)).argmin(dim=1)


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
