"""Interval bounds of a network's margins over a whole box of images (Gowal et al., 2018, arXiv 1810.12715).

Sound over the reals: every image of the box has margins at least as large as the bound. Computed in float64, each
result widened by a bound of its rounding errors (Higham, 2002, Accuracy and Stability of Numerical Algorithms, lemma
3.1: a sum of n products is off by at most γ_n = nu / (1 - nu) times the sum of their magnitudes, in whatever order).
Networks are traced by torch.fx; a layer that has no rule below makes the network one without bounds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from typing_extensions import override

from moebench.errors import UsageError

UNIT = 2.0**-53
"""Unit roundoff of float64."""


def rounding(terms: int) -> float:
    """A bound of the relative error of a sum of so many products of non-negative numbers; generous by a factor of four.

    The factor covers the operations around the sum, the rounding of this bound and of what it is multiplied with.
    """
    return 4 * (terms + 4) * UNIT


class Interval(NamedTuple):
    """Values between `center - radius` and `center + radius`, element by element."""

    center: Tensor
    radius: Tensor

    @property
    def magnitude(self) -> Tensor:
        """The largest absolute value in it."""
        return self.center.abs() + self.radius

    def widened(self, magnitude: Tensor, terms: int) -> Interval:
        """With room for the rounding of sums of so many terms, whose magnitudes add up to `magnitude`."""
        return Interval(self.center, self.radius + rounding(terms) * magnitude)

    def map(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """The image under a function that is the same linear, non-negative one on both (a mean, a reshaping)."""
        made = Interval(function(self.center), function(self.radius))
        terms = -(-self.center.numel() // max(made.center.numel(), 1))
        return made if terms == 1 else made.widened(function(self.magnitude), terms)

    def rising(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """The image under a function that rises in every argument and gives no value that is larger than they are."""
        spare = rounding(1) * self.magnitude
        low, high = function(self.center - self.radius - spare), function(self.center + self.radius + spare)
        return Interval((high + low) / 2, (high - low) / 2).widened(high.abs() + low.abs(), 1)


class Head(NamedTuple):
    """The last linear layer, kept apart: differences of its outputs have tighter bounds than each output alone."""

    features: Interval
    layer: nn.Linear


class IntervalNetwork(fx.Interpreter):
    """Runs a traced network in eval mode on intervals; the last linear layer is left to `margin_bounds`."""

    def __init__(self, network: nn.Module) -> None:
        try:
            traced = fx.symbolic_trace(network)
        except Exception as error:
            raise UsageError(f"no interval bounds for {type(network).__name__}: it cannot be traced") from error
        super().__init__(traced)
        (output,) = (node for node in traced.graph.nodes if node.op == "output")
        self._last = output.args[0]
        self._current: fx.Node | None = None

    @override
    def run_node(self, n: fx.Node) -> Any:
        self._current = n
        return super().run_node(n)

    @override
    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, x = self.fetch_attr(target), args[0]
        if not isinstance(x, Interval):
            return super().call_module(target, args, kwargs)
        if isinstance(module, nn.Linear):
            if self._current is self._last:
                return Head(x, module)
            weight, bias = module.weight.abs(), _size(module.bias)
            return Interval(module(x.center), F.linear(x.radius, weight)).widened(
                F.linear(x.magnitude, weight, bias), weight.shape[1]
            )
        if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            weight, bias = module.weight.abs(), _size(module.bias)
            geometry = (module.stride, module.padding, module.dilation, module.groups)
            return Interval(module(x.center), F.conv2d(x.radius, weight, None, *geometry)).widened(
                F.conv2d(x.magnitude, weight, bias, *geometry), weight[0].numel()
            )
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            assert module.weight is not None
            assert module.running_mean is not None
            scale = (module.weight.abs() / (module.running_var + module.eps).sqrt()).view(1, -1, 1, 1)
            shift, bias = (one.abs().view(1, -1, 1, 1) for one in (module.running_mean, module.bias))
            return Interval(module(x.center), x.radius * scale).widened((x.magnitude + shift) * scale + bias, 8)
        if isinstance(module, nn.ReLU | nn.MaxPool2d):
            return x.rising(lambda t: F.relu(t) if isinstance(module, nn.ReLU) else module(t))
        if isinstance(module, nn.Identity | nn.Flatten | nn.AvgPool2d | nn.AdaptiveAvgPool2d):
            return x.map(module)
        raise UsageError(f"no interval bounds for a layer {type(module).__name__} ({target})")

    @override
    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        intervals = [one for one in args if isinstance(one, Interval)]
        if not intervals:
            return super().call_function(target, args, kwargs)
        if target in (F.relu, torch.relu):
            return intervals[0].rising(F.relu)
        if target in (operator.add, operator.iadd, torch.add) and len(intervals) == 2:
            one, two = intervals
            return Interval(one.center + two.center, one.radius + two.radius).widened(one.magnitude + two.magnitude, 2)
        if target is torch.flatten:
            return intervals[0].map(lambda t: torch.flatten(t, *args[1:], **kwargs))
        raise UsageError(f"no interval bounds for the operation {getattr(target, '__name__', target)}")

    @override
    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        if not isinstance(x, Interval):
            return super().call_method(target, args, kwargs)
        if target in ("mean", "flatten", "view", "reshape"):
            return x.map(lambda t: getattr(t, target)(*args[1:], **kwargs))
        if target == "relu":
            return x.rising(F.relu)
        raise UsageError(f"no interval bounds for the operation {target}")


def margin_bounds(network: IntervalNetwork, box: Interval, y: Tensor) -> Tensor:
    """Lower bounds of z_y - z_j over a box of inputs, (B, K); infinite at j = y.

    Raises:
        UsageError: the network has an operation without a rule, or does not end in a linear layer.
    """
    head = network.run(box)
    if not isinstance(head, Head):
        raise UsageError("no interval bounds for a network that does not end in a linear layer")
    return linear_margins(head.layer, head.features, y)


def linear_margins(layer: nn.Linear, x: Interval, y: Tensor) -> Tensor:
    """Minima of z_y - z_j of a linear layer over a box of its inputs, (B, K), less rounding; infinite at j = y."""
    weight, bias = layer.weight, layer.bias
    rows = weight[y].unsqueeze(1) - weight
    low = (rows * x.center.unsqueeze(1) - rows.abs() * x.radius.unsqueeze(1)).sum(dim=2)
    size = (rows.abs() * x.magnitude.unsqueeze(1)).sum(dim=2)
    if bias is not None:
        low = low + bias[y].unsqueeze(1) - bias
        size = size + bias[y].abs().unsqueeze(1) + bias.abs()
    low = low - rounding(2 * weight.shape[1]) * size
    return low.masked_fill(F.one_hot(y, len(weight)).bool(), float("inf"))


def _size(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.abs()
