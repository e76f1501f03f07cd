"""Margins of a classifier and how fast they can fall: the robustness bounds of RT-ER's paper, estimated or certified.

Zhang et al., 2025 (arXiv 2502.06832) bound the radius within which a prediction cannot change by

    r(x) = min_{j != y} (F_y(x) - F_j(x)) / (L_y + L_j)

for the logits F of an MoE with Lipschitz constants L_c, and for a dual model F_D = (1 - alpha) F_S + alpha F_R of
probabilities by

    r(x) = min_{j != y} [alpha (F_R,y(x) - F_R,j(x)) + alpha - 1] / [alpha (L_y + L_j)],

which needs a margin of at least (1 - alpha) / alpha. The paper makes L_c of the constants of experts and router,
sum_i a_i Lip(f_i,c) + M Lip(a_i) with M >= |f_i,c|, and those of a network are not known. `slopes` takes the largest
gradient of F at some points of the ball instead, which is no upper bound: a radius made of it is an *estimate*. It is
also blind to the jumps of top-k routing, where F has no gradient at all. `certified_radius` is a certificate, by
interval bounds and for every expert that the router can reach, and accordingly small.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moebench.attacks._projections import random_start
from moebench.attacks._random import sample_keys
from moebench.errors import UsageError
from moebench.intervals import Interval, IntervalNetwork, linear_margins, margin_bounds, rounding
from moebench.models._base import Normalize, NormalizedClassifier
from moebench.models.ensemble import Ensemble
from moebench.models.rt_er import ClassifierMoE, DualModel
from moebench.schema import Norm, ThreatModel

RIVALS = 9
"""Other classes that are looked at, those of the highest outputs: with ten classes, all."""

Forward = Callable[[Tensor], Tensor]
Bounds = Callable[[Interval, Tensor], Tensor]


def margins(outputs: Tensor, y: Tensor) -> Tensor:
    """F_y - max_{j != y} F_j of outputs (B, K), (B,): negative where the prediction is wrong."""
    at = y.unsqueeze(1)
    return (outputs.gather(1, at) - outputs.scatter(1, at, float("-inf")).amax(dim=1, keepdim=True)).squeeze(1)


def rivals(outputs: Tensor, y: Tensor) -> Tensor:
    """The label and then the other classes of the highest outputs, (B, 1 + min(K - 1, RIVALS))."""
    others = outputs.scatter(1, y.unsqueeze(1), float("-inf"))
    return torch.cat((y.unsqueeze(1), others.topk(min(outputs.shape[1] - 1, RIVALS), dim=1).indices), dim=1)


def slopes(forward: Forward, x: Tensor, classes: Tensor, norm: Norm) -> Tensor:
    """The norm of the gradient of some outputs at x, (B, J), in the norm that is dual to the threat model's.

    Args:
        forward: from images (B, C, H, W) to outputs (B, K).
        x: images.
        classes: which outputs of each image, (B, J).
        norm: of the perturbations; a step of length r changes an output by at most r times this, to first order.
    """
    x = x.detach().requires_grad_()
    wanted = forward(x).gather(1, classes)
    found = []
    for column in range(classes.shape[1]):
        (gradient,) = torch.autograd.grad(wanted[:, column].sum(), x, retain_graph=True)
        flat = gradient.flatten(1)
        found.append(flat.abs().sum(dim=1) if norm == "Linf" else flat.square().sum(dim=1).sqrt())
    return torch.stack(found, dim=1).detach()


def lipschitz_estimate(
    forward: Forward, x: Tensor, classes: Tensor, threat: ThreatModel, ids: Tensor, *, points: int, seed: int
) -> Tensor:
    """The largest slope of some outputs at x and at random points of the ball around it, (B, J): no upper bound.

    Args:
        forward: from images to outputs.
        x: clean images, (B, C, H, W).
        classes: which outputs, (B, J).
        threat: norm and radius.
        ids: names of the samples, (B,), on which the random points hang.
        points: how many of them.
        seed: of the random points.
    """
    largest = slopes(forward, x, classes, threat.norm)
    for number in range(points):
        near = random_start(x, sample_keys(seed, f"slope/{number}", ids), threat)
        largest = torch.maximum(largest, slopes(forward, near, classes, threat.norm))
    return largest


def estimated_radius(outputs: Tensor, classes: Tensor, lipschitz: Tensor, alpha: float | None = None) -> Tensor:
    """The paper's radius with estimated constants, (B,); 0 where the bound does not apply.

    Args:
        outputs: logits of F, or with `alpha` the probabilities of F_R, (B, K).
        classes: the label and its rivals, (B, J).
        lipschitz: of those outputs, (B, J).
        alpha: weight of the robust half of a dual model.
    """
    chosen = outputs.gather(1, classes)
    lead, speed = chosen[:, :1] - chosen[:, 1:], lipschitz[:, :1] + lipschitz[:, 1:]
    if alpha is not None:
        lead, speed = alpha * lead + alpha - 1, alpha * speed
    return (lead / speed.clamp_min(1e-12)).amin(dim=1).clamp_min(0)


def certifiable(model: nn.Module) -> Bounds:
    """A function that bounds a model's margins from below over a box of images, (box, y) -> (B, K).

    Experts enter by the smallest margin of any that the router can select somewhere in the box. A top-k mixture is a
    convex combination of its experts' logits, so this holds for every k.

    Raises:
        UsageError: there is no bound for this kind of model.
    """
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    if isinstance(model, NormalizedClassifier):
        network, normalize = IntervalNetwork(model.network), model.normalize
        return lambda box, y: margin_bounds(network, _normalized(normalize, box), y)
    if isinstance(model, Ensemble) and model.combination == "mean":
        members, scale = [IntervalNetwork(member) for member in model.members], model.normalize
        return lambda box, y: _mean(torch.stack([margin_bounds(one, _normalized(scale, box), y) for one in members]))
    if isinstance(model, ClassifierMoE):
        return _moe_bounds(model)
    if isinstance(model, DualModel):
        return _dual_bounds(model)
    raise UsageError(f"no certificate for a model of this kind ({type(model).__name__})")


def _mean(bounds: Tensor) -> Tensor:
    """The mean over the first dimension, less what rounding may have added; infinite entries stay so."""
    low = bounds.mean(dim=0)
    return torch.where(low.isinf(), low, low - rounding(len(bounds)) * bounds.abs().mean(dim=0))


def _moe_bounds(model: ClassifierMoE) -> Bounds:
    experts = [IntervalNetwork(expert) for expert in model.moe.experts]
    router = model.moe.router.get_submodule("1")
    assert isinstance(router, nn.Linear)

    def bounds(box: Interval, y: Tensor) -> Tensor:
        z = _normalized(model.normalize, box)
        flat = z.map(lambda t: t.flatten(1))
        leads = [linear_margins(router, flat, torch.full_like(y, number)) for number in range(len(experts))]
        # An expert that k others beat everywhere in the box is selected nowhere in it.
        beats = torch.stack(leads, dim=1) > 0
        beaten = (beats & ~torch.eye(len(experts), dtype=torch.bool, device=y.device)).sum(dim=1)
        each = torch.stack([margin_bounds(expert, z, y) for expert in experts], dim=1)
        unreachable = (beaten >= model.moe.top_k).unsqueeze(2)
        return each.masked_fill(unreachable, float("inf")).amin(dim=1)

    return bounds


def _dual_bounds(model: DualModel) -> Bounds:
    halves = [_moe_bounds(half) for half in (model.standard, model.robust)]

    def bounds(box: Interval, y: Tensor) -> Tensor:
        low = [half(box, y) for half in halves]
        own = torch.nn.functional.one_hot(y, low[0].shape[1]).bool()
        if model.mixing == "probabilities":
            low = [_probability_margins(half, own) for half in low]
        standard, robust = (half.masked_fill(own, 0.0) for half in low)
        size = standard.abs() + robust.abs()
        mixed = (1 - model.alpha) * standard + model.alpha * robust - rounding(4) * size
        return mixed.masked_fill(own, float("inf"))

    return bounds


def _probability_margins(low: Tensor, own: Tensor) -> Tensor:
    """Lower bounds of p_y - p_j = p_y (1 - exp(-m_j)) from those of the logit margins m, (B, K).

    Where m_j may be negative the bound is -1, as the paper has it for the whole standard half.
    """
    ratios = (-low).exp().masked_fill(own, 0.0)
    label = 1 / (1 + ratios.sum(dim=1, keepdim=True))
    # The exponential is right to a few units in the last place, and so are the sums of at most 1 that follow.
    return torch.where(low >= 0, label * (1 - ratios) - rounding(low.shape[1]), -torch.ones_like(low))


def _normalized(normalize: Normalize, box: Interval) -> Interval:
    size = (box.magnitude + normalize.mean.abs()) / normalize.std
    return Interval(normalize(box.center), box.radius / normalize.std).widened(size, 4)


def certified_radius(bounds: Bounds, x: Tensor, y: Tensor, *, smallest: float = 1e-7, steps: int = 18) -> Tensor:
    """The largest radius up to which interval bounds prove the prediction, (B,); 0 where not even `smallest` is proven.

    It holds for Linf, and for L2 as well, whose ball lies within the box. Bisection on a logarithmic scale.

    Args:
        bounds: of `certifiable`.
        x: images in [0, 1].
        y: labels.
        smallest: radius below which it is not worth saying anything.
        steps: halvings of the ratio between 1 and `smallest`.
    """
    x = x.double()

    def proven(radius: Tensor) -> Tensor:
        reach = radius.view(-1, 1, 1, 1)
        low, high = (x - reach).clamp_min(0), (x + reach).clamp_max(1)
        box = Interval((low + high) / 2, (high - low) / 2).widened(high, 2)
        return bounds(box, y).amin(dim=1) > 0

    good = torch.full((len(x),), smallest, dtype=torch.float64, device=x.device)
    bad = torch.ones_like(good)
    none = ~proven(good)
    for _ in range(steps):
        middle = (good * bad).sqrt()
        holds = proven(middle)
        good, bad = torch.where(holds, middle, good), torch.where(holds, bad, middle)
    return good.masked_fill(none, 0.0)
