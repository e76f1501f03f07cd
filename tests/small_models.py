"""Models small enough to be checked by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moebench.models._base import Forward
from moebench.models._moe import MoELayer, RouterMode


def fill(module: nn.Module, seed: int) -> nn.Module:
    """The module with every parameter drawn anew, so that a test does not hang on torch's initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


class Flat(nn.Module):
    """A linear classifier of the pixels."""

    def __init__(self, inputs: int, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, num_classes)
        fill(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        return logits


class LayeredMoE(nn.Module):
    """Two MoE layers, one behind the other: (B, size) -> (B, size) -> (B, classes)."""

    def __init__(
        self,
        size: int = 5,
        num_classes: int = 3,
        *,
        experts: int = 3,
        top_k: int = 1,
        router: RouterMode = "trained",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.first = MoELayer(
            [nn.Linear(size, size) for _ in range(experts)],
            nn.Linear(size, experts),
            top_k=top_k,
            router_mode=router,
        )
        self.second = MoELayer(
            [nn.Linear(size, num_classes) for _ in range(experts)],
            nn.Linear(size, experts),
            top_k=top_k,
            router_mode=router,
        )
        fill(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(torch.tanh(self.first(x.flatten(1))))
        return logits


class TwoExperts(nn.Module):
    """A known gate: the first pixel above one half asks for expert 1, by the log-odds `slope * (pixel - 1/2)`.

    Expert 0 answers class 0 and expert 1 class 1, whatever the image.
    """

    def __init__(self, slope: float = 4.0, *, top_k: int = 1) -> None:
        super().__init__()
        experts: list[nn.Module] = [Flat(2, 2), Flat(2, 2)]
        self.moe = MoELayer(experts, nn.Linear(2, 2), top_k=top_k)
        with torch.no_grad():
            self.moe.router.get_parameter("weight").copy_(torch.tensor([[0.0, 0.0], [slope, 0.0]]))
            self.moe.router.get_parameter("bias").copy_(torch.tensor([0.0, -slope / 2]))
            for number, expert in enumerate(self.moe.experts):
                for parameter in expert.parameters():
                    parameter.zero_()
                expert.get_parameter("linear.bias")[number] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.moe(x.flatten(1))
        return logits


class Shift:
    """An adversary that adds a constant, and keeps what it was asked for."""

    def __init__(self, *deltas: float) -> None:
        self.deltas = deltas
        self.forwards: list[Forward] = []
        self.losses: list[Callable[[Tensor], Tensor]] = []

    def __call__(self, forward: Forward, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        self.forwards.append(forward)
        self.losses.append(loss)
        return (x + self.deltas[(len(self.forwards) - 1) % len(self.deltas)]).clamp(0, 1)


class Noted(Shift):
    """A `Shift` with a radius that also keeps how each attack was asked for."""

    def __init__(self, *deltas: float, eps: float = 0.2) -> None:
        super().__init__(*deltas)
        self.eps = eps
        self.asked: list[dict[str, Any]] = []

    def __call__(self, forward: Forward, x: Tensor, loss: Callable[[Tensor], Tensor], **asked: Any) -> Tensor:
        self.asked.append(asked)
        return super().__call__(forward, x, loss)
