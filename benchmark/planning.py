"""From a command's words to cells: which attack runs on which view, with what, and what cannot work at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moebench.attacks import load_attack
from moebench.attacks._base import AttackPlan
from moebench.attacks._library import bind_library
from moebench.attacks._reference import check_reference
from moebench.attacks._views import check_view, default_views
from moebench.datasets import Dataset
from moebench.errors import UsageError
from moebench.fitting import is_trained
from moebench.identity import cell_fingerprint
from moebench.loading import LoadedModel
from moebench.schema import CellSpec, ProtocolRecord, ThreatModel, is_protocol

if TYPE_CHECKING:
    from moebench.evaluation import EvalSpec


def parse_attacks(names: Sequence[str]) -> list[AttackPlan]:
    """The plans of the named attacks, each once, in the given order."""
    if not names:
        raise UsageError("no attack given; `moebench list attacks` shows all")
    return list({plan.name: plan for plan in map(load_attack, names)}.values())


def check_numbers(spec: EvalSpec) -> None:
    """Refuses sizes that mean nothing, and options of the native engine with the reference engine."""
    if spec.batch_size is not None and spec.batch_size < 1:
        raise UsageError(f"batch size must be at least 1, got {spec.batch_size}")
    if spec.draws < 1:
        raise UsageError(f"--eot takes the number of passes to average, at least 1, got {spec.draws}")
    own = {"--precision": spec.precision != "float32", "--eot": spec.draws > 1, "--compile": spec.compiled}
    for option, used in own.items():
        if used and spec.engine != "native":
            raise UsageError(f"{option} belongs to our engine; leave out --engine {spec.engine}")


def check_protocols(spec: EvalSpec, plans: Sequence[AttackPlan]) -> None:
    """Refuses what makes no sense of a published protocol, which decides everything about its passes itself."""
    protocols = [plan.name for plan in plans if is_protocol(plan.name)]
    if not protocols:
        return
    own = {
        "--norm L2": spec.norm != "Linf",
        f"--engine {spec.engine}": spec.engine != "native",
        f"--precision {spec.precision}": spec.precision != "float32",
        "--eot": spec.draws > 1,
        "--save-adv": spec.save_adv is not None,
    }
    for option, used in own.items():
        if used:
            raise UsageError(f"{protocols[0]!r} is a protocol with a rule of its own, for Linf; leave out {option}")


def fit_plan(
    plan: AttackPlan, threat: ThreatModel, shape: tuple[int, int, int], classes: int, batch_size: int
) -> AttackPlan:
    """The attack with all that it takes from the evaluation.

    Raises:
        UsageError: it does not work for these images, so many classes or this threat model.
    """
    if classes < plan.min_classes:
        raise UsageError(f"attack {plan.name!r} needs at least {plan.min_classes} classes; this model has {classes}")
    return bind_library(plan, threat, shape, classes, batch_size)


def plan_cells(
    spec: EvalSpec,
    plans: Sequence[AttackPlan],
    loaded: LoadedModel,
    protocol: ProtocolRecord,
    training: Dataset | None = None,
) -> tuple[tuple[AttackPlan, CellSpec], ...]:
    """Every (attack, view) that the command asks for, with its fingerprint."""
    cells = []
    for wanted in plans:
        plan = wanted.fitted(loaded.module)
        for view in _views_of(plan, spec, loaded):
            check_view(view, loaded.module)
            if spec.engine == "reference":
                check_reference(plan, view)
            cells.append((plan, _cell(plan, view, spec, loaded, protocol, training)))
    return tuple(cells)


def applies(plan: AttackPlan, loaded: LoadedModel) -> bool:
    """Whether an attack has something to do on a model: those on the routing need some."""
    try:
        fitted = plan.fitted(loaded.module)
    except UsageError:
        return False
    return not (_through_routing(fitted) and default_views(loaded.module) == ["whole"])


def _through_routing(plan: AttackPlan) -> bool:
    return plan.views not in (None, ("whole",)) or any(stage.view is not None for stage in plan.stages)


def _views_of(plan: AttackPlan, spec: EvalSpec, loaded: LoadedModel) -> Sequence[str]:
    if _through_routing(plan) and default_views(loaded.module) == ["whole"]:
        raise UsageError(f"attack {plan.name!r} needs a model with routing; {loaded.record.name} has none")
    if plan.views is None:
        return list(dict.fromkeys(spec.views)) or default_views(loaded.module)
    wrong = [view for view in spec.views if view not in plan.views]
    if wrong and len(spec.attacks) == 1:
        raise UsageError(f"attack {plan.name!r} runs on view {', '.join(plan.views)}, not on {wrong[0]!r}")
    return plan.views


def _cell(
    plan: AttackPlan,
    view: str,
    spec: EvalSpec,
    loaded: LoadedModel,
    protocol: ProtocolRecord,
    training: Dataset | None,
) -> CellSpec:
    parameters = plan.parameters()
    if spec.draws > 1:
        parameters["eot"] = spec.draws
    if is_trained(plan):
        assert training is not None
        parameters["training data"] = {"sha256": training.sha256, "n": len(training)}
    identity = cell_fingerprint(
        model=loaded.record.name,
        weights=loaded.checkpoint.sha256,
        code=loaded.code,
        protocol=protocol,
        attack=plan.name,
        parameters=parameters,
        view=view,
        seed=spec.seed,
        engine=spec.engine,
        precision=spec.precision,
    )
    return CellSpec(identity, plan.name, parameters, view, spec.seed, spec.engine, spec.precision)
