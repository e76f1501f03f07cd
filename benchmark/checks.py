"""Checks of a model before any attack: what fails here would make every number after it meaningless."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebench.attacks._engine import Samples
from moebench.attacks._passes import batches
from moebench.errors import UsageError


@torch.no_grad()
def clean_logits(model: nn.Module, samples: Samples, num_classes: int, batch_size: int) -> Tensor:
    """Logits (N, K) on the clean samples, after checking that they can be trusted.

    Args:
        model: in eval mode.
        samples: what will be attacked.
        num_classes: classes of the data set; the model may have more.
        batch_size: samples per forward pass.

    Raises:
        UsageError: the model fails, or returns something else than finite logits (B, K) that depend on the image alone.
    """
    parts = []
    for x in batches(samples.x, batch_size):
        parts.append(checked_logits(model, x, num_classes))
    logits = torch.cat(parts)
    check_not_probabilities(logits)
    check_deterministic(model, samples.x[:batch_size], parts[0])
    check_independent(model, samples.x[:8], logits[:8])
    return logits


def checked_logits(model: nn.Module, x: Tensor, num_classes: int) -> Tensor:
    """The model's logits (B, K) on a batch, in float32.

    Raises:
        UsageError: the model fails, or returns no logits.
    """
    try:
        out = model(x)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        given = f"images of {'×'.join(map(str, x.shape[1:]))} (batch of {len(x)})"
        raise UsageError(f"the model fails on {given}: {type(error).__name__}: {first[:200]}") from error
    check_logits(out, len(x), num_classes)
    logits: Tensor = out.float()
    return logits


def check_logits(out: object, batch: int, num_classes: int) -> None:
    """Refuses an output that is not a finite floating tensor (B, K) with K >= num_classes."""
    if not isinstance(out, Tensor):
        raise UsageError(f"the model returns {type(out).__name__}; expected a tensor of logits (batch, classes)")
    shape = "×".join(map(str, out.shape))
    if out.dim() != 2 or out.shape[0] != batch or not out.is_floating_point():
        raise UsageError(
            f"the model returns {out.dtype} of shape {shape} for {batch} images; expected float logits {batch}×classes"
        )
    if out.shape[1] < num_classes:
        raise UsageError(
            f"the model has {out.shape[1]} classes and the data set {num_classes}; labels would be out of range"
        )
    if not bool(torch.isfinite(out).all()):
        raise UsageError("the model returns NaN or infinite logits on clean images; nothing can be measured on it")


def check_not_probabilities(logits: Tensor) -> None:
    """Refuses softmax outputs: their gradients vanish, and attacks would only seem to fail."""
    inside = bool((logits >= 0).all()) and bool((logits <= 1).all())
    if inside and bool(((logits.sum(dim=1) - 1).abs() < 1e-4).all()):
        raise UsageError("the model returns probabilities; attacks need logits: remove the softmax at its end")


def check_deterministic(model: nn.Module, x: Tensor, first: Tensor) -> None:
    """Refuses a model that answers the same images differently."""
    second = checked_logits(model, x, first.shape[1])
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-5):
        worst = float((first - second).abs().max())
        raise UsageError(
            f"the model gives different logits for the same images (by up to {worst:.3g}); is there dropout, noise or "
            "train-mode BatchNorm in its forward pass?"
        )


def check_independent(model: nn.Module, x: Tensor, together: Tensor) -> None:
    """Refuses a model whose logits for one image depend on the rest of the batch."""
    alone = torch.cat([checked_logits(model, image.unsqueeze(0), together.shape[1]) for image in x])
    scale = together.abs().max().clamp_min(1.0)
    if not torch.allclose(alone, together, rtol=1e-3, atol=1e-3 * float(scale)):
        raise UsageError(
            "the model's logits for an image change with the other images of the batch (batch-statistics BatchNorm or "
            "expert capacity); per-image robustness is not defined for it"
        )
