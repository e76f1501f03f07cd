from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import Flat, LayeredMoE
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.attacks._engine import Samples
from moebench.checks import clean_logits
from moebench.errors import UsageError
from moebench.flags import BATCH_DEPENDENT, RANDOM_FORWARD, TRAIN_MODE
from moebench.models import load_model

CLASSES = 4


def samples(count: int = 20, shape: tuple[int, int, int] = (1, 3, 3)) -> Samples:
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    return Samples(x, torch.arange(count) % CLASSES, torch.arange(count))


class Wrong(nn.Module):
    """An honest linear model whose output goes through a function that spoils it."""

    def __init__(self, spoil: Any) -> None:
        super().__init__()
        self.inner = Flat(9, CLASSES)
        self.spoil = spoil

    def forward(self, x: Tensor) -> Any:
        return self.spoil(self.inner(x))


def one_bad(value: float) -> Any:
    """Spoils a single logit, of the last sample only."""

    def spoil(logits: Tensor) -> Tensor:
        logits[-1, 1] = value
        return logits

    return spoil


def refused(model: nn.Module, *, batch_size: int = 8, num_classes: int = CLASSES) -> str:
    with pytest.raises(UsageError) as caught:
        clean_logits(model.eval(), samples(), num_classes, batch_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- honest models


@pytest.mark.parametrize("batch_size", [1, 7, 20, 64])
def test_honest_model_passes(batch_size: int) -> None:
    model, given = Flat(9, CLASSES).eval(), samples()
    logits, findings = clean_logits(model, given, CLASSES, batch_size)
    assert not logits.requires_grad and findings == ()
    torch.testing.assert_close(logits, model(given.x).detach())


def test_honest_moe_and_shipped_architecture_pass() -> None:
    moe = LayeredMoE(9, CLASSES, experts=3).eval()
    logits, findings = clean_logits(moe, samples(), CLASSES, 8)
    assert logits.shape == (20, CLASSES) and findings == ()
    torch.manual_seed(0)
    dual = load_model("dual-moe", dataset=None)
    logits, findings = clean_logits(dual, samples(shape=(1, 8, 8)), 10, 8)
    assert logits.shape == (20, 10) and findings == ()


def test_more_classes_than_the_data_has_are_fine() -> None:
    assert clean_logits(Flat(9, 7), samples(), CLASSES, 8)[0].shape == (20, 7)


def test_half_precision_comes_back_in_float32() -> None:
    logits, _ = clean_logits(Wrong(lambda z: z.to(torch.bfloat16)).eval(), samples(), CLASSES, 8)
    assert logits.dtype == torch.float32


def test_logits_between_zero_and_one_are_no_probabilities() -> None:
    assert clean_logits(Wrong(torch.sigmoid).eval(), samples(), CLASSES, 8)[0].shape == (20, CLASSES)
    clean_logits(Wrong(lambda z: z.log_softmax(1)).eval(), samples(), CLASSES, 8)


# --- outputs that are no logits


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda z: (z, z), "the model returns tuple; expected a tensor of logits"),
        (lambda z: None, "the model returns NoneType; expected a tensor of logits"),
        (lambda z: {"logits": z}, "the model returns dict; expected a tensor of logits"),
        (
            lambda z: z.argmax(1),
            "the model returns torch.int64 of shape 8 for 8 images; expected float logits 8×classes",
        ),
        (lambda z: z.round().long(), "the model returns torch.int64 of shape 8×4 for 8 images"),
        (lambda z: z.unsqueeze(2), "the model returns torch.float32 of shape 8×4×1 for 8 images"),
        (lambda z: z[:1], "the model returns torch.float32 of shape 1×4 for 8 images"),
        (lambda z: z.T, "the model returns torch.float32 of shape 4×8 for 8 images"),
        (lambda z: z[:, :3], "the model has 3 classes and the data set 4; labels would be out of range"),
        (one_bad(float("nan")), "the model returns NaN or infinite logits on clean images"),
        (one_bad(float("inf")), "the model returns NaN or infinite logits on clean images"),
        (one_bad(float("-inf")), "the model returns NaN or infinite logits on clean images"),
        (lambda z: z.softmax(1), "the model returns probabilities; attacks need logits"),
        (lambda z: F.one_hot(z.argmax(1), CLASSES).float(), "the model returns probabilities; attacks need logits"),
    ],
)
def test_output_that_is_no_logits_is_refused(spoil: Any, message: str) -> None:
    assert message in refused(Wrong(spoil))


def test_spoilt_last_batch_is_found() -> None:
    model = Wrong(lambda z: z if len(z) == 8 else z * float("nan"))
    assert "NaN or infinite" in refused(model)


# --- outputs that depend on more than the image


def found(model: nn.Module, batch_size: int = 8) -> dict[str, str]:
    flags = clean_logits(model.eval(), samples(), CLASSES, batch_size)[1]
    assert all("\n" not in flag.evidence for flag in flags)
    return {flag.code: flag.evidence for flag in flags}


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_random_output_is_a_finding(batch_size: int) -> None:
    torch.manual_seed(0)
    flags = found(Wrong(lambda z: z + 0.01 * torch.randn_like(z)), batch_size)
    assert list(flags) == [RANDOM_FORWARD]
    assert "differ by up to 0.0" in flags[RANDOM_FORWARD] and "--eot N" in flags[RANDOM_FORWARD]
    assert list(found(Wrong(lambda z: F.dropout(z, 0.5, training=True)), batch_size)) == [RANDOM_FORWARD]


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_batch_dependent_output_is_a_finding(batch_size: int) -> None:
    assert list(found(Wrong(lambda z: z - z.mean(0)), batch_size)) == [BATCH_DEPENDENT]


def test_a_capacity_that_drops_is_a_finding() -> None:
    dropping = Wrong(lambda z: torch.cat((z[:6], torch.zeros_like(z[6:]))))
    flags = found(dropping)
    assert list(flags) == [BATCH_DEPENDENT] and "8 images alone and together" in flags[BATCH_DEPENDENT]


class Modes(nn.Module):
    """Dropout that is switched on for the forward pass, or that eval() does not reach; at rate 0 it changes nothing."""

    def __init__(self, *, switching: bool) -> None:
        super().__init__()
        self.inner, self.drop, self.switching = Flat(9, CLASSES), nn.Dropout(0.0), switching

    def train(self, mode: bool = True) -> Modes:
        super().train(mode)
        self.drop.train(not self.switching or mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not self.switching:
            return self.drop(self.inner(x))  # type: ignore[no-any-return]
        self.drop.train()
        out: Tensor = self.drop(self.inner(x))
        self.drop.eval()
        return out


@pytest.mark.parametrize("switching", [True, False])
def test_modules_in_train_mode_are_a_finding(switching: bool) -> None:
    model = Modes(switching=switching).eval()
    flags = found(model)
    assert flags == {TRAIN_MODE: "1 of 4 modules run in train mode: drop (Dropout)"}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_batch_normalisation_in_train_mode_is_refused() -> None:
    class Forgotten(nn.Module):
        """Batch statistics whatever the mode; torch refuses them for a single value per channel."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = Flat(9, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.inner(x), None, None, training=True)

    message = refused(Forgotten())
    assert message.startswith("the model fails on images of 1×3×3 (batch of 1): ValueError: Expected more than 1 value")


def test_output_that_loses_its_batch_is_refused() -> None:
    message = refused(Wrong(lambda z: z.squeeze()))
    assert "the model returns torch.float32 of shape 4 for 1 images; expected float logits 1×classes" in message


# --- models that raise


def test_model_that_raises_is_refused_with_its_reason() -> None:
    message = refused(nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)))
    assert message.startswith("the model fails on images of 1×3×3 (batch of 8): RuntimeError: ")
    assert "mat1 and mat2 shapes" in message

    def fail(logits: Tensor) -> Tensor:
        raise KeyError("first line\nsecond line")

    assert "KeyError" in refused(Wrong(fail))


def test_model_that_raises_on_the_second_pass_is_refused() -> None:
    calls = []

    def fail(logits: Tensor) -> Tensor:
        calls.append(len(logits))
        if len(calls) > 3:
            raise RuntimeError("only three passes")
        return logits

    assert "RuntimeError: only three passes" in refused(Wrong(fail))
