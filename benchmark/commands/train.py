"""`moebench train`: train a registered model and write its weights and card."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moebench.commands._options import debug_option, device_option, parse_settings, seed_option, settings_option
from moebench.errors import UsageError
from moebench.registry import check_recipe_name, model_registry

if TYPE_CHECKING:
    from moebench.train import EpochLog


@click.command("train")
@click.option("--model", required=True, metavar="NAME", help="Registered name, see `list models`.")
@click.option(
    "--recipe",
    metavar="NAME",
    help="Train by another recipe than the model's own: see `list recipes`, or a model of the same kind.",
)
@click.option("--dataset", default="digits", show_default=True, metavar="NAME", help="Needs a train and a val split.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, metavar="DIR")
@click.option("--epochs", type=click.IntRange(min=0), help="Epochs instead of the recipe's.")
@seed_option("Seed of weights, batches and random starts.")
@device_option
@click.option("--fresh", is_flag=True, help="Start over from no checkpoint; replace weights of another variant.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard events beside the weights.")
@settings_option
@debug_option
def train_command(
    model: str,
    recipe: str | None,
    dataset: str,
    out: Path,
    epochs: int | None,
    seed: int,
    device: str,
    fresh: bool,
    tensorboard: bool,
    settings: tuple[str, ...],
) -> None:
    """Train a registered model.

    The epoch is chosen on the validation split. --set takes settings of the model (router=frozen) and of its recipe
    (beta=3). A log with a line per epoch is written beside the weights.
    """
    if model not in model_registry():
        raise UsageError(model_registry().unknown(model))
    if recipe is not None:
        check_recipe_name(model, recipe)
    from moebench.datasets import load_dataset
    from moebench.datasets._base import SINGLE_SPLIT
    from moebench.loading import check_device
    from moebench.train import TrainSpec, split_settings, train

    check_device(device)
    of_model, of_recipe = split_settings(model, parse_settings(settings))
    if epochs is not None:
        of_recipe["epochs"] = epochs
    spec = TrainSpec(model, dataset, out, seed, device, of_model, of_recipe, fresh, recipe, tensorboard)
    with TrainingBar(model if recipe is None else f"{model} by {recipe}") as listen:
        path, card = train(spec, listen)
    chosen = card["validation"]
    if "warning" in chosen:
        click.echo(f"warning: {chosen['warning']}", err=True)
    click.echo(
        f"{model}: epoch {chosen['epoch']} chosen on the validation split, clean {chosen['clean']:.2%}, "
        f"{chosen['robust']:.2%} under {chosen['attack']}"
    )
    click.echo(f"weights: {path}")
    if path.parent.name != dataset or card["objective"] is not None:
        words = ["--model", model, "--dataset", dataset, "--weights", str(path), "--attack", "autoattack"]
        click.echo(f"next: {shlex.join(['moebench', 'evaluate', *words])}")
        if load_dataset(dataset, n=1).split == SINGLE_SPLIT:
            click.echo(f"{dataset} has no test split: give images that were not trained on with --dataset instead")


class TrainingBar:
    """A progress bar on standard error; one line every tenth epoch where that is no terminal."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.progress.add_task(title, total=None)
        self.title = title
        self.began = time.monotonic()
        self.before: int | None = None
        self.accuracies = ""

    def __enter__(self) -> TrainingBar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, line: EpochLog, epochs: int) -> None:
        """Shows an epoch."""
        text = self.describe(line, epochs, time.monotonic() - self.began)
        self.progress.update(self.task, total=epochs, completed=line.epoch, description=text.replace("[", "\\["))
        if not self.console.is_terminal and (line.epoch % 10 == 0 or line.epoch == epochs):
            click.echo(f"epoch {line.epoch}/{epochs}: {text}", err=True)

    def describe(self, line: EpochLog, epochs: int, seconds: float) -> str:
        """Loss, the last validation, the pace since this process began, and what is left at that pace."""
        if self.before is None:
            # A resumed run did not do the epochs before its first one.
            self.before = line.epoch - 1
        pace = seconds / (line.epoch - self.before)
        if line.val_clean is not None and line.val_robust is not None:
            self.accuracies = f", val SA {line.val_clean:.1%}, RA {line.val_robust:.1%}"
        return (
            f"{self.title}: loss {line.loss:.3f}{self.accuracies}, {pace:.1f} s/epoch, "
            f"{_duration(pace * (epochs - line.epoch))} left"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
