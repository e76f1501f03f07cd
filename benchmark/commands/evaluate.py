"""`moebench evaluate`: attack a model, store the evidence, print the numbers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moebench.commands._cluster import DIVIDED, cluster_options, on_cluster, taken_from
from moebench.commands._guard import users_code
from moebench.commands._names import check_names
from moebench.commands._options import (
    batch_option,
    check_price,
    database_option,
    dataset_option,
    debug_option,
    device_option,
    json_option,
    model_option,
    norm_option,
    parse_settings,
    price_option,
    samples_option,
    seed_option,
    settings_option,
    split_names,
    training_options,
    weights_option,
)
from moebench.overrides import parse_routing
from moebench.schema import PRECISIONS, ThreatModel, parse_radii

if TYPE_CHECKING:
    from moebench.cluster.settings import ClusterSettings
    from moebench.evaluation import EvalSpec


NUMERIC_OPTIONS = {
    "n": None, "batch_size": None, "seed": 0, "engine": "native", "precision": "float32", "draws": 1, "weights": None,
    "train_data": None, "train_n": None, "routing": None,
}  # fmt: skip
"""Options that numbers depend on, by the name of their parameter, with their defaults."""


@click.command("evaluate")
@model_option
@click.option(
    "--attack",
    default="autoattack",
    show_default=True,
    metavar="A[,B…]",
    help="Attacks, see `list attacks`.",
)
@dataset_option
@click.option("--view", default="", metavar="V[,W…]", help="Views to attack [default: those of the headline metrics].")
@norm_option
@click.option(
    "--eps", metavar="E[,F…]", help="Radius, such as 8/255 or 0.03; several make a curve [default: the data set's]."
)
@click.option("--cold", is_flag=True, help="With several radii: attack each for itself, without warm starts.")
@samples_option
@batch_option
@device_option
@seed_option("Seed of random starts and proposals.")
@click.option(
    "--engine", default="native", show_default=True, type=click.Choice(["native", "reference", "ray"]),
    help="Our engine, pyautoattack and torchattacks, or our engine on a Ray cluster.",
)  # fmt: skip
@cluster_options
@click.option(
    "--precision", default="float32", show_default=True, type=click.Choice(PRECISIONS),
    help="Of the search; bfloat16 culls first, bfloat16-only is a quick look that is never ranked.",
)  # fmt: skip
@click.option(
    "--eot", "draws", type=int, default=1, show_default=True, metavar="N",
    help="Passes to average, for a model that is random.",
)  # fmt: skip
@click.option("--compile", "compiled", is_flag=True, help="Try torch.compile on the search.")
@weights_option
@settings_option
@click.option(
    "--routing", metavar="HOW",
    help="Override the routing of every MoE layer: top-k=N, drop-best (use the next best experts), drop-best=N.",
)  # fmt: skip
@training_options
@database_option
@click.option("--save-adv", type=click.Path(path_type=Path), metavar="FILE", help="Write the adversarial images (npz).")
@click.option("--fresh", is_flag=True, help="Compute again what the database already has.")
@click.option("--no-trust", is_flag=True, help="Leave out the probes for gradient masking after the attacks.")
@click.option("--dry-run", is_flag=True, help="Only say what would be computed, and what it costs, by a short trial.")
@price_option
@json_option
@debug_option
def evaluate_command(
    model: str,
    attack: str,
    dataset: str,
    view: str,
    eps: str | None,
    cold: bool,
    settings: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
    price: float | None,
    no_trust: bool,
    **options: Any,
) -> None:
    """Attack a model and store what is left of its accuracy."""
    radii = {} if eps is None else parse_radii(eps)
    for radius in radii:
        ThreatModel(options["norm"], radius)
    check_price(price, dry_run)
    attacks, views = split_names(attack), split_names(view)
    check_names(model, attacks, views)
    if options["routing"] is not None:
        options["routing"] = str(parse_routing(options["routing"]))

    settings_of_cluster = taken_from(options)

    from moebench.evaluation import EvalSpec, evaluate

    def command(written: str | None) -> str:
        return command_line(model, dataset, attacks, views, written, settings, options)

    spec = EvalSpec(
        model=model, dataset=dataset, attacks=attacks, views=views, eps=next(iter(radii), None),
        settings=parse_settings(settings), command=command(next(iter(radii.values()), None)), trust=not no_trust,
        **options,
    )  # fmt: skip
    if len(radii) > 1:
        commands = dict(zip(radii, map(command, _texts(radii, cold, spec)), strict=True))
        if dry_run:
            _dry_run_of_sweep(spec, list(commands), cold=cold, as_json=as_json, price=price)
            _say_divided(settings_of_cluster, as_json)
        else:
            _sweep(spec, commands, settings_of_cluster, cold=cold, as_json=as_json)
        return
    if dry_run:
        _dry_run(spec, as_json, price)
        _say_divided(settings_of_cluster, as_json)
        return
    from moebench.commands._progress import listening

    with listening() as listener, users_code(), on_cluster(spec, settings_of_cluster) as placed:
        summary = evaluate(placed, listener)
    if as_json:
        click.echo(json.dumps(summary.to_json()))
    else:
        from moebench.commands._say import print_summary

        print_summary(summary, spec)


def _texts(radii: dict[float, str], cold: bool, spec: EvalSpec) -> list[str]:
    """What `--eps` says in the command that repeats each radius: with warm starts, the smaller ones come first."""
    written = list(radii.values())
    alone = cold or spec.engine != "native"
    return written if alone else [",".join(written[: place + 1]) for place in range(len(written))]


def _sweep(
    spec: EvalSpec, commands: dict[float, str], cluster: ClusterSettings | None, *, cold: bool, as_json: bool
) -> None:
    """Evaluates at the radii that are the keys of `commands`."""
    from moebench.commands._progress import listening
    from moebench.radii import sweep

    with listening() as listener, users_code(), on_cluster(spec, cluster) as placed:
        found = sweep(placed, list(commands), cold=cold, commands=commands, listener=listener)
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        from moebench.commands._say import print_sweep

        print_sweep(found, spec)


def _dry_run_of_sweep(spec: EvalSpec, radii: list[float], *, cold: bool, as_json: bool, price: float | None) -> None:
    from moebench.radii import plan_sweep_with_costs

    with users_code():
        planned, bill = plan_sweep_with_costs(spec, radii, cold=cold, price_per_hour=price)
    from moebench.commands._say import say_planned_sweep

    say_planned_sweep(planned, bill, as_json)


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
    for key, default in NUMERIC_OPTIONS.items():
        if options.get(key, default) != default:
            words += [f"--{'eot' if key == 'draws' else key.replace('_', '-')}", str(options[key])]
    for pair in settings:
        words += ["--set", pair]
    return shlex.join(words)


def _say_divided(cluster: ClusterSettings | None, as_json: bool) -> None:
    if cluster is not None and not as_json:
        click.echo(DIVIDED)


def _dry_run(spec: EvalSpec, as_json: bool, price: float | None) -> None:
    from moebench.estimate import planned_with_costs
    from moebench.evaluation import prepare
    from moebench.planning import parse_attacks

    with users_code():
        planned, bill = planned_with_costs(prepare(spec, parse_attacks(spec.attacks)), price)
    if as_json:
        click.echo(json.dumps({"cells": [cell.to_json() for cell in planned], "total": bill.to_json()}))
        return
    from moebench.commands._say import bill_lines, in_words

    for line in (*map(in_words, planned), *bill_lines(bill)):
        click.echo(line)
