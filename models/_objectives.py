"""Training objectives that several papers share, each a loss over (model, images, labels, adversary, recipe)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.models._base import Adversary, Phase, Recipe, evaluating


def kl_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) of the softmax distributions of two logits (B, K), per sample (B,)."""
    log_p, log_q = logits_p.log_softmax(dim=1), logits_q.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def cross_entropy_adversary(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary) -> Tensor:
    """Images near x that raise the model's cross-entropy."""
    return adversary(model, x, lambda logits: F.cross_entropy(logits, y, reduction="none"))


def standard_loss(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    """Cross-entropy on clean images."""
    return F.cross_entropy(model(x), y)


def adversarial_loss(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    """Cross-entropy on adversarial images only (Madry et al., 2018, arXiv 1706.06083)."""
    return F.cross_entropy(model(cross_entropy_adversary(model, x, y, adversary)), y)


def trades_loss(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, recipe: Recipe) -> Tensor:
    """CE(f(x), y) + beta KL(p(x) || p(x')), x' chosen to raise the divergence (Zhang et al., 2019)."""
    with torch.no_grad(), evaluating(model):
        reference = model(x)
    x_adv = adversary(model, x, lambda logits: kl_divergence(reference, logits))
    clean, adv = model(torch.cat((x, x_adv))).chunk(2)
    return F.cross_entropy(clean, y) + recipe.beta * kl_divergence(clean, adv).mean()


STANDARD = (Phase(standard_loss),)
ADVERSARIAL = (Phase(adversarial_loss),)
TRADES = (Phase(trades_loss),)
