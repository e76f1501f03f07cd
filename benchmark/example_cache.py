"""Adversarial examples kept between commands: one safetensors file per fingerprint of how they were made.

The folder is $MOEBENCH_CACHE, else `moebench` in the XDG cache folder ($XDG_CACHE_HOME or ~/.cache). Nothing in it is
needed: what is missing or damaged is made anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from moebench.files import replace_file
from moebench.models._weights import sha256_of
from moebench.provenance import fingerprint

FOLDER = "examples"


def cache_folder() -> Path:
    """Where moebench keeps what it can make again."""
    own = os.environ.get("MOEBENCH_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared and Path(shared).is_absolute() else Path.home() / ".cache") / "moebench"


def example_file(facts: Mapping[str, Any]) -> Path:
    """The file of the examples that these facts describe."""
    return cache_folder() / FOLDER / f"{fingerprint(facts)}.safetensors"


def read_examples(facts: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor | None:
    """The kept examples, float32 of the given shape; None where there are none, or none that can be trusted."""
    path = example_file(facts)
    try:
        data = path.read_bytes()
        stored = load(data)
    except (OSError, SafetensorError):
        return None
    x_adv, digest = stored.get("x_adv"), stored.get("sha256")
    if x_adv is None or digest is None or x_adv.dtype != torch.float32 or tuple(x_adv.shape) != shape:
        return None
    if bytes(digest.flatten().to(torch.uint8).tolist()) != bytes.fromhex(_digest(path.stem, x_adv)):
        return None
    return x_adv


def keep_examples(facts: Mapping[str, Any], x_adv: Tensor) -> Path:
    """Keeps examples with a hash over them and over how they were made.

    Raises:
        OSError: the cache cannot be written.
    """
    path = example_file(facts)
    images = x_adv.detach().cpu().contiguous()
    digest = torch.tensor(list(bytes.fromhex(_digest(path.stem, images))), dtype=torch.uint8)
    made = json.dumps(facts, sort_keys=True, default=str)
    replace_file(path, save({"x_adv": images, "sha256": digest}, metadata={"made": made}))
    return path


def _digest(made: str, images: Tensor) -> str:
    return sha256_of(made.encode() + images.numpy().tobytes())
