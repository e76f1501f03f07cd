"""`moebench universal`: one perturbation for all images, made on training data, judged on the test data, kept."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from moebench.attack_names import base_name
from moebench.commands._guard import users_code
from moebench.commands._names import check_names
from moebench.commands._options import (
    database_option,
    dataset_option,
    debug_option,
    device_option,
    json_option,
    model_option,
    parse_settings,
    seed_option,
    settings_option,
    training_options,
)
from moebench.errors import UsageError
from moebench.registry import attack_registry
from moebench.schema import parse_eps

if TYPE_CHECKING:
    from moebench.universal import UniversalSpec, UniversalSummary

DEFAULTS: Mapping[str, Any] = {
    "dataset": "digits", "attack": "universal-pgd", "view": "whole", "norm": None, "eps": None, "n": None,
    "batch_size": None, "seed": 0, "train_data": None, "train_n": None, "weights": None,
}  # fmt: skip
OF_MAKING = ("attack", "view", "seed", "train_data", "train_n")
"""Options that mean nothing for a perturbation that is made already."""

FILE = click.Path(path_type=Path)


@click.command("universal")
@model_option
@dataset_option
@click.option("--attack", default="universal-pgd", show_default=True, metavar="A", help="universal-pgd or -fgsm.")
@click.option("--view", default="whole", show_default=True, metavar="V", help="The view that δ is made on.")
@click.option(
    "--norm", type=click.Choice(["Linf", "L2"]), help="Norm of the ball [default: Linf, or that of the loaded file]."
)
@click.option("--eps", metavar="EPS", help="Radius [default: the data set's, or that of the loaded file].")
@click.option("--n", type=int, metavar="N", help="Judge δ on the first N samples only.")
@click.option("--batch-size", type=int, metavar="N", help="Samples judged together [default: by image size].")
@device_option
@seed_option("Seed of random starts and of the order of the training data.")
@training_options
@click.option("--weights", type=FILE, metavar="FILE", help="Weights instead of the shipped ones.")
@settings_option
@click.option("--save", type=FILE, metavar="FILE", help="Write δ and where it comes from (npz).")
@click.option("--load", type=FILE, metavar="FILE", help="Judge the δ of a file instead of making one.")
@click.option("--picture", type=FILE, metavar="FILE", help="Write δ and a few images with and without it (PNG).")
@database_option
@click.option("--fresh", is_flag=True, help="Compute again what the database already has.")
@json_option
@debug_option
@click.pass_context
def universal_command(
    context: click.Context,
    /,
    settings: tuple[str, ...],
    load: Path | None,
    save: Path | None,
    picture: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Judge one perturbation for all images.

    δ is made on the training data and judged on the test data. --save keeps it; --load judges it again, on the same
    model or on another.
    """
    radius = None if options["eps"] is None else parse_eps(options["eps"])
    check_names(options["model"], (options["attack"],), (options["view"],))
    _check_attack(options["attack"])
    if load is not None:
        _check_load(context, options)

    from moebench.commands._progress import listening
    from moebench.evaluation import EvalSpec
    from moebench.universal import UniversalSpec, universal

    evaluation = EvalSpec(
        model=options["model"], dataset=options["dataset"], attacks=(options["attack"],), views=(options["view"],),
        norm=options["norm"] or "Linf", eps=radius, settings=parse_settings(settings),
        command=_command_line(options, settings, load),
        **{key: options[key] for key in (
            "n", "batch_size", "device", "seed", "db", "weights", "fresh", "train_data", "train_n"
        )},
    )  # fmt: skip
    spec = UniversalSpec(evaluation, load, options["norm"] is not None, save, picture)
    with listening() as listener, users_code():
        found = universal(spec, listener)
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        _print(found, spec)


def _check_attack(name: str) -> None:
    """Other attacks are refused before torch is imported; what a plug-in declares is looked at later."""
    declared = {one.name: one.module for one in attack_registry().declarations()}
    makers = [attack for attack, module in declared.items() if module == "moebench.attacks.universal"]
    base = base_name(name)
    if base not in makers and declared.get(base, "moebench.attacks.").startswith("moebench.attacks."):
        raise UsageError(
            f"attack {name!r} makes one perturbation per image; universal takes {' or '.join(makers)} "
            "(`moebench evaluate` takes every attack)"
        )


def _check_load(context: click.Context, options: Mapping[str, Any]) -> None:
    given = [key for key in OF_MAKING if context.get_parameter_source(key) is not ParameterSource.DEFAULT]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{option} is about making a perturbation, and that of --load is made already; leave one out")


def _command_line(options: Mapping[str, Any], settings: tuple[str, ...], load: Path | None) -> str:
    """The shortest command that computes the same numbers."""
    words = ["moebench", "universal", "--model", options["model"]]
    for key, default in DEFAULTS.items():
        if options[key] != default:
            words += [f"--{key.replace('_', '-')}", str(options[key])]
    for pair in settings:
        words += ["--set", pair]
    if load is not None:
        words += ["--load", str(load)]
    return shlex.join(words)


def _print(found: UniversalSummary, spec: UniversalSpec) -> None:
    from rich.markup import escape

    from moebench.commands._tables import headline_lines, interval, percent, results_lines, standard_output
    from moebench.schema import ThreatModel

    console, summary = standard_output(), found.summary
    threat = ThreatModel(summary.norm, summary.eps)  # type: ignore[arg-type]
    console.print(f"[bold]{escape(summary.model)}[/bold] on {escape(summary.dataset)}, n = {summary.n}, {threat}")
    for line in headline_lines(summary):
        console.print(line)
    for line in results_lines(summary.results, console.width):
        console.print(line)
    if found.fooling_rate is not None:
        console.print(
            f"fooling rate: {interval(found.fooling_rate, found.right)} of the {found.right} samples that are right "
            "without δ"
        )
    if found.train_fooling_rate is not None:
        whose = "" if found.source is None else ", of the model it was made on"
        console.print(f"on the {found.train_n} training samples{whose}: {percent(found.train_fooling_rate)} %")
    for layer in found.record.routing:
        console.print(f"layer {escape(layer.name)}: routes changed {layer.changed:.1%}, IoU {layer.iou:.3f}")
    if found.source is not None:
        where = ", other weights than these: a transfer" if found.transfer else ", these very weights"
        console.print(f"δ was made on {escape(found.source)}{where}")
    for flag in summary.flags:
        console.print(f"[yellow]flag[/yellow] {flag.code}: {escape(flag.evidence)}")
    if summary.reused:
        console.print("The result was in the database already and not computed again (--fresh does).")
    console.print(f"run {summary.run_id}, {summary.seconds:.1f} s")
    for what, path in (("perturbation", spec.save), ("picture", spec.picture)):
        if path is not None:
            console.print(f"{what}: {escape(str(path))}")
