"""The native engine on a real Ray cluster of two nodes: the same verdicts, whatever dies."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import MOE, Terminal

from moebench.datasets import load_dataset
from moebench.errors import RunError, UsageError
from moebench.evaluation import EvalSpec, Progress, evaluate
from moebench.loading import load
from moebench.radii import sweep
from moebench.schema import StoredResult
from moebench.store import Store

pytest.importorskip("ray", reason="Ray is not installed; the extra `ray` adds it")

import ray
from ray.cluster_utils import Cluster

from moebench.cluster import engine as engine_module
from moebench.cluster.engine import RayEngine, ray_engine
from moebench.cluster.settings import ClusterSettings
from moebench.cluster.shipping import Parcel, admit, pack

NODE = {"object_store_memory": 80 * 2**20, "include_dashboard": False}

ATTACKS = ("pgd-3", "square[queries=20]", "universal-fgsm", "torchattacks:PGD[steps=3]", "moe-adaptive")
"""An attack per sample, one with random proposals, one that learns first, a library's, and one of several views."""

FRAGILE = """
import os, signal
from pathlib import Path
import torch
from torch import nn
from beside import scale

DRIVER, FOLDER = {driver}, Path({folder!r})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        if os.getpid() != DRIVER and not (FOLDER / "no-{kind}").exists():
            self.{kind}(x)
        return scale(self.linear(x.flatten(1)))

    def killed(self, x):
        (FOLDER / "no-killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def poisoned(self, x):
        if bool((x.flatten(1).mean(dim=1) > 0.8).any()):
            raise ValueError("a bright image\\nis too much")

    def healthy(self, x):
        pass


def net():
    return Net()
"""


def ours(names: tuple[str, ...] = ("raylet", "gcs_server", "ray::")) -> set[int]:
    """The processes of Ray on this machine."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if any(name in words.split("\0")[0] for name in names):
            found.add(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    before = ours()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **NODE})
    made.add_node(num_cpus=2, **NODE)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(address=made.address, logging_level="error", log_to_driver=False)
            yield made
    finally:
        ray.shutdown()
        made.shutdown()
    deadline = time.monotonic() + 10
    while ours() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ours() - before == set(), "Ray left processes behind"


@contextmanager
def on(cluster: Cluster, **settings: Any) -> Iterator[RayEngine]:
    with ray_engine(ClusterSettings(cluster.address, **settings), "cpu") as engine:
        yield engine


def spec(where: Path, **changes: Any) -> EvalSpec:
    basics = EvalSpec(MOE, attacks=ATTACKS, views=("whole",), n=20, db=str(where), trust=False)
    made = replace(basics, **changes)
    return replace(made, train_n=40) if "universal-fgsm" in made.attacks else made


def evidence(where: Path) -> dict[tuple[str, str, float], tuple[Any, ...]]:
    """By attack, view and radius all that a result says but its time, with the outcomes of its samples."""
    found = {}
    with Store.open(where, write=False) as store:
        assert store.check() == []
        for one in store.results():
            outcomes = store.outcomes(one.result_id)
            arrays = [array.tolist() for name, array in vars(outcomes).items() if name != "stage"]
            examples = [(example.index, example.adversarial.tobytes()) for example in store.examples(one.result_id)]
            found[one.cell.attack, one.cell.view, one.protocol.threat.eps] = (
                *arrays,
                outcomes.stage,
                examples,
                one.cell.fingerprint,
                plain(one),
            )
    return found


def plain(one: StoredResult) -> tuple[Any, ...]:
    record = one.record
    stages = {
        stage: {key: value for key, value in account.items() if key in ("attacked", "broken")}
        for stage, account in record.stages.items()
    }
    return record.accuracy, record.clean_accuracy, record.changed_predictions, record.forwards, stages


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("native") / "r.db"
    evaluate(spec(where))
    return where


@pytest.mark.parametrize(("cpus", "workers", "size"), [(2.0, 1, 7), (1.0, 3, 3), (1.0, 3, None)])
def test_verdicts_are_those_of_the_native_engine(
    cluster: Cluster, native: Path, tmp_path: Path, cpus: float, workers: int, size: int | None
) -> None:
    where = tmp_path / "r.db"
    steps: list[Progress] = []
    with on(cluster, cpus_per_task=cpus, shard_size=size) as engine:
        evaluate(spec(where, cluster=engine), steps.append)
    assert evidence(where) == evidence(native)
    with Store.open(where, write=False) as store:
        (run,) = store.runs()
    facts = run.environment["cluster"]
    assert (facts["engine"], facts["workers"], facts["shard_size"]) == ("ray", workers, size)
    assert {step.attack for step in steps} == set(ATTACKS) and all(0 <= step.done <= step.n for step in steps)
    # What one of them computed is not computed again by the other.
    assert evaluate(spec(where)).reused == len(ATTACKS)


def test_images_come_back_where_they_are_needed(cluster: Cluster, tmp_path: Path) -> None:
    files = []
    with on(cluster, shard_size=6) as engine:
        for name, place in (("native", None), ("ray", engine)):
            path = tmp_path / f"{name}.npz"
            evaluate(spec(tmp_path / "r.db", attacks=("pgd-3",), save_adv=path, cluster=place, fresh=True))
            with np.load(path) as archive:
                files.append({key: archive[key] for key in archive.files})
        for key, array in files[0].items():
            np.testing.assert_array_equal(array, files[1][key], err_msg=key)
        for name, place in (("native", None), ("ray", engine)):
            sweep(spec(tmp_path / f"{name}.db", attacks=("pgd-3",), cluster=place), (0.02, 0.05))
    assert evidence(tmp_path / "native.db") == evidence(tmp_path / "ray.db")


def test_a_library_gets_the_batches_that_it_gets_here(cluster: Cluster, tmp_path: Path) -> None:
    """Its random numbers are drawn for a whole batch: shards are made of whole ones."""
    for name, size in (("native", None), ("ray", 5)):
        with on(cluster, shard_size=size) as engine:
            place = engine if size else None
            evaluate(spec(tmp_path / name, attacks=("torchattacks:PGD[steps=3]",), batch_size=4, cluster=place))
    assert evidence(tmp_path / "native") == evidence(tmp_path / "ray")


def users_model(folder: Path, kind: str) -> str:
    (folder / "beside.py").write_text("def scale(z):\n    return 5.0 * z\n")
    path = folder / f"{kind}.py"
    path.write_text(FRAGILE.format(driver=os.getpid(), folder=str(folder), kind=kind))
    return f"{path}:net"


@pytest.fixture
def images(tmp_path: Path) -> str:
    """Twelve dark images and, as number 7, a bright one; the linear model gets all of them right."""
    x = np.random.default_rng(0).uniform(0, 0.6, (13, 8, 8, 1)).astype(np.float32)
    x[7] = 0.95
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 10)
    with torch.no_grad():
        y = linear(torch.from_numpy(x).flatten(1)).argmax(1).numpy()
    np.savez(tmp_path / "data.npz", x=x, y=y, class_names=np.array([str(number) for number in range(10)]))
    return f"npz:{tmp_path / 'data.npz'}"


def chunks(where: Path) -> list[tuple[Any, ...]]:
    """The committed chunks: number, stage, samples and bytes; none as long as there is no such table."""
    if not where.exists():
        return []
    with closing(sqlite3.connect(f"file:{where}?mode=ro", uri=True)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master").fetchall()
        return connection.execute("SELECT id, stage, n, arrays FROM chunk ORDER BY id").fetchall() if tables else []


def users_spec(where: Path, model: str, data: str, **changes: Any) -> EvalSpec:
    basics = EvalSpec(model, data, attacks=("fgsm", "pgd-3"), eps=0.05, norm="Linf", db=str(where), trust=False)
    return replace(basics, **changes)


def test_a_killed_worker_costs_nothing(cluster: Cluster, tmp_path: Path, images: str) -> None:
    model = users_model(tmp_path, "killed")
    evaluate(users_spec(tmp_path / "native.db", model, images))
    with on(cluster, shard_size=2) as engine:
        evaluate(users_spec(tmp_path / "r.db", model, images, cluster=engine))
    assert (tmp_path / "no-killed").exists(), "no worker was killed"
    assert evidence(tmp_path / "r.db") == evidence(tmp_path / "native.db")


def test_a_poisoned_shard_costs_itself(cluster: Cluster, tmp_path: Path, images: str) -> None:
    where, model = tmp_path / "r.db", users_model(tmp_path, "poisoned")
    with on(cluster, shard_size=3) as engine:
        with pytest.raises(RunError) as caught:
            evaluate(users_spec(where, model, images, cluster=engine))
        line = str(caught.value)
        assert "\n" not in line and line.count("3 of 13 samples could not be decided") == 2
        assert "such as number 6: ValueError: a bright image; tried 3 times" in line
        with Store.open(where, write=False) as store:
            (run,) = store.runs()
            assert (run.status, run.results) == ("failed", ()) and store.check() == []
        before = chunks(where)
        assert sum(row[2] for row in before if row[1] == "pgd") == 10
        (tmp_path / "no-poisoned").touch()
        evaluate(users_spec(where, model, images, cluster=engine))
    after = chunks(where)
    assert after[: len(before)] == before
    assert [row[1:3] for row in after[len(before) :]] == [("fgsm", 3), ("pgd", 3)]
    evaluate(users_spec(tmp_path / "native.db", model, images))
    assert evidence(where) == evidence(tmp_path / "native.db")


def test_a_users_model_is_rebuilt_from_what_was_sent(cluster: Cluster, tmp_path: Path) -> None:
    """On a worker that finds neither its file nor the package beside it."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("")
    (tmp_path / "parts" / "layer.py").write_text(
        "from torch import nn\n\nclass Half(nn.Module):\n    def forward(self, x):\n        return x / 2\n"
    )
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nfrom parts.layer import Half\n\n"
        "def net():\n    return nn.Sequential(nn.Flatten(), Half(), nn.Linear(64, 10), Own())\n\n"
        "class Own(nn.Module):\n    def forward(self, x):\n        return (lambda z: z + 1)(x)\n"
    )
    model = load(f"{tmp_path / 'mine.py'}:net", load_dataset("digits", n=2)).module
    parcel = pack(lambda: ray.put((model, model)))
    # Models that other tests have loaded in this process travel along.
    assert {name.partition("_")[0] for name in parcel.sources} >= {"moebench", "parts", "parts.layer"}
    for name in ("mine.py", "parts/layer.py", "parts/__init__.py"):
        (tmp_path / name).unlink()

    def rebuilt(sent: Parcel, x: torch.Tensor) -> tuple[int, bool, torch.Tensor]:
        admit(sent)
        network, search = ray.get(sent.model)
        return os.getpid(), network is search, network(x)

    x = torch.rand(3, 1, 8, 8)
    pid, one, logits = ray.get(ray.remote(rebuilt).remote(parcel, x))
    assert pid != os.getpid() and one
    assert torch.equal(logits, model(x))


def test_a_model_that_cannot_be_sent_or_built_is_refused(cluster: Cluster, tmp_path: Path, images: str) -> None:
    path = tmp_path / "open.py"
    path.write_text(
        "import threading\nfrom torch import nn\n\nclass Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.linear, self.lock = nn.Linear(64, 10), threading.Lock()\n"
        "    def forward(self, x):\n        return self.linear(x.flatten(1))\n\ndef net():\n    return Net()\n"
    )
    where = tmp_path / "r.db"
    with on(cluster) as engine:
        with pytest.raises(UsageError, match=r"cannot be sent to other machines \(TypeError: .*lock"):
            evaluate(users_spec(where, f"{path}:net", images, cluster=engine))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moebench.cluster.shipping.package_digest", lambda: "0" * 64)
            with pytest.raises(UsageError, match="has another moebench"):
                evaluate(spec(where, attacks=("fgsm",), cluster=engine))
    assert not where.exists()


# What is refused before anything is done; the command line's own connection.


WORDS = ("evaluate", "--model", MOE, "--attack", "fgsm", "--n", 5)


def test_more_than_any_node_has(cluster: Cluster, moebench: Terminal) -> None:
    line = moebench.refuses(*WORDS, "--engine", "ray", "--cpus-per-task", 64)
    assert "no node of the cluster can run a task of 64 CPU (they have " in line
    assert "1 CPU, 0 GPU" in line and "2 CPU, 0 GPU" in line


def test_the_commands_on_a_cluster(cluster: Cluster, moebench: Terminal) -> None:
    """What is stored is what the native engine would have stored, the command included."""
    ray_words = ("--engine", "ray", "--address", cluster.address, "--shard-size", 3, "--json")
    found = moebench(*WORDS, *ray_words).json
    again = moebench(*WORDS, "--json").json
    assert found["results"] == again["results"]
    with Store.open("results.db", write=False) as store:
        first, second = store.runs()
    assert first.command == second.command and "ray" not in first.command and second.reused == len(second.results)
    assert (first.environment["cluster"]["shard_size"], second.environment.get("cluster")) == (3, None)
    assert moebench("verify", first.run_id).code == 0
    planned = moebench("sweep", "--models", MOE, "--n", 5, "--engine", "ray", "--address", "nowhere:1", "--dry-run")
    assert planned.code == 0, "a dry run needs no cluster"


def working_on(node: Any) -> set[int]:
    """The processes on a node that have a shard in work."""
    raylet = node.all_processes["raylet"][0].process.pid
    found = set()
    for pid in ours(("ray::search_shard",)):
        with suppress(OSError):
            if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == raylet:
                found.add(pid)
    return found


def test_a_lost_node_costs_its_shards_only(
    cluster: Cluster, native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, gone, losses = tmp_path / "r.db", False, []
    real = engine_module._reason
    monkeypatch.setattr(engine_module, "_reason", lambda error: losses.append(real(error)) or losses[-1])
    node = next(iter(cluster.worker_nodes))

    def pull_the_plug(step: Progress) -> None:
        nonlocal gone
        if not gone and step.done > 0 and working_on(node):
            gone = True
            cluster.remove_node(node, allow_graceful=False)

    with on(cluster, shard_size=2) as engine:
        assert engine.room() == 3
        try:
            evaluate(spec(where, attacks=("moe-adaptive",), cluster=engine), pull_the_plug)
        finally:
            cluster.add_node(num_cpus=2, **NODE)
    assert gone and set(losses) & {"its machine is gone", "its worker process died"}
    key = ("moe-adaptive", "whole", 0.2)
    assert evidence(where)[key] == evidence(native)[key]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_driver_goes_on_with_what_is_missing(cluster: Cluster, native: Path, tmp_path: Path) -> None:
    where = tmp_path / "r.db"
    words = ["evaluate", "--model", MOE, "--attack", "moe-adaptive", "--n", "20", "--no-trust", "--db", str(where)]
    words += ["--engine", "ray", "--address", cluster.address, "--shard-size", "2"]
    paths = os.pathsep.join(filter(None, sys.path))
    driver = subprocess.Popen(
        [sys.executable, "-m", "moebench", *words],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 200
        while len(known := chunks(where)) < 4:
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    assert driver.returncode == -signal.SIGKILL
    before = chunks(where)
    assert len(before) >= len(known)
    with on(cluster, shard_size=4) as engine:
        evaluate(spec(where, attacks=("moe-adaptive",), cluster=engine))
    assert chunks(where)[: len(before)] == before
    key = ("moe-adaptive", "whole", 0.2)
    assert evidence(where)[key] == evidence(native)[key]
    with Store.open(where, write=False) as store:
        assert [run.status for run in store.runs()] == ["failed", "done"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("killed", [False, True])
def test_a_cluster_of_the_commands_own_ends_with_it(tmp_path: Path, killed: bool) -> None:
    before = ours()
    words = ["evaluate", "--model", MOE, "--attack", "moe-adaptive" if killed else "fgsm", "--n", "20"]
    command = [sys.executable, "-m", "moebench", *words, "--engine", "ray", "--address", "local", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    driver = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if killed:
        while not ours(("ray::search_shard",)):
            assert driver.poll() is None
            time.sleep(0.1)
        driver.send_signal(signal.SIGKILL)
    out, errors = driver.communicate(timeout=200)
    assert killed or (driver.returncode == 0 and out.startswith(b"{") and out.count(b"\n") == 1), errors
    deadline = time.monotonic() + 120
    while ours() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ours() - before == set()
