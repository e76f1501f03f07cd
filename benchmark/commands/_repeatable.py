"""The evaluation that a stored run was, read back from its command or from its records."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from moebench.commands._options import parse_settings, split_names
from moebench.errors import UsageError
from moebench.schema import StoredRun, parse_radii

if TYPE_CHECKING:
    from moebench.evaluation import EvalSpec


def spec_of(run: StoredRun, device: str) -> tuple[EvalSpec, list[float]]:
    """The evaluation behind a run, and the radii of its sweep up to its own.

    Raises:
        UsageError: its command is none that can be read, or its attacks are none that can be run by themselves.
    """
    try:
        words = shlex.split(run.command)
    except ValueError as error:
        raise UsageError(f"cannot read the command of run {run.run_id}: {error}") from None
    spec, radii = _from_command(run, words[2:]) if words[:2] == ["moebench", "evaluate"] else _from_records(run)
    # Library attacks run in batches that are part of what they are.
    batch_size = run.environment.get("batch_size") or spec.batch_size
    return replace(spec, device=device, batch_size=batch_size, trust=False), radii


def _from_command(run: StoredRun, words: list[str]) -> tuple[EvalSpec, list[float]]:
    from moebench.commands.evaluate import evaluate_command
    from moebench.evaluation import EvalSpec

    try:
        told = dict(evaluate_command.make_context("evaluate", list(words)).params)
    except click.ClickException as error:
        raise UsageError(f"cannot read the command of run {run.run_id}: {error.format_message()}") from None
    radii = list(parse_radii(told["eps"])) if told["eps"] is not None else [run.protocol.threat.eps]
    own = ("model", "dataset", "norm", "n", "batch_size", "seed", "engine", "precision", "draws", "weights", "routing")
    spec = EvalSpec(
        **{name: told[name] for name in (*own, "train_data", "train_n")},
        attacks=split_names(told["attack"]),
        views=split_names(told["view"]),
        settings=parse_settings(told["settings"]),
    )
    return spec, radii


def _from_records(run: StoredRun) -> tuple[EvalSpec, list[float]]:
    """For runs of other commands: their cells as `evaluate` would run them."""
    from moebench.evaluation import EvalSpec

    cells = [result.cell for result in run.results]
    if not cells:
        raise UsageError(f"run {run.run_id} cannot be repeated: it has no finished result")
    if any(cell.attack == "transfer" for cell in cells):
        raise UsageError(f"run {run.run_id} judged examples of other models; `moebench transfer --fresh` repeats it")
    first = cells[0]
    spec = EvalSpec(
        model=run.model.name,
        dataset=run.protocol.dataset,
        attacks=tuple(dict.fromkeys(cell.attack for cell in cells)),
        views=tuple(dict.fromkeys(cell.view for cell in cells)),
        norm=run.protocol.threat.norm,
        n=run.protocol.n,
        seed=first.seed,
        engine=first.engine,
        precision=first.precision,
        draws=first.parameters.get("eot", 1),
    )
    return spec, [run.protocol.threat.eps]
