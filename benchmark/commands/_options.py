"""Options that several commands share, declared once."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from moebench.errors import UsageError

Decorated = Callable[..., Any]


def model_option(function: Decorated) -> Decorated:
    return click.option(
        "--model", required=True, metavar="NAME", help="Registered name, FILE.py:FACTORY or pkg.mod:FACTORY."
    )(function)


def weights_option(function: Decorated) -> Decorated:
    return click.option(
        "--weights", type=click.Path(path_type=Path), metavar="FILE", help="Weights instead of the shipped ones."
    )(function)


def dataset_option(function: Decorated) -> Decorated:
    return click.option(
        "--dataset", default="digits", show_default=True, metavar="NAME", help="NAME, npz:FILE or folder:DIR."
    )(function)


def norm_option(function: Decorated) -> Decorated:
    return click.option(
        "--norm", default="Linf", show_default=True, type=click.Choice(["Linf", "L2"]), help="Norm of the ball."
    )(function)


def samples_option(function: Decorated) -> Decorated:
    return click.option("--n", type=int, metavar="N", help="Only the first N samples.")(function)


def batch_option(function: Decorated) -> Decorated:
    return click.option("--batch-size", type=int, metavar="N", help="Rows that run together [default: by image size].")(
        function
    )


def device_option(function: Decorated) -> Decorated:
    return click.option("--device", default="cpu", show_default=True, help="Torch device, such as cuda.")(function)


def json_option(function: Decorated) -> Decorated:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")(function)


def database_option(function: Decorated) -> Decorated:
    return click.option(
        "--db",
        metavar="URL",
        help="Results database, a file or an SQLAlchemy URL [default: $MOEBENCH_DB or results.db].",
    )(function)


def debug_option(function: Decorated) -> Decorated:
    """`--debug` is read by `main`, which decides about tracebacks; here it only has to be known."""
    return click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback on errors.")(function)


def seed_option(text: str) -> Callable[[Decorated], Decorated]:
    return click.option("--seed", type=int, default=0, show_default=True, metavar="N", callback=_check_seed, help=text)


def _check_seed(context: click.Context, parameter: click.Parameter, seed: int) -> int:
    if not 0 <= seed < 2**32:
        raise UsageError(f"the seed must be between 0 and {2**32 - 1}, got {seed}")
    return seed


def price_option(function: Decorated) -> Decorated:
    return click.option(
        "--price", type=float, metavar="PER_HOUR", help="With --dry-run: what an hour of the device costs."
    )(function)


def check_price(price: float | None, dry_run: bool) -> None:
    """Refuses a price that means nothing.

    Raises:
        UsageError: it is no positive number, or nothing is estimated.
    """
    if price is not None and not dry_run:
        raise UsageError("--price is for the estimate of --dry-run; give both or neither")
    if price is not None and not (math.isfinite(price) and price > 0):
        raise UsageError(f"--price takes what an hour costs, a positive number such as 2.5, got {price}")


def settings_option(function: Decorated) -> Decorated:
    return click.option(
        "--set",
        "settings",
        metavar="KEY=VALUE",
        multiple=True,
        help="A setting of the model; may be given several times.",
    )(function)


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE pairs with Python literals as values; anything else is a string.

    Raises:
        UsageError: a pair without "=".
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key:
            raise UsageError(f"--set takes KEY=VALUE, got {pair!r}")
        try:
            settings[key.strip()] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[key.strip()] = text
    return settings


def training_options(function: Decorated) -> Decorated:
    """What attacks that learn first are made on."""
    function = click.option(
        "--train-n", type=int, metavar="N", help="Make universal perturbations on the first N training samples only."
    )(function)
    return click.option(
        "--train-data",
        metavar="NAME",
        help="What universal perturbations are made on [default: the train split of --dataset].",
    )(function)


def split_names(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated list, blanks removed; commas inside brackets belong to a name's settings."""
    parts, depth = [""], 0
    for char in text:
        depth = max(0, depth + (char == "[") - (char == "]"))
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return tuple(part.strip() for part in parts if part.strip())
