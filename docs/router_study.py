"""Why an attack on the routing of a shipped MoE does or does not help: `python docs/router_study.py MODEL [N]`.

For a model of whole classifiers under one linear router, and the first N test digits: for every set of experts that
the router can select, how often it is selected, in what share of the balls it can be reached at all (exact, by one
linear programme per image), how accurate these experts are when they are forced, and what `route-flip` achieves.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from scipy.optimize import linprog  # type: ignore[import-untyped]
from torch import Tensor, nn

from moebench.attacks._engine import Engine, to_samples
from moebench.attacks._views import make_view
from moebench.attacks.apgd import APGD
from moebench.attacks.region import RouteFlip
from moebench.datasets import load_dataset
from moebench.loading import load
from moebench.models._moe import MoELayer, Routing, moe_layers, route, routed_by


class Forced(nn.Module):
    """The model with one set of experts, whatever the image; their weights stay the router's."""

    def __init__(self, model: nn.Module, experts: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        ((self.name, layer),) = moe_layers(model).items()
        self.selected = torch.tensor([number in experts for number in range(len(layer.experts))])

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""

        def policy(layer: MoELayer, features: Tensor) -> Routing:
            selected = self.selected.expand(len(features), -1)
            kept = layer.probabilities(features) * selected
            return Routing(kept / kept.sum(dim=1, keepdim=True), selected)

        with routed_by(self.model, {self.name: policy}):
            logits: Tensor = self.model(x)
        return logits


def reachable(router: nn.Module, x: Tensor, eps: float, experts: Sequence[int]) -> Tensor:
    """Whether the Linf ball around each image holds one for which the router selects those experts, (N,) bool."""
    size = x[0].numel()
    bias = router(torch.zeros(1, *x.shape[1:]))[0]
    weights = (router(torch.eye(size).view(size, *x.shape[1:])) - bias).double().numpy()
    others = [number for number in range(len(bias)) if number not in experts]
    beaten = np.stack([weights[:, other] - weights[:, mine] for mine in experts for other in others])
    room = np.stack([(bias[mine] - bias[other]).double().item() for mine in experts for other in others])
    found = []
    for image in x.flatten(1).double().numpy():
        box = np.stack((np.maximum(image - eps, 0), np.minimum(image + eps, 1)), axis=1)
        found.append(linprog(np.zeros(size), A_ub=beaten, b_ub=room, bounds=box, method="highs").status == 0)
    return torch.tensor(found)


@torch.no_grad()
def main(name: str, n: int) -> None:
    """Prints one line for each set of experts, and one for route-flip."""
    data = load_dataset("digits", n=n)
    threat = data.default_threat("Linf")
    model = load(name, data, weights=None, settings={}, device="cpu").module
    samples = to_samples(data.images, data.labels, data.ids, "cpu")
    ((at, layer),) = moe_layers(model).items()
    own = route(model, samples.x)[at].selected
    router = nn.Sequential(model.get_submodule("normalize"), layer.router)
    for experts in combinations(range(len(layer.experts)), layer.top_k):
        forced = Forced(model, experts).eval()
        engine = Engine(forced, make_view("whole", forced), samples, threat, batch_size=512)
        engine.broken |= forced(samples.x).argmax(dim=1) != samples.y
        clean = 1 - engine.broken.double().mean()
        engine.run_stage(APGD(), (~engine.broken).nonzero().squeeze(1), lambda finished: None)
        chosen = (own == forced.selected).all(dim=1).double().mean()
        reach = reachable(router, samples.x, threat.eps, experts).double().mean()
        print(
            f"{name} experts {experts}: selected {chosen:.1%}, reachable {reach:.1%}, "
            f"forced SA {clean:.1%}, forced RA (apgd-ce) {1 - engine.broken.double().mean():.1%}"
        )
    engine = Engine(model, make_view("whole", model), samples, threat, batch_size=512)
    engine.run_stage(RouteFlip(), torch.arange(n), lambda finished: None)
    moved = (route(model, engine.x_adv)[at].selected != own).any(dim=1).double().mean()
    broken = engine.broken.double().mean()
    print(f"{name} route-flip: {moved:.1%} of the routes changed, {broken:.1%} of the images broken")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 200)
