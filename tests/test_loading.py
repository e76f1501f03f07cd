from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import Flat, LayeredMoE, TwoExperts
from torch import Tensor, nn

from moebench.datasets import Dataset, load_dataset
from moebench.errors import UsageError
from moebench.flops import count_flops
from moebench.loading import LoadedModel, check_device, load
from moebench.models import MODELS
from moebench.models._moe import MoELayer
from moebench.models._weights import save_weights, state_sha256

SHAPE = (1, 8, 8)

HEADER = "import torch\nfrom torch import nn\n"
GOOD = HEADER + (
    "def build(num_classes=3):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes)).train()\n"
    "def ten():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(64, 10)\n"
    "    def forward(self, x):\n        return super().forward(x.flatten(1))\n"
)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", n=4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    return path


def refused(name: str, dataset: Dataset, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load(name, dataset, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- FILE.py:FACTORY


@pytest.mark.parametrize("factory", ["build", "ten", "Net"])
def test_factory_of_a_file(file: Path, digits: Dataset, factory: str) -> None:
    torch.manual_seed(0)
    loaded = load(f"{file}:{factory}", digits)
    assert loaded.module(torch.from_numpy(digits.images)).shape == (4, 10)
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert loaded.record.name == f"mine.py:{factory}"
    assert (loaded.record.family, loaded.record.summary) == ("external", "a user's dense model")
    assert loaded.code == hashlib.sha256(file.read_bytes()).hexdigest()
    both = f"{state_sha256(loaded.module)}\n{loaded.code}".encode()
    assert loaded.checkpoint.sha256 == hashlib.sha256(both).hexdigest()
    assert (loaded.checkpoint.parameters, loaded.checkpoint.active_parameters) == (650, 650)
    assert (loaded.checkpoint.dataset, loaded.checkpoint.origin) == (None, f"mine.py:{factory}")


def test_file_may_import_its_neighbours(tmp_path: Path, digits: Dataset) -> None:
    write(tmp_path, "neighbour_of_mine.py", GOOD)
    path = write(tmp_path, "main.py", "from neighbour_of_mine import build\n")
    before = list(sys.path)
    assert load(f"{path}:build", digits).checkpoint.parameters == 650
    assert sys.path == before
    del sys.modules["neighbour_of_mine"]


def test_factory_may_import_neighbours_when_it_is_called(tmp_path: Path, digits: Dataset) -> None:
    write(tmp_path, "late_neighbour.py", GOOD)
    text = "def build():\n    from late_neighbour import ten\n    return ten()\n"
    before = list(sys.path)
    assert load(f"{write(tmp_path, 'main.py', text)}:build", digits).checkpoint.parameters == 650
    assert sys.path == before
    del sys.modules["late_neighbour"]


def test_path_changes_of_the_file_are_its_own(tmp_path: Path, digits: Dataset) -> None:
    extra = str(tmp_path / "extra")
    path = write(tmp_path, "main.py", f"import sys\nsys.path.insert(0, {extra!r})\n{GOOD}")
    before = list(sys.path)
    load(f"{path}:ten", digits)
    assert [entry for entry in sys.path if entry != extra] == before
    if extra in sys.path:
        sys.path.remove(extra)


def test_models_package_of_the_users_repository_is_found(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "models/__init__.py", "")
    write(tmp_path, "models/net.py", GOOD)
    path = write(tmp_path, "main.py", "from models.net import ten\n")
    monkeypatch.delitem(sys.modules, "models", raising=False)
    assert load(f"{path}:ten", digits).checkpoint.parameters == 650
    for name in ("models", "models.net"):
        monkeypatch.delitem(sys.modules, name)


def test_two_files_of_one_name_are_two_models(tmp_path: Path, digits: Dataset) -> None:
    one = write(tmp_path, "a/net.py", GOOD)
    two = write(tmp_path, "b/net.py", GOOD.replace("nn.Linear(64, 10)", "nn.Linear(64, 11)"))
    assert load(f"{one}:ten", digits).checkpoint.parameters == 650
    assert load(f"{two}:ten", digits).checkpoint.parameters == 65 * 11
    assert load(f"{one}:ten", digits).code != load(f"{two}:ten", digits).code


def test_classes_of_the_file_know_their_module(tmp_path: Path, digits: Dataset) -> None:
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass C:\n    a: int = 1\n"
    )
    assert load(f"{write(tmp_path, 'main.py', text + GOOD)}:ten", digits).checkpoint.parameters == 650


@pytest.mark.parametrize(
    ("text", "factory", "message"),
    [
        (GOOD, "biuld", "mine.py has no callable 'biuld'; it has build, ten, Net"),
        ("x = 1\n", "x", "mine.py has no callable 'x'; it has none"),
        ("def build(:\n", "build", "mine.py failed: SyntaxError: "),
        ("import not_installed_here\n", "build", "failed: ModuleNotFoundError: No module named 'not_installed_here'"),
        ("1 / 0\n", "build", "failed: ZeroDivisionError: division by zero (--debug shows where)"),
        ("raise SystemExit(0)\n", "build", "mine.py failed: SystemExit: 0"),
        (
            "def build():\n    raise ValueError('no\\nweights')\n",
            "build",
            "mine.py:build failed: ValueError: no (--debug",
        ),
        ("def build():\n    raise SystemExit('usage')\n", "build", "mine.py:build failed: SystemExit: usage"),
        (
            "def build(width):\n    return width\n",
            "build",
            "mine.py:build failed: TypeError: build() missing 1 required",
        ),
        (
            "def build():\n    return 5\n",
            "build",
            "mine.py:build returned int; a factory must return a torch.nn.Module",
        ),
        ("def build():\n    return None\n", "build", "returned NoneType; a factory must return a torch.nn.Module"),
        (HEADER + "def build():\n    return nn.Linear\n", "build", "returned type; a factory must return a torch.nn"),
    ],
)
def test_file_that_gives_no_model_is_refused(
    tmp_path: Path, digits: Dataset, text: str, factory: str, message: str
) -> None:
    path = write(tmp_path, "mine.py", text)
    before = list(sys.path)
    assert message in refused(f"{path}:{factory}", digits)
    assert sys.path == before


def test_binary_and_missing_files_are_refused(tmp_path: Path, digits: Dataset) -> None:
    path = tmp_path / "binary.py"
    path.write_bytes(b"\x00\xff\xfe\x80")
    assert "binary.py failed: " in refused(f"{path}:build", digits)
    assert refused(f"{tmp_path}/none.py:build", digits).startswith(f"no file {tmp_path}/none.py; --model takes")
    assert "no file" in refused(f"{tmp_path.parent}.py:build", digits)


# --- package.module:FACTORY


def test_factory_of_a_module(tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "my_defence_pkg/__init__.py", "")
    module = write(tmp_path, "my_defence_pkg/net.py", GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    loaded = load("my_defence_pkg.net:build", digits)
    assert loaded.record.name == "my_defence_pkg.net:build"
    assert loaded.code == hashlib.sha256(module.read_bytes()).hexdigest()
    assert "my_defence_pkg.net has no callable 'nothing'; it has build, ten, Net" in refused(
        "my_defence_pkg.net:nothing", digits
    )
    for name in ("my_defence_pkg.net", "my_defence_pkg"):
        monkeypatch.delitem(sys.modules, name)


def test_module_that_cannot_be_imported_is_refused(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refused("no_such_package_here.net:build", digits)
    assert message == (
        "cannot import no_such_package_here.net (No module named 'no_such_package_here'); is its folder on PYTHONPATH?"
    )
    write(tmp_path, "broken_module_here.py", "1 / 0\n")
    write(tmp_path, "exiting_module_here.py", "raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "importing broken_module_here failed: ZeroDivisionError" in refused("broken_module_here:build", digits)
    assert "importing exiting_module_here failed: SystemExit" in refused("exiting_module_here:build", digits)
    for name in (":build", "..net:build", "net/mine:build"):
        refused(name, digits)


def test_weights_and_settings_belong_to_registered_models(file: Path, digits: Dataset) -> None:
    wanted = "--weights and --set belong to registered models"
    assert wanted in refused(f"{file}:ten", digits, weights=Path("w.safetensors"))
    assert wanted in refused(f"{file}:ten", digits, settings={"top_k": 2})


# --- registered names


def save(folder: Path, name: str = "rt-er", *, settings: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Weights of a fresh model with the card that training would write."""
    torch.manual_seed(3)
    model = MODELS.get(name).make(10, SHAPE, **(settings or {}))
    card = {"model": name, "settings": settings or {}, "num_classes": 10, "shape": list(SHAPE), "dataset": "digits"}
    path = folder / "w.safetensors"
    save_weights(
        path, model.state_dict(), {**card, "seed": 3, "recipe": {"epochs": 1}, "log": [{"epoch": 1}], **changes}
    )
    return path


def test_registered_model_with_weights_of_the_user(tmp_path: Path, digits: Dataset) -> None:
    path = save(tmp_path)
    loaded = load("rt-er", digits, weights=path)
    assert isinstance(loaded, LoadedModel)
    assert loaded.record == MODELS.get("rt-er").record()
    torch.manual_seed(3)
    fresh = MODELS.get("rt-er").make(10, SHAPE).eval()
    x = torch.from_numpy(digits.images)
    assert torch.equal(loaded.module(x), fresh(x))
    checkpoint = loaded.checkpoint
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (checkpoint.model, checkpoint.dataset, checkpoint.origin) == ("rt-er", "digits", "w.safetensors")
    assert checkpoint.recipe["seed"] == 3 and checkpoint.recipe["recipe"] == {"epochs": 1}
    assert list(checkpoint.training_log) == [{"epoch": 1}]
    classifier, router = 24_666, 65 * 4
    assert checkpoint.parameters == 4 * classifier + router
    assert checkpoint.active_parameters == classifier + router


def test_architecture_comes_from_the_card_and_settings_come_on_top(tmp_path: Path, digits: Dataset) -> None:
    path = save(tmp_path, settings={"experts": 3, "top_k": 2})
    loaded = load("rt-er", digits, weights=path)
    layer = loaded.module.get_submodule("moe")
    assert isinstance(layer, MoELayer)
    assert (len(layer.experts), layer.top_k) == (3, 2)
    other = load("rt-er", digits, weights=path, settings={"top_k": 1})
    layer = other.module.get_submodule("moe")
    assert isinstance(layer, MoELayer)
    assert (len(layer.experts), layer.top_k) == (3, 1)
    assert loaded.code != other.code
    assert loaded.code == load("rt-er", digits, weights=path).code


def test_registered_model_is_refused_with_the_reason(tmp_path: Path, digits: Dataset) -> None:
    path = save(tmp_path)
    assert "unknown model 'rt-err'; did you mean rt-er" in refused("rt-err", digits)
    assert "holds weights of 'rt-er', not of 'at-moe'" in refused("at-moe", digits, weights=path)
    assert "has no setting 'width'" in refused("rt-er", digits, weights=path, settings={"width": 2})
    assert "do not fit the model" in refused("rt-er", digits, weights=path, settings={"experts": 5})
    assert f"cannot read the weights {tmp_path}/none" in refused("rt-er", digits, weights=tmp_path / "none.safetensors")
    np.savez(tmp_path / "d.npz", x=np.zeros((3, 9, 9, 1), np.uint8), y=np.array([0, 1, 2]))
    other = load_dataset(f"npz:{tmp_path}/d.npz")
    assert "are for images of 1×8×8, and npz:" in refused("rt-er", other, weights=path)
    assert "no weights of rt-er are shipped for data set npz:" in refused("rt-er", other)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": None},
        {"num_classes": "ten"},
        {"shape": 64},
        {"shape": None},
        {"settings": [1]},
        {"settings": {"experts": "four"}},
        {"settings": {"depth": 3}},
        {"log": None},
        {"log": 3},
        {"objective": 3},
        {"objective": "at"},
    ],
)
def test_strange_card_is_refused(tmp_path: Path, digits: Dataset, changes: dict[str, Any]) -> None:
    path = save(tmp_path)
    card = {**json.loads(path.with_suffix(".json").read_text()), **changes}
    path.with_suffix(".json").write_text(json.dumps({key: value for key, value in card.items() if value is not None}))
    if changes == {"log": None}:
        assert load("rt-er", digits, weights=path).checkpoint.training_log == ()
    else:
        refused("rt-er", digits, weights=path)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "", "cpu:x"])
def test_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match="cannot be used here") as caught:
        check_device(device)
    assert "\n" not in str(caught.value)
    assert "--device cpu" in str(caught.value)


def test_device_without_values_is_refused() -> None:
    with pytest.raises(UsageError, match="device 'meta' cannot be used here"):
        check_device("meta")


def test_cpu_is_always_there(file: Path, digits: Dataset) -> None:
    check_device("cpu")
    assert "device 'nonsense' cannot be used here" in refused(f"{file}:ten", digits, device="nonsense")


# --- what a sample costs


def test_operations_and_parameters_of_a_known_moe(tmp_path: Path, digits: Dataset) -> None:
    """Two experts 64 -> 10 -> 10 and 64 -> 10, a router 64 -> 2, top-1."""
    text = HEADER + (
        "from moebench.models._moe import MoELayer\n"
        "def build():\n"
        "    big = nn.Sequential(nn.Linear(64, 10), nn.Linear(10, 10))\n"
        "    router = nn.Linear(64, 2)\n"
        "    with torch.no_grad():\n"
        "        router.weight.zero_()\n"
        "        router.bias.copy_(torch.tensor([1.0, 0.0]))\n"
        "    return nn.Sequential(nn.Flatten(), MoELayer([big, nn.Linear(64, 10)], router))\n"
    )
    loaded = load(f"{write(tmp_path, 'moe.py', text)}:build", digits)
    assert loaded.record.summary == "a user's moe model"
    big, small, router = 65 * 10 + 11 * 10, 65 * 10, 65 * 2
    assert loaded.checkpoint.parameters == big + small + router
    assert loaded.checkpoint.active_parameters == big + router
    assert loaded.checkpoint.flops == 2 * (64 * 10 + 10 * 10 + 64 * 2)


def test_operations_count_the_selected_experts_only() -> None:
    per_expert, router = 2 * 5 * 5, 2 * 5 * 3
    last = 2 * 5 * 3
    for top_k in (1, 2, 3):
        model = LayeredMoE(top_k=top_k).eval()
        flat = nn.Sequential(nn.Flatten(), model)
        assert count_flops(flat, (1, 1, 5)) == 2 * router + top_k * (per_expert + last)


def test_counting_leaves_the_mode_alone_and_forgives_a_model_that_refuses_zeros() -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no zeros")

    model = Refuses().train()
    assert count_flops(model, SHAPE) is None
    assert model.training
    assert count_flops(Flat(64, 10), SHAPE) == 2 * 64 * 10
    assert count_flops(TwoExperts(), (1, 1, 2)) == 2 * 2 * 2 + 2 * 2 * 2
