from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import DENSE, MOE, chunks_in

from moebench.cli import main
from moebench.store import Store

COMMAND = [sys.executable, "-m", "moebench"]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and limits")
LONG = ("evaluate", "--model", DENSE, "--attack", "fgsm,pgd-50,square", "--n", "60")
"""A command of a few seconds in three cells."""


@pytest.fixture(autouse=True)
def folder(own_work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    return own_work_folder


def start(*words: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, timeout=240, **options)


def one_line(text: str) -> bool:
    return text.startswith("moebench: ") and text.count("\n") == 1


def verdicts(path: str | Path) -> dict[tuple[str, str], list[Any]]:
    """Per cell what must not depend on how often the work was interrupted."""
    with Store.open(path, write=False) as store:
        assert store.check() == []
        found = {(one.cell.attack, one.cell.view): store.outcomes(one.result_id) for one in store.results()}
    return {cell: [out.broken.tolist(), out.clean_pred.tolist(), out.stage] for cell, out in found.items()}


# Speed of what needs no network, exit codes.


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["evaluate", "--help"],
        ["verify", "--help"],
        *(["list", what] for what in ("models", "attacks", "datasets", "suites")),
    ],
)
def test_help_and_lists_do_not_import_torch(words: list[str]) -> None:
    program = (
        "import sys\n"
        "from moebench.cli import main\n"
        f"code = main({words!r})\n"
        "slow = {'torch', 'torchvision', 'sklearn', 'scipy', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported: {slow}' if slow else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        "evaluate --model rter",
        "evaluate --model st-moe --eps -1",
        "evaluate --model st-moe --eps 0.1,2",
        "evaluate --model st-moe --attack pgd-7,pgd-0",
        "evaluate --model st-moe --view wohle",
    ],
)
def test_a_wrong_name_is_answered_without_torch(words: str) -> None:
    program = (
        "import sys\n"
        "from moebench.cli import main\n"
        f"code = main({words.split()!r})\n"
        "sys.exit(99 if 'torch' in sys.modules else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and one_line(done.stderr)


def test_the_installed_command(folder: Path) -> None:
    program = Path(sys.executable).with_name("moebench")
    if not program.exists():
        pytest.skip("moebench is not installed as a command beside this interpreter")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    assert version.returncode == 0 and version.stdout.startswith("moebench, version ")
    bare = subprocess.run([program], capture_output=True, text=True, check=False)
    assert bare.returncode == 2 and bare.stderr.startswith("Usage: moebench") and bare.stdout == ""
    wrong = subprocess.run([program, "evaluate"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and one_line(wrong.stderr) and not list(folder.iterdir())


@POSIX
@pytest.mark.parametrize("words", [["list", "models"], ["show", "rt-er"]])
def test_a_reader_that_leaves_early_causes_no_traceback(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, *words], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode in (0, 1) and done.stderr == ""


@POSIX
def test_results_go_to_a_file_whole_and_without_colour(folder: Path) -> None:
    env = {**os.environ, "COLUMNS": "40", "PYTHONIOENCODING": "ascii"}
    done = run("evaluate", "--model", MOE, "--attack", "fgsm", "--n", 20, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "st-moe on digits, n = 20, Linf 0.2" and done.stdout.isascii() and "\x1b" not in done.stdout
    assert any(line.split()[:2] == ["fgsm", "experts"] and len(line) > 70 for line in lines)
    shown = run("show", lines[-1].split()[1].rstrip(","), env=env)
    assert shown.returncode == 0 and "--model st-moe --dataset digits --attack fgsm --n 20\n" in shown.stdout


# Interruptions.


def wait_for_work(process: subprocess.Popen[str], path: Path, committed: int) -> None:
    """Returns when the process has added so many chunks to the database, or has ended."""
    before = chunks_in(path)
    while process.poll() is None and chunks_in(path) < before + committed:
        time.sleep(0.01)


def kill_and_finish(folder: Path, words: Sequence[str], moments: Sequence[tuple[int, float]]) -> None:
    """Kills the command at each moment (chunks committed, seconds after that), then lets it finish."""
    assert main([*words, "--db", "undisturbed.db"]) == 0
    database = folder / "results.db"
    killed = 0
    for committed, seconds in moments:
        process = start(*words)
        wait_for_work(process, database, committed)
        time.sleep(seconds)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        with Store.open(database, write=False) as store:
            assert store.check() == []
    done = run(*words, "--json")
    assert done.returncode == 0 and done.stderr == "" and killed >= 1, done.stderr
    assert verdicts(database) == verdicts("undisturbed.db")
    found = json.loads(done.stdout)
    with Store.open(database, write=False) as store:
        runs = store.runs()
        assert len(store.results(newest_only=False)) == len(found["results"]) == 3
        assert [one.status for one in runs if one.status == "running"] == []
        assert runs[-1].run_id == found["run_id"] and runs[-1].status == "done"
    assert sorted(path.name for path in folder.iterdir()) == ["results.db", "undisturbed.db"]


@POSIX
def test_a_killed_evaluation_goes_on_to_the_same_verdicts(folder: Path) -> None:
    kill_and_finish(folder, LONG, [(2, 0.1)])


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_evaluations_killed_at_random_moments(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    words = ("evaluate", "--model", DENSE, "--attack", "pgd-50,autoattack,square", "--n", "100")
    kill_and_finish(folder, words, [(chance.randint(1, 3), chance.uniform(0, 6)) for _ in range(6)])


@POSIX
def test_an_interrupted_evaluation_says_so_and_goes_on(folder: Path) -> None:
    # A test run started in the background ignores the signal, and its children would inherit that.
    process = start(*LONG, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for_work(process, folder / "results.db", 4)
    # In the middle of the third cell, which takes seconds.
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 1 and out == ""
    assert one_line(err.lstrip("\n")) and "the same command goes on from there" in err
    with Store.open("results.db", write=False) as store:
        assert [(one.status, one.error) for one in store.runs()] == [("failed", "interrupted")]
        before = len(store.results())
    assert 1 <= before < 3 and [path.name for path in folder.iterdir()] == ["results.db"]
    assert main([*LONG]) == 0
    with Store.open("results.db", write=False) as store:
        assert store.check() == [] and store.runs()[-1].reused == before


def test_two_evaluations_write_to_one_database_at_once(folder: Path) -> None:
    words = ("--attack", "fgsm,pgd-20", "--n", 60, "--json")
    processes = [start("evaluate", "--model", MOE, *words) for _ in range(2)]
    found = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0 and err == "", err
        found.append(json.loads(out))
    assert [len(one["results"]) for one in found] == [6, 6]
    assert (found[0]["ra"], found[0]["ra_e"], found[0]["ra_r"]) == (found[1]["ra"], found[1]["ra_e"], found[1]["ra_r"])
    with Store.open("results.db", write=False) as store:
        assert store.check() == [] and [one.status for one in store.runs()] == ["done"] * 2
        assert len(store.results()) == 6
    assert [path.name for path in folder.iterdir()] == ["results.db"]


# A disk that is full.


@POSIX
@pytest.mark.parametrize(("limit", "left"), [(100_000, []), (450_000, ["results.db"])])
def test_a_full_disk_is_said_in_one_line(folder: Path, limit: int, left: list[str]) -> None:
    import resource

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = run("evaluate", "--model", DENSE, "--attack", "fgsm", "--n", 8, preexec_fn=small_files)
    assert done.returncode == 1 and done.stdout == ""
    assert one_line(done.stderr) and "is the disk full?" in done.stderr
    names = sorted(path.name for path in folder.iterdir())
    assert [name for name in names if not name.endswith(("-wal", "-shm"))] == left
    assert main(["evaluate", "--model", DENSE, "--attack", "fgsm", "--n", "8"]) == 0
    with Store.open("results.db", write=False) as store:
        assert store.check() == [] and len(store.results()) == 1
