"""`moebench db`, `moebench runs` and `moebench verify` on real evaluations."""

from __future__ import annotations

import re
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import finish_cell, make_cell, make_run_start
from commands import DENSE, MOE, USER_MODELS, Terminal, write_npz

from moebench.schema import Chunk
from moebench.store import Store, packing
from moebench.store.migrate import REVISIONS

DATA = Path(__file__).parent / "data"


def sql(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def first_release(path: Path) -> Path:
    """Two real runs, written by the code of the first schema."""
    with sqlite3.connect(path) as connection:
        connection.executescript((DATA / "schema-0001.sql").read_text(encoding="utf-8"))
    connection.close()
    return path


# moebench db


def test_an_older_database_is_checked_upgraded_and_told_its_labels(moebench: Terminal) -> None:
    path = first_release(moebench.folder / "results.db")
    before = path.read_bytes()
    said = moebench("db", "check", "--json").json
    assert (said["schema"], said["runs"], said["results"], said["problems"]) == ("0001", 2, 2, [])
    assert path.read_bytes() == before
    said = moebench("db", "upgrade")
    assert said.code == 0 and said.out.splitlines() == [
        f"'results.db' was of schema 0001, now up to date (schema {REVISIONS[-1]})",
        "labels added: digits (n = 12)",
    ]
    again = moebench("db", "upgrade")
    assert again.out == f"'results.db' is up to date (schema {REVISIONS[-1]})\n"
    with Store.open(write=False) as store:
        assert [store.labels(run.protocol) is not None for run in store.runs()] == [True, True]
    assert moebench("db", "check").out == "'results.db': 2 runs, 2 finished results; all of it adds up\n"


def test_check_names_every_problem_and_answers_with_exit_code_1(moebench: Terminal) -> None:
    first_release(moebench.folder / "results.db")
    sql(
        moebench.folder / "results.db",
        "UPDATE result SET parameters = json_set(parameters, '$.pgd.steps', 50) WHERE id = 1",
        "UPDATE result SET seconds = 1 WHERE id = 2",
        "UPDATE run SET fingerprint = 'x' WHERE id = 2",
        "UPDATE result SET routing = json_set(routing, '$[0].load_adv[0]', 0.9) WHERE id = 1",
        "UPDATE result SET stages = json_set(stages, '$.clean.loss', 3) WHERE id = 1",
    )
    said = moebench("db", "check")
    assert said.code == 1 and said.err == ""
    *lines, last = said.out.splitlines()
    wanted = [
        "result 1 .*: its fingerprint is not that of its weights, data, attack and settings",
        "result 1 .*: loss before the attack is 3, its samples give",
        "result 1 .*: load of layer moe is not what its samples give",
        "result 2 .*: seconds is 1, its samples give 0",
        "run .*: its fingerprint is not that of the results that it shows",
    ]
    assert len(lines) == len(wanted) and all(map(re.match, wanted, lines)), lines
    assert last.endswith("2 runs, 2 finished results; 5 problems")
    assert moebench("db", "check", "--json").code == 1


def test_check_looks_at_pictures(moebench: Terminal) -> None:
    moebench.evaluate(MOE, "fgsm", 12, "--view", "whole", "--no-trust")
    assert moebench("db", "check").code == 0
    sql(moebench.folder / "results.db", "UPDATE example SET adv_pred = 9 - adv_pred")
    said = moebench("db", "check")
    assert said.code == 1 and "the picture of sample 0 says other than the sample" in said.out


def test_merge_adds_once(moebench: Terminal) -> None:
    other = first_release(moebench.folder / "other.db")
    before = other.read_bytes()
    moebench.evaluate(DENSE, "fgsm", 12, "--no-trust")
    said = moebench("db", "merge", "other.db")
    assert (said.code, said.out) == (0, "'results.db': 2 runs and 2 results added from 'other.db'\n")
    again = moebench("db", "merge", "other.db", "--json").json
    assert (again["runs"], again["results"], again["known_runs"], again["known_results"]) == (0, 0, 2, 2)
    assert other.read_bytes() == before and moebench("db", "check").code == 0
    # The merged results are reused like own ones.
    moebench.evaluate(MOE, "pgd-3", 12, "--view", "whole", "--no-trust")
    with Store.open(write=False) as store:
        assert store.runs()[-1].reused == 1


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound database and several that are none, or not sound."""
    folder = tmp_path_factory.mktemp("databases")
    (folder / "empty.db").touch()
    (folder / "text.db").write_text("no database at all\n" * 60)
    for name in ("other", "newer", "unsound"):
        with Store.open(folder / f"{name}.db", write=True) as store:
            store.begin_run(make_run_start())
            finish_cell(store, "run-1", make_cell())
            store.finish_run("run-1", "done", seconds=1.0)
    sql(folder / "newer.db", "UPDATE alembic_version SET version_num = '0999'")
    sql(folder / "unsound.db", "UPDATE result SET seconds = 77")
    sql(folder / "foreign.db", "CREATE TABLE users (id INTEGER)")
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("db check", "there is no database 'results.db'"),
        ("db upgrade", "there is no database 'results.db'"),
        ("db upgrade --db empty.db", "'empty.db' holds no results yet"),
        ("db merge no.db", "there is no database 'no.db'"),
        ("db merge other.db --db other.db", "'other.db' is the database to merge into"),
        ("db merge newer.db", "'newer.db' has schema 0999, newer than .* upgrade moebench"),
        ("db merge text.db", "'text.db' is damaged or no SQLite database"),
        ("db merge foreign.db", "'foreign.db' is a database of something else"),
        ("db merge unsound.db --db fresh.db", "'unsound.db' is not sound .*seconds is 77.*nothing was changed"),
        ("db merge mysql://me:secret@host/x", "unknown kind of database 'mysql'"),
        ("db merge", "Missing argument"),
        ("db mend", "No such command 'mend'"),
        ("runs", "there is no database 'results.db'"),
        ("runs --status gone", "Invalid value for '--status'"),
        ("runs cancel", "name the runs to cancel, or give --gone"),
        ("runs cancel x --gone", "name the runs to cancel, or give --gone"),
        ("runs cancel x", "there is no database 'results.db'"),
        ("runs cancel run-9 --db other.db", "no run 'run-9' in 'other.db'; did you mean run-1"),
        ("runs cancel run-1 --db other.db", "run run-1 has ended already .done.; only running ones"),
        ("runs --json cancel run-1 --db other.db", "--json belongs to the list of runs"),
        ("verify run-1", "there is no database 'results.db'"),
        ("verify run-9 --db other.db", "no run 'run-9' in 'other.db'"),
        ("verify run-1 --db other.db --samples 0", "--samples must be at least 1, got 0"),
        ("verify run-1 --db other.db --samples 5 --all", "--samples and --all exclude each other"),
        ("verify run-1 --db other.db --seed -1", "the seed must be between"),
    ],
)
def test_wrong_input_is_one_line_and_changes_nothing(
    moebench: Terminal, databases: Path, words: str, message: str
) -> None:
    shutil.copytree(databases, moebench.folder, dirs_exist_ok=True)
    said = moebench.refuses(*words.split())
    assert re.search(message, said), said
    assert "secret" not in said


# moebench runs


def test_runs_are_listed_with_what_they_do(moebench: Terminal) -> None:
    first_release(moebench.folder / "results.db")
    moebench("db", "upgrade")
    with Store.open("results.db", write=True) as store:
        store.begin_run(make_run_start("run-gone", environment={"host": "elsewhere", "pid": 1}))
        result_id, _ = store.open_cell("run-gone", make_cell(), resume=False)
        store.append_chunk(result_id, Chunk("clean", *_eight(), 0.5))
    said = moebench("runs")
    heading, *rows = said.out.splitlines()
    assert said.code == 0 and heading.split()[:3] == ["run", "status", "started"]
    assert [row.split()[1] for row in rows] == ["done", "done", "running"]
    assert re.search(r"at pgd-10 on whole, 8 decisions, last commit \d.* ago", rows[2]) and rows[0].endswith("pgd-3")
    found = moebench("runs", "--json", "--status", "running").json["runs"]
    assert [(one["run_id"], one["process"], one["results"]) for one in found] == [("run-gone", "elsewhere", [])]
    found = moebench("runs", "--json", "--model", MOE).json["runs"]
    assert [one["results"][0]["attack"] for one in found] == ["pgd-3"]
    assert moebench("runs", "--model", "nobody").out == "no runs that fit in 'results.db'\n"


def _eight() -> tuple[np.ndarray, ...]:
    whole = np.arange(8, dtype=np.int64)
    return whole, whole < 0, whole % 3, whole % 3, np.zeros(8, np.float32), whole, whole


def test_a_cancelled_run_stops_at_its_next_commit_and_can_go_on(
    moebench: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (MOE, "fgsm,pgd-3", 20, "--view", "whole", "--no-trust")
    moebench.evaluate(*words, "--db", "undisturbed.db")
    real, commits, cancelled = Store.append_chunk, 0, []

    def append(store: Store, result_id: int, chunk: Chunk) -> None:
        nonlocal commits
        commits += 1
        if commits == 4:  # the second cell has its clean pass, and its attack is about to be committed
            with Store.open("results.db", write=True) as other:
                cancelled.extend(other.cancel_runs([other.runs()[0].run_id[:6]]))
        real(store, result_id, chunk)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "append_chunk", append)
        said = moebench.evaluate(*words)
    (run,) = cancelled
    assert (said.code, said.err.count("\n")) == (1, 1)
    assert f"run {run.run_id} was cancelled; what was finished is kept, and the same command goes on" in said.err
    with Store.open("results.db", write=False) as store:
        stopped = store.run(run.run_id)
        assert (stopped.status, stopped.error, len(stopped.results)) == ("failed", "cancelled", 1)
        assert store.check() == []
    assert moebench.evaluate(*words).code == 0
    with Store.open("results.db", write=False) as store:
        assert store.runs()[-1].reused == 1
    with Store.open("results.db", write=False) as one, Store.open("undisturbed.db", write=False) as other:
        for mine, theirs in zip(one.results(), other.results(), strict=True):
            first, second = one.outcomes(mine.result_id), other.outcomes(theirs.result_id)
            np.testing.assert_array_equal(first.broken, second.broken)
            assert first.stage == second.stage


def test_runs_whose_process_is_gone_are_cancelled_together(moebench: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebench.store.owner._alive", lambda pid: pid == 1)
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    with Store.open("results.db", write=True) as store:
        for run_id, host, pid in (("run-1", "here", 1), ("run-2", "here", 2), ("run-3", "there", 2)):
            store.begin_run(make_run_start(run_id, environment={"host": host, "pid": pid}))
    assert "running?" in moebench("runs").out and "its process is gone" in moebench("runs").out
    said = moebench("runs", "cancel", "--gone")
    assert (said.code, said.out) == (0, "run run-2 is cancelled\n")
    assert moebench("runs", "cancel", "--gone").out == "no run in 'results.db' has lost its process\n"
    said = moebench("runs", "cancel", "run-1", "run-3")
    assert said.out.splitlines() == [
        "run run-1 is cancelled; its process stops at its next commit",
        "run run-3 is cancelled",
    ]
    with Store.open("results.db", write=False) as store:
        assert {(run.status, run.error) for run in store.runs()} == {("failed", "cancelled")}


# moebench verify


def only_run(path: str = "results.db") -> str:
    with Store.open(path, write=False) as store:
        return store.runs()[-1].run_id


@pytest.mark.parametrize(
    ("model", "attacks", "words"),
    [
        (MOE, "fgsm,apgd-ce[steps=4]", ("--view", "whole,router,experts", "--norm", "L2", "--set", "top_k=2")),
        (DENSE, "published:robust-experts[mode=train,batch=6,steps=3],square[queries=20]", ()),
        (MOE, "pgd-3", ("--view", "whole", "--eps", "0.05,0.1,0.2")),
    ],
)
def test_a_run_comes_out_again(moebench: Terminal, model: str, attacks: str, words: tuple[str, ...]) -> None:
    done = moebench.evaluate(model, attacks, 30, "--no-trust", *words)
    assert done.code == 0, done.err
    before = moebench.files()
    for seed in (0, 1):
        found = moebench("verify", only_run()[:8], "--samples", 12, "--seed", seed, "--json").json
        assert found["agrees"] and len(found["index"]) == 12 and found["n"] == 30
        assert all(cell["compared"] == cell["agree"] == 12 and not cell["other_class"] for cell in found["cells"])
    assert moebench("verify", only_run(), "--all").out.count("30 of 30 verdicts as stored") == len(found["cells"])
    assert moebench.files() == before


def test_a_verdict_that_is_not_what_comes_out_is_named(moebench: Terminal) -> None:
    moebench.evaluate(DENSE, "fgsm", 20, "--no-trust")
    with sqlite3.connect(moebench.folder / "results.db") as connection:
        stage, seconds, blob = connection.execute("SELECT stage, seconds, arrays FROM chunk WHERE seq = 1").fetchone()
        chunk = packing.unpack(stage, seconds, blob)
        broken = chunk.broken.copy()
        broken[:2] = ~broken[:2]
        connection.execute("UPDATE chunk SET arrays = ? WHERE seq = 1", (packing.pack(replace(chunk, broken=broken)),))
    connection.close()
    said = moebench("verify", only_run(), "--all")
    assert said.code == 1 and "fgsm on whole: 18 of 20 verdicts as stored" in said.out
    for index, was in zip(chunk.index[:2], broken[:2], strict=True):
        then, now = ("broken", "standing") if was else ("standing", "broken")
        assert re.search(rf"sample {index}, fgsm on whole: {then} \(.*\) then, {now} \(.*\) now", said.out)
    assert moebench("verify", only_run(), "--all", "--json").code == 1


def test_what_has_changed_since_is_said(moebench: Terminal) -> None:
    (moebench.folder / "mine.py").write_text(USER_MODELS)
    write_npz(moebench.folder / "data.npz", n=20)
    moebench.evaluate("mine.py:good", "fgsm", 20, "--dataset", "npz:data.npz", "--no-trust")
    assert moebench("verify", only_run()).code == 0
    (moebench.folder / "mine.py").write_text(USER_MODELS.replace("manual_seed(0)", "manual_seed(1)"))
    said = moebench.refuses("verify", only_run())
    assert re.search(r"run \w+ cannot be repeated: the weights of .* changed from \w{16}… to \w{16}…", said)
    with np.load("data.npz") as data:
        changed = {"x": 255 - data["x"], "y": data["y"]}
    np.savez("data.npz", **changed)
    assert "the data of npz:data.npz changed from" in moebench.refuses("verify", only_run())


def test_runs_that_hang_on_batches_are_repeated_as_a_whole(moebench: Terminal) -> None:
    moebench.evaluate(DENSE, "fgsm", 12, "--engine", "reference", "--no-trust")
    said = moebench.refuses("verify", only_run(), "--samples", 5)
    assert "cannot be repeated on a part of its samples" in said and "--all" in said
    assert moebench("verify", only_run(), "--all", "--json").json["agrees"]
    moebench.evaluate(DENSE, "fgsm,torchattacks:FGSM", 12, "--no-trust")
    said = moebench("verify", only_run(), "--samples", 5)
    assert (
        said.code == 0
        and "fgsm on whole: 5 of 5" in said.out
        and "torchattacks:FGSM on whole: not compared" in said.out
    )


def test_runs_of_other_commands(moebench: Terminal) -> None:
    moebench("ablation", "published:rt-er", "--models", DENSE, "--n", 6)
    with Store.open(write=False) as store:
        run = store.runs()[-1]
    assert run.command.startswith("moebench ablation") and len(run.results) > 2
    found = moebench("verify", run.run_id, "--samples", 3, "--json").json
    assert found["agrees"] and len(found["cells"]) == len(run.results)
    moebench("transfer", "--models", f"{DENSE},{MOE}", "--attack", "fgsm", "--n", 6, "--db", "transfer.db")
    said = moebench.refuses("verify", only_run("transfer.db"), "--db", "transfer.db")
    assert "judged examples of other models; `moebench transfer --fresh` repeats it" in said
