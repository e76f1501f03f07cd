"""A faster copy of a model for the search.

BatchNorm in eval mode is folded into the convolution before it; large images are kept channels-last on a CPU; on
request the copy is compiled. All of this changes logits by float rounding only. Every success is confirmed on the model
itself, so the copy can cost an attack nothing but time; where a step fails, or the copy does not agree with the model,
the step is left out and a note says why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from moebench.models._moe import moe_layers

TOLERANCE = 1e-4
"""Largest accepted difference of logits, as a share of the largest logit."""

SMALLEST_CHANNELS_LAST = 16
"""Side of the images from which channels-last pays on a CPU (docs/performance.md)."""


@dataclass(frozen=True)
class SearchCopy:
    """The module to attack (the model itself where no copy is faster), and what was done to it, step by step."""

    module: nn.Module
    notes: dict[str, str]


def search_copy(model: nn.Module, x: Tensor, *, compiled: bool = False) -> SearchCopy:
    """A copy of a model that gives the same logits faster.

    Args:
        model: in eval mode.
        x: clean images to compare the two on, (B, C, H, W).
        compiled: try `torch.compile` on the copy.
    """
    module, notes = model, {}
    steps: dict[str, tuple[bool, Callable[[nn.Module], nn.Module]]] = {
        "folded BatchNorm": (_has_batchnorm(model), lambda module: _fold(copy.deepcopy(module))),
        "channels-last": (_prefers_channels_last(model, x), _channels_last),
        "compiled": (compiled, _compiled),
    }
    for name, (wanted, step) in steps.items():
        if wanted:
            module, notes[name] = _try(step, module, model, x)
    return SearchCopy(module, notes)


def _try(
    step: Callable[[nn.Module], nn.Module], module: nn.Module, model: nn.Module, x: Tensor
) -> tuple[nn.Module, str]:
    """The module after a step, or as it was where the step fails."""
    try:
        changed = step(module).eval().requires_grad_(False)
        agreeing = all(_agree(model, changed, part) for part in (x[:1], x[:3], x))
    except Exception as error:
        # Arbitrary user code is traced and copied here, and may refuse in any way; nothing is lost but speed.
        return module, f"no: {type(error).__name__}"
    return (changed, "yes") if agreeing else (module, "no: the logits differ")


def _fold(module: nn.Module) -> nn.Module:
    """Folds the largest parts that can be traced; routing depends on the data and is left as it is."""
    if not moe_layers(module) and _has_batchnorm(module):
        try:
            return fuse(module)
        except Exception:
            # Not traceable as a whole: its children may be.
            pass
    for name, child in module.named_children():
        setattr(module, name, _fold(child))
    return module


def _channels_last(module: nn.Module) -> nn.Module:
    changed: nn.Module = copy.deepcopy(module).to(memory_format=torch.channels_last)
    return changed


def _compiled(module: nn.Module) -> nn.Module:
    """Compiled in place: layers keep the names by which routing is recorded; the routing itself stays as it is."""
    changed = copy.deepcopy(module)
    layers = moe_layers(changed).values()
    parts = [part for layer in layers for part in (layer.router, *layer.experts)] or [changed]
    for part in parts:
        part.compile(dynamic=True)
    return changed


def _has_batchnorm(module: nn.Module) -> bool:
    return any(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def _prefers_channels_last(model: nn.Module, x: Tensor) -> bool:
    convolutional = any(isinstance(part, nn.Conv2d) and part.kernel_size != (1, 1) for part in model.modules())
    return convolutional and x.device.type == "cpu" and min(x.shape[2:]) >= SMALLEST_CHANNELS_LAST


@torch.no_grad()
def _agree(model: nn.Module, other: nn.Module, x: Tensor) -> bool:
    expected, got = model(x), other(x)
    return bool(((expected - got).abs() <= TOLERANCE * expected.abs().max().clamp_min(1.0)).all())
