"""`moebench transfer`: adversarial examples of some models, judged on others."""

from __future__ import annotations

import csv
import io
import json
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moebench.commands._guard import users_code
from moebench.commands._names import check_attack_names, check_model_name
from moebench.commands._options import (
    batch_option,
    database_option,
    dataset_option,
    debug_option,
    device_option,
    json_option,
    norm_option,
    samples_option,
    seed_option,
    split_names,
)
from moebench.errors import RunError, UsageError
from moebench.schema import parse_eps

if TYPE_CHECKING:
    from moebench.transfer import Pair, TransferSummary

MODELS_HELP = "Sources: names, FILE.py:FACTORY, and with /expert[i], /expert[LAYER:i], /standard or /robust a part."


@click.command("transfer")
@click.option("--models", required=True, metavar="A[,B…]", help=MODELS_HELP)
@click.option("--targets", default="", metavar="A[,B…]", help="Targets, named alike [default: the sources].")
@click.option(
    "--attack", default="pgd-50", show_default=True, metavar="A", help="Attack on the sources: pgd-50, apgd-ce, "
    "torchattacks:MIFGSM, … Attacks of several stages make no examples for other models.",
)  # fmt: skip
@dataset_option
@norm_option
@click.option("--eps", metavar="EPS", help="Radius, such as 8/255 or 0.03 [default: the data set's].")
@samples_option
@batch_option
@device_option
@seed_option("Seed of random starts and proposals.")
@database_option
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Write transfer.csv and transfer.json.")
@click.option("--fresh", is_flag=True, help="Make and judge again what is there already.")
@json_option
@debug_option
def transfer_command(
    models: str,
    targets: str,
    attack: str,
    dataset: str,
    eps: str | None,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Judge adversarial examples of some models on others.

    Every pair is stored as a result of its target, and counts in the target's worst case.
    """
    radius = None if eps is None else parse_eps(eps)
    sources, judged = split_names(models), split_names(targets)
    for name in (*sources, *judged):
        check_model_name(name)
    check_attack_names((attack,))
    if out is not None:
        _check_folder(out)

    from moebench.commands._progress import listening
    from moebench.transfer import TransferSpec, transfer

    command = command_line(sources, judged, attack, dataset, eps, options)
    spec = TransferSpec(sources, judged, attack, dataset, eps=radius, command=command, **options)
    with listening() as listener, users_code():
        summary = transfer(spec, listener)
    for note in summary.notes:
        click.echo(f"moebench: {note}", err=True)
    if out is not None:
        _write(out, summary)
    if as_json:
        click.echo(json.dumps(summary.to_json()))
    else:
        _print(summary, out)


def command_line(
    sources: tuple[str, ...], targets: tuple[str, ...], attack: str, dataset: str, eps: str | None, options: Any
) -> str:
    """The shortest command that computes the same numbers: where they go and what is printed is left out."""
    words = ["moebench", "transfer", "--models", ",".join(sources)]
    if targets:
        words += ["--targets", ",".join(targets)]
    words += ["--attack", attack, "--dataset", dataset]
    if eps is not None:
        words += ["--eps", eps]
    for key, default in (("norm", "Linf"), ("n", None), ("batch_size", None), ("seed", 0)):
        if options[key] != default:
            words += [f"--{key.replace('_', '-')}", str(options[key])]
    return shlex.join(words)


def _check_folder(out: Path) -> None:
    """Refuses a folder that could not be written after the work; makes nothing."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out takes a folder, and {out} is none; name another")
    there = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write to {there}: {error.strerror or error}; choose another place for --out"
        ) from None


def _write(out: Path, summary: TransferSummary) -> None:
    from moebench.files import replace_file

    texts = {"transfer.csv": matrix_csv(summary), "transfer.json": json.dumps(summary.to_json(), indent=1) + "\n"}
    for name, text in texts.items():
        try:
            replace_file(out / name, text.encode())
        except OSError as error:
            raise RunError(f"cannot write {out / name}: {error.strerror or error}; the results are stored") from None


def matrix_csv(summary: TransferSummary) -> str:
    """One line per pair; text that a spreadsheet would run as a formula is quoted."""
    from moebench.report.text import safe

    facts = {key: getattr(summary, key) for key in ("attack", "dataset", "norm", "eps", "seed")}
    rows = [{**facts, **pair.to_json()} for pair in summary.matrix]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow(map(safe, row.values()))
    return text.getvalue()


def _print(summary: TransferSummary, out: Path | None) -> None:
    from rich.markup import escape

    from moebench.commands._tables import percent, standard_output
    from moebench.schema import ThreatModel

    console = standard_output()
    threat = ThreatModel(summary.norm, summary.eps)  # type: ignore[arg-type]
    console.print(
        f"[bold]transfer of {escape(summary.attack)}[/bold] on {escape(summary.dataset)}, n = {summary.n}, {threat}"
    )
    console.print("Success, % of what source and target both get right clean, with its 95 % interval; * white box")
    console.print(_table(summary, lambda pair: _interval(pair.success_rate, pair.success_ci_low, pair.success_ci_high)))
    console.print("Accuracy of the target under the source's examples, % of all samples")
    console.print(_table(summary, lambda pair: _interval(pair.accuracy, pair.ci_low, pair.ci_high)))
    for model in summary.models:
        worst = "" if model.ra_worst is None else f", RA-worst {percent(model.ra_worst)} %, run {model.run_id}"
        console.print(f"{escape(model.name)}: SA {percent(model.clean_accuracy)} %{worst}")
    if summary.reused:
        console.print(
            f"{summary.reused} of {len(summary.matrix)} results were in the database already and not computed again "
            "(--fresh does)."
        )
    console.print(f"{summary.seconds:.1f} s" + ("" if out is None else f"; written to {escape(str(out))}"))


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    """A share in percent with its interval, short enough for a matrix; `--json` and `--out` have all digits."""
    if value is None or low is None or high is None:
        return "–"
    return f"{100 * value:.1f} \\[{100 * low:.0f}, {100 * high:.0f}]"


def _table(summary: TransferSummary, cell: Callable[[Pair], str]) -> Any:
    """Sources down, targets across."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("source \\ target", overflow="fold")
    for target in summary.targets:
        table.add_column(escape(target), justify="right", overflow="fold")
    for source in summary.sources:
        row = {pair.target: pair for pair in summary.matrix if pair.source == source}
        texts = [cell(row[target]) + ("*" if row[target].white_box else "") for target in summary.targets]
        table.add_row(escape(source), *texts)
    return table
