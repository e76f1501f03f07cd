"""The CSV and JSON files of a report, and how numbers are written for readers."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
from fake_store import FakeStore, demo, first_broken, model, routing
from hostile import HOSTILE, hostile_store

from moebench.report import exports, render, text


@pytest.mark.parametrize("name", HOSTILE)
def test_no_csv_field_is_a_formula_and_every_row_has_all_columns(name: str) -> None:
    rows = list(csv.reader(io.StringIO(render(hostile_store(name))["data/leaderboard.csv"], newline="")))
    assert len({len(row) for row in rows}) == 1
    assert len(rows) == 3
    assert not [field for row in rows for field in row if field.lstrip().startswith(("=", "+", "-", "@"))]
    assert any(field.removeprefix("'") == name for row in rows[1:] for field in row)


def test_csv_numbers_are_fractions_and_gaps_are_told_apart() -> None:
    store = FakeStore()
    for attack in ("autoattack", "moe-adaptive"):
        store.add(model("a", "moe"), attack, first_broken(200, 40))
    (row,) = csv.DictReader(io.StringIO(render(store)["data/leaderboard.csv"]))
    assert (row["rank"], row["ra_worst"], row["sa"], row["ra[autoattack]"]) == ("1", "0.800000", "0.950000", "0.800000")
    assert float(row["ra_low"]) < 0.8 < float(row["ra_high"])
    assert (row["ra_e"], row["ra_smoe"]) == ("", "n/a")


def test_json_lines_hold_every_result_in_order_without_what_identifies_a_machine() -> None:
    store = demo(60)
    store.superseded = {1}
    lines = render(store)["data/results.jsonl"].splitlines()
    rows = [json.loads(line) for line in lines]
    assert sorted(row["result_id"] for row in rows) == [one.result_id for one in store.stored]
    assert all(list(row) == sorted(row) for row in rows)
    assert "secret-host" not in "".join(str(content) for content in render(store).values())
    assert rows[0]["environment"] == {"device": "cpu", "moebench": "0.1.0", "torch": "2.9.0"}
    assert rows[0]["outcomes"]["n"] == 60


def test_json_lines_are_strict_where_a_number_is_not_finite() -> None:
    store = FakeStore()
    store.add(model("a"), "autoattack", first_broken(200, 4), layers=(replace(routing(), iou=float("nan")),))
    files = render(store)
    (line,) = files["data/results.jsonl"].splitlines()
    row = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert row["record"]["routing"][0]["iou"] is None
    assert "nan" not in files["models/a.html"].split("<h2>Routing</h2>")[1].split("<h2")[0]


def test_the_digest_of_outcomes_changes_with_any_verdict() -> None:
    store = FakeStore()
    for broken in (first_broken(50, 3), first_broken(50, 3), first_broken(50, 4)):
        store.add(model("a"), "autoattack", broken)
    first, same, other = (exports.outcomes_digest(store.outcomes(number)) for number in (1, 2, 3))
    assert first == same != other


def test_numbers_are_written_for_readers() -> None:
    assert [text.quantity(count) for count in (None, 0, 999, 1000, 11_200_000, 999_999)] == [
        *("—", "0", "999", "1.00 k", "11.2 M"),
        "1.00 M",
    ]
    assert [text.seconds(time) for time in (None, 0.42, 59.0, 65.0, 7800.0)] == [
        *("—", "0.42 s", "59 s", "1 min 05 s"),
        "2 h 10 min",
    ]
    assert (text.percent(0.5, 10), text.percent(0.5, 1000), text.percent(float("nan"), 10)) == ("50.0", "50.00", "—")
