from __future__ import annotations

import hashlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from small_models import Flat
from torch import Tensor
from torch.nn import functional as F

from moebench.datasets import load_dataset
from moebench.errors import RunError, UsageError
from moebench.models import MODELS, load_model
from moebench.models._weights import (
    SHIPPED,
    load_into,
    read_card,
    read_weights,
    save_weights,
    shipped_weights,
    state_sha256,
)
from moebench.schema import ThreatModel
from moebench.training_adversary import TrainingAdversary

FILES = sorted(SHIPPED.glob("*/*.safetensors"))
shipped = pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}-{path.stem}" for path in FILES])

# --- the weights that come with the package


def test_weights_are_shipped() -> None:
    assert (SHIPPED / "digits").is_dir()
    assert FILES


@shipped
def test_card_says_how_the_weights_came_to_be(path: Path) -> None:
    card = read_card(path)
    entry = MODELS.get(path.stem)
    assert entry.recipe is not None
    assert (card["model"], card["dataset"]) == (path.stem, path.parent.name)
    assert path == shipped_weights(card["dataset"], card["model"])
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stat().st_size <= 1 << 20
    assert card["command"] == f"moebench train --model {path.stem} --dataset {path.parent.name} --seed {card['seed']}"
    # That command uses the registered recipe and settings; they must be the ones of the card.
    # A setting that came later is at its default there.
    assert type(entry.recipe)(**card["recipe"]) == entry.recipe
    assert card["settings"] == dict(entry.settings)
    sets = {split: load_dataset(card["dataset"], split=split) for split in ("train", "val")}
    assert card["data_sha256"] == {split: data.sha256 for split, data in sets.items()}
    assert (card["num_classes"], tuple(card["shape"])) == (sets["val"].num_classes, sets["val"].shape)
    assert ThreatModel(**card["threat"]) == sets["val"].default_threat()
    assert isinstance(card["torch"], str)


@shipped
def test_card_chose_its_epoch_by_its_rule(path: Path) -> None:
    card = read_card(path)
    chosen, log, rule = card["validation"], card["log"], card["recipe"]["select"]
    assert (chosen["split"], chosen["selected_by"]) == ("val", rule)
    assert [line["epoch"] for line in log] == (list(range(1, card["recipe"]["epochs"] + 1)) or [0])

    def score(line: dict[str, float]) -> float:
        clean, robust = line["val_clean"], line["val_robust"]
        return {"clean": clean, "robust": robust, "mean": (clean + robust) / 2}[rule]

    # The epochs of a pre-training do not count.
    objective = MODELS.get(path.stem).objective
    first = round(objective[-1].span[0] * card["recipe"]["epochs"]) if objective else -1
    best = max((line for line in log if line["epoch"] > first), key=score)
    assert (chosen["epoch"], chosen["clean"], chosen["robust"]) == (
        best["epoch"],
        best["val_clean"],
        best["val_robust"],
    )


@shipped
def test_starting_weights_are_the_shipped_ones(path: Path) -> None:
    card = read_card(path)
    assert set(card["initialised_from"]) == set(card["recipe"]["init_from"])
    for part, name in card["recipe"]["init_from"].items():
        assert card["initialised_from"][part] == f"{name} {read_card(path.with_stem(name))['sha256']}"


def restored(path: Path) -> tuple[torch.nn.Module, dict[str, Any], Tensor, Tensor]:
    """A shipped model, its card, and the images and labels of the validation split."""
    state, card = read_weights(path)
    assert all(torch.isfinite(value).all() for value in state.values())
    model = MODELS.get(card["model"]).make(card["num_classes"], tuple(card["shape"]))
    load_into(model, state, str(path))
    data = load_dataset(card["dataset"], split="val")
    return model.eval().requires_grad_(False), card, torch.from_numpy(data.images), torch.from_numpy(data.labels)


@shipped
def test_validation_accuracy_is_reproduced(path: Path) -> None:
    model, card, x, y = restored(path)
    assert (model(x).argmax(1) == y).double().mean().item() == card["validation"]["clean"]


ONE_OF_EACH_KIND = ("resnet-at", "vit-at", "rt-er", "dual-moe", "soe", "adv-moe", "block-moe-switch", "v-moe-at")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in ONE_OF_EACH_KIND else pytest.mark.slow)
        for path in FILES
    ],
)
def test_robust_validation_accuracy_is_reproduced(path: Path) -> None:
    model, card, x, y = restored(path)
    registered = MODELS.get(card["model"]).recipe
    assert registered is not None
    recipe = replace(registered, **card["recipe"])
    adversary = TrainingAdversary(model, ThreatModel(**card["threat"]), recipe, card["seed"])
    x_adv = adversary(model, x, lambda logits: F.cross_entropy(logits, y, reduction="none"))
    robust = (model(x_adv).argmax(1) == y).double().mean().item()
    # Another processor rounds otherwise, and the sign of a gradient near zero may flip.
    assert robust == pytest.approx(card["validation"]["robust"], abs=0.01)


@shipped
def test_load_model_gives_the_shipped_weights(path: Path) -> None:
    card = read_card(path)
    model = load_model(path.stem, num_classes=card["num_classes"], shape=tuple(card["shape"]), dataset=path.parent.name)
    assert not model.training
    state, _ = read_weights(path)
    found = model.state_dict()
    assert set(found) == set(state)
    assert all(torch.equal(found[key], value) for key, value in state.items())


# --- files that are not what their card says

CARD: dict[str, Any] = {"model": "flat", "log": []}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "flat.safetensors"
    save_weights(path, Flat(4, 3).state_dict(), CARD)
    return path


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def resign(path: Path, data: bytes) -> None:
    """Other contents, with a card that vouches for them."""
    path.write_bytes(data)
    card = {**CARD, "sha256": hashlib.sha256(data).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(card))


def test_what_is_saved_is_read(saved: Path) -> None:
    state, card = read_weights(saved)
    assert card == {**CARD, "sha256": hashlib.sha256(saved.read_bytes()).hexdigest()}
    assert all(torch.equal(state[key], value) for key, value in Flat(4, 3).state_dict().items())
    assert sorted(os.listdir(saved.parent)) == ["flat.json", "flat.safetensors"]


def test_saving_twice_gives_the_same_bytes(saved: Path) -> None:
    weights, card = saved.read_bytes(), saved.with_suffix(".json").read_bytes()
    save_weights(saved, Flat(4, 3).state_dict(), CARD)
    assert (saved.read_bytes(), saved.with_suffix(".json").read_bytes()) == (weights, card)


def test_one_changed_byte_is_found(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    saved.write_bytes(bytes(data))
    message = refused(saved)
    assert f"the weights {saved} do not match their card: sha256 " in message
    assert message.endswith("restore the file or train again")


def test_truncated_file_is_found_by_its_hash(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-4])
    assert "do not match their card" in refused(saved)


def cut(data: bytes) -> bytes:
    return data[:-4]


def header_only(data: bytes) -> bytes:
    return data[:20]


def nothing(data: bytes) -> bytes:
    return b""


def huge_header(data: bytes) -> bytes:
    return b"\xff" * 8 + data[8:]


def words(data: bytes) -> bytes:
    return b"these are no weights at all, but a text that is long enough"


@pytest.mark.parametrize("damage", [cut, header_only, nothing, huge_header, words])
def test_file_that_is_no_safetensors_is_refused(saved: Path, damage: Callable[[bytes], bytes]) -> None:
    resign(saved, damage(saved.read_bytes()))
    assert refused(saved).startswith(f"{saved} is not a safetensors file: ")


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_damaged_header_never_escapes_as_another_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("damage") / "w.safetensors"
    raw = bytearray(save({"a": torch.zeros(2, 2), "b": torch.ones(1)}))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    resign(path, bytes(raw))
    model = Flat(2, 2)
    try:
        state, _ = read_weights(path)
        load_into(model, state, "damaged")
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        pytest.fail("names and shapes of another model were accepted")


def test_missing_files_are_refused(saved: Path, tmp_path: Path) -> None:
    saved.with_suffix(".json").unlink()
    assert refused(saved) == (f"no card {saved.with_suffix('.json')} beside the weights; `moebench train` writes both")
    assert refused(tmp_path / "none.safetensors") == (
        f"cannot read the weights {tmp_path}/none.safetensors: No such file or directory"
    )
    assert refused(tmp_path) == f"cannot read the weights {tmp_path}: Is a directory"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"weights of a model", "cannot read the card"),
        (b"", "cannot read the card"),
        (b'{"sha256": "ab"', "cannot read the card"),
        (b"\xff\xfe\x00", "cannot read the card"),
        (b"[" * 100_000, "cannot read the card"),
        (b"[1, 2]", "is not one that `moebench train` wrote"),
        (b"null", "is not one that `moebench train` wrote"),
        (b"{}", "is not one that `moebench train` wrote"),
        (b'{"sha256": 3}', "is not one that `moebench train` wrote"),
    ],
    ids=["words", "empty", "half", "binary", "deep", "list", "null", "no hash", "number"],
)
def test_card_that_is_no_card_is_refused(saved: Path, text: bytes, message: str) -> None:
    saved.with_suffix(".json").write_bytes(text)
    assert message in refused(saved)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Flat(5, 3), "size mismatch"),
        (Flat(4, 2), "size mismatch"),
        (Flat(4, 3).linear, "Missing key(s)"),
        (torch.nn.Sequential(Flat(4, 3), torch.nn.BatchNorm1d(3)), "Missing key(s)"),
    ],
)
def test_weights_of_another_shape_are_refused(other: torch.nn.Module, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_into(Flat(4, 3), other.state_dict(), "w.safetensors")
    text = str(caught.value)
    assert text.startswith("the weights w.safetensors do not fit the model: ")
    assert message in text
    assert "\n" not in text and "\t" not in text


def test_superfluous_weights_are_refused() -> None:
    state = {**Flat(4, 3).state_dict(), "more": torch.zeros(1)}
    with pytest.raises(UsageError, match="Unexpected key"):
        load_into(Flat(4, 3), state, "w.safetensors")


# --- writing


@contextmanager
def disk_full(limit: int) -> Iterator[None]:
    """No file that this process writes may grow past the limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_failing_write_leaves_the_old_files(saved: Path) -> None:
    weights, card = saved.read_bytes(), saved.with_suffix(".json").read_bytes()
    with pytest.raises(RunError) as caught, disk_full(100):
        save_weights(saved, Flat(4, 3, seed=1).state_dict(), CARD)
    assert str(caught.value) == f"cannot write {saved}: File too large"
    assert (saved.read_bytes(), saved.with_suffix(".json").read_bytes()) == (weights, card)
    assert sorted(os.listdir(saved.parent)) == ["flat.json", "flat.safetensors"]


def test_card_that_finds_no_room_leaves_the_old_weights(saved: Path) -> None:
    files = saved.read_bytes(), saved.with_suffix(".json").read_bytes()
    with pytest.raises(RunError), disk_full(5000):
        save_weights(saved, Flat(4, 3, seed=1).state_dict(), {**CARD, "log": ["a long one" * 1000]})
    assert (saved.read_bytes(), saved.with_suffix(".json").read_bytes()) == files
    assert sorted(os.listdir(saved.parent)) == ["flat.json", "flat.safetensors"]


def test_folder_that_is_a_file_is_refused(saved: Path) -> None:
    with pytest.raises(RunError, match="cannot write"):
        save_weights(saved / "flat.safetensors", Flat(4, 3).state_dict(), CARD)
    read_weights(saved)


def test_folder_is_made(tmp_path: Path) -> None:
    digest = save_weights(tmp_path / "a" / "b" / "w.safetensors", Flat(4, 3).state_dict(), CARD)
    assert read_card(tmp_path / "a" / "b" / "w.safetensors")["sha256"] == digest


def test_weights_that_are_not_contiguous_or_require_gradients_are_saved(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state: dict[str, Tensor] = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(2, requires_grad=True)}
    save_weights(path, state, CARD)
    found, _ = read_weights(path)
    assert all(torch.equal(found[key], value) for key, value in state.items())


# --- the hash of a model without a file


def test_hash_of_a_state() -> None:
    assert state_sha256(Flat(4, 3)) == state_sha256(Flat(4, 3))
    changed = Flat(4, 3)
    with torch.no_grad():
        changed.linear.bias[2] += 1e-6
    hashes = {
        state_sha256(model)
        for model in (
            Flat(4, 3),
            changed,
            Flat(3, 4),
            Flat(4, 3).double(),
            torch.nn.Sequential(Flat(4, 3)),
            torch.nn.BatchNorm1d(3),
            torch.nn.BatchNorm1d(3, affine=False),
            torch.nn.ReLU(),
        )
    }
    assert len(hashes) == 8


def test_hash_of_a_state_covers_buffers_and_is_not_that_of_its_bytes_alone() -> None:
    model = torch.nn.BatchNorm1d(3)
    before = state_sha256(model)
    model(torch.rand(5, 3))
    assert state_sha256(model) != before
    flat, wide = torch.nn.Module(), torch.nn.Module()
    flat.register_buffer("a", torch.zeros(4))
    wide.register_buffer("a", torch.zeros(2, 2))
    assert state_sha256(flat) != state_sha256(wide)
