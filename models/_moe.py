"""Mixture-of-experts layers whose routing can be recorded and replayed.

Everything that moebench measures about routing rests on two operations that every MoE model supports: *record* the
routing weights that an input causes, and *replay* given weights while another input passes through the experts. Both
are differentiable. A model takes part by routing through `MoELayer`, wherever that layer sits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from moebench.errors import UsageError

RouterMode = Literal["trained", "frozen"]


class Routing(NamedTuple):
    """How one MoE layer mixes its experts, per image (B, E), or per token (B, T, E) where a layer routes tokens.

    Attributes:
        weights: (B, E) or (B, T, E), what each expert's output is multiplied with.
        selected: bool, of the same shape, the experts that run. A selected expert may have weight 0 (it then only
            carries gradient).
    """

    weights: Tensor
    selected: Tensor

    def take(self, rows: Tensor) -> Routing:
        """The routing of some samples."""
        return Routing(self.weights[rows], self.selected[rows])

    def load(self) -> Tensor:
        """Each expert's share of all experts' weight, (B, E); the mean over an image's tokens where they are routed."""
        shares = self.weights / self.weights.sum(dim=-1, keepdim=True).clamp_min(1e-30)
        return shares if shares.dim() == 2 else shares.mean(dim=1)


def join(*routings: Routing) -> Routing:
    """The routing of several batches as that of one."""
    return Routing(
        torch.cat([routing.weights for routing in routings]), torch.cat([routing.selected for routing in routings])
    )


Tape = dict[str, Routing]
"""The routing of every MoE layer of a model, by the layer's name."""

Policy = Callable[["MoELayer", Tensor], Routing]


class MoELayer(nn.Module):
    """A router and its experts: F(x) = sum over the selected i of w_i(x) f_i(x).

    Each selected expert runs once, on its own samples (or tokens) only.

    Args:
        experts: modules of equal output shape.
        router: maps the layer's input to router logits (B, E), or (B, T, E) for an input (B, T, ...) of tokens.
        top_k: experts per sample or token; E gives a soft mixture of all.
        router_mode: "trained" passes gradients to the router (straight-through for top-1), "frozen" keeps the router
            at its initialisation.
        per_token: each of the T tokens of an image is routed by itself.
        renormalize: divide the softmax weights of the winners by their sum, so that for top-1 the weight is exactly 1;
            otherwise the weights are the softmax values themselves.

    `barred` is 0 but where a routing is overridden: so many of the best experts do as if they were not there.
    """

    def __init__(
        self,
        experts: list[nn.Module],
        router: nn.Module,
        *,
        top_k: int = 1,
        router_mode: RouterMode = "trained",
        per_token: bool = False,
        renormalize: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= len(experts):
            raise UsageError(f"top_k must be between 1 and the {len(experts)} experts, got {top_k}")
        if router_mode not in ("trained", "frozen"):
            raise UsageError(f"router must be 'trained' or 'frozen', got {router_mode!r}")
        self.experts = nn.ModuleList(experts)
        self.router = router
        self.top_k = top_k
        self.router_mode = router_mode
        self.per_token = per_token
        self.renormalize = renormalize
        self.barred = 0
        if router_mode == "frozen":
            self.router.requires_grad_(False)
        self.policy: Policy | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Mixes the experts' outputs for an input (B, ...)."""
        return self.run(x, self.route(x))

    def run(self, x: Tensor, routing: Routing) -> Tensor:
        """The experts' outputs on x (B, ...), mixed by a given routing; experts that share parts override it."""
        return combine(self.experts, x, routing)

    @property
    def active(self) -> int:
        """Experts that an input runs."""
        return self.top_k

    def alone(self, expert: int) -> nn.Module:
        """The network that stands in the layer's place where one expert answers every input."""
        return self.experts[expert]

    def route(self, x: Tensor) -> Routing:
        """The routing in force: the layer's own, or that of the policy installed from outside."""
        return self.own_routing(x) if self.policy is None else self.policy(self, x)

    def own_routing(self, x: Tensor) -> Routing:
        """Top-k of the router's softmax. In train mode, top-1 lets the gradient of the winner's weight through."""
        return self.assign(self.probabilities(x))

    def assign(self, probs: Tensor) -> Routing:
        """The routing that a softmax (B, E) of the router gives; `own_routing` without running the router."""
        if self.top_k == len(self.experts):
            return Routing(probs, torch.ones_like(probs, dtype=torch.bool))
        return self.weigh(probs, top_experts(probs, self.top_k))

    def weigh(self, probs: Tensor, selected: Tensor) -> Routing:
        """The weights of selected experts, (B, E) bool (or per token) with k true entries per row."""
        kept = probs * selected
        if not self.renormalize:
            return Routing(kept, selected)
        if self.top_k > 1:
            return Routing(kept / kept.sum(dim=-1, keepdim=True), selected)
        weights = selected.to(probs.dtype)
        if self.training and self.router_mode == "trained":
            weights = weights + kept - kept.detach()
        return Routing(weights, selected)

    def soft_routing(self, x: Tensor) -> Routing:
        """All experts, weighted by the router's softmax: the differentiable surrogate of hard routing."""
        probs = self.probabilities(x)
        return Routing(probs, torch.ones_like(probs, dtype=torch.bool))

    def straight_through_routing(self, x: Tensor) -> Routing:
        """The weights of hard routing in the forward pass, the gradient of soft routing in the backward pass."""
        probs = self.probabilities(x)
        weights = self.own_routing(x).weights.detach() + probs - probs.detach()
        return Routing(weights, torch.ones_like(probs, dtype=torch.bool))

    def forced_routing(self, x: Tensor, expert: int) -> Routing:
        """One expert with weight 1 for every sample or token."""
        weights = x.new_zeros(*x.shape[: 2 if self.per_token else 1], len(self.experts))
        weights[..., expert] = 1.0
        return Routing(weights, weights.bool())

    def probabilities(self, x: Tensor) -> Tensor:
        """The router's softmax over all experts, (B, E) or (B, T, E); 0 for those that are barred."""
        logits: Tensor = self.router(x)
        if self.barred > 0:
            logits = logits.masked_fill(top_experts(logits, self.barred), float("-inf"))
        return logits.softmax(dim=-1)


def top_experts(scores: Tensor, count: int) -> Tensor:
    """Which entries are among the `count` largest of the last dimension, bool."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, scores.topk(count, dim=-1).indices, True)


def combine(experts: nn.ModuleList, x: Tensor, routing: Routing) -> Tensor:
    """Runs each expert on the samples, or tokens, that selected it and adds up the weighted outputs.

    Args:
        experts: E modules.
        x: (B, ...), or (B, T, ...) where tokens are routed.
        routing: for B samples (or B·T tokens) and E experts.
    Returns: (B, ...) or (B, T, ...), the experts' output shape.
    """
    if routing.weights.dim() == 3:
        flat = Routing(*(part.flatten(0, 1) for part in routing))
        mixed = combine(experts, x.flatten(0, 1), flat)
        return mixed.view(*x.shape[:2], *mixed.shape[1:])
    out: Tensor | None = None
    for number, expert in enumerate(experts):
        rows = routing.selected[:, number].nonzero().squeeze(1)
        if rows.numel() == 0 and not (out is None and number == len(experts) - 1):
            continue
        y = expert(x if rows.numel() == x.shape[0] else x[rows])
        # Under autocast the experts answer in a smaller type than the router.
        weight = routing.weights[rows, number].to(y.dtype).view(-1, *[1] * (y.dim() - 1))
        if out is None:
            out = y.new_zeros(x.shape[0], *y.shape[1:])
        out = out.index_add(0, rows, y * weight)
    assert out is not None
    return out


class RoutedModel(nn.Module):
    """A classifier with MoE layers inside.

    Subclasses whose routing depends on the image alone override `route`, `expert_outputs` and `mix`, so that attacks
    on the router need not run experts and those on frozen experts run them once.
    """

    def route(self, x: Tensor, *, soft: bool = False) -> Tape:
        """The routing that images (B, C, H, W) cause in every MoE layer.

        Args:
            x: images in [0, 1].
            soft: record the softmax over all experts instead of the top-k selection. The images pass through the
                model by its own routing all the same, see `record`.
        """
        return record(self, x, soft=soft)

    def expert_outputs(self, x: Tensor) -> dict[str, Tensor] | None:
        """Logits of every expert of every layer on x, {layer: (B, E, K)}; None where they depend on the routing."""
        return None

    def mix(self, outputs: Mapping[str, Tensor], tape: Tape) -> Tensor:
        """The model's logits from its experts' outputs and a routing."""
        raise TypeError(f"{type(self).__name__} has no experts whose outputs could be kept")


def has_shortcut(model: nn.Module) -> bool:
    """Whether a model knows its routing without running its experts (it overrides `RoutedModel.route`)."""
    return isinstance(model, RoutedModel) and type(model).route is not RoutedModel.route


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers of a model by name, in the order of its modules; empty for a dense model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


def mixes_all(model: nn.Module) -> bool:
    """Whether a model has MoE layers and all of them mix all their experts (soft gates): nothing is ever selected."""
    layers = moe_layers(model).values()
    return bool(layers) and all(layer.top_k == len(layer.experts) for layer in layers)


def routes_tokens(model: nn.Module) -> bool:
    """Whether a model has MoE layers that route each token by itself."""
    return any(layer.per_token for layer in moe_layers(model).values())


def reroute(model: nn.Module, *, top_k: int | None = None, barred: int | None = None) -> None:
    """Overrides the routing of every MoE layer of a trained model.

    Args:
        model: changed in place.
        top_k: experts per sample or token; None leaves each layer its own.
        barred: how many of the best experts of each sample or token do as if they were not there, so that the next
            best take their places; 0 for as many as the layer selects, None for nothing of the kind.

    Raises:
        UsageError: the model has no MoE layers, or one of them has too few experts.
    """
    layers = moe_layers(model)
    if not layers:
        raise UsageError("this model has no MoE layers, so there is no routing to override")
    for name, layer in layers.items():
        count = len(layer.experts)
        if top_k is not None:
            if not 1 <= top_k <= count:
                raise UsageError(f"top-k must be between 1 and the {count} experts of layer {name!r}, got {top_k}")
            layer.top_k = top_k
        if barred is not None:
            bars = barred or layer.top_k
            if bars + layer.top_k > count:
                raise UsageError(
                    f"without its {bars} best experts, layer {name!r} has {max(count - bars, 0)} of {count} left and "
                    f"selects {layer.top_k}; use drop-best={max(count - layer.top_k, 0)} or less"
                    if count > layer.top_k
                    else f"layer {name!r} selects all its {count} experts, so none could take the place of the best"
                )
            layer.barred = bars


@contextmanager
def routed_by(model: nn.Module, policies: Mapping[str, Policy]) -> Iterator[None]:
    """Installs routing policies in the named layers and takes them out again, whatever happens."""
    layers = moe_layers(model)
    before = {name: layers[name].policy for name in policies}
    try:
        for name, policy in policies.items():
            layers[name].policy = policy
        yield
    finally:
        for name, policy_before in before.items():
            layers[name].policy = policy_before


def record(model: nn.Module, x: Tensor, *, soft: bool = False, straight_through: bool = False) -> Tape:
    """Runs the model on x and keeps the routing of each layer, with its gradient to x.

    However the weights are written down, the images pass through the model by its own (hard) routing, so that what a
    layer behind another one sees, and with it its entropy and load, is what it sees when the model predicts.

    Args:
        model: any model; a dense one gives an empty tape.
        x: images in [0, 1], (B, C, H, W).
        soft: keep the softmax over all experts instead of the top-k selection.
        straight_through: give the way through each layer the gradient of soft routing (the values stay those of hard
            routing), so that later layers' weights have a gradient to the routing before them. Runs every expert.
    """
    tape: Tape = {}

    def recorder(name: str) -> Policy:
        def policy(layer: MoELayer, features: Tensor) -> Routing:
            own = layer.own_routing(features)
            tape[name] = layer.soft_routing(features) if soft else own
            return layer.straight_through_routing(features) if straight_through else own

        return policy

    with routed_by(model, {name: recorder(name) for name in moe_layers(model)}):
        model(x)
    return tape


def replay(model: nn.Module, x: Tensor, tape: Tape) -> Tensor:
    """The model's logits on x with the routing of the tape instead of its own."""

    def player(routing: Routing) -> Policy:
        return lambda layer, features: routing

    with routed_by(model, {name: player(routing) for name, routing in tape.items()}):
        logits: Tensor = model(x)
    return logits


def route(model: nn.Module, x: Tensor, *, soft: bool = False) -> Tape:
    """The routing that x causes, by the model's own shortcut where it has one."""
    return model.route(x, soft=soft) if isinstance(model, RoutedModel) else record(model, x, soft=soft)


def soft_route(model: nn.Module, x: Tensor) -> Tape:
    """Soft weights of every layer with a gradient to x through all routing before them.

    Where several layers lie behind each other, each weighs the features that hard routing really gives it, and the
    gradient passes the layers before it straight through. That takes every expert; where no gradient is asked for
    (under `torch.no_grad`), the same weights cost the selected experts alone.
    """
    if has_shortcut(model):
        return route(model, x, soft=True)
    return record(model, x, soft=True, straight_through=torch.is_grad_enabled())


def split_forward(model: nn.Module, x_router: Tensor, x_expert: Tensor, *, soft: bool = False) -> Tensor:
    """Logits when one input steers the routing and another passes through the experts.

    Args:
        model: a model with MoE layers.
        x_router: images that decide the routing, (B, C, H, W).
        x_expert: images that the experts see, (B, C, H, W).
        soft: mix by the softmax over all experts (see `soft_route`), so that the routing has a gradient.
    Returns: logits (B, K), differentiable with respect to both inputs.
    """
    return replay(model, x_expert, soft_route(model, x_router) if soft else route(model, x_router))


def smooth_forward(model: nn.Module, x: Tensor, *, straight_through: bool = False) -> Tensor:
    """Logits with dense soft routing in every layer (or hard values with soft gradients)."""

    def policy(layer: MoELayer, features: Tensor) -> Routing:
        return layer.straight_through_routing(features) if straight_through else layer.soft_routing(features)

    with routed_by(model, dict.fromkeys(moe_layers(model), policy)):
        logits: Tensor = model(x)
    return logits


def forced_forward(model: nn.Module, x: Tensor, expert: int, layer: str | None = None) -> Tensor:
    """Logits with one expert forced, in one layer or in all of them.

    Raises:
        UsageError: the layer or the expert does not exist.
    """
    layers = moe_layers(model)
    if layer is not None and layer not in layers:
        raise UsageError(f"no MoE layer {layer!r} in this model; it has {', '.join(layers) or 'none'}")
    names = [layer] if layer is not None else list(layers)
    for name in names:
        if not 0 <= expert < len(layers[name].experts):
            raise UsageError(
                f"no expert {expert} in layer {name!r}: it has experts 0 to {len(layers[name].experts) - 1}"
            )

    def policy(forced: MoELayer, features: Tensor) -> Routing:
        return forced.forced_routing(features, expert)

    with routed_by(model, dict.fromkeys(names, policy)):
        logits: Tensor = model(x)
    return logits
