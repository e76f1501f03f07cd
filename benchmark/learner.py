"""One optimiser step of training, and everything that it changes: what a checkpoint must hold to go on exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from moebench.models._base import Phase, Recipe
from moebench.optimizers import make_optimizer, make_schedule
from moebench.training_adversary import TrainingAdversary


class Learner:
    """A model with the optimisers and schedules of its phases, the loss scaler, the averaged weights, the adversary.

    Args:
        model: to train, on its device.
        phases: of the objective.
        recipe: for all of them.
        steps: optimiser steps of each phase.
        adversary: the attacks inside the objective.
        device: as torch names it.
    """

    def __init__(
        self,
        model: nn.Module,
        phases: Sequence[Phase],
        recipe: Recipe,
        steps: Sequence[int],
        adversary: TrainingAdversary,
        device: str,
    ) -> None:
        self.model = model
        self.phases = phases
        self.recipe = recipe
        self.adversary = adversary
        self.device = device
        self.optimizers = [make_optimizer(phase.parameters(model), phase.paced(recipe)) for phase in phases]
        self.schedulers = [
            make_schedule(optimizer, phase.paced(recipe), count)
            for phase, optimizer, count in zip(phases, self.optimizers, steps, strict=True)
        ]
        self.scaler = torch.amp.GradScaler(self._device_type, enabled=recipe.precision == "float16")
        self.average: AveragedModel | None = None
        if recipe.ema > 0:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)  # type: ignore[no-untyped-call]

    @property
    def shown(self) -> nn.Module:
        """What is validated and saved: the averaged weights, where the recipe averages them."""
        return self.model if self.average is None else self.average.module

    @property
    def _device_type(self) -> str:
        return torch.device(self.device).type

    def step(self, x: Tensor, y: Tensor, active: Sequence[bool]) -> list[float]:
        """One optimiser step of each active phase on a batch.

        Args:
            x: images (B, C, H, W).
            y: labels (B,).
            active: which phases take part.
        Returns: their losses. One that is not finite is the last and moves nothing.
        """
        losses = []
        steppers = zip(self.phases, self.optimizers, self.schedulers, strict=True)
        for phase, optimizer, scheduler in compress(steppers, active):
            self.model.zero_grad(set_to_none=True)
            with self._autocast():
                loss = phase.loss(self.model, x, y, self.adversary, self.recipe)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return losses
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            if self.recipe.clip > 0:
                self.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(phase.parameters(self.model), self.recipe.clip)
            self.scaler.step(optimizer)
            self.scaler.update()
            scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return losses

    def _autocast(self) -> AbstractContextManager[object]:
        if self.recipe.precision == "float32":
            return nullcontext()
        # No cache: a weight first cast without gradients (to rank experts, say) would pass none on afterwards.
        return torch.autocast(self._device_type, getattr(torch, self.recipe.precision), cache_enabled=False)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, random numbers included."""
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": self.scaler.state_dict(),
            "adversary_calls": self.adversary.calls,
            "delta": self.adversary.delta,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self._device_type == "cuda" else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to where `state_dict` was called."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.adversary.calls, self.adversary.delta = state["adversary_calls"], state["delta"]
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)
