"""What `moebench universal` does: makes or loads one δ, judges it like any attack, and keeps it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moebench.attacks import AttackPlan, load_attack
from moebench.attacks._training import TrainedAttack
from moebench.attacks.universal import OneDelta, UniversalFile
from moebench.delta_file import (
    FORMAT,
    DeltaFile,
    check_norm,
    check_shape,
    read_delta,
    replacing,
    write_delta,
)
from moebench.delta_picture import Example, check_channels, write_picture
from moebench.dry_run import fingerprints, stored_results
from moebench.errors import UsageError
from moebench.evaluation import EvalSpec, Listener, Prepared, cell_work, prepare, run_prepared
from moebench.fitting import CRAFTING, fit_stage
from moebench.metrics import wilson
from moebench.saving import check_writable
from moebench.schema import ResultRecord
from moebench.summary import Summary

FILE_ATTACK = "universal-file"
"""Name under which the results of a loaded δ are stored."""

EXAMPLES = 6


@dataclass(frozen=True)
class UniversalSpec:
    """What to do; `evaluation` names one attack and at most one view.

    With `load` a δ is judged that was made earlier, in the threat model that its file names: `norm_given` says that the
    norm of `evaluation` counts instead, and an eps that is not None always does. `save` and `picture` are written.
    """

    evaluation: EvalSpec
    load: Path | None = None
    norm_given: bool = False
    save: Path | None = None
    picture: Path | None = None


@dataclass(frozen=True)
class UniversalSummary:
    """What came out. `fooled` of `right` test samples are right without δ and wrong with it.

    `train_fooling_rate` is the same share of the `train_n` training samples. `source` names the model that a loaded δ
    was made on, and `transfer` says that these are not the weights that were attacked. `delta_sha256` and `delta_norm`
    are None where the result was in the database and nothing asked for δ itself.
    """

    summary: Summary
    view: str
    fooled: int
    right: int
    train_n: int | None
    train_fooling_rate: float | None
    delta_sha256: str | None
    delta_norm: float | None
    source: str | None
    transfer: bool

    @property
    def record(self) -> ResultRecord:
        """The stored result."""
        return self.summary.results[0]

    @property
    def fooling_rate(self) -> float | None:
        """Share of the samples that are right without δ whose prediction changes; None if there are none."""
        return self.fooled / self.right if self.right else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval of the fooling rate."""
        return wilson(self.fooled, self.right) if self.right else None

    def to_json(self) -> dict[str, Any]:
        """The object that `moebench universal --json` prints: that of `evaluate`, and what is known of δ."""
        low, high = self.interval or (None, None)
        return {
            **self.summary.to_json(),
            "universal": {
                "fooling_rate": self.fooling_rate,
                "ci_low": low,
                "ci_high": high,
                "n": self.right,
                "train_fooling_rate": self.train_fooling_rate,
                "train_n": self.train_n,
                "delta_sha256": self.delta_sha256,
                "delta_norm": self.delta_norm,
                "source": self.source,
                "transfer": self.transfer,
                "routing": [
                    {
                        "layer": layer.name,
                        "changed": layer.changed,
                        "iou": layer.iou,
                        "entropy_clean": layer.entropy_clean,
                        "entropy_adv": layer.entropy_adv,
                        "load_clean": list(layer.load_clean),
                        "load_adv": list(layer.load_adv),
                    }
                    for layer in self.record.routing
                ],
            },
        }


def universal(spec: UniversalSpec, listener: Listener | None = None) -> UniversalSummary:
    """Makes or loads a universal perturbation, judges it, stores the result, and writes δ and its picture.

    Raises:
        UsageError: something that was asked for cannot be done; nothing is written.
        RunError: the work failed on the way.
    """
    _check_outputs(spec)
    file = None if spec.load is None else read_delta(spec.load)
    evaluation = spec.evaluation
    if file is not None:
        norm = evaluation.norm if spec.norm_given else file.threat.norm
        same = evaluation.eps is None and norm == file.threat.norm
        evaluation = replace(evaluation, norm=norm, eps=file.threat.eps if same else evaluation.eps)
    prepared = prepare(evaluation, [_plan(spec, file)])
    if file is not None and spec.load is not None:
        _check_file(spec.load, file, prepared)
    if spec.picture is not None:
        check_channels(prepared.dataset.shape[0])
    wanted = spec.save is not None or spec.picture is not None
    if (
        wanted
        or prepared.spec.fresh
        or prepared.cells[0][1].fingerprint not in fingerprints(stored_results(evaluation))
    ):
        prepared = _fitted(prepared, listener)
    summary = run_prepared(prepared, listener)
    stage = prepared.cells[0][0].stages[0]
    if spec.save is not None:
        assert isinstance(stage, TrainedAttack) and stage.fitted is not None
        write_delta(spec.save, _to_file(prepared, stage))
    if spec.picture is not None:
        assert isinstance(stage, OneDelta)
        _draw(spec.picture, prepared, stage.delta)
    return _summary(prepared, summary, file)


def _check_outputs(spec: UniversalSpec) -> None:
    if spec.load is not None and spec.save is not None:
        raise UsageError("--save keeps a perturbation that was made here; that of --load is in its file already")
    if spec.save is not None and spec.picture is not None and spec.save.absolute() == spec.picture.absolute():
        raise UsageError(f"--save and --picture both name {spec.save}; give each a file of its own")
    for option, path in (("--save", spec.save), ("--picture", spec.picture)):
        if path is not None:
            check_writable(path, option)


def _plan(spec: UniversalSpec, file: DeltaFile | None) -> AttackPlan:
    if file is not None:
        stage = UniversalFile(file.sha256, file.facts, torch.from_numpy(file.delta))
        return AttackPlan(FILE_ATTACK, "a δ from a file", (stage,), ("whole",))
    (name,) = spec.evaluation.attacks
    plan = load_attack(name)
    if len(plan.stages) != 1 or not isinstance(plan.stages[0], TrainedAttack):
        raise UsageError(f"attack {name!r} makes no universal perturbation; take universal-pgd, or `moebench evaluate`")
    return plan


def _check_file(path: Path, file: DeltaFile, prepared: Prepared) -> None:
    check_shape(path, file, prepared.dataset.shape, prepared.dataset.name)
    check_norm(path, file, prepared.threat)
    if file.facts["training_sha256"] == prepared.dataset.sha256:
        raise UsageError(f"{path}: was made on the very images of {prepared.dataset.name} that it would be judged on")


def _fitted(prepared: Prepared, listener: Listener | None) -> Prepared:
    """The evaluation with δ made, so that the cell does not make it again; as it is where δ comes from a file."""
    plan, cell = prepared.cells[0]
    stage = plan.stages[0]
    if not isinstance(stage, TrainedAttack):
        return prepared
    assert prepared.training is not None
    work = cell_work(prepared, plan, cell, 1, listener)
    standing = int((prepared.clean_pred == prepared.samples.y).sum())
    fitted = fit_stage(
        stage, prepared.training, model=work.model, search=work.search, view=cell.view, threat=work.threat,
        seed=cell.seed, device=prepared.samples.x.device,
        tell=lambda done, total: work.tell(f"{stage.stage}{CRAFTING}", done, total, standing),
    )  # fmt: skip
    return replace(prepared, cells=((replace(plan, stages=(fitted,)), cell),))


def _to_file(prepared: Prepared, stage: TrainedAttack) -> DeltaFile:
    _, cell = prepared.cells[0]
    assert stage.fitted is not None and prepared.training is not None
    facts = {
        "format": FORMAT,
        "model": prepared.loaded.record.name,
        "weights_sha256": prepared.loaded.checkpoint.sha256,
        "dataset": prepared.training.name,
        "training_sha256": prepared.training.sha256,
        "training_n": len(prepared.training),
        "attack": cell.attack,
        "parameters": dict(stage.parameters()),
        "view": cell.view,
        "norm": prepared.threat.norm,
        "eps": prepared.threat.eps,
        "seed": cell.seed,
        "train_fooling_rate": stage.fitted.fooling_rate,
    }
    return DeltaFile(stage.fitted.delta.cpu().numpy().astype(np.float32), facts)


@torch.no_grad()
def _draw(path: Path, prepared: Prepared, delta: torch.Tensor) -> None:
    samples, names = prepared.samples, prepared.dataset.class_names
    x = samples.x[:EXAMPLES]
    perturbed = (x + delta.to(x.device)).clamp(prepared.threat.lower, prepared.threat.upper)
    seen = prepared.loaded.module(perturbed).argmax(dim=1).tolist()

    def name(number: int) -> str:
        return names[number] if number < len(names) else str(number)

    examples = [
        Example(
            x[at].cpu().numpy(),
            perturbed[at].cpu().numpy(),
            name(int(samples.y[at])),
            name(int(prepared.clean_pred[at])),
            name(seen[at]),
        )
        for at in range(len(x))
    ]
    with replacing(path) as out:
        write_picture(out, delta.cpu().numpy(), examples)


def _summary(prepared: Prepared, summary: Summary, file: DeltaFile | None) -> UniversalSummary:
    plan, cell = prepared.cells[0]
    record, stage = summary.results[0], plan.stages[0]
    right = round(record.clean_accuracy * record.n)
    crafting = record.stages.get(f"{stage.stage}{CRAFTING}", {})
    n, rate = crafting.get("train_n"), crafting.get("train_fooling_rate")
    made = file
    if isinstance(stage, TrainedAttack) and stage.fitted is not None:
        made, n, rate = _to_file(prepared, stage), stage.fitted.n, stage.fitted.fooling_rate
    elif file is not None:
        n, rate = file.facts["training_n"], file.facts["train_fooling_rate"]
    flat = None if made is None else made.delta.astype(np.float64).ravel()
    order = np.inf if prepared.threat.norm == "Linf" else 2
    return UniversalSummary(
        summary=summary,
        view=cell.view,
        fooled=right - round(record.accuracy * record.n),
        right=right,
        train_n=None if n is None else int(n),
        train_fooling_rate=None if rate is None else float(rate),
        delta_sha256=None if made is None else made.sha256,
        delta_norm=None if flat is None else float(np.linalg.norm(flat, order)),
        source=None if file is None else str(file.facts["model"]),
        transfer=file is not None and file.facts["weights_sha256"] != prepared.loaded.checkpoint.sha256,
    )
