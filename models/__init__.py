"""Model registry: one public file per paper, weights and cards beside them."""

from __future__ import annotations

from typing import Any

from torch import nn

from moebench.models._base import MODELS, ModelEntry


def list_models() -> list[str]:
    """Names of all registered models."""
    return MODELS.names()


def load_model(
    name: str,
    *,
    num_classes: int = 10,
    shape: tuple[int, int, int] = (1, 8, 8),
    dataset: str | None = "digits",
    **settings: Any,
) -> nn.Module:
    """A registered model in eval mode, with the weights shipped for a data set (fresh ones for `dataset=None`).

    Raises:
        UsageError: unknown name or setting, or no weights are shipped for that data set.
    """
    from moebench.models._weights import load_into, read_weights, shipped_weights

    model = MODELS.get(name).make(num_classes, shape, **settings)
    if dataset is not None:
        path = shipped_weights(dataset, name)
        load_into(model, read_weights(path)[0], str(path))
    return model.eval()


__all__ = ["MODELS", "ModelEntry", "list_models", "load_model"]
