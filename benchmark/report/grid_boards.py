"""The tables of one leaderboard: the ranking, what AutoAttack misses, and which stage of which attack broke what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moebench.papers import attack_paper
from moebench.report import tables
from moebench.report.evidence import WHOLE, attack_key, group_key, is_warm, protocol_facts
from moebench.report.external import EXTERNAL
from moebench.report.grid import Absent, Amount, Cell, Chance, Column, Grid, Label, Line, Points, Portion, Share
from moebench.report.missed import ADAPTIVE, Missed
from moebench.report.result_rows import ResultRow
from moebench.report.tables import COMPONENTS, RANKING_ATTACK, Board, Report, Row
from moebench.report.text import fold
from moebench.schema import PaperCard, ProtocolRecord, StoredResult

SHORT = {RANKING_ATTACK: "AA", "fgsm": "FGSM", "apgd-ce": "APGD-CE", "apgd-dlr": "APGD-DLR", "apgd-t": "APGD-T"} | {
    "fab-t": "FAB-T",
    "square": "Square",
    ADAPTIVE: "adaptive",
}
"""What attacks and stages are called where columns are narrow; others keep their names."""

FEW, RARE = 4, 0.02
"""Of attacks with more than four stages, those that break less than 2 % of every model stand together as "other"."""

UNDERCUT = "The dagger marks an over-stated RA: an attack on a part of the model leaves fewer samples standing."
ELSEWHERE = "The double dagger marks numbers that another lab measured and that were imported; they take no rank."
NOT_APPLICABLE = "n/a: the model has no such part. A dash: not measured."


def leaderboard(board: Board) -> Grid:
    """The ranking of one board; columns beyond the usual ones are there for those who ask for them."""
    attacks = board.attacks
    twice = attacks == (RANKING_ATTACK,)
    columns = (
        Column("rank", "#"),
        Column("model", "Model", left=True),
        Column("ra_worst", "RA-worst", best="high"),
        Column("sa", "SA", best="high"),
        Column("ra", "RA", best="high"),
        *(Column(f"ra[{one}]", f"RA ({short(one)})", best="high", shown=_usual(one) and not twice) for one in attacks),
        *(Column(label.lower().replace("-", "_"), label, best="high") for label, _ in COMPONENTS),
        Column("family", "Family", shown=False, left=True),
        Column("training", "Training", shown=False, left=True),
        Column("routing", "Routing", shown=False, left=True),
        Column("parameters", "Params", shown=False),
        Column("active_parameters", "Active", shown=False),
        Column("flops", "FLOPs", shown=False),
        Column("venue", "Venue", shown=False, left=True),
        Column("flags", "Flags", shown=False, left=True),
        Column("checkpoint_sha256", "Weights", shown=False, left=True),
        Column("unranked_because", "Unranked because", shown=False, left=True),
    )
    notes = [
        "RA-worst: share of samples that no recorded attack on any view breaks. RA: that no attack on the whole model "
        f"breaks. RA (AA): under AutoAttack. {NOT_APPLICABLE}",
        *_signs(board.rows),
    ]
    return Grid(
        kind="leaderboard",
        stem=f"leaderboard-{_stem(board)}",
        title=f"Robust accuracy on {where(board.protocol)}.",
        notes=tuple(notes),
        columns=columns,
        lines=tuple(_leaderboard_line(row) for row in board.rows),
        facts=protocol_facts(board.protocol, board.suites),
        papers=_attack_papers(board.attacks),
        rule=len(board.ranked),
        main=board.main,
    )


def _usual(attack: str) -> bool:
    return attack == RANKING_ATTACK


def _leaderboard_line(row: Row) -> Line:
    unknown = Absent("not recorded")
    record, weights = row.model, row.checkpoint
    cells: tuple[Cell, ...] = (
        Absent(row.unranked or "not ranked") if row.rank is None else row.rank,
        name(row),
        _share(row.worst),
        _share(row.sa),
        *(_share(cell, row.overstated) for cell in (row.ra, *row.attacks)),
        *map(_share, row.components),
        record.family,
        record.training or unknown,
        record.routing or Absent("no routing", applies=False),
        Amount(weights.parameters),
        unknown if weights.active_parameters is None else Amount(weights.active_parameters),
        unknown if weights.flops is None else Amount(weights.flops),
        f"{record.paper.venue} {record.paper.year}" if record.paper else unknown,
        ", ".join(sorted({mark.code for mark in row.marks})) or Absent("no flag was raised"),
        weights.sha256,
        row.unranked or Absent("it is ranked"),
    )
    return Line(record.name, cells, ranked=row.rank is not None, papers=(record.paper,) if record.paper else ())


def missed(board: Board) -> Grid:
    """RA under AutoAttack and under moe-adaptive on the same samples, one row per MoE."""
    rows = {row.label: row for row in board.rows}
    columns = (
        Column("model", "Model", left=True),
        Column("ra[autoattack]", "RA (AA)", best="high"),
        Column("ra[moe-adaptive]", "RA (adaptive)", best="high"),
        Column("difference", "Difference"),
        Column("missed", "Missed"),
        Column("only_autoattack", "Only AA"),
        Column("p", "p"),
    )
    notes = (
        "Difference in points. Missed: samples that only moe-adaptive breaks; only AA: that only AutoAttack breaks; "
        "p: exact McNemar test on these two counts.",
        *(f"A dash: {one.label}: {one.why}." for one in board.missed if one.paired is None),
        *_signs([rows[one.label] for one in board.missed], undercut=False),
    )
    return Grid(
        kind="missed",
        stem=f"missed-{_stem(board)}",
        title=f"What AutoAttack misses: robust accuracy on {where(board.protocol)}.",
        notes=notes,
        columns=columns,
        lines=tuple(_missed_line(one, rows[one.label]) for one in board.missed),
        facts=protocol_facts(board.protocol, board.suites),
        papers=_attack_papers((RANKING_ATTACK,)),
        main=board.main,
    )


def _missed_line(one: Missed, row: Row) -> Line:
    absent = Absent(one.why)
    measured = tuple(absent if found is None else Share(found) for found in (one.standard, one.adaptive))
    compared: tuple[Cell, ...] = (absent,) * 4
    if one.paired is not None and one.points is not None:
        compared = (Points(one.points), one.paired.only_second, one.paired.only_first, Chance(one.paired.p))
    papers = (row.model.paper,) if row.model.paper else ()
    return Line(row.model.name, (name(row, undercut=False), *measured, *compared), row.rank is not None, papers)


def attacks(board: Board, report: Report) -> Grid:
    """RA per attack, and of the attacks of several stages how much each stage broke, in percent of the samples."""
    found = _stage_results(board, report)
    staged = {attack: own for attack, own in found.items() if any(len(_stages(one)) > 1 for one in own.values())}
    plan = [(attack, *_columns_of(staged[attack])) for attack in board.attacks if attack in staged]
    columns = [Column("model", "Model", left=True), Column("sa", "SA", best="high", shown=False)]
    columns += [Column(f"ra[{one}]", short(one), group="RA", best="high") for one in board.attacks]
    columns.append(Column("clean_error", "Error"))
    for attack, named, other in plan:
        stages = [*named, *(["other"] if other else [])]
        columns += [Column(f"{attack}[{stage}]", short(stage), group=f"{attack}: broken by") for stage in stages]
    lines = []
    for row in board.rows:
        key, sa = (row.model.name, row.checkpoint.sha256), row.sa.measure
        cells: list[Cell] = [name(row), _share(row.sa), *(_share(cell, row.overstated) for cell in row.attacks)]
        cells.append(_share(row.sa) if sa is None else Portion(sa.n - sa.k, sa.n))
        for attack, named, other in plan:
            cells += _broken(found[attack].get(key), named, other, attack)
        papers = (row.model.paper,) if row.model.paper else ()
        lines.append(Line(row.model.name, tuple(cells), row.rank is not None, papers))
    notes = [
        "RA under each attack on the whole model. Error: wrong from the start. Broken by: what each stage of an attack "
        "breaks of what the stages before it leave; with RA and error they make 100. A dash: not measured, or nothing "
        "was left for the stage.",
    ]
    if any(other for _, _, other in plan):
        notes.append(f"Other: stages that break less than {RARE:.0%} of every model's samples.")
    return Grid(
        kind="attacks",
        stem=f"attacks-{_stem(board)}",
        title=f"Robust accuracy by attack, and the stage that broke the rest, on {where(board.protocol)}.",
        notes=(*notes, *_signs(board.rows)),
        columns=tuple(columns),
        lines=tuple(lines),
        facts=protocol_facts(board.protocol, board.suites),
        papers=_attack_papers(board.attacks),
        rule=len(board.ranked),
        main=board.main,
    )


def _stage_results(board: Board, report: Report) -> dict[str, dict[tuple[str, str], ResultRow]]:
    """The newest listed result on the whole model by attack and checkpoint; without a warm start where there is one."""
    found: dict[str, dict[tuple[str, str], ResultRow]] = {}
    here = group_key(board.protocol)
    for page in report.models:
        own = [one for one in page.results if one.listed and one.stored.cell.view == WHOLE]
        own = [one for one in own if group_key(one.stored.protocol) == here]
        for one in sorted(own, key=lambda one: _freshness(one.stored)):
            key = (one.stored.model.name, one.stored.checkpoint.sha256)
            found.setdefault(one.stored.cell.attack, {})[key] = one
    return {attack: found[attack] for attack in sorted(found, key=attack_key)}


def _freshness(stored: StoredResult) -> tuple[bool, str, int]:
    return not is_warm(stored), stored.finished_at, stored.result_id


def _stages(result: ResultRow) -> dict[str, int]:
    return {stage: count for stage, count in result.stages if stage != "clean"}


def _columns_of(results: Mapping[tuple[str, str], ResultRow]) -> tuple[list[str], list[str]]:
    """The stages that get a column, in the order in which they ran, and those that stand together."""
    order = list(dict.fromkeys(stage for one in results.values() for stage in _stages(one)))
    if len(order) <= FEW:
        return order, []
    largest = {
        stage: max(_stages(one).get(stage, 0) / one.stored.record.n for one in results.values()) for stage in order
    }
    return (
        [stage for stage in order if largest[stage] >= RARE],
        [stage for stage in order if 0 < largest[stage] < RARE],
    )


def _broken(result: ResultRow | None, named: Sequence[str], other: Sequence[str], attack: str) -> list[Cell]:
    if result is None or result.measure is None:
        return [Absent(f"{attack} has not been run")] * (len(named) + bool(other))
    n, broke = result.measure.n, _stages(result)
    cells: list[Cell] = [
        Portion(broke[stage], n) if stage in broke else Absent("nothing was left for it") for stage in named
    ]
    if other:
        cells.append(Portion(sum(broke.get(stage, 0) for stage in other), n))
    return cells


def name(row: Row, undercut: bool = True) -> Label:
    """A row's name with the signs of what its numbers carry."""
    signs = [("dagger", undercut and row.overstated), ("ddagger", any(mark.code == EXTERNAL for mark in row.marks))]
    return Label(row.label, tuple(sign for sign, there in signs if there))


def short(attack: str) -> str:
    """An attack's name for a narrow column."""
    return SHORT.get(attack, attack.upper() if attack.startswith("pgd-") else attack)


def _share(cell: tables.Cell, doubted: bool = False) -> Cell:
    if cell.measure is None:
        return Absent(cell.why, applies=cell.state != "n/a")
    return Share(cell.measure, doubted)


def _signs(rows: Sequence[Row], undercut: bool = True) -> list[str]:
    names = [name(row, undercut) for row in rows]
    told = (("dagger", UNDERCUT), ("ddagger", ELSEWHERE))
    return [words for sign, words in told if any(sign in one.signs for one in names)]


def _attack_papers(attacks: Sequence[str]) -> tuple[PaperCard, ...]:
    return tuple(dict.fromkeys(card for one in attacks if (card := attack_paper(one)) is not None))


def where(protocol: ProtocolRecord) -> str:
    """The samples and the threat model of a table, for its title."""
    return f"{protocol.dataset} ({protocol.split}, n = {protocol.n}, {protocol.threat})"


def _stem(board: Board) -> str:
    return f"{fold(board.protocol.dataset)}-{board.protocol.threat.norm}"
