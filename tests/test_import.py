"""`moebench import`: another lab's results come in whole and apart, or not at all."""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Terminal, shipped

pytest.importorskip("jsonschema", reason="jsonschema is not installed")

from moebench.metrics import wilson
from moebench.report import render, tables
from moebench.report.exports import outcomes_digest
from moebench.report.results_json import content_digest, results_json, unpack_samples
from moebench.store import Store

RESULTS = Path(__file__).resolve().parents[1] / "results.db"
LAB = "Lab & Söhne_1"
MODELS = ("rt-er", "resnet-at", "dual-moe[mixing=probabilities]")

Document = dict[str, Any]


@pytest.fixture(scope="module")
def exported() -> str:
    """What the committed store knows of three models, as another lab would send it."""
    if not RESULTS.exists():
        pytest.skip("results.db is not here")
    with Store.open(RESULTS, write=False) as store:
        # One leaderboard: the store has curves over further radii.
        chosen = [one for one in store.results() if one.model.name in MODELS and one.protocol.threat.eps == 0.2]
        return results_json(store, chosen, LAB)


@pytest.fixture
def moebench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOEBENCH_DB", raising=False)
    return Terminal(tmp_path, capfd)


@pytest.fixture
def sent(moebench: Terminal, exported: str) -> Path:
    """The file as it arrives."""
    path = moebench.folder / "lab.json"
    path.write_text(exported, encoding="utf-8")
    return path


def own_store(path: Path) -> Path:
    """A copy of the committed store with these models alone; its report takes seconds less."""
    path.write_bytes(RESULTS.read_bytes())
    with closing(sqlite3.connect(path)) as database:
        names = ", ".join(f"'{name}'" for name in MODELS)
        runs = f"SELECT run.id FROM run JOIN model ON model.id = run.model_id WHERE model.name NOT IN ({names})"
        for table in ("chunk", "example"):
            database.execute(f"DELETE FROM {table} WHERE result_id IN (SELECT id FROM result WHERE run_id IN ({runs}))")
        for table in ("run_result", "result"):
            database.execute(f"DELETE FROM {table} WHERE run_id IN ({runs})")
        database.execute(f"DELETE FROM run WHERE id IN ({runs})")
        database.commit()
    return path


def edited(path: Path, change: Callable[[Document], None], *, honest_hash: bool = True) -> Path:
    """The file with something changed, its own hash made right again unless that is the point."""
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    if honest_hash:
        document["sha256"] = content_digest(document)
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return path


# What comes in


def test_a_round_trip_gives_the_same_numbers_and_evidence(moebench: Terminal, sent: Path) -> None:
    said = moebench("import", sent, "--db", "new.db")
    assert said.code == 0, said.err
    assert "added" in said.out and "as external" in said.out
    with (
        Store.open(own_store(moebench.folder / "own.db"), write=False) as ours,
        Store.open("new.db", write=False) as theirs,
    ):
        assert theirs.check() == []
        before = {one.cell.fingerprint: one for one in ours.results()}
        after = theirs.results()
        assert len(after) == int(said.out.split()[0]) > 20
        for one in after:
            original = before[one.cell.fingerprint.rpartition(":")[2]]
            assert one.record == original.record
            assert one.cell.parameters == original.cell.parameters
            assert one.protocol == original.protocol
            assert one.command == original.command
            assert one.model.name == f"{original.model.name} (external: {LAB})"
            told, found = ours.outcomes(original.result_id), theirs.outcomes(one.result_id)
            assert outcomes_digest(told) == outcomes_digest(found)
            assert told.stage == found.stage
            for name in ("distance", "forwards", "backwards"):
                assert np.array_equal(getattr(told, name), getattr(found, name))
        measured = {row.model.name: row for row in tables.build(ours).boards[0].rows}
        rows = [row for board in tables.build(theirs).boards for row in board.rows]
        assert len(rows) == 3
        for row in rows:
            mine = measured[row.model.name.partition(" (external")[0]]
            for name in ("worst", "sa", "ra", "components"):
                assert getattr(row, name) == getattr(mine, name)


def test_external_rows_are_marked_take_no_rank_and_stand_beside_ours(moebench: Terminal, sent: Path) -> None:
    db = own_store(moebench.folder / "both.db")
    edited(sent, lambda document: [run.update(run_id=f"x{run['run_id']}") for run in document["runs"]])
    with Store.open(db, write=False) as store:
        before = {row.model.name: row for row in tables.build(store).boards[0].rows}
    assert moebench("import", sent, "--from", "Other lab", "--db", db).code == 0
    with Store.open(db, write=False) as store:
        board = tables.build(store).boards[0]
        pages = render(store)
    external = [row for row in board.rows if "(external: Other lab)" in row.label]
    assert len(external) == 3
    for row in external:
        assert row.rank is None
        assert (row.unranked or "").startswith("external: measured by Other lab and imported from lab.json")
        assert "external" in {mark.code for mark in row.marks}
    assert {row.model.name: row for row in board.rows if row not in external} == before
    assert "external: Other lab" in pages["index.html"]
    assert "ddagger" in pages["tables/leaderboard-digits-Linf.tex"]


def test_the_same_file_twice_adds_nothing(moebench: Terminal, sent: Path) -> None:
    assert moebench("import", sent).code == 0
    before = Store.open("results.db", write=False).results()
    said = moebench("import", sent)
    assert said.code == 0
    assert said.out.startswith("0 results") and "were there already" in said.out
    assert Store.open("results.db", write=False).results() == before


def test_a_larger_file_of_the_same_lab_adds_what_is_new(moebench: Terminal, sent: Path, exported: str) -> None:
    runs = len(json.loads(exported)["runs"])
    edited(sent, lambda document: document.update(runs=document["runs"][:2]))
    first = int(moebench("import", sent).out.split()[0])
    sent.write_text(exported, encoding="utf-8")
    said = moebench("import", sent)
    assert f"{first} were there already" in said.out
    with Store.open("results.db", write=False) as store:
        assert len(store.runs()) == runs
        assert store.check() == []


def test_a_store_does_not_import_its_own_results_nor_pass_on_others(moebench: Terminal, sent: Path) -> None:
    db = moebench.folder / "own.db"
    db.write_bytes(RESULTS.read_bytes())
    said = moebench("import", sent, "--db", db)
    assert said.code == 0 and "this store's own; nothing was added" in said.out
    assert db.read_bytes() == RESULTS.read_bytes()
    assert moebench("import", sent, "--db", "new.db").code == 0
    assert "imported results are not passed on" in moebench.refuses("export", "--format", "json", "--db", "new.db")


@pytest.mark.skipif(not shipped("resnet-at"), reason="its weights are not shipped")
def test_an_evaluation_reuses_nothing_that_was_imported(moebench: Terminal) -> None:
    assert moebench.evaluate("resnet-at", "fgsm", 20, "--db", "lab.db").code == 0
    assert moebench("export", "--format", "json", "--from", LAB, "--out", "lab.json", "--db", "lab.db").code == 0
    assert moebench("import", "lab.json", "--db", "ours.db").code == 0
    again = moebench.evaluate("resnet-at", "fgsm", 20, "--db", "ours.db", "--json").json
    with Store.open("ours.db", write=False) as store:
        run = store.run(again["run_id"])
        assert run.reused == 0
        assert len(store.results()) == 2
        shown = moebench("show", store.runs()[0].run_id, "--db", "ours.db")
    assert f"measured by {LAB}, from lab.json" in shown.out


def test_a_dry_run_writes_nothing(moebench: Terminal, sent: Path) -> None:
    before = moebench.files()
    said = moebench("import", sent, "--dry-run")
    assert said.code == 0 and "the file is sound" in said.out
    assert moebench.files() == before


# What stays out


def run_of(document: Document, attack: str) -> Document:
    """The first run in a document that has a result of an attack."""
    found: Document = next(
        run for run in document["runs"] if any(one["cell"]["attack"] == attack for one in run["results"])
    )
    return found


def result(document: Document, attack: str = "autoattack") -> Document:
    """The first result of an attack in a document."""
    found: Document = next(one for one in run_of(document, attack)["results"] if one["cell"]["attack"] == attack)
    return found


def flip_verdict(document: Document) -> None:
    samples = result(document)["samples"]
    bits = bytearray(base64.b64decode(samples["broken"]))
    bits[3] ^= 0xFF
    samples["broken"] = base64.b64encode(bytes(bits)).decode()


def flatter(document: Document) -> None:
    """A forger who makes the aggregate better and its interval consistent, but not the samples."""
    record = result(document)["record"]
    standing = round(record["accuracy"] * record["n"]) + 25
    record["accuracy"] = standing / record["n"]
    record["ci_low"], record["ci_high"] = wilson(standing, record["n"])


def flatter_with_samples(document: Document) -> None:
    """A forger who makes samples stand as well and hashes them anew, but leaves the predictions."""
    written = result(document)
    samples, record = written["samples"], written["record"]
    outcomes = unpack_samples(samples)
    fallen = np.flatnonzero([bool(stage) for stage in outcomes.stage])[:10]
    outcomes.broken[fallen] = False
    samples["broken"] = base64.b64encode(np.packbits(outcomes.broken, bitorder="little").tobytes()).decode()
    samples["sha256"] = outcomes_digest(outcomes)
    standing = int(np.count_nonzero(~outcomes.broken))
    record["accuracy"] = standing / record["n"]
    record["ci_low"], record["ci_high"] = wilson(standing, record["n"])


def shrink_eps(document: Document) -> None:
    run_of(document, "autoattack")["protocol"]["threat"]["eps"] = 0.05


def other_prediction(document: Document) -> None:
    samples = result(document)["samples"]
    data = bytearray(base64.b64decode(samples["adv_pred"]["data"]))
    data[0] = 99
    samples["adv_pred"]["data"] = base64.b64encode(bytes(data)).decode()
    outcomes = unpack_samples(samples)
    samples["sha256"] = outcomes_digest(outcomes)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (flip_verdict, "its samples do not have the sha256 that they state"),
        (flatter, "accuracy is "),
        (flatter_with_samples, "a stage is said to have broken a sample that stands"),
        (shrink_eps, "is outside Linf 0.05"),
        (other_prediction, "adv_pred names a class that is none of 10"),
        (lambda d: result(d)["record"].update(clean_accuracy=1.0), "clean_accuracy is 1"),
        (lambda d: result(d, "published:rt-er")["record"].update(clean_accuracy=0.5), "clean_accuracy is 0.5"),
        (lambda d: result(d)["record"].update(forwards=1), "forwards is 1"),
        (lambda d: result(d)["record"].update(ci_low=0.0), "ci_low is 0"),
        (lambda d: result(d)["record"]["stages"]["apgd-ce"].update(broken=1), "stage 'apgd-ce' broke 1 samples"),
        (lambda d: result(d)["record"].update(view="router"), "its aggregate is of autoattack on router"),
        (lambda d: result(d)["samples"].update(n=499), "has 500 bytes, 499 samples of"),
        (lambda d: d["runs"][0]["protocol"].update(n=400), "500 bytes, 400 samples of type uint8 take 400"),
        (lambda d: d["runs"][0]["protocol"].update(version="2"), "follows version 2 of the evaluation rules"),
        (lambda d: d["runs"][0]["environment"].update(imported={}), "was imported by that lab itself"),
        (lambda d: d["runs"].append(d["runs"][0]), "is there twice"),
        (lambda d: d["runs"][0]["results"].append(d["runs"][0]["results"][0]), "is there twice"),
        (lambda d: d.update(extra=1), "does not follow the schema at $: Additional properties"),
        (lambda d: d["runs"][0]["model"].update(family="best"), "does not follow the schema at $.runs[0].model.family"),
        (lambda d: d["runs"][0]["protocol"].pop("data_sha256"), "'data_sha256' is a required property"),
        (lambda d: d.update(format_version=2), "has format version 2, this moebench reads 1"),
        (lambda d: d.update(format="x"), "is no file of moebench results"),
        (lambda d: d.update(lab=None), "does not say who measured; add --from NAME"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_in_one_line(
    moebench: Terminal, sent: Path, change: Callable[[Document], None], line: str
) -> None:
    edited(sent, change)
    assert line in moebench.refuses("import", sent)


def test_an_edit_without_a_new_hash_is_seen(moebench: Terminal, sent: Path) -> None:
    edited(sent, lambda document: document["runs"][0].update(command="moebench evaluate"), honest_hash=False)
    assert "is damaged or was edited" in moebench.refuses("import", sent)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "is no JSON that can be read"),
        (b"{", "is no JSON that can be read"),
        (b"[]", "is no file of moebench results"),
        (b"\xff\xfe", "is no UTF-8 text"),
        (b'{"format": "moebench-results", "format": "x"}', "the same key twice"),
        (b'{"format": NaN}', "NaN is no JSON number"),
        (b"[" * 100_000, "too deeply nested"),
        (b'{"format": "moebench-results", "format_version": 1}', "does not follow the schema"),
    ],
)
def test_what_is_no_results_file_is_refused_in_one_line(moebench: Terminal, content: bytes, line: str) -> None:
    Path("bad.json").write_bytes(content)
    assert line in moebench.refuses("import", "bad.json")


def test_a_missing_file_and_a_bad_name_are_one_line(moebench: Terminal, sent: Path) -> None:
    assert "cannot read 'none.json': No such file" in moebench.refuses("import", "none.json")
    for name in ("", " ", "x" * 41, "a\nb", "\x1b[31m"):
        assert "--from takes a name of 1 to 40 printable characters" in moebench.refuses("import", sent, "--from", name)


def test_one_file_is_not_taken_for_two_labs(moebench: Terminal, sent: Path) -> None:
    assert moebench("import", sent, "--from", "A").code == 0
    before = Store.open("results.db", write=False).results()
    said = moebench("import", sent, "--from", "B")
    assert said.code == 2 and "before, as 'A', not 'B'" in said.err
    assert Store.open("results.db", write=False).results() == before


def test_a_second_file_with_other_samples_of_the_same_run_is_refused(moebench: Terminal, sent: Path) -> None:
    assert moebench("import", sent).code == 0

    def remeasure(document: Document) -> None:
        samples = result(document)["samples"]
        distance = np.frombuffer(base64.b64decode(samples["distance"]["data"]), "<f4") * np.float32(0.5)
        samples["distance"]["data"] = base64.b64encode(distance.tobytes()).decode()

    edited(sent, remeasure)
    before = Store.open("results.db", write=False).results()
    said = moebench("import", sent)
    assert said.code == 2 and "before, with other samples" in said.err
    assert Store.open("results.db", write=False).results() == before
