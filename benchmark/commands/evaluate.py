"""`moebench evaluate`: attack a model, store the evidence, print the numbers."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moebench.commands._names import check_attack_names, check_model_name
from moebench.commands._options import (
    database_option,
    debug_option,
    parse_settings,
    seed_option,
    settings_option,
    split_names,
)
from moebench.errors import RunError
from moebench.schema import check_view_name, parse_eps

if TYPE_CHECKING:
    from moebench.evaluation import EvalSpec
    from moebench.summary import Summary


@click.command("evaluate")
@click.option("--model", required=True, metavar="NAME", help="Registered name, FILE.py:FACTORY or pkg.mod:FACTORY.")
@click.option(
    "--attack", default="autoattack", show_default=True, metavar="A[,B…]", help="Attacks, see `list attacks`."
)
@click.option("--dataset", default="digits", show_default=True, metavar="NAME", help="NAME, npz:FILE or folder:DIR.")
@click.option("--view", default="", metavar="V[,W…]", help="Views to attack [default: those of the headline metrics].")
@click.option("--norm", default="Linf", show_default=True, type=click.Choice(["Linf", "L2"]), help="Norm of the ball.")
@click.option("--eps", metavar="EPS", help="Radius, such as 8/255 or 0.03 [default: the data set's].")
@click.option("--n", type=int, metavar="N", help="Only the first N samples.")
@click.option("--batch-size", type=int, metavar="N", help="Rows that run together [default: by image size].")
@click.option("--device", default="cpu", show_default=True, help="Torch device, such as cuda.")
@seed_option("Seed of random starts and proposals.")
@click.option(
    "--engine", default="native", show_default=True, type=click.Choice(["native", "reference"]),
    help="Our engine, or pyautoattack and torchattacks.",
)  # fmt: skip
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", help="Weights instead of the shipped ones.")
@settings_option
@database_option
@click.option("--save-adv", type=click.Path(path_type=Path), metavar="FILE", help="Write the adversarial images (npz).")
@click.option("--fresh", is_flag=True, help="Compute again what the database already has.")
@click.option("--dry-run", is_flag=True, help="Only say what would be computed, and how many passes at most.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@debug_option
def evaluate_command(
    model: str,
    attack: str,
    dataset: str,
    view: str,
    eps: str | None,
    settings: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Attack a model and store what is left of its accuracy."""
    radius = None if eps is None else parse_eps(eps)
    attacks, views = split_names(attack), split_names(view)
    _check_names(model, attacks, views)

    from moebench.evaluation import EvalSpec, evaluate

    spec = EvalSpec(
        model=model, dataset=dataset, attacks=attacks, views=views, eps=radius, settings=parse_settings(settings),
        command=command_line(model, dataset, attacks, views, eps, settings, options), **options,
    )  # fmt: skip
    if dry_run:
        _dry_run(spec, as_json)
        return
    from moebench.commands._progress import listening

    with listening() as listener, users_code():
        summary = evaluate(spec, listener)
    if as_json:
        click.echo(json.dumps(summary.to_json()))
    else:
        _print(summary, spec)


def command_line(
    model: str,
    dataset: str,
    attacks: tuple[str, ...],
    views: tuple[str, ...],
    eps: str | None,
    settings: tuple[str, ...],
    options: dict[str, Any],
) -> str:
    """The shortest command that computes the same numbers: where they go and what is printed is left out."""
    words = ["moebench", "evaluate", "--model", model, "--dataset", dataset, "--attack", ",".join(attacks)]
    if views:
        words += ["--view", ",".join(views)]
    if options["norm"] != "Linf":
        words += ["--norm", options["norm"]]
    if eps is not None:
        words += ["--eps", eps]
    for key, default in (("n", None), ("batch_size", None), ("seed", 0), ("engine", "native"), ("weights", None)):
        if options[key] != default:
            words += [f"--{key.replace('_', '-')}", str(options[key])]
    for pair in settings:
        words += ["--set", pair]
    return shlex.join(words)


def _check_names(model: str, attacks: tuple[str, ...], views: tuple[str, ...]) -> None:
    """Wrong names are answered before torch is imported."""
    check_model_name(model)
    check_attack_names(attacks)
    for view in views:
        check_view_name(view)


@contextmanager
def users_code() -> Iterator[None]:
    """What a user's model prints must not mix with the results, and its sys.exit must not pass for ours."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except SystemExit as error:
        raise RunError(f"the code of the model called sys.exit({error.code!r})") from error


def _dry_run(spec: EvalSpec, as_json: bool) -> None:
    from moebench.evaluation import plan_only

    with users_code():
        planned = plan_only(spec)
    if as_json:
        click.echo(json.dumps({"cells": [cell.to_json() for cell in planned]}))
        return
    for cell in planned:
        state = (
            "stored already"
            if cell.stored
            else f"at most {cell.forwards:,} forward and {cell.backwards:,} backward passes"
        )
        click.echo(f"{cell.attack} on view {cell.view}, {cell.n} samples: {state}")


def _print(summary: Summary, spec: EvalSpec) -> None:
    from moebench.commands._tables import headline_lines, results_lines, standard_output
    from moebench.schema import ThreatModel

    console = standard_output()
    threat = ThreatModel(spec.norm, summary.eps)
    console.print(f"[bold]{_plain(summary.model)}[/bold] on {_plain(summary.dataset)}, n = {summary.n}, {threat}")
    for line in headline_lines(summary):
        console.print(line)
    for line in results_lines(summary.results, console.width):
        console.print(line)
    for flag in summary.flags:
        console.print(f"[yellow]flag[/yellow] {flag.code}: {_plain(flag.evidence)}")
    if summary.reused:
        what = "All" if summary.reused == len(summary.results) else f"{summary.reused} of {len(summary.results)}"
        console.print(f"{what} results were in the database already and not computed again (--fresh does).")
    console.print(f"run {summary.run_id}, {summary.seconds:.1f} s")
    if spec.save_adv is not None:
        console.print(f"adversarial images: {_plain(str(spec.save_adv))}")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
