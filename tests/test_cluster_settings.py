"""What `--engine ray` refuses before it needs Ray, and what a model is sent as."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from commands import MOE, Terminal

from moebench.cluster import connection
from moebench.cluster.hello import refuse_silence
from moebench.cluster.settings import ClusterSettings
from moebench.errors import RunError, UsageError

SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""The first frame of every HTTP/2 server."""

WORDS = ("evaluate", "--model", MOE, "--attack", "fgsm", "--n", 5)


@pytest.fixture
def moebench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOEBENCH_DB", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Terminal(tmp_path, capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--address", "auto"), "--address is for a cluster; add --engine ray"),
        (("--gpus-per-task", "0.5", "--engine", "reference"), "--gpus-per-task is for a cluster"),
        (("--engine", "ray", "--address", "here"), "--address takes auto, local or HOST:PORT such as"),
        (("--engine", "ray", "--address", "here:0"), "--address takes auto, local or HOST:PORT such as"),
        (("--engine", "ray", "--address", "ray://here:1"), "takes no ray:// client address"),
        (("--engine", "ray", "--cpus-per-task", "0"), "--cpus-per-task takes a part of one, such as 0.5"),
        (("--engine", "ray", "--cpus-per-task", "1.5"), "or a whole number, got 1.5"),
        (("--engine", "ray", "--cpus-per-task", "nan"), "got nan"),
        (("--engine", "ray", "--cpus-per-task", "inf"), "got inf"),
        (("--engine", "ray", "--gpus-per-task", "-1"), "or a whole number or 0, got -1"),
        (("--engine", "ray", "--gpus-per-task", "0.5"), "add --device cuda"),
        (("--engine", "ray", "--gpus-per-task", "0", "--device", "cuda"), "--device cuda needs GPUs"),
        (("--engine", "ray", "--device", "cuda:3"), "give --device cuda instead of cuda:3"),
        (("--engine", "ray", "--shard-size", "0"), "--shard-size takes at least 1 sample, got 0"),
        (("--engine", "ray", "--compile"), "--compile does not reach the workers"),
        (("--engine", "rai"), "'rai' is not one of"),
    ],
)
def test_wrong_input(moebench: Terminal, words: tuple[str, ...], expected: str) -> None:
    assert expected in moebench.refuses(*WORDS, *words)


def test_a_sweep_takes_the_same_options(moebench: Terminal) -> None:
    assert "add --engine ray" in moebench.refuses("sweep", "--models", MOE, "--shard-size", 3)
    assert "got 0" in moebench.refuses("sweep", "--models", MOE, "--engine", "ray", "--shard-size", 0)


def test_without_ray(moebench: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "find_spec", lambda name: None)
    assert '`pip install "moebench[ray]"` adds it' in moebench.refuses(*WORDS, "--engine", "ray")


def test_a_dry_run_connects_to_nothing_and_says_what_a_cluster_changes(moebench: Terminal) -> None:
    ray = ("--engine", "ray", "--address", "127.0.0.1:1", "--dry-run")
    for words in ((*WORDS, *ray), (*WORDS, "--eps", "0.1,0.2", *ray), ("sweep", "--models", MOE, "--n", 2, *ray)):
        said = moebench(*words)
        assert said.code == 0 and said.out.splitlines()[-1].startswith("on a cluster the tasks that run at once share")
    assert list(moebench(*WORDS, *ray, "--json").json) == ["cells", "total"] and moebench.files() == {}


@contextmanager
def listening(answer: bytes | None) -> Iterator[int]:
    """The port of a server that says the same to everybody, or nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        callers = []

        def serve() -> None:
            while True:
                try:
                    caller, _ = server.accept()
                except OSError:
                    return
                callers.append(caller)
                if answer is not None:
                    caller.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        for caller in callers:
            caller.close()


def test_a_cluster_that_does_not_answer(moebench: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed; the extra `ray` adds it")
    monkeypatch.setattr(connection, "PATIENCE", 0.3)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        line = moebench.refuses(*WORDS, "--engine", "ray", "--address", f"127.0.0.1:{port}")
        assert f"no Ray cluster answers at 127.0.0.1:{port} (Connection refused)" in line
    with listening(None) as port:
        assert "(timed out)" in moebench.refuses(*WORDS, "--engine", "ray", "--address", f"127.0.0.1:{port}")
    with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        assert "is no Ray cluster" in moebench.refuses(*WORDS, "--engine", "ray", "--address", f"127.0.0.1:{port}")
    with listening(SETTINGS) as port:  # speaks HTTP/2 and then says nothing, for which Ray itself waits for ever
        assert "(timed out)" in moebench.refuses(*WORDS, "--engine", "ray", "--address", f"127.0.0.1:{port}")
    line = moebench.refuses(*WORDS, "--engine", "ray", "--address", "no-such-host.invalid:6379")
    assert "no Ray cluster answers at no-such-host.invalid:6379" in line
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    assert f"answers at 127.0.0.1:{port}" in moebench.refuses(*WORDS, "--engine", "ray")


@pytest.mark.parametrize(
    ("status", "message", "known"),
    [
        (b"\x88", b"\x0bgrpc-status\x0212", False),  # gRPC without such a call
        (b"\x88", b"\x0bgrpc-status\x0216", True),  # a cluster that wants a token
        (b"\x88", b"", True),
        (b"\x8d", b"", False),  # a web server's 404
    ],
)
def test_who_speaks_the_language_of_a_cluster(status: bytes, message: bytes, known: bool) -> None:
    fields = status + b"@\x0ccontent-type\x10application/grpc" + (b"\0" + message if message else b"")
    headers = len(fields).to_bytes(3, "big") + bytes((1, 4, 0, 0, 0, 1)) + fields
    with (
        listening(SETTINGS + headers) as port,
        nullcontext() if known else pytest.raises(UsageError, match="is no Ray"),
    ):
        refuse_silence(f"127.0.0.1:{port}", 5.0)


def test_gpus_of_a_task() -> None:
    assert ClusterSettings().gpus_on("cpu") == 0 and ClusterSettings(gpus_per_task=0).gpus_on("cpu") == 0
    assert ClusterSettings().gpus_on("cuda") == 1 and ClusterSettings(gpus_per_task=0.25).gpus_on("cuda:0") == 0.25
    assert ClusterSettings("[::1]:6379") and ClusterSettings("10.0.0.1:6379", 0.5, 2.0, 1)


# What a model is sent as.


def test_other_sources_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed; the extra `ray` adds it")
    from moebench.cluster import shipping

    model = torch.nn.Linear(2, 2)
    parcel = shipping.pack(lambda: model)
    monkeypatch.setattr(shipping, "package_digest", lambda: "f" * 64)
    with pytest.raises(RunError, match=r"another moebench .*sources ffffffffffff.* install the same on all"):
        shipping.admit(parcel)


def test_too_much_source_beside_a_model_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from moebench.cluster import shipping

    monkeypatch.setattr(shipping, "LARGEST_SOURCE", -1)
    with pytest.raises(UsageError, match=r"bytes of source; keep the model's file apart"):
        shipping.user_sources()
