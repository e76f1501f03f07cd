"""Options of `--engine ray`, and the cluster that they name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from moebench.cluster.settings import AUTO, ClusterSettings
from moebench.errors import UsageError

if TYPE_CHECKING:
    from moebench.evaluation import EvalSpec

DIVIDED = (
    "on a cluster the tasks that run at once share this time; hours and price stay, if its devices are like this one"
)
"""What a dry run for a cluster says: it tries the work here, and connects to nothing."""

NAMES = ("address", "cpus_per_task", "gpus_per_task", "shard_size")


def cluster_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--address`, `--cpus-per-task`, `--gpus-per-task` and `--shard-size`; `taken_from` takes them up."""
    for option in (
        click.option(
            "--shard-size", type=int, metavar="N", help="With ray: samples of a task [default: by the cluster]."
        ),
        click.option("--gpus-per-task", type=float, metavar="X", help="With ray: such as 0.5 [default: 1 on a GPU]."),
        click.option("--cpus-per-task", type=float, metavar="X", help="With ray: cores of a task [default: 1]."),
        click.option("--address", metavar="A", help="With ray: auto, HOST:PORT, or local to start it [default: auto]."),
    ):
        function = option(function)
    return function


def taken_from(options: dict[str, Any]) -> ClusterSettings | None:
    """Takes the cluster's options out of a command's; what is left says "native" where Ray was asked for.

    Ray is a way to run the native engine: results are the same, so neither they nor the commands that are stored with
    them name it.

    Raises:
        UsageError: a value is wrong, or there is one without `--engine ray`.
    """
    given = {name: value for name in NAMES if (value := options.pop(name)) is not None}
    if options["engine"] != "ray":
        for name in given:
            raise UsageError(f"--{name.replace('_', '-')} is for a cluster; add --engine ray")
        return None
    options["engine"] = "native"
    if options.get("compiled"):
        raise UsageError("--compile does not reach the workers of a cluster; leave it out with --engine ray")
    settings = ClusterSettings(**{"address": AUTO, **given})
    settings.gpus_on(options["device"])
    return settings


@contextmanager
def on_cluster(spec: EvalSpec, settings: ClusterSettings | None) -> Iterator[EvalSpec]:
    """The evaluation with the cluster that it runs on; as it is where it runs in this process."""
    if settings is None:
        yield spec
        return
    from moebench.cluster.engine import ray_engine

    with ray_engine(settings, spec.device) as engine:
        yield replace(spec, cluster=engine)
