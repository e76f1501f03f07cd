"""The command line: parses, calls one function per command, and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

import click

from moebench import __version__, interrupt
from moebench.commands._options import debug_option
from moebench.commands.ablation import ablation_command
from moebench.commands.certify import certify_command
from moebench.commands.compare import compare_command
from moebench.commands.db import db_command
from moebench.commands.evaluate import evaluate_command
from moebench.commands.experts import experts_command
from moebench.commands.export import export_command
from moebench.commands.import_results import import_command
from moebench.commands.listing import list_command
from moebench.commands.report import report_command
from moebench.commands.runs import runs_command
from moebench.commands.show import show_command
from moebench.commands.sweep import sweep_command
from moebench.commands.train import train_command
from moebench.commands.transfer import transfer_command
from moebench.commands.universal import universal_command
from moebench.commands.verify import verify_command
from moebench.errors import MoebenchError, Notice


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="moebench")
@debug_option
def cli() -> None:
    """Adversarial robustness of mixture-of-experts vision models, measured."""


for command in (
    evaluate_command,
    sweep_command,
    train_command,
    transfer_command,
    universal_command,
    certify_command,
    experts_command,
    ablation_command,
    list_command,
    show_command,
    compare_command,
    report_command,
    export_command,
    import_command,
    runs_command,
    verify_command,
    db_command,
):
    cli.add_command(command)


GOING_ON = ("evaluate", "sweep", "transfer", "ablation", "experts", "universal", "train")
"""The commands whose work is committed on the way, so that the same command goes on; of others nothing is kept."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 1 the run failed, 2 bad usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # an encoding without – or × is no reason to lose a result
            stream.reconfigure(errors="replace")
    try:
        with interrupt.handling(lambda: _say(_how_to_go_on(words))), _saying_notices():
            return int(cli.main(words, prog_name="moebench", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        _say(f"{error.format_message().rstrip('.')}{_see_help(error)}")
        return 2
    except MoebenchError as error:
        _trace(debug)
        _say(str(error))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say(_how_to_go_on(words))
        if arguments is None:
            # All is committed and closed; what Python would still take apart takes longer than people wait.
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(1)
        return 1
    except BrokenPipeError:
        return 1
    except Exception as error:
        _trace(debug)
        _say(f"failed: {type(error).__name__}: {error}{'' if debug else ' (--debug shows where)'}")
        return 1


@contextmanager
def _saying_notices() -> Iterator[None]:
    """Notices are one line on standard error, as errors are; other warnings are left as they are."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def say(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, Notice):
                _say(str(message))
            else:
                show(message, category, *place, **more)

        warnings.simplefilter("always", Notice)
        warnings.showwarning = say
        yield


def _how_to_go_on(words: Sequence[str]) -> str:
    """What to say of a command that was interrupted. The password of a database is not shown."""
    name = next((word for word in words if not word.startswith("-")), "")
    goes_on = name in GOING_ON and "--dry-run" not in words
    again = [_without_password(word) for word in words if not (goes_on and word == "--fresh")]
    command = shlex.join(["moebench", *again])
    if not goes_on:
        return f"interrupted; the same command begins anew: {command}"
    if "--fresh" in words:
        return f"interrupted; what was finished is kept, and the same command without --fresh goes on: {command}"
    return f"interrupted; what was finished is kept, and the same command goes on from there: {command}"


def _without_password(word: str) -> str:
    """A word of a command with what stands for a password in an address replaced by stars."""
    word = re.sub(r"(://[^:/@]*:).*@", r"\1***@", word, flags=re.DOTALL)
    return re.sub(r"([?&]\w*password=)[^&]*", r"\1***", word, flags=re.IGNORECASE)


def _see_help(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return "" if context is None else f" (see `{context.command_path} --help`)"


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()


def _say(text: str) -> None:
    click.echo(f"moebench: {' '.join(text.split())}", err=True)
