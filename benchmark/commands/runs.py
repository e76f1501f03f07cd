"""`moebench runs`: the runs of a database; `moebench runs cancel` ends one that is running."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from moebench.commands._options import database_option, debug_option, json_option
from moebench.errors import UsageError

if TYPE_CHECKING:
    from moebench.schema import StoredRun
    from moebench.store.activity import Working

STATUS = ("running", "done", "failed")
HEADINGS = ("run", "status", "started (UTC)", "took", "model", "data", "threat model", "n", "attacks")


@click.group("runs", invoke_without_command=True)
@click.option("--status", type=click.Choice(STATUS), help="Only runs in this state.")
@click.option("--model", metavar="NAME", help="Only runs of this model.")
@database_option
@json_option
@debug_option
@click.pass_context
def runs_command(context: click.Context, status: str | None, model: str | None, db: str | None, as_json: bool) -> None:
    """List the runs of a database, oldest first, or cancel one."""
    context.obj = db
    if context.invoked_subcommand is not None:
        given = {"--status": status is not None, "--model": model is not None, "--json": as_json}
        for option in (name for name, used in given.items() if used):
            raise UsageError(
                f"{option} belongs to the list of runs; leave it out of `runs {context.invoked_subcommand}`"
            )
        return
    from moebench.store import Store

    with Store.open(db, write=False) as store:
        working = store.working()
        runs = [run for run in store.runs() if status in (None, run.status) and model in (None, run.model.name)]
        where = store.where
    if as_json:
        click.echo(json.dumps({"database": where, "runs": [_facts(run, working.get(run.run_id)) for run in runs]}))
    elif runs:
        _print(runs, working)
    else:
        chosen = " that fit" if status or model else ""
        click.echo(f"no runs{chosen} in {where}")


@runs_command.command("cancel")
@click.argument("run", nargs=-1, metavar="RUN…")
@click.option("--gone", is_flag=True, help="All runs whose process ended on this machine without saying so.")
@database_option
@debug_option
@click.pass_obj
def cancel_command(outer: str | None, run: tuple[str, ...], gone: bool, db: str | None) -> None:
    """End runs that are running, named by the start of their ids.

    A process that works on one stops at its next commit. What is finished is kept, and the same command goes on.
    """
    if bool(run) == gone:
        raise UsageError(
            "name the runs to cancel, or give --gone for all whose process is gone; `moebench runs` lists them"
        )
    from moebench.store import Store

    with Store.open(db if db is not None else outer, write=True, create=False) as store:
        working = store.working()
        if gone:
            run = tuple(run_id for run_id, state in working.items() if state.process == "gone")
        cancelled = [one.run_id for one in store.cancel_runs(run)]
        where = store.where
    for run_id in cancelled:
        alive = working[run_id].process == "alive"
        click.echo(f"run {run_id} is cancelled" + ("; its process stops at its next commit" if alive else ""))
    if not cancelled:
        click.echo(f"no run in {where} has lost its process")


def _facts(run: StoredRun, state: Working | None) -> dict[str, Any]:
    protocol = run.protocol
    return {
        "run_id": run.run_id,
        "status": run.status,
        "process": None if state is None else state.process,
        "last_commit": None if state is None else state.touched_at,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        "seconds": run.seconds,
        "error": run.error,
        "command": run.command,
        "model": run.model.name,
        "weights_sha256": run.checkpoint.sha256,
        "dataset": protocol.dataset,
        "n": protocol.n,
        "norm": protocol.threat.norm,
        "eps": protocol.threat.eps,
        "results": [
            {"attack": one.cell.attack, "view": one.cell.view, "accuracy": one.record.accuracy} for one in run.results
        ],
        "reused": run.reused,
        "flags": [flag.code for flag in run.flags],
    }


def _print(runs: list[StoredRun], working: dict[str, Working]) -> None:
    from rich.table import Table
    from rich.text import Text

    from moebench.commands._tables import standard_output

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in HEADINGS:
        right = heading in ("took", "n")
        fixed = heading not in ("model", "data", "attacks")
        table.add_column(heading, justify="right" if right else "left", no_wrap=fixed, overflow="fold")
    for run in runs:
        table.add_row(*map(Text, _cells(run, working.get(run.run_id))))
    console = standard_output()
    with console.capture() as captured:
        console.print(table, soft_wrap=False)
    for line in captured.get().splitlines():
        click.echo(line.rstrip(), color=console.is_terminal)


def _cells(run: StoredRun, state: Working | None) -> tuple[str, ...]:
    status = run.status
    attacks = ", ".join(dict.fromkeys(result.cell.attack for result in run.results))
    if state is not None:
        status = {"alive": "running", "gone": "running?", "elsewhere": "running"}[state.process]
        attacks = "; ".join(filter(None, (attacks, _doing(state))))
    elif run.status == "failed":
        attacks = "; ".join(filter(None, (attacks, run.error or "")))
    return (
        run.run_id,
        status,
        run.started_at[:16].replace("T", " "),
        "–" if run.seconds is None else span(run.seconds),
        run.model.name,
        run.protocol.dataset,
        str(run.protocol.threat),
        str(run.protocol.n),
        attacks or "–",
    )


def _doing(state: Working) -> str:
    since = (datetime.now(UTC) - datetime.fromisoformat(state.touched_at)).total_seconds()
    cell = "" if state.attack is None else f"at {state.attack} on {state.view}, {state.decisions} decisions, "
    gone = ", its process is gone" if state.process == "gone" else ""
    return f"{cell}last commit {span(max(0.0, since))} ago{gone}"


def span(seconds: float) -> str:
    """A length of time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
