"""What `moebench evaluate` prints for people."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from moebench.commands._tables import curve_lines, duration, headline_lines, interval, results_lines, standard_output
from moebench.schema import ThreatModel, format_eps, is_protocol

if TYPE_CHECKING:
    from moebench.bill import Bill
    from moebench.dry_run import PlannedCell
    from moebench.evaluation import EvalSpec
    from moebench.radii import Sweep
    from moebench.summary import Summary


def in_words(cell: PlannedCell) -> str:
    """One planned cell."""
    name = f"{cell.attack} on view {cell.view}, {cell.n} samples"
    if cell.stored:
        return f"{name}: stored already"
    most = f"at most {cell.forwards:,} forward and {cell.backwards:,} backward passes"
    if cell.cost is None:
        return f"{name}: {most}"
    cost = cell.cost
    about = f"about {cost.forwards:,} forward and {cost.backwards:,} backward passes, {duration(cost.seconds)}"
    return f"{name}: {most}, {duration(cost.seconds_at_most)}; {about} (from {cost.basis})"


def bill_lines(bill: Bill) -> list[str]:
    """What a command costs altogether, after its cells."""
    about, most = (
        f"{duration(seconds)} ({bill.hours(seconds):.2g} {bill.unit})"
        for seconds in (bill.seconds, bill.seconds_at_most)
    )
    lines = [f"total: about {about}, at most {most}"]
    if bill.price_per_hour is not None:
        told = [
            (bill.price(seconds) or 0.0, bill.price_per_1000(seconds) or 0.0)
            for seconds in (bill.seconds, bill.seconds_at_most)
        ]
        words = [f"{price:.2g} ({each:.2g} per 1,000 images)" for price, each in told]
        lines.append(f"price at {bill.price_per_hour:g} per hour: about {words[0]}, at most {words[1]}")
    where = "CPU" if bill.device == "cpu" else "GPU"
    threads = f", {bill.threads} thread{'s' * (bill.threads > 1)}" if bill.device == "cpu" else ""
    lines.append(f"tried on this {where}{threads} for {duration(bill.calibration)}")
    return lines


def say_planned_sweep(planned: dict[float, list[PlannedCell]], bill: Bill, as_json: bool) -> None:
    """The plan of a sweep over radii."""
    if as_json:
        radii = [{"eps": eps, "cells": [cell.to_json() for cell in cells]} for eps, cells in planned.items()]
        click.echo(json.dumps({"radii": radii, "total": bill.to_json()}))
        return
    for eps, cells in planned.items():
        for cell in cells:
            click.echo(f"eps {format_eps(eps)}: {in_words(cell)}")
    for line in bill_lines(bill):
        click.echo(line)


def print_summary(summary: Summary, spec: EvalSpec) -> None:
    """What one evaluation found."""
    console = standard_output()
    threat = ThreatModel(spec.norm, summary.eps)
    console.print(f"[bold]{escape(summary.model)}[/bold] on {escape(summary.dataset)}, n = {summary.n}, {threat}")
    if spec.precision == "bfloat16-only":
        console.print("[yellow]a quick look[/yellow]: searched in bfloat16 only, an upper bound that is not ranked")
    for line in headline_lines(summary):
        console.print(line)
    for line in results_lines(summary.results, console.width):
        console.print(line)
    if any(is_protocol(record.attack) for record in summary.results):
        console.print(
            f"published:… is scored by the paper's own rule and counts in none of the metrics above: "
            f"moebench show {summary.run_id}"
        )
    for flag in summary.flags:
        console.print(f"[yellow]flag[/yellow] {escape(flag.code)}: {escape(flag.evidence)}")
    if summary.flags:
        console.print(f"What a flag means and what to try: moebench show {summary.run_id}")
    if summary.reused:
        what = "All" if summary.reused == len(summary.results) else f"{summary.reused} of {len(summary.results)}"
        console.print(f"{what} results were in the database already and not computed again (--fresh does).")
    console.print(f"run {summary.run_id}, {summary.seconds:.1f} s")
    if spec.save_adv is not None:
        console.print(f"adversarial images: {escape(str(spec.save_adv))}")


def print_sweep(found: Sweep, spec: EvalSpec) -> None:
    """What a sweep over radii found."""
    console, first = standard_output(), found.summaries[0]
    console.print(f"[bold]{escape(first.model)}[/bold] on {escape(first.dataset)}, n = {first.n}, {spec.norm}")
    console.print(f"  SA  {interval(first.sa, first.n)}")
    console.print("  accuracy in percent, by eps:")
    for line in curve_lines(found, console.width):
        console.print(line)
    flags = dict.fromkeys((flag.code, flag.evidence, one.eps) for one in found.summaries for flag in one.flags)
    for code, evidence, eps in flags:
        console.print(f"[yellow]flag[/yellow] {code} at {ThreatModel(spec.norm, eps)}: {escape(evidence)}")
    reused, total = (sum(counts) for counts in zip(*((s.reused, len(s.results)) for s in found.summaries), strict=True))
    if reused:
        what = "All" if reused == total else f"{reused} of {total}"
        console.print(f"{what} results were in the database already and not computed again (--fresh does).")
    for summary in found.summaries:
        console.print(f"run {summary.run_id}, {ThreatModel(spec.norm, summary.eps)}, {summary.seconds:.1f} s")
