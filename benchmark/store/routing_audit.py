"""Whether the routing that a result tells of its attacked images is what its samples give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moebench.schema import Chunk, ResultRecord, RoutingLayer

_TOLERANCE = 1e-4
"""Means are taken in single precision on some device, and over many samples."""


def routing_problems(record: ResultRecord, chunks: Sequence[Chunk]) -> Iterator[str]:
    """Where load, entropy and first choices on attacked images are not those of the samples, in words.

    Routing on clean images is not kept per sample, so what hangs on it alone cannot be checked.
    """
    for layer in record.routing:
        last = _last(chunks, f"{layer.name}/", record.n)
        for name, has, gives in _pairs(layer, last):
            if has.shape != gives.shape or not np.allclose(has, gives, rtol=_TOLERANCE, atol=_TOLERANCE):
                yield f"{name} of layer {layer.name} is not what its samples give"


def _last(chunks: Sequence[Chunk], start: str, n: int) -> dict[str, NDArray[Any]]:
    """What was kept last of each attacked sample, by name: (m, …)."""
    found: dict[str, NDArray[Any]] = {}
    seen = np.zeros(n, np.bool_)
    for chunk in chunks:
        own = {name.removeprefix(start): array for name, array in chunk.extras.items() if name.startswith(start)}
        for name, array in own.items():
            if name not in found:
                found[name] = np.zeros((n, *array.shape[1:]), array.dtype)
            found[name][chunk.index] = array
        if own:
            seen[chunk.index] = True
    return {name: array[seen] for name, array in found.items()}


def _pairs(
    layer: RoutingLayer, last: dict[str, NDArray[Any]]
) -> Iterator[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    experts = len(layer.load_adv)
    loads = last.get("weights", last.get("load"))
    if loads is not None:
        yield "load", np.array(layer.load_adv), loads.astype(np.float64).mean(axis=0)
    if "entropy" in last:
        yield "entropy", np.array([layer.entropy_adv]), last["entropy"].astype(np.float64).mean(keepdims=True)
    for name, told in (("iou", layer.iou), ("changed", layer.changed)):
        if name in last:
            yield name, np.array([told]), last[name].astype(np.float64).mean(keepdims=True)
    first = last["weights"].argmax(axis=1) if "weights" in last else last.get("first")
    if first is not None:
        counts = np.bincount(first.ravel(), minlength=experts).astype(np.float64)
        yield "first choices", np.array(layer.moves, np.float64).sum(axis=0), counts
