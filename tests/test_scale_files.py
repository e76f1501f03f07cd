"""The cluster's files in docs/ can be used as they are, and the simulation stores what it says."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from moebench import simulate
from moebench.commands.evaluate import evaluate_command
from moebench.store import Store

DOCS = Path(__file__).resolve().parents[1] / "docs"
SBATCH = DOCS / "slurm" / "ray.sbatch"


def words_of(command: str) -> set[str]:
    return set(re.findall(r"--[a-z-]+", command))


def test_the_batch_script_is_bash() -> None:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    done = subprocess.run(["bash", "-n", str(SBATCH)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_batch_script_passes_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(SBATCH)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


STUB = """#!/bin/bash
case $(basename "$0") in
    scontrol) printf 'node1\\nnode2\\nnode3\\n' ;;
    hostname) echo 10.0.0.1 10.0.0.2 ;;
    srun) while [[ $1 == --* ]]; do echo "srun $1" >> "$SAID"; shift; done; exec "$@" ;;
    ray) echo "ray $*" >> "$SAID"; if [[ $* == *--block* ]]; then exec sleep 60; fi ;;
    moebench) sleep 0.5; echo "moebench $*" >> "$SAID"; exit 3 ;;
esac
"""


def test_the_batch_script_starts_ray_on_every_node_and_ends_it(tmp_path: Path) -> None:
    """With stand-ins for the commands of Slurm and Ray that write down how they are called."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    (tmp_path / "bin").mkdir()
    for name in ("scontrol", "hostname", "srun", "ray", "moebench"):
        path = tmp_path / "bin" / name
        path.write_text(STUB)
        path.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "SAID": str(tmp_path / "said"),
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_ID": "123456",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_GPUS_ON_NODE": "4",
    }
    command = ["bash", str(SBATCH), "evaluate", "--model", "a b"]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 2 and "name the database in MOEBENCH_DB" in refused.stderr
    environment["MOEBENCH_DB"] = "r.db"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 3, done.stderr  # that of moebench
    said = (tmp_path / "said").read_text().splitlines()
    address = f"10.0.0.1:{20000 + 123456 % 20000}"
    started = [line for line in said if line.startswith("ray start")]
    assert len(started) == 3 and all("--num-cpus=16 --num-gpus=4" in line for line in started)
    assert sum("--head --node-ip-address=10.0.0.1" in line for line in started) == 1
    assert sum(f"--address={address}" in line for line in started) == 2
    assert {line for line in said if "--nodelist=" in line} == {f"srun --nodelist=node{n}" for n in (1, 2, 3)}
    assert said[-1] == f"moebench evaluate --model a b --engine ray --address {address}"


def test_the_launchers_example_is_what_ray_takes() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; it comes with Ray")
    config: dict[str, Any] = yaml.safe_load((DOCS / "ray" / "cluster.yaml").read_text(encoding="utf-8"))
    kinds = config["available_node_types"]
    assert config["head_node_type"] in kinds and kinds["worker"]["min_workers"] >= 1
    assert any("moebench[ray" in command for command in config["setup_commands"])
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:
        pytest.skip("Ray is not installed, so its schema is not here")
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads((Path(found.origin).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "cluster": "name"}, schema)


@pytest.mark.parametrize("path", ["scale.md", "slurm.md", "slurm/ray.sbatch", "ray/cluster.yaml"])
def test_options_that_the_pages_name_exist(path: str) -> None:
    known = {option for parameter in evaluate_command.params for option in parameter.opts} | {"--suite", "--models"}
    known |= {"--datasets"}
    lines = (DOCS / path).read_text(encoding="utf-8").splitlines()
    named = [line for line in lines if re.search(r"(moebench|ray\.sbatch) (evaluate|sweep) ", line)]
    assert named or path == "slurm/ray.sbatch"
    for line in named:
        command = re.split(r"ray\.sbatch |moebench (?=evaluate|sweep)", line)[-1]
        assert words_of(command) <= known, line


def test_the_simulation_stores_a_result_that_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = tmp_path / "r.db"
    assert simulate.main(["--db", str(where), "--shards", "70", "--samples", "3", "--workers", "8"]) == 0
    said = capsys.readouterr().out
    # Eight workers and two shards ahead of them come back together.
    assert said.startswith("70 shards of 3 samples in ") and " in 7 transactions; " in said and said.count("\n") == 1
    with Store.open(where, write=False) as store:
        assert store.check() == []
        (result,) = store.results()
        assert result.record.accuracy == pytest.approx(2 / 3) and result.protocol.n == 210
        assert len(store.examples(result.result_id)) > 0
    assert simulate.main(["--db", str(tmp_path), "--shards", "1"]) == 2
    assert capsys.readouterr().err.startswith("simulate: ")
