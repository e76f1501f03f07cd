"""A store in memory, made of the real records, and a small populated one for looking at reports."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moebench.schema import (
    BoolArray,
    CellSpec,
    CheckpointRecord,
    Claim,
    Example,
    ExpertChoice,
    Flag,
    IntArray,
    ModelRecord,
    Outcomes,
    PaperCard,
    ProtocolRecord,
    ResultRecord,
    RoutingLayer,
    StoredResult,
    StoredRun,
    ThreatModel,
)

ENVIRONMENT = {"device": "cpu", "host": "secret-host", "moebench": "0.1.0", "process": 4242, "torch": "2.9.0"}


def sha(text: str) -> str:
    """A stand-in for the hash of something large."""
    return hashlib.sha256(text.encode()).hexdigest()


def paper(title: str = "Routing, Attacked") -> PaperCard:
    """A paper of that title."""
    bibtex = "@inproceedings{routing2025,\n  title = {Routing, Attacked},\n  year = {2025}\n}"
    return PaperCard(title, "A. Author and B. Böll", "ICML", 2025, "2502.06832", bibtex)


def model(name: str, family: str = "moe", **facts: Any) -> ModelRecord:
    """A model of that name."""
    return ModelRecord(name=name, family=family, **{"summary": f"The model {name}.", "paper": paper(), **facts})


def protocol(dataset: str = "digits", n: int = 200, norm: Any = "Linf", eps: float = 0.2) -> ProtocolRecord:
    """The first n test samples of a data set under one threat model."""
    names = tuple(str(digit) for digit in range(10))
    return ProtocolRecord(dataset, "test", sha(f"{dataset}-{n}"), n, 10, names, ThreatModel(norm, eps))


def outcomes(broken: BoolArray, stage: str = "") -> Outcomes:
    """What an attack leaves that broke the given samples, all in one stage."""
    n = broken.size
    zeros, ones = np.zeros(n, dtype=np.int64), np.ones(n, dtype=np.int64)
    stages = tuple(stage if hit else "" for hit in broken) if stage else ("",) * n
    return Outcomes(np.arange(n), broken, zeros, broken.astype(np.int64), np.zeros(n, np.float32), ones, ones, stages)


def first_broken(n: int, k: int) -> BoolArray:
    """The first k of n samples broken."""
    return np.arange(n) < k


def routing(name: str = "layer4.0") -> RoutingLayer:
    """The routing of a layer of four experts."""
    moves = ((40, 5, 3, 2), (6, 40, 4, 0), (2, 3, 45, 0), (1, 0, 9, 40))
    return RoutingLayer(name, 0.81, 0.19, 1.02, 1.21, (0.25, 0.25, 0.25, 0.25), (0.245, 0.24, 0.305, 0.21), moves)


def example(index: int, label: int, adv_pred: int, *, side: int = 8, layer: str = "layer4.0") -> Example:
    """A grey bar on black that an attack turned into another class."""
    clean = np.zeros((1, side, side), np.float32)
    clean[:, :, label % side] = 0.75
    noise = np.where(np.indices(clean.shape).sum(axis=0) % 2, 0.2, -0.2).astype(np.float32)
    choice = ExpertChoice(layer, before=(label % 4,), after=(adv_pred % 4,))
    return Example(index, label, label, adv_pred, 0.2, "apgd-ce", clean, np.clip(clean + noise, 0, 1), (choice,))


@dataclass
class FakeStore:
    """Holds what is added to it; `add` makes all records of one finished cell."""

    stored: list[StoredResult] = field(default_factory=list)
    evidence: dict[int, Outcomes] = field(default_factory=dict)
    published: list[Claim] = field(default_factory=list)
    made: list[StoredRun] = field(default_factory=list)
    superseded: set[int] = field(default_factory=set)
    classes: dict[str, IntArray] = field(default_factory=dict)
    pictures: dict[int, tuple[Example, ...]] = field(default_factory=dict)

    def results(self, *, newest_only: bool = True) -> Sequence[StoredResult]:
        """Like the real store."""
        return [one for one in self.stored if not (newest_only and one.result_id in self.superseded)]

    def outcomes(self, result_id: int, /) -> Outcomes:
        """Like the real store."""
        return self.evidence[result_id]

    def labels(self, protocol: ProtocolRecord, /) -> IntArray | None:
        """Like the real store."""
        return self.classes.get(protocol.data_sha256)

    def examples(self, result_id: int, /) -> Sequence[Example]:
        """Like the real store."""
        return self.pictures.get(result_id, ())

    def claims(self) -> Sequence[Claim]:
        """Like the real store."""
        return list(self.published)

    def runs(self) -> Sequence[StoredRun]:
        """Like the real store."""
        return list(self.made)

    def add(
        self,
        who: ModelRecord,
        attack: str,
        broken: BoolArray,
        view: str = "whole",
        on: ProtocolRecord | None = None,
        clean: float = 0.95,
        engine: str = "native",
        precision: str = "float32",
        weights: str | None = None,
        stage: str = "",
        layers: tuple[RoutingLayer, ...] = (),
        stages: dict[str, Any] | None = None,
    ) -> StoredResult:
        """Adds a finished cell whose attack broke the given samples."""
        number = len(self.stored) + 1
        where = on or protocol(n=int(broken.size))
        accuracy = 1 - float(broken.mean()) if broken.size else 0.0
        digest = sha(weights or who.name)
        stored = StoredResult(
            result_id=number,
            run_id=f"run-{number:04d}",
            command=f"moebench evaluate --model {who.name} --dataset {where.dataset} --attack {attack} --view {view}",
            finished_at=f"2026-01-02T03:04:{number % 60:02d}Z",
            cell=CellSpec(sha(f"cell {number}"), attack, {"steps": 100, "targets": [1, 2]}, view, 0, engine, precision),
            record=ResultRecord(
                *(attack, view, accuracy, 0.0, 1.0, int(broken.size), 12.5, 54_321, 12_345, clean, 0.4),
                routing=layers,
                stages=stages or {},
            ),
            model=who,
            checkpoint=CheckpointRecord(
                *(digest, who.name, where.dataset, "shipped", 88_700_000, 11_200_000, 1_330_000_000),
                recipe={"epochs": 130, "optimiser": {"name": "Adam", "lr": 1e-4}},
                training_log=({"epoch": 1, "loss": 0.52}, {"epoch": 2, "loss": 0.31}),
            ),
            protocol=where,
            environment=ENVIRONMENT,
        )
        self.stored.append(stored)
        self.evidence[number] = outcomes(broken, stage)
        return stored

    def add_run(
        self, of: StoredResult, status: str = "done", flags: tuple[Flag, ...] = (), error: str | None = None
    ) -> None:
        """Adds the run that a result came from."""
        self.made.append(
            StoredRun(
                *(of.run_id, status, of.command, "2026-01-02T03:00:00Z", of.finished_at, 12.5, error),
                *(of.model, of.checkpoint, of.protocol, of.environment, (of,), flags, 0),
            )
        )


def claim(name: str, value: float, dataset: str = "CIFAR-10", attack: str = "PGD", **facts: Any) -> Claim:
    """A published robust accuracy in percent, under PGD where nothing else is said."""
    made = Claim(
        *("2502.06832", f"{name} (paper)", name, dataset, "MoE top-1, E=4", attack),
        *("Linf eps=8/255, 50 steps, step 2/255", "RA", value, "2502.06832 Table 1", None),
    )
    return replace(made, **facts)


def demo(n: int = 297) -> FakeStore:
    """Several families, data sets, flags and gaps: what a real store may hold after some weeks."""
    store, draw = FakeStore(), np.random.default_rng(7)
    strength = {"fgsm": 0.75, "pgd-50": 0.9, "autoattack": 1.0, "moe-adaptive": 1.06}
    models = (
        model("rt-er", summary="Experts trained against the attack on the one that the router ranks second."),
        model("st-moe", summary="Standard training, top-1 routing."),
        model("jtd-moe", "dual"),
        model("dwf", "ensemble"),
        model("resnet-at", "dense", training="PGD-10 adversarial training", routing=None),
        model("trades-moe"),
        model("my_defence.py:build", "external", paper=None),
    )
    views = {"moe": ("experts", "router"), "dual": ("experts", "router", "standard", "robust")}
    weakness = {"experts": 0.8, "router": 0.3, "standard": 0.5, "robust": 0.7}
    broke = {"rt-er": 0.45, "st-moe": 0.97, "jtd-moe": 0.42, "dwf": 0.55, "resnet-at": 0.5, "trades-moe": 0.6}
    for who in models:
        hardness = draw.random(n)
        share = broke.get(who.name, 0.5)
        clean = 0.97 - 0.05 * share
        for attack, power in strength.items():
            if who.family == "external" and attack not in ("fgsm", "pgd-50"):
                continue
            broken = (hardness < min(share * power, 0.995)) | (hardness < 1 - clean)
            more: dict[str, Any] = {}
            if attack == "autoattack":
                more = {"stage": "apgd-ce", "stages": {"apgd-ce": {}, "apgd-t": {}, "fab-t": {}, "square": {}}}
                more["layers"] = (routing("layer4.0"), routing("layer4.1")) if who.family == "moe" else ()
            done = store.add(who, attack, broken, clean=clean, **more)
            store.classes[done.protocol.data_sha256] = np.arange(n, dtype=np.int64) % 10
            if more:
                fallen = np.flatnonzero(broken & (hardness >= 1 - clean))[:8].tolist()
                store.pictures[done.result_id] = tuple(example(at, at % 10, (at + 3) % 10) for at in fallen)
        for view in views.get(who.family, ()):
            power = 1.15 if (who.name, view) == ("rt-er", "experts") else weakness[view]
            store.add(who, "pgd-50", (hardness < share * power) | (hardness < 1 - clean), view, clean=clean)
        gradient = Flag("gradient masking", "square breaks 14 samples that apgd-ce leaves standing")
        store.add_run(done, flags=(gradient,) if who.name == "st-moe" else ())
    store.add(models[0], "autoattack", first_broken(n, 130), engine="reference", clean=0.95)
    cifar = protocol("cifar-10", 1000, eps=8 / 255)
    broken = draw.random(1000) < 0.62
    for attack in ("autoattack", "moe-adaptive"):
        store.add(models[0], attack, broken, on=cifar, clean=0.758)
    store.add(models[0], "pgd-50", draw.random(1000) < 0.58, on=cifar, clean=0.758)
    failed = store.add(models[3], "square", first_broken(n, 10), clean=0.9425)
    store.add_run(failed, "failed", error="the loss became NaN at step 3")
    why = "whole-MoE RA far above RA-E; the official attack is gradient-masked"
    store.published += [claim("rt-er", 69.09), claim("rt-er", 54.4, attack="AutoAttack (as named by paper)")]
    store.published += [claim("rt-er", 75.92, attack="none", metric="SA", attack_params="")]
    store.published += [claim("st-moe", 52.54, flag=why), claim("st-moe", 3.11, metric="RA-E")]
    store.published += [claim("jtd-moe", 74.62), claim("jtd-moe", 48.1, dataset="TinyImageNet")]
    return store
