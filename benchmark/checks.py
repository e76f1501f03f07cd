"""Checks of a model before any attack: what makes every number after it meaningless is refused, doubt is flagged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebench.attacks._engine import Samples
from moebench.attacks._passes import Expectation, batches
from moebench.errors import UsageError
from moebench.flags import BATCH_DEPENDENT, RANDOM_FORWARD, TRAIN_MODE
from moebench.schema import Flag

REPEATS = 3
"""Further passes over the same images, to see whether the answers stay the same."""

TOGETHER = 8
"""Images whose logits are compared with those of each image alone."""


@torch.no_grad()
def clean_logits(
    model: nn.Module, samples: Samples, num_classes: int, batch_size: int
) -> tuple[Tensor, tuple[Flag, ...]]:
    """Logits (N, K) on the clean samples, and what there is to doubt about them.

    Args:
        model: in eval mode.
        samples: what will be attacked.
        num_classes: classes of the data set; the model may have more.
        batch_size: samples per forward pass.

    Raises:
        UsageError: the model fails, or returns something else than finite logits (B, K).
    """
    parts = []
    for x in batches(samples.x, batch_size):
        parts.append(checked_logits(model, x, num_classes))
    logits = torch.cat(parts)
    check_not_probabilities(logits)
    random = random_forward(model, samples.x[:batch_size], parts[0])
    few = samples.x[: min(TOGETHER, max(batch_size, 2))]
    # Where two passes differ anyway, images alone and together cannot be compared.
    batchwise = batch_dependent(model, few, num_classes) if random is None else None
    found = (random, batchwise, train_mode(model, few, num_classes))
    return logits, tuple(flag for flag in found if flag is not None)


@torch.no_grad()
def expected_logits(model: nn.Module, x: Tensor, draws: int, batch_size: int) -> Tensor:
    """What a random model answers on average: log-probabilities (N, K), meaned over the draws as probabilities."""
    expectation = Expectation(model, draws)
    return torch.cat([expectation(part) for part in batches(x, batch_size)])


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


def random_forward(model: nn.Module, x: Tensor, first: Tensor) -> Flag | None:
    """A flag for a model that answers the same images x (B, C, H, W) differently than with the logits `first`."""
    worst, changed = 0.0, torch.zeros(len(x), dtype=torch.bool, device=x.device)
    random = False
    for _ in range(REPEATS):
        again = checked_logits(model, x, first.shape[1])
        random |= not torch.allclose(first, again, rtol=1e-4, atol=1e-5)
        worst = max(worst, float((first - again).abs().max()))
        changed |= first.argmax(dim=1) != again.argmax(dim=1)
    if not random:
        return None
    words = (
        f"logits of the same {len(x)} clean images differ by up to {worst:.3g} between {REPEATS + 1} passes, and "
        f"{int(changed.sum())} predictions with them; each verdict here is one draw (the judge makes a single forward "
        "pass), and --eot N averages the gradients that attacks follow"
    )
    return Flag(RANDOM_FORWARD, words)


def batch_dependent(model: nn.Module, x: Tensor, num_classes: int) -> Flag | None:
    """A flag for a model whose logits for one image change with the rest of the batch x (B, C, H, W)."""
    together = checked_logits(model, x, num_classes)
    alone = torch.cat([checked_logits(model, image.unsqueeze(0), num_classes) for image in x])
    scale = together.abs().max().clamp_min(1.0)
    if torch.allclose(alone, together, rtol=1e-3, atol=1e-3 * float(scale)):
        return None
    worst = float((alone - together).abs().max())
    changed = int((alone.argmax(dim=1) != together.argmax(dim=1)).sum())
    words = (
        f"logits of {len(x)} images alone and together differ by up to {worst:.3g}, and {changed} predictions with "
        "them (batch-statistics BatchNorm or expert capacity); verdicts here hang on the batch size"
    )
    return Flag(BATCH_DEPENDENT, words)


def train_mode(model: nn.Module, x: Tensor, num_classes: int) -> Flag | None:
    """A flag for modules that are in train mode although the model is in eval mode, or while it works on x."""
    names = {module: name or "the model" for name, module in model.named_modules()}
    training = {module for module in names if module.training}

    def note(module: nn.Module, inputs: object) -> None:
        if module.training:
            training.add(module)

    handles = [module.register_forward_pre_hook(note) for module in names]
    try:
        checked_logits(model, x, num_classes)
    finally:
        for handle in handles:
            handle.remove()
    training.update(module for module in names if module.training)
    if not training:
        return None
    shown = [f"{name} ({type(module).__name__})" for module, name in names.items() if module in training]
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return Flag(TRAIN_MODE, f"{len(shown)} of {len(names)} modules run in train mode: {', '.join(shown[:5])}{more}")
