"""Snapshots and changes: what is written is read back, what is foreign is refused, what differs is found and tested."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Terminal
from fake_store import FakeStore, demo, first_broken, model, protocol
from page_stores import broke, everything
from scipy.stats import binomtest, fisher_exact  # type: ignore[import-untyped]

from moebench.errors import UsageError
from moebench.metrics import Measure
from moebench.report import changes, render, snapshot, tables, write_report
from moebench.report.snapshot import Snapshot
from moebench.schema import Flag


def taken(store: FakeStore) -> Snapshot:
    return snapshot.take(store, tables.build(store).boards)


def small(**broken: int) -> FakeStore:
    store = FakeStore()
    for name, count in broken.items():
        store.add(model(name, "dense"), "autoattack", first_broken(200, count), clean=1.0)
    return store


def only(before: FakeStore, after: FakeStore) -> changes.BoardChange:
    (found,) = changes.compare(taken(before), taken(after))
    return found


def test_a_snapshot_comes_back_as_it_was_written() -> None:
    first = taken(everything(45))
    second = snapshot.parse(snapshot.dump(first))
    assert snapshot.dump(second) == snapshot.dump(first)
    for one, other in zip(first.boards, second.boards, strict=True):
        assert replace(one, rows=()) == replace(other, rows=())
        for row, same in zip(one.rows, other.rows, strict=True):
            assert row.worst == same.worst
            assert row.standing is not None
            assert same.standing is not None
            assert np.array_equal(row.standing, same.standing)
    assert changes.compare(first, second)
    assert not any(change.any for change in changes.compare(first, second))


def test_verdicts_are_left_out_where_they_are_not_those_behind_the_number() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 20), clean=0.95)
    (row,) = taken(store).boards[0].rows
    assert row.standing is not None
    assert int(row.standing.sum()) == 180
    assert row.right is None


def test_models_come_and_go_and_numbers_move_with_a_paired_test() -> None:
    found = only(small(a=20, b=40, gone=50), small(a=20, b=60, new=10))
    assert [row.model for row in found.added] == ["new"]
    assert [row.model for row in found.removed] == ["gone"]
    by_name = {change.label: change for change in found.changes}
    shift = by_name["b"].worst
    assert (shift.before, shift.after, shift.test) == (Measure(160, 200), Measure(140, 200), "paired")
    assert shift.points == pytest.approx(-10)
    assert shift.p == pytest.approx(binomtest(0, 20, 0.5).pvalue)
    assert not by_name["b"].sa.changed
    assert by_name["a"].ranks == (1, 2)


def test_on_other_samples_the_test_is_fishers_and_the_page_says_why() -> None:
    before, after = small(a=20), FakeStore()
    after.add(model("a"), "autoattack", first_broken(100, 30), on=protocol(n=100), clean=1.0)
    found = only(before, after)
    (change,) = found.changes
    assert change.worst.test == "unpaired"
    assert change.worst.p == pytest.approx(fisher_exact([[180, 20], [70, 30]]).pvalue)
    assert found.notes == ("n 200 → 100: the samples are others, so tests are not paired",)


def test_without_verdicts_the_test_is_unpaired() -> None:
    before = taken(small(a=20))
    rows = tuple(replace(row, standing=None) for row in before.boards[0].rows)
    bare = replace(before, boards=(replace(before.boards[0], rows=rows),))
    ((change,),) = [one.changes for one in changes.compare(bare, taken(small(a=30)))]
    assert change.worst.test == "unpaired"


def test_protocol_and_suite_versions_are_said_and_paired_on_the_same_samples() -> None:
    before = taken(small(a=20))
    board = replace(before.boards[0], version="0", suites=("v0",))
    (found,) = changes.compare(replace(before, boards=(board,)), taken(small(a=30)))
    assert [note.partition(":")[0] for note in found.notes] == ["protocol version 0 → 1", "suite v0 → v1"]
    assert found.changes[0].worst.test == "paired"


def test_flags_attacks_and_weights_are_compared() -> None:
    before, after = small(a=20), FakeStore()
    done = after.add(model("a"), "autoattack", first_broken(200, 20), clean=1.0, weights="others")
    after.add(model("a"), "pgd-50", first_broken(200, 20), "experts", clean=1.0, weights="others")
    after.add_run(done, flags=(Flag("zero-gradients", "words"),))
    (change,) = only(before, after).changes
    assert change.retrained
    assert change.flags == (("zero-gradients",), ())
    assert change.attacks == (("pgd-50 on experts",), ())
    assert not change.worst.changed


def test_new_and_vanished_leaderboards() -> None:
    after = small(a=20)
    after.add(model("a"), "autoattack", first_broken(200, 20), on=protocol("svhn"))
    came = changes.compare(taken(small(a=20)), taken(after))
    assert [(one.before is None, one.board.dataset) for one in came] == [(False, "digits"), (True, "svhn")]
    went = changes.compare(taken(after), taken(small(a=20)))
    assert [(one.after is None, one.board.dataset) for one in went] == [(False, "digits"), (True, "svhn")]


def test_two_boards_of_one_question_are_not_guessed_at() -> None:
    before, after = small(a=20), FakeStore()
    for n in (50, 100):
        after.add(model("a"), "autoattack", first_broken(n, 5), on=protocol(n=n))
    found = changes.compare(taken(before), taken(after))
    assert sorted((one.before is None, one.after is None) for one in found) == [
        (False, True),
        (True, False),
        (True, False),
    ]


def test_two_checkpoints_of_a_name_are_matched_by_their_weights() -> None:
    def store(second: int) -> FakeStore:
        made = FakeStore()
        made.add(model("a"), "autoattack", first_broken(200, 20), weights="one")
        made.add(model("a"), "autoattack", first_broken(200, second), weights="two")
        return made

    (change,) = only(store(30), store(40)).changes
    assert change.label.startswith("a · ")
    assert change.worst.before == Measure(170, 200)


def test_the_page_is_there_only_with_an_earlier_report_and_goes_again(tmp_path: Path) -> None:
    write_report(small(a=20), tmp_path)
    assert not (tmp_path / "changes.html").exists()
    assert "changes.html" not in (tmp_path / "index.html").read_text()
    before = snapshot.read(tmp_path)
    write_report(small(a=30), tmp_path, before)
    page = (tmp_path / "changes.html").read_text()
    assert "<strong>-5.0</strong>" in page
    assert 'href="changes.html"' in (tmp_path / "index.html").read_text()
    write_report(small(a=30), tmp_path, snapshot.read(tmp_path))
    assert "Nothing changed." in (tmp_path / "changes.html").read_text()
    write_report(small(a=30), tmp_path)
    assert not (tmp_path / "changes.html").exists()


def test_a_page_of_changes_that_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "changes.html").write_text("<p>mine</p>")
    write_report(small(a=30), tmp_path)
    assert (tmp_path / "changes.html").read_text() == "<p>mine</p>"


def test_empty_stores_on_either_side() -> None:
    assert "Nothing changed." in render(FakeStore(), taken(FakeStore()))["changes.html"]
    assert "This leaderboard is gone" in render(FakeStore(), taken(small(a=20)))["changes.html"]
    assert "This leaderboard is new" in render(small(a=20), taken(FakeStore()))["changes.html"]


def test_the_same_stores_give_the_same_bytes_in_whatever_order() -> None:
    old, store = taken(demo(30)), everything(30)
    mixed = replace(store, stored=store.stored[::-1], made=store.made[::-1])
    assert render(store, old) == render(mixed, old)


# Files from outside


def edited(change: Any) -> str:
    record = json.loads(snapshot.dump(taken(small(a=20))))
    change(record)
    return json.dumps(record)


def at_row(key: str, value: Any) -> Any:
    return lambda record: record["boards"][0]["rows"][0].update({key: value})


def at_board(key: str, value: Any) -> Any:
    return lambda record: record["boards"][0].update({key: value})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "it is no JSON"),
        ("{", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[]", "it is no object"),
        ("{}", "it has no 'format'"),
        ('{"format": NaN}', "it is no JSON"),
        (edited(lambda record: record.update(format="other")), "its format is 'other', expected 'moebench snapshot'"),
        (edited(lambda record: record.update(version=2)), "it has version 2, and this moebench reads version 1"),
        (edited(lambda record: record.update(version=True)), "'version' must be of type int, got bool"),
        (edited(lambda record: record.update(boards={})), "'boards' must be of type list, got dict"),
        (edited(lambda record: record["boards"].append(3)), r"boards\[1\] is no object"),
        (edited(at_board("eps", "0.2")), r"boards\[0\]: 'eps' must be of type float, got str"),
        (edited(at_board("eps", 10**400)), r"boards\[0\]: 'eps' must be of type float, got int"),
        (edited(at_board("n", -1)), r"boards\[0\]: 'n' must be from 0 to"),
        (edited(at_board("suites", [1])), r"boards\[0\]: 'suites' must be a list of texts"),
        (edited(at_row("model", None)), r"boards\[0\].rows\[0\]: 'model' must be of type str, got NoneType"),
        (edited(at_row("rank", 0)), r"boards\[0\].rows\[0\]: 'rank' must be from 1"),
        (edited(at_row("ra_worst", {"k": 3, "n": 2})), r"boards\[0\].rows\[0\].ra_worst: 'k' must be from 0 to 2"),
        (edited(at_row("ra_worst", {"k": 3, "n": 0})), r"'n' must be from 1"),
        (edited(at_row("standing", "%%%")), "'standing' is no base64"),
        (edited(at_row("standing", "AAAA")), "'standing' must hold 200 bits, got 24"),
        (edited(at_row("ra_worst", {"k": 3, "n": 200})), "'standing' does not add up to the number beside it"),
        (edited(lambda record: record["boards"][0]["rows"][0].pop("sa")), "has no 'sa'"),
    ],
)
def test_a_file_that_is_no_snapshot_is_refused_in_one_line(content: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=why) as caught:
        snapshot.read(file)
    assert "\n" not in str(caught.value)
    assert "--since takes an earlier report's data/snapshot.json" in str(caught.value)


def test_a_snapshot_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^cannot read the snapshot .*snapshot\.json.*No such file"):
        snapshot.read(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="it is no text"):
        snapshot.read(tmp_path / "binary")


@pytest.fixture
def moebench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOEBENCH_DB", raising=False)
    return Terminal(tmp_path, capsys)


def test_the_command_refuses_a_bad_file_before_it_writes_and_takes_its_own_folder(moebench: Terminal) -> None:
    from moebench.store import Store

    with Store.open("results.db", write=True):
        pass
    Path("bad.json").write_text("{}")
    assert "is no snapshot" in moebench.refuses("report", "--since", "bad.json", "--out", "out")
    assert not Path("out").exists()
    assert moebench("report", "--out", "out").code == 0
    assert moebench("report", "--out", "out", "--since", "out").code == 0
    assert "Nothing changed." in Path("out/changes.html").read_text()


def test_standing_of_several_attacks_is_the_worst_case() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", broke(0, 1))
    store.add(model("a"), "pgd-50", broke(1, 2), "experts")
    (row,) = taken(store).boards[0].rows
    assert row.standing is not None
    assert np.flatnonzero(~row.standing).tolist() == [0, 1, 2]
    assert row.attacks == ("autoattack", "pgd-50 on experts")
