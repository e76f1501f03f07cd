"""Optimisers and learning-rate schedules of a recipe."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from moebench.models._base import Recipe


def make_optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser; the schedule sets its rate."""
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=recipe.lr_low, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "adamw":
        kernels = [parameter for parameter in parameters if parameter.dim() in (2, 4)]
        others = [parameter for parameter in parameters if parameter.dim() not in (2, 4)]
        groups: list[dict[str, Any]] = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=recipe.lr_low, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr_high,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The recipe's schedule over so many optimiser steps."""
    if recipe.schedule == "triangular":
        half_cycle = max(steps // (2 * recipe.cycles), 1)
        return torch.optim.lr_scheduler.CyclicLR(
            optimizer, recipe.lr_low, recipe.lr_high, step_size_up=half_cycle, cycle_momentum=False
        )
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr_high
    warm = round(recipe.warmup * steps)
    lowest = recipe.lr_low / recipe.lr_high if recipe.lr_high > 0 else 0.0

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        left = 1 - min((step - warm) / max(steps - warm, 1), 1.0)
        fall = {
            "cosine": (1 - math.cos(math.pi * left)) / 2,
            "poly": left**0.9,
            "step": 0.1 ** ((left <= 0.5) + (left <= 0.25)),
            "constant": 1.0,
        }[recipe.schedule]
        return lowest + (1 - lowest) * fall if recipe.schedule != "constant" else 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
