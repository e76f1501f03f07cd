"""Stores for the pages beside the leaderboards: transfer results, and attacks whose overlap is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from fake_store import FakeStore, demo, model, sha

from moebench.schema import PART_FAMILY, BoolArray, StoredResult

N = 40


def broke(*samples: int, n: int = N) -> BoolArray:
    """The given ones of n samples."""
    hits = np.zeros(n, dtype=np.bool_)
    hits[list(samples)] = True
    return hits


def wrong_clean(store: FakeStore, samples: BoolArray) -> None:
    """Makes samples of the result added last wrong from the start, as attacks leave them: prediction unchanged."""
    number = store.stored[-1].result_id
    one = store.evidence[number]
    adversarial = np.where(samples, one.clean_pred, one.adv_pred)
    store.evidence[number] = replace(one, broken=one.broken | samples, adv_pred=adversarial)


def add_transfer(
    store: FakeStore, source: str, target: str, broken: BoolArray, attack: str = "pgd-50", seed: int = 0
) -> StoredResult:
    """One pair as `moebench transfer` stores it."""
    stored = store.add(model(target, PART_FAMILY if "/" in target else "moe"), "transfer", broken)
    settings = {
        "source": source,
        "source_weights": sha(source),
        "source_view": "whole",
        "attack": attack,
        "attack_parameters": {"pgd": {"steps": 50}},
    }
    cell = replace(stored.cell, parameters={f"from {source}": settings}, seed=seed)
    store.stored[-1] = replace(stored, cell=cell)
    return store.stored[-1]


def transfer_store(names: tuple[str, ...] = ("a", "b", "a/expert[0]"), n: int = N) -> FakeStore:
    """Every pair of some models: source i breaks the first 4·(i + 1) samples of others, and twice that of itself."""
    store = FakeStore()
    for target in names:
        for number, source in enumerate(names):
            count = 4 * (number + 1) * (2 if source == target else 1)
            add_transfer(store, source, target, broke(*range(min(n, count)), n=n))
    return store


def everything(n: int = 60) -> FakeStore:
    """The small populated store with transfer results among its models."""
    store = demo(n)
    for one in transfer_store(("rt-er", "st-moe", "rt-er/expert[0]"), n).stored:
        where = one.cell.parameters
        (settings,) = where.values()
        broken = broke(*range(int(n * (0.2 if settings["source"] == one.model.name else 0.1))), n=n)
        add_transfer(store, settings["source"], one.model.name, broken)
    return store
