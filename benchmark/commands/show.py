"""`moebench show`: the card of a model, or everything about a stored run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from moebench.commands._options import database_option, debug_option
from moebench.errors import UsageError
from moebench.flags import meaning
from moebench.published import describe, explain
from moebench.registry import model_registry
from moebench.schema import IMPORTED, WARM_START, format_eps, is_protocol

if TYPE_CHECKING:
    from moebench.schema import StoredRun
    from moebench.side_by_side import SideBySide
    from moebench.store import Store


@click.command("show")
@click.argument("what", metavar="MODEL|PROTOCOL|RUN")
@database_option
@debug_option
def show_command(what: str, db: str | None) -> None:
    """Show a model, a published protocol or a stored run.

    A model's card holds paper, architecture, recipe, what differs from the paper, weights and claims, a protocol's its
    rule and its switches. A run is named by the start of its id.
    """
    if is_protocol(what):
        click.echo("\n".join(describe(what)))
        return
    if what in model_registry():
        from moebench.cards import model_card

        click.echo(model_card(what))
        return
    from moebench.store import Store

    try:
        with Store.open(db, write=False) as store:
            run = store.run(what)
            compared = _compared(store, run)
    except UsageError as error:
        raise UsageError(f"{what!r} is neither a model nor a run: {model_registry().unknown(what)}; {error}") from None
    _show_run(run, compared)


def _compared(store: Store, run: StoredRun) -> list[SideBySide]:
    """The published protocols of a run beside their claims and our attacks; of other runs what has the same samples."""
    if not any(is_protocol(one.cell.attack) for one in run.results):
        return []
    from moebench.report.evidence import Evidence, group_key
    from moebench.side_by_side import side_by_side

    key = group_key(run.protocol)
    own = [
        Evidence(one, store.outcomes(one.result_id))
        for one in store.results(model=run.model.name, checkpoint_sha=run.checkpoint.sha256)
        if group_key(one.protocol) == key
    ]
    return side_by_side(run, own, store.claims())


def _show_run(run: StoredRun, compared: Sequence[SideBySide]) -> None:
    from rich.markup import escape

    from moebench.commands._tables import results_lines, standard_output
    from moebench.report.transfers import attack_title

    console = standard_output()
    protocol, environment = run.protocol, run.environment
    took = "" if run.seconds is None else f", {run.seconds:.1f} s"
    console.print(
        f"[bold]run {run.run_id}[/bold]  {run.status}{took}" + (f": {escape(run.error)}" if run.error else "")
    )
    console.print(f"  command     {escape(run.command)}")
    imported = environment.get(IMPORTED)
    if imported:
        file = f"{imported['file']} ({imported['file_sha256'][:16]}…)"
        told = f"measured by {imported['from']}, from {file} on {imported['at']}"
        console.print(f"  imported    {escape(told)}")
    weights = f"{run.checkpoint.sha256[:16]}… ({escape(run.checkpoint.origin)})"
    console.print(f"  model       {escape(run.model.name)}, weights {weights}")
    console.print(
        f"  protocol    {escape(protocol.dataset)} {protocol.split}, n = {protocol.n}, {protocol.threat}, "
        f"version {protocol.version}, data {protocol.data_sha256[:16]}…"
    )
    machine = f"{environment.get('device')} ({escape(str(environment.get('platform')))})"
    console.print(f"  started     {run.started_at}, on {machine}")
    versions = environment.get("versions") or {}
    console.print("  versions    " + ", ".join(f"{name} {value}" for name, value in versions.items() if value))
    titles = [attack_title(result) for result in run.results]
    records = [replace(one.record, attack=title) for one, title in zip(run.results, titles, strict=True)]
    for line in results_lines(records, console.width):
        console.print(line)
    for result, title in zip(run.results, map(escape, titles), strict=True):
        source = result.cell.parameters.get(WARM_START)
        if source is not None:
            taken = int(result.record.stages.get(WARM_START, {}).get("broken", 0))
            console.print(
                f"  {title} on {escape(result.record.view)}: warm start, {taken} samples taken over "
                f"from eps {format_eps(source['eps'])} (result {source['fingerprint'][:16]}…)"
            )
        before, after = result.record.losses
        if before is not None and after is not None:
            console.print(
                f"  {title} on {escape(result.record.view)}: predictions changed "
                f"{result.record.changed_predictions:.1%}, loss {before:.3f} → {after:.3f}"
            )
        for layer in result.record.routing:
            console.print(
                f"  {title} on {escape(result.record.view)}, layer {layer.name}: routes changed "
                f"{layer.changed:.1%}, IoU {layer.iou:.3f}, "
                f"entropy {layer.entropy_clean:.3f} → {layer.entropy_adv:.3f}, "
                f"load {_loads(layer.load_clean)} → {_loads(layer.load_adv)}"
            )
    for one in compared:
        for line in _side_by_side_lines(one, run):
            console.print(escape(line))
    for flag in run.flags:
        console.print(f"  [yellow]flag[/yellow] {escape(flag.code)}: {escape(flag.evidence)}")
        said = meaning(flag.code)
        if said is not None:
            console.print(f"    means  {escape(said.meaning)}")
            console.print(f"    try    {escape(said.advice)}")
    if run.reused:
        console.print(f"  {run.reused} of these results were computed by earlier runs")


def _side_by_side_lines(found: SideBySide, run: StoredRun) -> Iterator[str]:
    """The three numbers under each other, with differences to the published protocol, and what its switches say."""
    width = max(len(line.label) for line in found.lines)
    yield f"  {found.name}, percent; in brackets the difference to the published protocol in points"
    for line in found.lines:
        text = line.text
        if line.measure is not None:
            text = f"{100 * line.measure.value:5.1f}"
            if found.published is not None and line.measure is not found.published:
                text += f" ({100 * (line.measure.value - found.published.value):+.1f})"
        yield f"    {line.label:{width}}  {text}"
    own = [one.cell for one in run.results if one.cell.attack in found.attacks]
    # The rows of an ablation differ in what their labels say; one explanation is enough.
    for cell in own if len(own) == 1 else [one for one in own if one.attack == found.name]:
        for words in explain(cell.attack, cell.parameters):
            yield f"  {cell.attack}: {words}"


def _loads(shares: tuple[float, ...]) -> str:
    return "/".join(f"{100 * share:.0f}" for share in shares)
