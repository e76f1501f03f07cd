"""Weights on disk: a safetensors file and a JSON card beside it that says how they came to be."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from moebench.errors import RunError, UsageError

SHIPPED = Path(__file__).parent / "weights"
"""Folder of the weights that come with the package, one folder per data set."""


def shipped_weights(dataset: str, model: str) -> Path:
    """Where the weights of a model trained on a data set are shipped (the file need not exist)."""
    return SHIPPED / dataset / f"{model}.safetensors"


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def state_sha256(model: nn.Module) -> str:
    """Hash of a model's parameters and buffers, for models that come without a weights file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_weights(path: Path, state: Mapping[str, Tensor], card: Mapping[str, Any]) -> str:
    """Writes weights and card, both or neither; returns the sha256 of the weights file.

    Raises:
        RunError: they cannot be written, because the disk is full, say.
    """
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    digest = sha256_of(data)
    text = json.dumps({**card, "sha256": digest}, indent=1, sort_keys=True) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write({path: data, path.with_suffix(".json"): text.encode()})
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    return digest


def read_card(path: Path) -> dict[str, Any]:
    """The card beside a weights file.

    Raises:
        UsageError: it is missing or no JSON object.
    """
    card_path = path.with_suffix(".json")
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no card {card_path} beside the weights; `moebench train` writes both") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read the card {card_path}: {error}") from None
    if not isinstance(card, dict) or not isinstance(card.get("sha256"), str):
        raise UsageError(f"the card {card_path} is not one that `moebench train` wrote (no sha256)")
    return card


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checked weights file and its card.

    Raises:
        UsageError: a file is missing, unreadable, or the weights are not those that the card describes.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the weights {path}: {error.strerror or error}") from None
    card = read_card(path)
    digest = sha256_of(data)
    if digest != card["sha256"]:
        raise UsageError(
            f"the weights {path} do not match their card: sha256 {digest[:12]}…, expected {card['sha256'][:12]}…; "
            "restore the file or train again"
        )
    try:
        return load(data), card
    except SafetensorError as error:
        raise UsageError(f"{path} is not a safetensors file: {error}") from None


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads weights strictly.

    Raises:
        UsageError: names or shapes differ.
    """
    try:
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        first = str(error).replace("\n", " ").replace("\t", " ")
        raise UsageError(f"the weights {source} do not fit the model: {first[:300]}") from None


def _write(files: Mapping[Path, bytes]) -> None:
    """Replaces the files once there is room for all of them."""
    drafts = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    try:
        for path, draft in drafts.items():
            draft.write_bytes(files[path])
        for path, draft in drafts.items():
            os.replace(draft, path)
    finally:
        for draft in drafts.values():
            with suppress(OSError):
                draft.unlink(missing_ok=True)
