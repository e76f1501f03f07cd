"""Adversarial examples for other models to be fooled by: which attacks make them, how, and where they are kept.

Every sample is attacked, and no attack stops at its first success, because what just fools the source transfers badly:
the image of highest loss counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moebench import __version__
from moebench.attacks import load_attack
from moebench.attacks._base import Attack, AttackPlan
from moebench.attacks._engine import Engine, Finished
from moebench.attacks._library import LibraryAttack
from moebench.attacks._reference import run_reference
from moebench.attacks._views import make_view
from moebench.attacks.fab import FAB
from moebench.errors import UsageError
from moebench.evaluation import Listener, Prepared, Progress
from moebench.example_cache import keep_examples, read_examples
from moebench.schema import PROTOCOL_VERSION, SUITE_VERSION, is_protocol
from moebench.threat import within


@dataclass
class Source:
    """A model with the attack on it; makes the examples when they are first asked for."""

    prepared: Prepared
    plan: AttackPlan
    fresh: bool
    tell: Listener | None
    examples: str = "not needed"
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The model's name in the store."""
        return self.prepared.loaded.record.name

    @property
    def origin(self) -> dict[str, Any]:
        """All that decides the examples, but for data and threat model: the parameters of the stored cells."""
        loaded = self.prepared.loaded
        return {
            "source": self.name,
            "source_weights": loaded.checkpoint.sha256,
            "source_code": loaded.code,
            "source_view": self.view,
            "attack": self.plan.name,
            "attack_parameters": self.plan.parameters(),
            "crafting": "no stop at the first success, image of highest loss",
        }

    @property
    def view(self) -> str:
        """What of the source the attack sees: the whole of it, unless the attack is defined on another view."""
        return "whole" if self.plan.views is None else self.plan.views[0]

    @cached_property
    def images(self) -> Tensor:
        """The examples (N, C, H, W) of all samples."""
        prepared = self.prepared
        facts = {
            **self.origin,
            "data": prepared.protocol.data_sha256,
            "ids": prepared.samples.ids.tolist(),
            "threat": prepared.threat,
            "seed": prepared.spec.seed,
            "protocol": PROTOCOL_VERSION,
            "suite": SUITE_VERSION,
            "version": __version__,
        }
        clean = prepared.samples.x
        kept = None if self.fresh else read_examples(facts, tuple(clean.shape))
        if kept is not None:
            kept = kept.to(clean.device)
            if bool(within(kept, clean, prepared.threat).all()):
                self.examples = "kept from before"
                return kept
        x_adv = craft(prepared, self.plan.stages[0], self.view, self.tell)
        self.examples = "made"
        try:
            keep_examples(facts, x_adv)
        except OSError as error:
            self.notes.append(f"the examples of {self.name} could not be kept ({error.strerror or error})")
        return x_adv


def source_plan(name: str) -> AttackPlan:
    """The attack of that name, if examples for other models can be made with it.

    Raises:
        UsageError: unknown name, or an attack that has several stages or does not look for a high loss.
    """
    plan = load_attack(name)
    why = None
    if is_protocol(plan.name):
        why = "it is a published protocol, whose images need not be valid"
    elif len(plan.stages) > 1:
        why = f"it runs {len(plan.stages)} attacks one after the other on what still stands"
    elif isinstance(plan.stages[0], FAB):
        why = "it looks for the nearest boundary of its model, not for a high loss"
    elif plan.stages[0].view is not None:
        why = "it attacks the routing of its model"
    if why is not None:
        raise UsageError(
            f"attack {name!r} makes no examples for other models: {why}; choose one such as pgd-50, apgd-ce, apgd-t or "
            "torchattacks:MIFGSM"
        )
    return plan


def craft(prepared: Prepared, stage: Attack, view: str, listener: Listener | None = None) -> Tensor:
    """Adversarial examples of all samples on a model, for other models to be fooled by: (N, C, H, W) in the ball.

    Args:
        prepared: the source model with its samples and threat model.
        stage: the attack; a class of torchattacks gives its last image, any other the one of highest loss.
        view: what of the source it sees.
        listener: told after each batch of finished samples.
    """
    samples, name = prepared.samples, prepared.loaded.record.name
    shown = make_view(view, prepared.search.module)
    shown.prepare(samples.x)
    engine = Engine(
        prepared.loaded.module,
        shown,
        samples,
        prepared.threat,
        batch_size=prepared.batch_size,
        seed=prepared.spec.seed,
        screen=prepared.search.module,
        stop_when_broken=False,
    )
    x_adv, done = samples.x.clone(), 0

    def sink(finished: Finished) -> None:
        nonlocal done
        x_adv[finished.index] = finished.x_adv
        done += len(finished.index)
        if listener is not None:
            listener(Progress(0, 0, f"{stage.stage} for transfer", name, "examples", done, len(samples), len(samples)))

    everything = torch.arange(len(samples), device=samples.x.device)
    if isinstance(stage, LibraryAttack):
        run_reference(stage, engine, everything, sink)
    else:
        engine.run_stage(stage, everything, sink)
    return x_adv
