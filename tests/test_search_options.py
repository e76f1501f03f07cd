"""Options of the search on the command line: precision, averaging over draws, compiling, and what the store says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import DENSE, Terminal
from torch import Tensor, nn

from moebench.attacks._search import search_copy
from moebench.store import Store

NOISY = """
import torch
from torch import nn


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        return self.linear((x + 0.2 * torch.randn_like(x)).flatten(1))


def make():
    return Noisy()
"""


def robust(path: str) -> np.typing.NDArray[np.bool_]:
    with np.load(path, allow_pickle=False) as archive:
        return np.asarray(archive["robust"])


@pytest.mark.parametrize("model", [DENSE, "rt-er"])
def test_culling_in_bfloat16_breaks_all_that_float32_breaks(moebench: Terminal, model: str) -> None:
    words = ("--view", "whole", "--no-trust", "--json", "--save-adv")
    full = moebench.evaluate(model, "apgd-ce", 16, *words, "full.npz").json
    culled = moebench.evaluate(model, "apgd-ce", 16, *words, "culled.npz", "--precision", "bfloat16").json
    quick = moebench.evaluate(model, "apgd-ce", 16, *words, "quick.npz", "--precision", "bfloat16-only").json
    assert not (robust("culled.npz") & ~robust("full.npz")).any()
    assert [found["precision"] for found in (full, culled, quick)] == ["float32", "bfloat16", "bfloat16-only"]
    with Store.open("results.db", write=False) as store:
        stages = {result.cell.precision: list(result.record.stages) for result in store.results()}
    assert stages == {
        "float32": ["clean", "apgd-ce"],
        "bfloat16": ["clean", "apgd-ce in bfloat16", "apgd-ce"],
        "bfloat16-only": ["clean", "apgd-ce in bfloat16"],
    }


def test_a_quick_look_says_that_it_is_one(moebench: Terminal) -> None:
    said = moebench.evaluate(DENSE, "fgsm", 20, "--precision", "bfloat16-only")
    assert "quick look" in said.out and "not ranked" in said.out
    assert "quick look" not in moebench.evaluate(DENSE, "fgsm", 20, "--precision", "bfloat16").out


def test_the_command_of_a_run_names_what_its_numbers_depend_on(moebench: Terminal) -> None:
    run = moebench.evaluate(DENSE, "fgsm", 20, "--precision", "bfloat16", "--compile", "--json").json["run_id"]
    shown = moebench("show", run).out
    assert "--precision bfloat16" in shown and "--compile" not in shown


def test_a_random_model_is_averaged_over_its_draws(moebench: Terminal) -> None:
    Path("noisy.py").write_text(NOISY)
    found = moebench.evaluate("noisy.py:make", "pgd-10", 20, "--eot", "5", "--json").json
    assert found["results"][0]["forwards"] % 5 == 0
    assert "random-forward" in [flag["code"] for flag in found["flags"]]
    with Store.open("results.db", write=False) as store:
        (result,) = store.results()
    assert result.cell.parameters["eot"] == 5


def test_a_model_that_is_not_random_needs_no_draws(moebench: Terminal) -> None:
    plain = moebench.evaluate(DENSE, "fgsm", 20, "--json").json
    averaged = moebench.evaluate(DENSE, "fgsm", 20, "--json", "--eot", "10").json
    assert averaged["results"] == plain["results"]


def test_a_dry_run_counts_draws_and_the_cull(moebench: Terminal) -> None:
    Path("noisy.py").write_text(NOISY)

    def planned(model: str, *words: str) -> int:
        cells = moebench.evaluate(model, "pgd-10", 20, "--view", "whole", "--dry-run", "--json", *words).json["cells"]
        return int(cells[0]["backwards"])

    assert planned(DENSE, "--precision", "bfloat16") == 2 * planned(DENSE)
    assert planned(DENSE, "--precision", "bfloat16-only") == planned(DENSE)
    once = planned("noisy.py:make")
    assert once > 0 and planned("noisy.py:make", "--eot", "5") % (5 * 10) == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--eot", "0"), "--eot takes the number of passes to average, at least 1, got 0"),
        (("--eot", "3", "--engine", "reference"), "--eot belongs to our engine"),
        (("--precision", "bfloat16", "--engine", "reference"), "--precision belongs to our engine"),
        (("--compile", "--engine", "reference"), "--compile belongs to our engine"),
        (("--precision", "half"), "'half' is not one of"),
    ],
)
def test_options_that_mean_nothing_are_refused(moebench: Terminal, words: tuple[str, ...], expected: str) -> None:
    assert expected in moebench.refuses("evaluate", "--model", DENSE, "--attack", "fgsm", *words)


# The copy that is searched on.


class Branching(nn.Module):
    """A convolution net whose forward pass cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x if float(x.sum()) > 0 else 2 * x)
        return logits


def large() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Branching().eval(), torch.rand(6, 3, 20, 20)
    with torch.no_grad():
        model(x)
    return model.requires_grad_(False), x


def test_each_step_towards_the_copy_is_noted() -> None:
    model, x = large()
    copied = search_copy(model, x)
    assert copied.notes == {"folded BatchNorm": "yes", "channels-last": "yes"}
    torch.testing.assert_close(copied.module(x), model(x), rtol=1e-4, atol=1e-4)
    assert model.body[0].weight.is_contiguous()  # type: ignore[operator, index, union-attr]
    assert "channels-last" not in search_copy(model, x[:, :, :12, :12].new_zeros(2, 3, 20, 12)).notes


def test_a_step_that_fails_is_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = large()

    def refuse(module: nn.Module) -> nn.Module:
        raise RuntimeError("no compiler")

    def spoil(module: nn.Module) -> nn.Module:
        return nn.Sequential(module, nn.Softplus())

    monkeypatch.setattr("moebench.attacks._search._compiled", refuse)
    monkeypatch.setattr("moebench.attacks._search._channels_last", spoil)
    copied = search_copy(model, x, compiled=True)
    assert copied.notes == {
        "folded BatchNorm": "yes",
        "channels-last": "no: the logits differ",
        "compiled": "no: RuntimeError",
    }
    torch.testing.assert_close(copied.module(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet-at", "rt-er"])
def test_a_compiled_copy_gives_the_same_logits_and_gradients(name: str) -> None:
    from moebench.datasets import load_dataset
    from moebench.models import load_model

    model, x = load_model(name).requires_grad_(False), torch.from_numpy(load_dataset("digits", n=40).images)
    copied = search_copy(model, x, compiled=True)
    assert copied.notes["compiled"] == "yes"
    gradients = []
    for module in (model, copied.module):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(module(leaf).logsumexp(1).sum(), leaf)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)
