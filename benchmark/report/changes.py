"""What changed between two reports: models that came and went, numbers, ranks and flags, with a test of each number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from moebench.metrics import Measure, paired
from moebench.report.snapshot import SnapBoard, SnapRow, Snapshot
from moebench.schema import BoolArray

Test = Literal["paired", "unpaired"]


@dataclass(frozen=True)
class Shift:
    """One number before and after. `p` is None where one of the two was not measured.

    "paired" is the exact McNemar test on the same samples, "unpaired" Fisher's exact test where the samples differ or
    their verdicts are not known.
    """

    before: Measure | None
    after: Measure | None
    p: float | None
    test: Test | None

    @property
    def changed(self) -> bool:
        """Whether the number is another one."""
        return (self.before is None) != (self.after is None) or (
            self.before is not None and self.after is not None and self.before.value != self.after.value
        )

    @property
    def points(self) -> float | None:
        """After minus before, in points."""
        return None if self.before is None or self.after is None else 100 * (self.after.value - self.before.value)


@dataclass(frozen=True)
class Change:
    """One model that is in both reports, with what differs."""

    label: str
    before: SnapRow
    after: SnapRow
    worst: Shift
    sa: Shift

    @property
    def retrained(self) -> bool:
        """Whether the weights are others."""
        return self.before.weights != self.after.weights

    @property
    def ranks(self) -> tuple[int | None, int | None] | None:
        """The rank before and after, None where it is the same."""
        both = self.before.rank, self.after.rank
        return both if both[0] != both[1] else None

    @property
    def flags(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The flags that came and those that went."""
        return _minus(self.after.flags, self.before.flags), _minus(self.before.flags, self.after.flags)

    @property
    def attacks(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The attacks that RA-worst counts now and did not, and the reverse."""
        return _minus(self.after.attacks, self.before.attacks), _minus(self.before.attacks, self.after.attacks)

    @property
    def any(self) -> bool:
        """Whether anything differs."""
        moved = self.worst.changed or self.sa.changed or self.ranks is not None or self.retrained
        return moved or any((*self.flags, *self.attacks))


@dataclass(frozen=True)
class BoardChange:
    """One leaderboard before and after; one of the two is None where it is new or gone.

    `notes` say what of the protocol differs, so that the numbers answer another question.
    """

    before: SnapBoard | None
    after: SnapBoard | None
    notes: tuple[str, ...]
    added: tuple[SnapRow, ...]
    removed: tuple[SnapRow, ...]
    changes: tuple[Change, ...]
    same: int

    @property
    def board(self) -> SnapBoard:
        """The newer of the two."""
        board = self.after or self.before
        assert board is not None
        return board

    @property
    def any(self) -> bool:
        """Whether anything differs."""
        return bool(self.notes or self.added or self.removed or self.changes)


def compare(before: Snapshot, after: Snapshot) -> tuple[BoardChange, ...]:
    """All leaderboards of both, those of the newer report first and in its order."""
    found = []
    partners = _partners(before.boards, after.boards)
    for number, board in enumerate(after.boards):
        old = partners.get(number)
        found.append(_compare_boards(None if old is None else before.boards[old], board))
    gone = sorted(set(range(len(before.boards))) - set(partners.values()))
    return (*found, *(_compare_boards(before.boards[number], None) for number in gone))


def _partners(before: Sequence[SnapBoard], after: Sequence[SnapBoard]) -> dict[int, int]:
    """Which older board a newer one goes on from: the same samples and rules, else the only one of its question."""
    found: dict[int, int] = {}
    exact = {(board.question, board.samples, board.version): number for number, board in enumerate(before)}
    for number, board in enumerate(after):
        old = exact.pop((board.question, board.samples, board.version), None)
        if old is not None:
            found[number] = old
    taken = set(found.values())
    for number, board in enumerate(after):
        if number not in found:
            free = [at for at, old in enumerate(before) if at not in taken and old.question == board.question]
            rivals = [at for at, one in enumerate(after) if at not in found and one.question == board.question]
            if len(free) == 1 and len(rivals) == 1:
                found[number] = free[0]
                taken.add(free[0])
    return found


def _compare_boards(before: SnapBoard | None, after: SnapBoard | None) -> BoardChange:
    old, new = before.rows if before else (), after.rows if after else ()
    pairs = _same_models(old, new)
    twice = {row.model for rows in (old, new) for row in rows if sum(one.model == row.model for one in rows) > 1}
    same_samples = before is not None and after is not None and before.samples == after.samples
    changes = []
    for at, number in sorted(pairs.items()):
        one, other = old[at], new[number]
        label = f"{other.model} · {other.weights[:8]}" if other.model in twice else other.model
        worst = _shift(one.worst, other.worst, one.standing, other.standing, same_samples)
        sa = _shift(one.sa, other.sa, one.right, other.right, same_samples)
        changes.append((number, Change(label, one, other, worst, sa)))
    moved = [change for _, change in sorted(changes, key=lambda item: item[0]) if change.any]
    return BoardChange(
        before,
        after,
        tuple(_notes(before, after)) if before and after else (),
        tuple(row for number, row in enumerate(new) if number not in pairs.values()),
        tuple(row for number, row in enumerate(old) if number not in pairs),
        tuple(moved),
        len(changes) - len(moved),
    )


def _same_models(old: Sequence[SnapRow], new: Sequence[SnapRow]) -> dict[int, int]:
    """Which row goes on as which: the same weights of the same name, else the only ones of that name."""
    pairs: dict[int, int] = {}
    known = {(row.model, row.weights): number for number, row in enumerate(new)}
    for at, row in enumerate(old):
        if (row.model, row.weights) in known:
            pairs[at] = known.pop((row.model, row.weights))
    left_old = _single(row.model for at, row in enumerate(old) if at not in pairs)
    left_new = _single(row.model for number, row in enumerate(new) if number not in pairs.values())
    taken = set(pairs.values())
    by_name = {row.model: number for number, row in enumerate(new) if number not in taken}
    for at, row in enumerate(old):
        if at not in pairs and row.model in left_old & left_new:
            pairs[at] = by_name[row.model]
    return pairs


def _single(names: Iterable[str]) -> set[str]:
    """The names that occur once."""
    listed = list(names)
    return {name for name in listed if listed.count(name) == 1}


def _shift(
    before: Measure | None,
    after: Measure | None,
    first: BoolArray | None,
    second: BoolArray | None,
    same_samples: bool,
) -> Shift:
    if before is None or after is None:
        return Shift(before, after, None, None)
    if same_samples and first is not None and second is not None:
        return Shift(before, after, paired(first, second).p, "paired")
    # Imported here: it takes a second, and few reports need it.
    from scipy.stats import fisher_exact  # type: ignore[import-untyped]

    table = [[before.k, before.n - before.k], [after.k, after.n - after.k]]
    return Shift(before, after, float(fisher_exact(table).pvalue), "unpaired")


def _notes(before: SnapBoard, after: SnapBoard) -> list[str]:
    notes = []
    if before.version != after.version:
        notes.append(f"protocol version {before.version} → {after.version}: the rules changed, so numbers may differ")
    if before.n != after.n:
        notes.append(f"n {before.n} → {after.n}: the samples are others, so tests are not paired")
    elif before.data_sha256 != after.data_sha256:
        notes.append("the samples are others (the hash of the data changed), so tests are not paired")
    if before.suites != after.suites:
        notes.append(f"suite {', '.join(before.suites) or '—'} → {', '.join(after.suites) or '—'}")
    return notes


def _minus(one: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in one if name not in other)
