"""CIFAR and SVHN through torchvision: checked by hash, downloaded or put there, never unpickled unchecked."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_checks import check, pixels, refused

from moebench.datasets import load_dataset


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@pytest.fixture
def tiny_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """An archive in CIFAR-10's format with five images, and torchvision told to expect its hashes."""
    from torchvision.datasets import CIFAR10

    members = {
        "test_batch": pickle.dumps({"data": pixels(5, 3072), "labels": [3, 1, 4, 1, 5]}),
        "batches.meta": pickle.dumps({"label_names": list("abcdefghij")}),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(CIFAR10, "train_list", [])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(members["test_batch"])]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(members["batches.meta"])})
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(buffer.getvalue()))
    return buffer.getvalue()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.usefixtures("no_network")
def test_cifar10_from_an_archive_put_there(tiny_cifar: bytes, own_data_folder: Path, capsys: Any) -> None:
    own_data_folder.mkdir()
    (own_data_folder / "cifar-10-python.tar.gz").write_bytes(tiny_cifar)
    data = check(load_dataset("cifar10", n=4))
    assert (data.images.shape, data.labels.tolist(), data.class_names[3]) == ((4, 3, 32, 32), [3, 1, 4, 1], "d")
    np.testing.assert_array_equal(data.images, pixels(5, 3072)[:4].reshape(4, 3, 32, 32) / np.float32(255))
    assert load_dataset("cifar10", n=4).sha256 == data.sha256
    assert capsys.readouterr().out == ""


def test_cifar10_is_downloaded_and_checked(tiny_cifar: bytes, own_data_folder: Path, monkeypatch: Any) -> None:
    served = [tiny_cifar[:-1], tiny_cifar]

    def urlretrieve(_: str, path: str, **__: object) -> None:
        Path(path).write_bytes(served.pop(0))

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", urlretrieve)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    assert "could not be downloaded" in refused("cifar10")
    assert list(own_data_folder.iterdir()) == []
    assert len(load_dataset("cifar10")) == 5
    assert sorted(entry.name for entry in own_data_folder.iterdir()) == [
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
    ]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "archive"),
    [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz"), ("svhn", "test_32x32.mat")],
)
def test_without_network_the_message_says_what_to_put_where(name: str, archive: str, own_data_folder: Path) -> None:
    message = refused(name)
    assert (
        f"is not in {own_data_folder}" in message and f"put {archive} (MD5 " in message and "MOEBENCH_DATA" in message
    )
    assert "has no split 'val'" in refused(name, split="val")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.usefixtures("no_network")
def test_a_changed_batch_is_never_unpickled(tiny_cifar: bytes, own_data_folder: Path) -> None:
    own_data_folder.mkdir()
    (own_data_folder / "cifar-10-python.tar.gz").write_bytes(tiny_cifar)
    load_dataset("cifar10")
    (own_data_folder / "cifar-10-python.tar.gz").unlink()
    mark = own_data_folder / "executed"
    (own_data_folder / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(Payload(mark)))
    assert "could not be downloaded" in refused("cifar10")
    assert not mark.exists()


@pytest.mark.usefixtures("no_network")
def test_svhn(own_data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat  # type: ignore[import-untyped]
    from torchvision.datasets import SVHN

    own_data_folder.mkdir()
    x, file = pixels(32, 32, 3, 4), own_data_folder / "test_32x32.mat"
    savemat(file, {"X": x, "y": np.array([[10], [1], [2], [9]], dtype=np.uint8)})
    monkeypatch.setitem(SVHN.split_list, "test", ["http://none", file.name, md5(file.read_bytes())])
    data = check(load_dataset("svhn", n=3))
    assert data.labels.tolist() == [0, 1, 2] and data.num_classes == 10
    np.testing.assert_array_equal(data.images, x.transpose(3, 2, 0, 1)[:3] / np.float32(255))
