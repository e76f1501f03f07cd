"""`moebench train`: train a registered model and write its weights and card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moebench.commands._options import debug_option, parse_settings, seed_option, settings_option
from moebench.errors import UsageError
from moebench.registry import model_registry

if TYPE_CHECKING:
    from moebench.train import EpochLog


@click.command("train")
@click.option("--model", required=True, metavar="NAME", help="Registered name, see `list models`.")
@click.option("--dataset", default="digits", show_default=True, metavar="NAME", help="Needs a train and a val split.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, metavar="DIR")
@click.option("--epochs", type=click.IntRange(min=0), help="Epochs instead of the recipe's.")
@seed_option("Seed of weights, batches and random starts.")
@click.option("--device", default="cpu", show_default=True, help="Torch device, such as cuda.")
@click.option("--fresh", is_flag=True, help="Start over instead of going on from the last checkpoint.")
@settings_option
@debug_option
def train_command(
    model: str,
    dataset: str,
    out: Path,
    epochs: int | None,
    seed: int,
    device: str,
    fresh: bool,
    settings: tuple[str, ...],
) -> None:
    """Train a registered model.

    The epoch is chosen on the validation split. --set takes settings of the model (router=frozen) and of its recipe
    (beta=3).
    """
    if model not in model_registry():
        raise UsageError(model_registry().unknown(model))
    from moebench.loading import check_device
    from moebench.train import TrainSpec, split_settings, train

    check_device(device)
    of_model, of_recipe = split_settings(model, parse_settings(settings))
    if epochs is not None:
        of_recipe["epochs"] = epochs
    spec = TrainSpec(model, dataset, out, seed, device, of_model, of_recipe, fresh)
    with _bar(model) as listen:
        path, card = train(spec, listen)
    chosen = card["validation"]
    click.echo(
        f"{model}: epoch {chosen['epoch']} chosen on the validation split, clean {chosen['clean']:.2%}, "
        f"{chosen['robust']:.2%} under {chosen['attack']}"
    )
    click.echo(f"weights: {path}")
    if path.parent.name != dataset:
        click.echo(f"next: moebench evaluate --model {model} --dataset {dataset} --weights {path} --attack autoattack")


class _bar:
    """A progress bar on standard error; one line every tenth epoch where that is no terminal."""

    def __init__(self, model: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.console = Console(stderr=True)
        self.progress = Progress(console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.progress.add_task(model, total=None)
        self.model = model

    def __enter__(self) -> _bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, line: EpochLog, epochs: int) -> None:
        text = f"{self.model} loss {line.loss:.3f}, val clean {line.val_clean:.1%}, robust {line.val_robust:.1%}"
        self.progress.update(self.task, total=epochs, completed=line.epoch, description=text)
        if not self.console.is_terminal and (line.epoch % 10 == 0 or line.epoch == epochs):
            click.echo(f"epoch {line.epoch}/{epochs}: {text}", err=True)
