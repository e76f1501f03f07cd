from __future__ import annotations

import math

import pytest
import torch
from small_models import Flat, LayeredMoE, TwoExperts
from torch import Tensor

from moebench.models import load_model
from moebench.models._moe import record
from moebench.routing import RoutingProbe

SLOPE = 4.0


def pixels(*first: float) -> Tensor:
    """Images of two pixels; the first one decides the gate."""
    return torch.tensor([[value, 0.25] for value in first]).view(-1, 1, 1, 2)


def binary_entropy(pixel: float) -> float:
    """Entropy in nats of the gate's softmax."""
    p = 1 / (1 + math.exp(-SLOPE * (pixel - 0.5)))
    return -(p * math.log(p) + (1 - p) * math.log(1 - p))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


CLEAN = (0.1, 0.2, 0.4, 0.7, 0.9)
"""Expert 0 for the first three, expert 1 for the last two."""


@pytest.fixture
def model() -> TwoExperts:
    return TwoExperts(SLOPE).eval()


def attack(probe: RoutingProbe) -> None:
    """Samples 0, 2, 3 and 4 are attacked, in two batches; 2 and 4 change their expert, 1 is left alone."""
    probe.look(pixels(0.3, 0.8), torch.tensor([0, 2]))
    probe.look(pixels(0.2, 0.6), torch.tensor([4, 3]))


def test_routing_of_a_known_gate_is_that_computed_by_hand(model: TwoExperts) -> None:
    probe = RoutingProbe(model, pixels(*CLEAN), batch_size=2)
    attack(probe)
    (layer,) = probe.layers()
    assert layer.name == "moe"
    assert layer.iou == pytest.approx(2 / 4)
    assert layer.changed == pytest.approx(2 / 4)
    assert layer.load_clean == pytest.approx((2 / 4, 2 / 4))
    assert layer.load_adv == pytest.approx((2 / 4, 2 / 4))
    assert layer.moves == ((1, 1), (1, 1))
    assert layer.entropy_clean == pytest.approx(mean([binary_entropy(p) for p in (0.1, 0.4, 0.7, 0.9)]), rel=1e-5)
    assert layer.entropy_adv == pytest.approx(mean([binary_entropy(p) for p in (0.3, 0.8, 0.2, 0.6)]), rel=1e-5)


def test_classes_are_counted_by_their_first_expert_on_the_clean_image(model: TwoExperts) -> None:
    y = torch.tensor([0, 0, 2, 0, 2])
    probe = RoutingProbe(model, pixels(*CLEAN), 2, y)
    attack(probe)
    (layer,) = probe.layers()
    # Sample 1 is not attacked; samples 0 and 2 go to expert 0, 3 and 4 to expert 1. Nobody is of class 1.
    assert layer.classes == ((1, 1), (0, 0), (1, 1))
    assert sum(map(sum, layer.classes)) == sum(map(sum, layer.moves)) == 4
    assert RoutingProbe(model, pixels(*CLEAN), 2).layers() == ()


def test_everybody_sent_to_one_expert(model: TwoExperts) -> None:
    probe = RoutingProbe(model, pixels(*CLEAN), batch_size=8)
    probe.look(pixels(0.9, 0.8, 0.7, 0.8, 0.9), torch.arange(5))
    (layer,) = probe.layers()
    assert layer.iou == pytest.approx(2 / 5)
    assert layer.changed == pytest.approx(3 / 5)
    assert layer.load_clean == pytest.approx((3 / 5, 2 / 5))
    assert layer.load_adv == pytest.approx((0.0, 1.0))
    assert layer.moves == ((0, 3), (0, 2))


def test_a_later_look_replaces_an_earlier_one(model: TwoExperts) -> None:
    probe = RoutingProbe(model, pixels(*CLEAN), batch_size=8)
    probe.look(pixels(0.9), torch.tensor([0]))
    probe.look(pixels(0.1), torch.tensor([0]))
    (layer,) = probe.layers()
    assert (layer.iou, layer.changed, layer.moves) == (1.0, 0.0, ((1, 0), (0, 0)))


def test_looking_at_the_clean_images_changes_nothing(model: TwoExperts) -> None:
    probe = RoutingProbe(model, pixels(*CLEAN), batch_size=3)
    probe.look(pixels(*CLEAN), torch.arange(5))
    (layer,) = probe.layers()
    assert (layer.iou, layer.changed) == (1.0, 0.0)
    assert layer.entropy_adv == layer.entropy_clean
    assert layer.load_adv == layer.load_clean


def test_top_two_of_three_shares_one_expert() -> None:
    """The gate of expert i is the i-th pixel: the two largest pixels win."""
    model = LayeredMoE(3, 3, experts=3, top_k=2).eval()
    for layer in (model.first, model.second):
        with torch.no_grad():
            layer.router.get_parameter("weight").copy_(torch.eye(3))
            layer.router.get_parameter("bias").zero_()
    x = torch.tensor([[0.9, 0.6, 0.1], [0.2, 0.5, 0.8]]).view(2, 1, 1, 3)
    probe = RoutingProbe(model, x, batch_size=2)
    extras = probe.look(torch.tensor([[0.1, 0.6, 0.9], [0.1, 0.5, 0.8]]).view(2, 1, 1, 3), torch.tensor([0, 1]))
    first = probe.layers()[0]
    assert [layer.name for layer in probe.layers()] == ["first", "second"]
    # {0, 1} became {1, 2}: one expert shared of three; {1, 2} stayed.
    assert first.iou == pytest.approx((1 / 3 + 1) / 2)
    assert first.changed == pytest.approx(1 / 2)
    assert first.moves == ((0, 0, 1), (0, 0, 0), (0, 0, 1))

    def pair(a: float, b: float) -> tuple[float, float]:
        total = math.exp(a) + math.exp(b)
        return math.exp(a) / total, math.exp(b) / total

    one, two = pair(0.9, 0.6), pair(0.5, 0.8)
    assert first.load_clean == pytest.approx((one[0] / 2, (one[1] + two[0]) / 2, two[1] / 2))
    assert extras["first/weights"].tolist()[1] == pytest.approx([0.0, *two])


def test_soft_routing_over_all_experts_never_changes_its_set() -> None:
    model = TwoExperts(SLOPE, top_k=2).eval()
    probe = RoutingProbe(model, pixels(*CLEAN), batch_size=3)
    probe.look(pixels(*reversed(CLEAN)), torch.arange(5))
    (layer,) = probe.layers()
    assert (layer.iou, layer.changed) == (1.0, 0.0)
    share = mean([1 / (1 + math.exp(-SLOPE * (p - 0.5))) for p in CLEAN])
    assert layer.load_clean == pytest.approx((1 - share, share))


def test_certain_gate_does_not_look_changed() -> None:
    """A weight that underflows to 0 belongs to a selected expert before the attack and after it."""
    model = TwoExperts(slope=1000.0, top_k=2).eval()
    probe = RoutingProbe(model, pixels(0.1, 0.9), batch_size=2)
    probe.look(pixels(0.1, 0.9), torch.arange(2))
    (layer,) = probe.layers()
    assert (layer.iou, layer.changed) == (1.0, 0.0)
    assert layer.entropy_clean == 0.0


# --- what goes through the store


def test_restoring_equals_looking(model: TwoExperts) -> None:
    looked, restored = (RoutingProbe(model, pixels(*CLEAN), batch_size=2) for _ in range(2))
    for images, index in ((pixels(0.3, 0.8), [0, 2]), (pixels(0.2, 0.6), [4, 3])):
        extras = looked.look(images, torch.tensor(index))
        assert {name: array.shape for name, array in extras.items()} == {"moe/weights": (2, 2), "moe/entropy": (2,)}
        assert {str(array.dtype) for array in extras.values()} == {"float32"}
        frozen = {name: array.copy() for name, array in extras.items()}
        for array in frozen.values():
            array.flags.writeable = False
        restored.restore(torch.tensor(index).numpy(), frozen)
    assert restored.layers() == looked.layers()
    assert torch.equal(restored.attacked, looked.attacked)


def test_restoring_and_looking_may_take_turns(model: TwoExperts) -> None:
    whole, resumed = (RoutingProbe(model, pixels(*CLEAN), batch_size=2) for _ in range(2))
    extras = whole.look(pixels(0.3, 0.8), torch.tensor([0, 2]))
    whole.look(pixels(0.2, 0.6), torch.tensor([4, 3]))
    resumed.restore(torch.tensor([0, 2]).numpy(), extras)
    resumed.look(pixels(0.2, 0.6), torch.tensor([4, 3]))
    assert resumed.layers() == whole.layers()


def test_extras_are_the_routing_of_the_attacked_images() -> None:
    torch.manual_seed(0)
    model = load_model("dual-moe", dataset=None)
    x = torch.rand(6, 1, 8, 8)
    probe = RoutingProbe(model, x, batch_size=4)
    x_adv, index = torch.rand(3, 1, 8, 8), torch.tensor([5, 0, 2])
    extras = probe.look(x_adv, index)
    tape = record(model, x_adv)
    assert set(extras) == {f"{name}/{what}" for name in tape for what in ("weights", "entropy")}
    for name, routing in tape.items():
        assert torch.equal(torch.from_numpy(extras[f"{name}/weights"]), routing.weights)
    assert [layer.name for layer in probe.layers()] == ["standard.moe", "robust.moe"]


# --- nothing to say


def test_before_any_attack_there_is_no_routing(model: TwoExperts) -> None:
    assert RoutingProbe(model, pixels(*CLEAN), batch_size=2).layers() == ()


def test_dense_model_has_no_routing() -> None:
    probe = RoutingProbe(Flat(2, 2), pixels(*CLEAN), batch_size=2)
    assert probe.look(pixels(0.5), torch.tensor([1])) == {}
    assert probe.layers() == ()
    probe.restore(torch.tensor([1]).numpy(), {})
    assert probe.layers() == ()


def test_the_probe_leaves_the_model_alone(model: TwoExperts) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attack(RoutingProbe(model, pixels(*CLEAN), batch_size=2))
    assert model.moe.policy is None
    assert not model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
