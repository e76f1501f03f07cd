"""`moebench certify`: margins on clean and attacked images, estimated radii, and a certificate where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moebench.attacks._passes import batches
from moebench.cells import run_cell
from moebench.errors import UsageError
from moebench.evaluation import EvalSpec, Listener, Prepared, cell_work, prepare
from moebench.margins import (
    Forward,
    certifiable,
    certified_radius,
    estimated_radius,
    lipschitz_estimate,
    margins,
    rivals,
)
from moebench.models.rt_er import DualModel
from moebench.planning import parse_attacks

LEVELS = (5, 25, 50, 75, 95)
"""Percentiles that are shown of what is measured per image."""


@dataclass(frozen=True)
class Spread:
    """Percentiles of a number per image, and the share of images on which it reaches a threshold."""

    percentiles: dict[str, float]
    reaching: float
    threshold: float


@dataclass(frozen=True)
class Certificate:
    """What was measured on n images; radii in units of the [0, 1] pixel scale, shares as fractions.

    Attributes:
        sa, standing: accuracy on clean images and under the attack.
        margins: of the logits F_y - max F_j, "clean" and "attacked"; they reach 0 where the prediction is right.
        estimated: the paper's radius with estimated constants, which is no certificate; it reaches eps on so many.
        certified: the proven radius; None where there is no bound for the model, and `why` says so.
        dual: for a dual model, the margins of F_R's probabilities, which must reach (1 - alpha) / alpha, and the
            paper's radius for dual models with estimated constants.
    """

    model: str
    dataset: str
    n: int
    norm: str
    eps: float
    attack: str
    points: int
    sa: float
    standing: float
    margins: dict[str, Spread]
    estimated: Spread
    certified: Spread | None
    why: str | None
    dual: dict[str, Spread] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object that `moebench certify --json` prints."""
        return asdict(self)


def certify(spec: EvalSpec, *, points: int = 8, listener: Listener | None = None) -> Certificate:
    """Measures margins and radii of a model; nothing is stored.

    Args:
        spec: model, data, threat model and one attack, which runs on the whole model.
        points: random points of the ball at which slopes are looked at, beside the image itself.
        listener: told after each batch of attacked samples.

    Raises:
        UsageError: something that was asked for cannot be done.
    """
    if points < 0:
        raise UsageError(f"--points must be at least 0, got {points}")
    plans = parse_attacks(spec.attacks)
    if len(plans) != 1:
        raise UsageError(f"certify takes one attack, got {len(plans)}")
    prepared = prepare(replace(spec, views=("whole",)), plans)
    plan, cell = prepared.cells[0]
    outcome = run_cell(cell_work(prepared, plan, cell, 1, listener), None, "", resume=False)[1]
    return _measured(prepared, outcome.x_adv, outcome.broken, points)


def _measured(prepared: Prepared, x_adv: Tensor, broken: Tensor, points: int) -> Certificate:
    model, samples, threat = prepared.loaded.module, prepared.samples, prepared.threat
    size = prepared.batch_size
    clean, attacked = _outputs(model, samples.x, size), _outputs(model, x_adv, size)
    bound, why = _certified(prepared)
    dual: dict[str, Spread] = {}
    if isinstance(model, DualModel):
        robust, alpha = _probabilities(model), model.alpha
        needed = (1 - alpha) / alpha
        p_clean, p_attacked = _outputs(robust, samples.x, size), _outputs(robust, x_adv, size)
        radius = _estimated(prepared, robust, p_clean, points, alpha)
        dual = {
            "margin of F_R, clean": _spread(margins(p_clean, samples.y), needed),
            "margin of F_R, attacked": _spread(margins(p_attacked, samples.y), needed),
            "estimated radius": _spread(radius, threat.eps),
        }
    return Certificate(
        model=prepared.loaded.record.name,
        dataset=prepared.dataset.name,
        n=len(samples),
        norm=threat.norm,
        eps=threat.eps,
        attack=prepared.cells[0][1].attack,
        points=points,
        sa=_share(prepared.clean_pred == samples.y),
        standing=_share(~broken),
        margins={
            "clean": _spread(margins(clean, samples.y), 0.0),
            "attacked": _spread(margins(attacked, samples.y), 0.0),
        },
        estimated=_spread(_estimated(prepared, model, clean, points), threat.eps),
        certified=None if bound is None else _spread(bound, threat.eps),
        why=why,
        dual=dual,
    )


def _probabilities(model: DualModel) -> Forward:
    return lambda x: model.robust(x).softmax(dim=1)


@torch.no_grad()
def _outputs(forward: Forward, x: Tensor, size: int) -> Tensor:
    return torch.cat([forward(part).float() for part in batches(x, size)])


def _estimated(
    prepared: Prepared, forward: Forward, outputs: Tensor, points: int, alpha: float | None = None
) -> Tensor:
    samples, classes = prepared.samples, rivals(outputs, prepared.samples.y)
    size, found = prepared.batch_size, []
    for start in range(0, len(samples), size):
        at = slice(start, start + size)
        fastest = lipschitz_estimate(
            forward, samples.x[at], classes[at], prepared.threat, samples.ids[at],
            points=points, seed=prepared.spec.seed,
        )  # fmt: skip
        found.append(estimated_radius(outputs[at], classes[at], fastest, alpha))
    return torch.cat(found)


@torch.no_grad()
def _certified(prepared: Prepared) -> tuple[Tensor | None, str | None]:
    """The proven radii, or why there are none."""
    samples, size = prepared.samples, prepared.batch_size
    try:
        bounds = certifiable(prepared.loaded.module)
        parts = [
            certified_radius(bounds, samples.x[start : start + size], samples.y[start : start + size])
            for start in range(0, len(samples), size)
        ]
    except UsageError as error:
        return None, str(error)
    return torch.cat(parts), None


def _spread(values: Tensor, threshold: float) -> Spread:
    return Spread(_percentiles(values), _share(values >= threshold), threshold)


def _percentiles(values: Tensor, levels: Sequence[int] = LEVELS) -> dict[str, float]:
    found = values.double().quantile(torch.tensor([level / 100 for level in levels], dtype=torch.float64))
    return {f"p{level}": float(value) for level, value in zip(levels, found.tolist(), strict=True)}


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
