"""Views: what an attack is shown of a model.

A component attack is an ordinary attack on another view; what counts is always the whole model. A view takes images
and the numbers of their samples, because it may hold what it computed on the clean samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from moebench.attacks._regions import list_regions
from moebench.errors import UsageError
from moebench.models._moe import (
    MoELayer,
    Policy,
    RoutedModel,
    Routing,
    Tape,
    forced_forward,
    join,
    moe_layers,
    replay,
    route,
    routed_by,
    smooth_forward,
    soft_route,
)
from moebench.schema import EXPERT_VIEW, check_view_name

HALVES = ("standard", "robust")

PART = 64
"""Clean samples that pass through the model together when a view is prepared."""


def in_parts(x: Tensor) -> list[Tensor]:
    """Clean samples in batches that fit any device; one empty batch if there are none."""
    return [x[start : start + PART] for start in range(0, max(len(x), 1), PART)]


class View(ABC):
    """Logits of one view of a model."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name = name
        self.model = model

    @property
    def is_whole(self) -> bool:
        """Whether the view's logits are those of the whole model."""
        return False

    def prepare(self, x: Tensor) -> None:
        """Keeps what the view needs of the clean samples, (N, C, H, W); `index` later counts in them."""
        return

    @abstractmethod
    def logits(self, x: Tensor, index: Tensor) -> Tensor:
        """Logits (R, K) of images (R, C, H, W) of the samples `index` (R,)."""

    def aimed(self, x: Tensor, index: Tensor, target: Tensor) -> Tensor:
        """What rows that aim at `target` (R,) see; the same for all targets on most views."""
        return self.logits(x, index)


class WholeView(View):
    """The model as it is."""

    @property
    @override
    def is_whole(self) -> bool:
        return True

    @override
    def logits(self, x: Tensor, index: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out


class FunctionView(View):
    """A view that needs nothing of the clean samples."""

    def __init__(self, name: str, model: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__(name, model)
        self._forward = forward

    @override
    def logits(self, x: Tensor, index: Tensor) -> Tensor:
        return self._forward(x)


class RouterView(View):
    """The attacked image steers the (soft) routing, the experts see the clean image: gives RA-R.

    Soft routing stands in for top-k, whose selection has no gradient. A layer behind another one weighs the features
    that the attacked image has there under hard routing, and its weights have a gradient through the layers before it;
    its experts see the clean image as the (attacked, soft) weights of the layers before it mix it.
    """

    @override
    def prepare(self, x: Tensor) -> None:
        self._clean = x
        self._outputs: Mapping[str, Tensor] | None = None
        if isinstance(self.model, RoutedModel):
            with torch.no_grad():
                found = [self.model.expert_outputs(part) for part in in_parts(x)]
            first = found[0]
            if first is not None:
                self._outputs = {
                    layer: torch.cat([outputs[layer] for outputs in found if outputs is not None]) for layer in first
                }

    @override
    def logits(self, x: Tensor, index: Tensor) -> Tensor:
        tape = soft_route(self.model, x)
        if self._outputs is None:
            return replay(self.model, self._clean[index], tape)
        assert isinstance(self.model, RoutedModel)
        return self.model.mix({layer: outputs[index] for layer, outputs in self._outputs.items()}, tape)


class ExpertsView(View):
    """The clean image steers the routing, the experts see the attacked one: gives RA-E."""

    @override
    def prepare(self, x: Tensor) -> None:
        with torch.no_grad():
            tapes = [route(self.model, part) for part in in_parts(x)]
        self._tape: Tape = {layer: join(*(tape[layer] for tape in tapes)) for layer in tapes[0]}

    @override
    def logits(self, x: Tensor, index: Tensor) -> Tensor:
        tape: Mapping[str, Routing] = {layer: routing.take(index) for layer, routing in self._tape.items()}
        return replay(self.model, x, dict(tape))


class JointView(View):
    """Three models in one, for attacks that weigh them: what the router view, the experts view and the whole show."""

    @override
    def prepare(self, x: Tensor) -> None:
        self._parts = [RouterView("router", self.model), ExpertsView("experts", self.model)]
        for part in self._parts:
            part.prepare(x)

    @override
    def logits(self, x: Tensor, index: Tensor) -> Tensor:
        """(R, 3, K): logits of `router`, `experts` and `whole`."""
        return torch.stack([*(part.logits(x, index) for part in self._parts), self.model(x)], dim=1)


class RegionView(View):
    """The model with the expert sets of one region forced, and how far the router is from selecting them.

    A region is a choice of top-k experts in every MoE layer, see `list_regions`; a number counts in the list of the
    sample. A target is region · K + class.
    """

    @override
    def prepare(self, x: Tensor) -> None:
        self._regions = list_regions(self.model, x)
        with torch.no_grad():
            self._classes = int(self.model(x[:1]).shape[1])

    @override
    def logits(self, x: Tensor, index: Tensor) -> Tensor:
        """All regions at once, (R, regions, K + 1)."""
        zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return torch.stack([self._forced(x, index, zeros + region) for region in range(self._regions.count)], dim=1)

    @override
    def aimed(self, x: Tensor, index: Tensor, target: Tensor) -> Tensor:
        """(R, K + 1): logits with the row's region forced, and the router's margin for that region.

        The margin is that of the weakest selected over the strongest unselected expert, as a share of the spread of the
        router's logits; positive where the router selects the region, and the smallest over the layers.
        """
        return self._forced(x, index, target // self._classes)

    def _forced(self, x: Tensor, index: Tensor, region: Tensor) -> Tensor:
        margins: list[Tensor] = []

        def policy(name: str) -> Policy:
            selected = self._regions.selected(name, index, region)

            def forced(layer: MoELayer, features: Tensor) -> Routing:
                probs = layer.probabilities(features)
                margins.append(_margin(probs, selected))
                kept = probs * selected
                weights = selected.to(probs.dtype) if layer.top_k == 1 else kept / kept.sum(dim=1, keepdim=True)
                return Routing(weights, selected)

            return forced

        with routed_by(self.model, {name: policy(name) for name in self._regions.masks}):
            logits = self.model(x)
        return torch.cat((logits, torch.stack(margins).amin(dim=0).unsqueeze(1)), dim=1)


def _margin(probs: Tensor, selected: Tensor) -> Tensor:
    """Lead of the weakest selected over the strongest unselected expert, in spreads of the log-probabilities, (R,)."""
    if bool(selected.all()):
        return torch.ones_like(probs[:, 0])
    scores = probs.clamp_min(1e-30).log()
    inside = scores.masked_fill(~selected, float("inf")).amin(dim=1)
    outside = scores.masked_fill(selected, float("-inf")).amax(dim=1)
    spread = (scores.amax(dim=1) - scores.amin(dim=1)).detach().clamp_min(1e-6)
    return (inside - outside) / spread


def applicable_views(model: nn.Module) -> list[str]:
    """Every view that this model has."""
    layers = moe_layers(model)
    if not layers:
        return ["whole"]
    names = ["whole", "router", "experts", "smooth", "straight-through", *component_halves(model)]
    if len(layers) == 1:
        names += [f"expert[{number}]" for number in range(len(next(iter(layers.values())).experts))]
    else:
        names += [
            f"expert[{layer}:{number}]" for layer, module in layers.items() for number in range(len(module.experts))
        ]
    return names


def default_views(model: nn.Module) -> list[str]:
    """The views behind the headline metrics: RA, and for an MoE RA-R, RA-E and one per half of a dual model."""
    return ["whole", "router", "experts", *component_halves(model)] if moe_layers(model) else ["whole"]


def component_halves(model: nn.Module) -> list[str]:
    """("standard", "robust") for a dual model, nothing for others."""
    children = dict(model.named_children())
    return list(HALVES) if all(half in children for half in HALVES) and moe_layers(model) else []


def make_view(name: str, model: nn.Module) -> View:
    """A view by name.

    Raises:
        UsageError: no such view, or this model does not have it.
    """
    own = {"region": RegionView, "joint": JointView}.get(name)
    if own is not None:
        return own(name, model)
    check_view(name, model)
    if name == "whole":
        return WholeView(name, model)
    if name == "router":
        return RouterView(name, model)
    if name == "experts":
        return ExpertsView(name, model)
    if name == "smooth":
        return FunctionView(name, model, lambda x: smooth_forward(model, x))
    if name == "straight-through":
        return FunctionView(name, model, lambda x: smooth_forward(model, x, straight_through=True))
    if name in HALVES:
        half = model.get_submodule(name)
        return FunctionView(name, model, lambda x: half(x))
    match = EXPERT_VIEW.fullmatch(name)
    assert match is not None
    layer, number = match["layer"], int(match["number"])
    return FunctionView(name, model, lambda x: forced_forward(model, x, number, layer))


def check_view(name: str, model: nn.Module) -> None:
    """Refuses views that do not exist or that the model does not have."""
    check_view_name(name)
    available = applicable_views(model)
    match = EXPERT_VIEW.fullmatch(name)
    if name in available or (match and match["layer"] is None and _everywhere(model, int(match["number"]))):
        return
    if available == ["whole"]:
        raise UsageError(f"view {name!r} needs a model with routing; this one is dense and has only the view 'whole'")
    shown = ", ".join(available)
    raise UsageError(f"view {name!r} does not exist on this model; it has {shown}")


def _everywhere(model: nn.Module, number: int) -> bool:
    """Whether every MoE layer has that expert, so that `expert[i]` forces it in all of them."""
    layers = moe_layers(model)
    return bool(layers) and all(number < len(layer.experts) for layer in layers.values())
