"""`moebench sweep`: what the store lacks of a suite, over models and data sets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from moebench.commands._cluster import DIVIDED, cluster_options, on_cluster, taken_from
from moebench.commands._guard import users_code
from moebench.commands._names import check_names
from moebench.commands._options import (
    batch_option,
    check_price,
    database_option,
    debug_option,
    device_option,
    json_option,
    norm_option,
    price_option,
    seed_option,
    split_names,
)
from moebench.schema import SUITE_VERSION, SUITES, ThreatModel, parse_eps

if TYPE_CHECKING:
    from moebench.suite import Swept


@click.command("sweep")
@click.option(
    "--suite", default=SUITE_VERSION, show_default=True, type=click.Choice(list(SUITES)), help="Suite version."
)
@click.option("--models", default="", metavar="A[,B…]", help="Models [default: all whose weights are shipped].")
@click.option("--datasets", default="digits", show_default=True, metavar="A[,B…]", help="Data sets, as for `evaluate`.")
@norm_option
@click.option("--eps", metavar="E", help="Radius, such as 8/255 or 0.03 [default: each data set's].")
@click.option("--n", type=int, metavar="N", help="Only the first N samples of each.")
@batch_option
@device_option
@seed_option("Seed of random starts and proposals.")
@click.option(
    "--engine", default="native", show_default=True, type=click.Choice(["native", "ray"]),
    help="Our engine, in this process or on a Ray cluster.",
)  # fmt: skip
@cluster_options
@database_option
@click.option("--dry-run", is_flag=True, help="Only say what is missing, and what it costs, by a short trial.")
@price_option
@json_option
@debug_option
@click.pass_context
def sweep_command(
    context: click.Context,
    /,
    suite: str,
    models: str,
    datasets: str,
    eps: str | None,
    dry_run: bool,
    price: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run what the database lacks of a suite."""
    radius = None if eps is None else parse_eps(eps)
    if radius is not None:
        ThreatModel(options["norm"], radius)
    check_price(price, dry_run)
    names, data = split_names(models), split_names(datasets)
    for name in names:
        check_names(name, SUITES[suite], ())

    settings_of_cluster = taken_from(options)

    from moebench.commands._sweeping import say_planned_suite, say_swept, watching
    from moebench.commands.evaluate import command_line
    from moebench.evaluation import EvalSpec
    from moebench.suite import plan_suite, run_suite

    def command(spec: EvalSpec) -> str:
        return command_line(spec.model, spec.dataset, spec.attacks, spec.views, eps, (), options)

    base = EvalSpec(model="", eps=radius, **options)
    cluster = None if dry_run else settings_of_cluster
    with watching() as watcher, users_code(), on_cluster(base, cluster) as placed:
        planned = plan_suite(placed, suite, names, data, watcher, costs=dry_run, price_per_hour=price)
        swept: Swept | None = None if dry_run else run_suite(planned, command, watcher)
    if swept is None:
        if as_json:
            plans = [plan.to_json() for plan in planned.plans]
            click.echo(json.dumps({"suite": suite, "models": plans, "failures": list(map(str, planned.failures))}))
        else:
            say_planned_suite(planned)
            if settings_of_cluster is not None:
                click.echo(DIVIDED)
    elif as_json:
        runs = [summary.to_json() for summary in swept.summaries]
        found = {"suite": suite, "complete": swept.complete, "runs": runs, "failures": list(map(str, swept.failures))}
        click.echo(json.dumps(found))
    else:
        say_swept(swept)
    if (planned if swept is None else swept).failures:
        context.exit(1)
