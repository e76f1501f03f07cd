"""A faster copy of a model for the search: BatchNorm in eval mode is folded into the convolution before it.

Folding changes logits by float rounding only. Every success is confirmed on the model itself, so the copy can cost an
attack nothing but time; where a model cannot be traced or does not agree with its copy, it is attacked as it is.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from moebench.models._moe import moe_layers

TOLERANCE = 1e-4
"""Largest accepted difference of logits, as a share of the largest logit."""


def fused_copy(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy of a model in eval mode with BatchNorm folded away, or the model itself where that is not possible.

    Args:
        model: in eval mode.
        x: clean images to compare the two on, (B, C, H, W).
    """
    if not _has_batchnorm(model):
        return model
    try:
        fused = _fuse(copy.deepcopy(model)).eval().requires_grad_(False)
        agreeing = all(_agree(model, fused, part) for part in (x[:1], x[:3], x))
    except Exception:
        # Arbitrary user code is traced and copied here, and may refuse in any way; nothing is lost but speed.
        return model
    return fused if agreeing else model


def _fuse(module: nn.Module) -> nn.Module:
    """Folds the largest parts that can be traced; routing depends on the data and is left as it is."""
    if not moe_layers(module) and _has_batchnorm(module):
        try:
            return fuse(module)
        except Exception:
            # Not traceable as a whole: its children may be.
            pass
    for name, child in module.named_children():
        setattr(module, name, _fuse(child))
    return module


def _has_batchnorm(module: nn.Module) -> bool:
    return any(isinstance(part, nn.BatchNorm2d) for part in module.modules())


@torch.no_grad()
def _agree(model: nn.Module, other: nn.Module, x: Tensor) -> bool:
    expected, got = model(x), other(x)
    return bool(((expected - got).abs() <= TOLERANCE * expected.abs().max().clamp_min(1.0)).all())
