"""Where float16 loses the gradients of an attack: share of images without any, and of pixels whose sign is right.

    python docs/fp16_gradients.py [IMAGES]
    python docs/fp16_gradients.py [IMAGES] st-moe resnet18-st

Without names: a ResNet-18 with random weights, its logits scaled until the median probability of all wrong classes
together is as given; labels are its own predictions. With names: models with shipped weights on the first digits of the
test split. Gradients of a cross-entropy averaged over 512 images, under float16 autocast with and without a loss scale
of 65536, against float32. Takes a minute or two on one core.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moebench.datasets import load_dataset
from moebench.loading import load
from moebench.models._resnet import ResNet, resnet18

BATCH = 512


def surer(model: ResNet, x: Tensor, wrong: float) -> float:
    """The factor on the last layer at which the median probability of all wrong classes is `wrong`."""
    logits = model(x)
    low, high = 0.0, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        error = 1 - (middle * logits.double()).softmax(dim=1).amax(dim=1)
        low, high = (middle, high) if float(error.median()) > wrong else (low, middle)
    return low


def gradients(model: nn.Module, x: Tensor, y: Tensor, *, half: bool, scale: float) -> Tensor:
    """Gradient (B, C, H, W) of the scaled loss, averaged over a batch of 512."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16, enabled=half):
        logits = model(x)
    loss = F.cross_entropy(logits.float(), y, reduction="sum") / BATCH * scale
    return torch.autograd.grad(loss, x)[0]


def told(model: nn.Module, x: Tensor, y: Tensor) -> str:
    """What float16 leaves of the gradients of a model at images x (B, C, H, W) with labels y (B,), in words."""
    exact = gradients(model, x, y, half=False, scale=1.0)
    said = []
    for scale in (1.0, 65536.0):
        found = gradients(model, x, y, half=True, scale=scale)
        zero = float((found == 0).flatten(1).all(dim=1).float().mean())
        right = float((found.sign() == exact.sign()).float().mean())
        said.append(f"loss scale {scale:g}: {zero:.0%} of images without gradient, {right:.0%} of signs right")
    return "; ".join(said)


def random_network(n: int) -> None:
    """One line per confidence of a network with random weights."""
    model, x = resnet18(10, 3).eval().requires_grad_(False), torch.randn(n, 3, 32, 32)
    weight, bias = model.fc.weight.clone(), model.fc.bias.clone()
    for wrong in (3e-1, 3e-3, 1e-4, 2e-6):
        model.fc.weight.copy_(weight)
        model.fc.bias.copy_(bias)
        with torch.no_grad():
            factor = surer(model, x, wrong)
            model.fc.weight.mul_(factor)
            model.fc.bias.mul_(factor)
            y = model(x).argmax(dim=1)
        print(f"median error {wrong:g}: {told(model, x, y)}")


def shipped(name: str, n: int) -> None:
    """One line about a model with shipped weights, at the first n digits of the test split."""
    data = load_dataset("digits", n=n)
    x, y = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    model = load(name, data).module
    with torch.no_grad():
        error = 1 - model(x).double().softmax(dim=1).gather(1, y.unsqueeze(1))
    print(f"{name}, median error {float(error.median()):.1e}: {told(model, x, y)}")


def main() -> None:
    """Prints one line per confidence, or per model."""
    torch.manual_seed(0)
    n = next((int(word) for word in sys.argv[1:] if word.isdigit()), None)
    names = [word for word in sys.argv[1:] if not word.isdigit()]
    for name in names:
        shipped(name, n or 200)
    if not names:
        random_network(n or 32)


main()
