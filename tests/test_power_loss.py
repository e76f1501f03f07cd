"""What an evaluation survives beside a kill: a torn log, a disk that is full, a machine that was started anew."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders import HOST, assert_same_chunk, make_cell, make_chunk, make_record, make_run_start
from commands import DENSE

from moebench.errors import InWorkError
from moebench.provenance import process_identity
from moebench.store import Store, owner


def test_a_log_that_ends_anywhere_leaves_whole_commits(tmp_path: Path) -> None:
    """What a disk holds of the log after the power went: its beginning, and behind it nothing, zeros or old bytes."""
    path, log = tmp_path / "r.db", tmp_path / "r.db-wal"
    Store.open(path, write=True).close()
    chunks = [make_chunk("clean"), *(make_chunk("apgd-ce", [place]) for place in range(6))]
    with Store.open(path, write=True) as store:
        store.begin_run(make_run_start())
        result_id, _ = store.open_cell("run-1", make_cell(), resume=False)
        for chunk in chunks:
            store.append_chunk(result_id, chunk)
        main, whole = path.read_bytes(), log.read_bytes()
    chance, seen = random.Random(0), set()
    for number in range(18):
        folder = tmp_path / str(number)
        folder.mkdir()
        cut = chance.randrange(len(whole)) if number else len(whole)
        tail = (b"", bytes(len(whole) - cut), whole[:cut][-(len(whole) - cut) :])[number % 3]
        (folder / "r.db").write_bytes(main)
        (folder / "r.db-wal").write_bytes(whole[:cut] + tail)
        with Store.open(folder / "r.db", write=True) as store:
            assert store.check() == []
            if not store.runs():
                seen.add(-1)
                continue
            store.begin_run(make_run_start("run-2"))
            result_id, found = store.open_cell("run-2", make_cell(), resume=True)
            seen.add(len(found))
            for one, other in zip(found, chunks, strict=False):
                assert_same_chunk(one, other)
            for chunk in chunks[len(found) :]:
                store.append_chunk(result_id, chunk)
            store.finish_cell(result_id, make_record(chunks))
            assert store.check() == []
        shutil.rmtree(folder)
    assert 7 in seen and len(seen) >= 5, "cuts at many places"


def test_a_later_process_of_the_same_number_does_not_keep_a_cell(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        now = process_identity(child.pid)
        if now is None:
            pytest.skip("no /proc")
        before = now.replace(now.split("/")[0], "a-boot-before-this-one")
        facts = {"host": HOST, "pid": child.pid}
        assert owner.state({**facts, "process": now}, HOST) == "alive" == owner.state(facts, HOST)
        assert owner.state({**facts, "process": before}, HOST) == "gone"
        with Store.open(tmp_path / "r.db", write=True) as store:
            for name, process in (("run-then", before), ("run-now", now)):
                store.begin_run(make_run_start(name, environment={**facts, "process": process}))
                store.open_cell(name, make_cell(f"cell of {name}"), resume=False)
            store.begin_run(make_run_start())
            assert store.open_cell("run-1", make_cell("cell of run-then"), resume=True)[0] == 1
            with pytest.raises(InWorkError):
                store.open_cell("run-1", make_cell("cell of run-now"), resume=True)
    finally:
        child.communicate(b"\n")


def test_a_run_that_was_killed_between_two_cells_is_said_to_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: HOST)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with Store.open(tmp_path / "r.db", write=True) as store:
        for name, fingerprint in (("run-dead", "cells"), ("run-other", "other cells")):
            environment = {"host": HOST, "pid": dead.pid}
            store.begin_run(make_run_start(name, fingerprint=fingerprint, environment=environment))
        store.begin_run(make_run_start("run-2", fingerprint="cells"))
        assert [store.run(name).status for name in ("run-dead", "run-other", "run-2")] == ["failed"] + 2 * ["running"]
        assert "run run-2 began anew" in (store.run("run-dead").error or "")


FULL = """
import sys
from pathlib import Path
from moebench.cli import main
from moebench.store import Store

words = ["evaluate", "--model", sys.argv[1], "--attack", "fgsm,pgd-10", "--n", "30", "--no-trust", "--db", "disk/r.db"]
real, commits = Store.append_chunk, 0


def filling(store, result_id, chunk):
    global commits
    commits += 1
    if commits == 4:  # the second attack's first verdicts
        with open("disk/others", "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError as error:
                print("filled:", error.strerror, file=sys.__stdout__, flush=True)
    real(store, result_id, chunk)


Store.append_chunk = filling
print("code", main(words), flush=True)
Store.append_chunk = real
with Store.open("disk/r.db", write=False) as store:
    print("problems", store.check(), "results", len(store.results()), flush=True)
Path("disk/others").unlink()
print("code", main(words), flush=True)
with Store.open("disk/r.db", write=False) as store:
    results = store.results()
    print("problems", store.check(), "results", len(results), flush=True)
    print("broken", [store.outcomes(one.result_id).broken.tolist() for one in results], flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("unshare"), reason="needs Linux's unshare")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A file system of 2 MB, which another program fills while the run works."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "full.py").write_text(FULL)
    alone = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=2m none disk && exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], cwd=tmp_path, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a file system of its own")
    done = subprocess.run(
        [*alone, sys.executable, "full.py", DENSE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "MOEBENCH_DB"},
    )
    assert done.returncode == 0, done.stderr
    said = [
        line for line in done.stdout.splitlines() if line.split(" ")[0] in ("filled:", "code", "problems", "broken")
    ]
    assert said[:3] == ["filled: No space left on device", "code 1", "problems [] results 1"], done.stdout + done.stderr
    assert said[3:5] == ["code 0", "problems [] results 2"]
    assert done.stderr.count("moebench: ") == 1 and "is the disk full?" in done.stderr
    from moebench.cli import main

    words = ["evaluate", "--model", DENSE, "--attack", "fgsm,pgd-10", "--n", "30", "--no-trust", "--db"]
    path = tmp_path / "undisturbed.db"
    assert main([*words, str(path)]) == 0
    with Store.open(path, write=False) as store:
        verdicts = [store.outcomes(one.result_id).broken.tolist() for one in store.results()]
    assert said[5] == f"broken {verdicts}"
    assert [len(one) for one in verdicts] == [30, 30]
