"""Projections, steps and random starts; the hyperplane projection against solvers that know nothing of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.optimize import brentq, linprog  # type: ignore[import-untyped]
from torch import Tensor
from toys import digits, make_rows

from moebench.attacks._projections import ascend, l2_norm, project, random_start
from moebench.attacks._random import sample_keys
from moebench.attacks.apgd import start_on_sphere
from moebench.attacks.fab import project_on_hyperplane
from moebench.schema import Norm, ThreatModel
from moebench.threat import distances, within

Array = NDArray[np.float64]

norms = st.sampled_from(["Linf", "L2"])
threats = st.builds(ThreatModel, norms, st.floats(0, 1, width=32))
SHAPE = (3, 2, 2, 3)
images = arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32)).map(torch.from_numpy)
points = arrays(np.float32, SHAPE, elements=st.floats(-3, 4, width=32)).map(torch.from_numpy)
many = settings(deadline=None, max_examples=100)


@many
@given(points, images, threats)
def test_projection_lands_inside_ball_and_box(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> None:
    assert bool(within(project(x_adv, x, threat), x, threat).all())


@many
@given(points, images, threats)
def test_projection_is_idempotent(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> None:
    once = project(x_adv, x, threat)
    torch.testing.assert_close(project(once, x, threat), once, rtol=0, atol=1e-6)


@many
@given(images, images, threats)
def test_projection_leaves_interior_points_alone(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> None:
    inside = distances(x_adv, x, threat) < threat.eps * (1 - 1e-5)
    moved = project(x_adv, x, threat)
    torch.testing.assert_close(moved[inside], x_adv[inside], rtol=0, atol=2e-7)


@many
@given(images, images, threats, st.floats(0.05, 0.95))
def test_projection_lands_on_the_boundary(a: Tensor, b: Tensor, threat: ThreatModel, share: float) -> None:
    """A point of the box outside the ball comes to distance eps: the way to it lies in the box."""
    outside = distances(a, b, threat) > threat.eps
    assume(bool(outside.any()))
    landed = distances(project(a, b, threat), b, threat)[outside]
    torch.testing.assert_close(landed, torch.full_like(landed, threat.eps), rtol=0, atol=2e-6)


@many
@given(points, images, threats)
def test_linf_projection_is_the_nearest_point(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> None:
    threat = ThreatModel("Linf", threat.eps)
    low, high = (x - threat.eps).clamp_min(0), (x + threat.eps).clamp_max(1)
    expected = torch.minimum(torch.maximum(x_adv, low), high)
    torch.testing.assert_close(project(x_adv, x, threat), expected, rtol=0, atol=1e-6)


@many
@given(points, images, threats)
def test_projection_works_row_by_row(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> None:
    together = project(x_adv, x, threat)
    for row in range(len(x)):
        assert torch.equal(project(x_adv[row : row + 1], x[row : row + 1], threat)[0], together[row])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("eps", [0.0, 0.03, 0.5])
def test_starts_lie_in_the_ball_and_differ_by_sample(norm: Norm, eps: float) -> None:
    threat = ThreatModel(norm, eps)
    samples = digits(60)
    x = samples.x.clone()
    keys = sample_keys(0, "pgd/0", samples.ids)
    for start in (random_start(x, keys, threat), start_on_sphere(make_rows(samples), threat)):
        assert start.dtype == torch.float32 and start.shape == x.shape
        assert bool(within(start, x, threat).all())
        if eps > 0:
            delta = (start - x).flatten(1)
            assert len({tuple(row) for row in delta.tolist()}) == len(x)
    assert torch.equal(x, samples.x)


def test_linf_start_is_uniform_in_the_cube() -> None:
    x = torch.full((500, 1, 4, 4), 0.5)
    delta = random_start(x, sample_keys(0, "pgd/0", torch.arange(500)), ThreatModel("Linf", 0.2)) - x
    assert float(delta.mean()) == pytest.approx(0, abs=0.004)
    assert float(delta.var()) == pytest.approx(0.4**2 / 12, rel=0.03)
    assert float(delta.abs().max()) > 0.199


def test_l2_start_is_uniform_in_the_ball() -> None:
    """In d dimensions, radius^d is uniform and the direction is isotropic."""
    x = torch.full((2000, 1, 2, 2), 0.5)
    delta = (random_start(x, sample_keys(0, "pgd/0", torch.arange(2000)), ThreatModel("L2", 0.2)) - x).flatten(1)
    radius = delta.norm(dim=1) / 0.2
    assert float((radius**4).mean()) == pytest.approx(0.5, abs=0.02)
    assert float(radius.max()) <= 1 + 1e-6
    covariance = delta.t() @ delta / len(delta)
    torch.testing.assert_close(covariance, torch.eye(4) * covariance.trace() / 4, rtol=0, atol=0.0008)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_auto_pgd_starts_on_the_sphere(norm: Norm) -> None:
    samples = digits(20)
    samples.x.fill_(0.5)
    threat = ThreatModel(norm, 0.1)
    reached = distances(start_on_sphere(make_rows(samples), threat), samples.x, threat)
    torch.testing.assert_close(reached, torch.full_like(reached, 0.1), rtol=0, atol=1e-6)


@many
@given(images, points, st.floats(0.01, 0.5), norms)
def test_ascent_gains_most_among_steps_of_its_length(x: Tensor, gradient: Tensor, size: float, norm: Norm) -> None:
    """The gain of a steepest step of length s is s times the dual norm of the gradient."""
    assume(float(l2_norm(gradient).min()) > 1e-3)
    step = ascend(x, gradient, size, ThreatModel(norm, 0.1)) - x
    gain = (step * gradient).flatten(1).sum(dim=1)
    dual = gradient.flatten(1).abs().sum(dim=1) if norm == "Linf" else l2_norm(gradient)
    torch.testing.assert_close(gain, size * dual, rtol=1e-3, atol=1e-4)
    length = step.flatten(1).abs().amax(dim=1) if norm == "Linf" else l2_norm(step)
    assert float(length.max()) <= size * (1 + 1e-4) + 1e-6


def test_a_zero_gradient_moves_nothing() -> None:
    x = torch.full((2, 1, 2, 2), 0.5)
    for norm in ("Linf", "L2"):
        assert torch.equal(ascend(x, torch.zeros_like(x), 0.1, ThreatModel(norm, 0.1)), x)


# The projection on a hyperplane inside the box.


def linf_step(point: Array, w: Array, gap: float) -> float:
    """Smallest Linf norm of d with w·d = -gap and 0 <= point + d <= 1, by linear programming; inf if there is none."""
    size = len(point)
    cost = np.append(np.zeros(size), 1.0)
    eye, ones = np.eye(size), np.ones((size, 1))
    solved = linprog(
        cost,
        A_ub=np.block([[eye, -ones], [-eye, -ones]]),
        b_ub=np.zeros(2 * size),
        A_eq=np.append(w, 0.0)[None],
        b_eq=[-gap],
        bounds=[*((-p, 1 - p) for p in point), (0, None)],
    )
    return float(solved.fun) if solved.success else float("inf")


def l2_step(point: Array, w: Array, gap: float) -> Array | None:
    """The shortest such d: by Lagrange, d = clip(t w) for the t that meets the gap; None if no t does."""

    def step(t: float) -> Array:
        moved: Array = np.clip(t * w, -point, 1 - point)
        return moved

    def miss(t: float) -> float:
        return float(w @ step(t)) + gap

    far = 1e7
    if miss(-far) * miss(far) > 0:
        return None
    return step(float(brentq(miss, -far, far, xtol=1e-12, rtol=1e-14, maxiter=500)))


def corner(point: Array, w: Array, gap: float) -> Array:
    """The corner of the box that comes closest to the hyperplane."""
    to = np.where(w * gap > 0, 0.0, np.where(w * gap < 0, 1.0, point))
    moved: Array = to - point
    return moved


weights = st.one_of(st.just(0.0), st.floats(0.05, 3), st.floats(-3, -0.05))
problems = st.integers(1, 8).flatmap(
    lambda size: st.tuples(
        arrays(np.float64, size, elements=st.floats(0, 1)),
        arrays(np.float64, size, elements=weights),
        # How far the hyperplane lies, as a share of what the box allows: beyond 1 it is out of reach.
        st.one_of(st.floats(0.02, 0.97), st.floats(1.05, 3)),
        st.sampled_from([-1.0, 1.0]),
    )
)


def hyperplane(point: Array, w: Array, share: float, side: float) -> float:
    """w·point - level of the hyperplane at that share of the way to the farthest corner on one side."""
    reach = float(w @ corner(point, w, side))
    assume(abs(reach) > 0.05)
    return -reach * share


def solve(point: Array, w: Array, gap: float, norm: Norm) -> Array:
    level = float(w @ point) - gap
    tensors: list[Any] = [torch.from_numpy(value) for value in (point[None], w[None], np.array([level]))]
    found: Array = project_on_hyperplane(tensors[0], tensors[1], tensors[2], norm).numpy()[0]
    return found


@many
@given(problems)
def test_linf_hyperplane_step_is_that_of_a_linear_program(problem: tuple[Array, Array, float, float]) -> None:
    point, w, share, side = problem
    gap = hyperplane(point, w, share, side)
    step = solve(point, w, gap, "Linf")
    assert (point + step >= -1e-9).all() and (point + step <= 1 + 1e-9).all()
    best = linf_step(point, w, gap)
    if share > 1:
        assert best == float("inf")
        np.testing.assert_allclose(step, corner(point, w, gap), atol=1e-9)
    else:
        assert w @ step == pytest.approx(-gap, abs=1e-7)
        assert np.abs(step).max() == pytest.approx(best, abs=1e-7)


@many
@given(problems)
def test_l2_hyperplane_step_is_the_shortest(problem: tuple[Array, Array, float, float]) -> None:
    point, w, share, side = problem
    gap = hyperplane(point, w, share, side)
    step = solve(point, w, gap, "L2")
    best = l2_step(point, w, gap)
    if share > 1:
        assert best is None
        best = corner(point, w, gap)
    assert best is not None
    np.testing.assert_allclose(step, best, atol=1e-6)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_hyperplane_steps_do_not_depend_on_neighbours(norm: Norm) -> None:
    generator = torch.Generator().manual_seed(3)
    point, w = torch.rand(30, 9, generator=generator), torch.randn(30, 9, generator=generator)
    level = (w * torch.rand(30, 9, generator=generator)).sum(dim=1)
    together = project_on_hyperplane(point, w, level, norm)
    for row in range(30):
        alone = project_on_hyperplane(point[row : row + 1], w[row : row + 1], level[row : row + 1], norm)[0]
        torch.testing.assert_close(alone, together[row], rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_no_weights_no_step(norm: Norm) -> None:
    """A zero gradient leaves the image where it is, without NaN."""
    point = torch.rand(4, 9)
    for level in (0.0, 1.0, -1.0):
        assert torch.equal(
            project_on_hyperplane(point, torch.zeros(4, 9), torch.full((4,), level), norm), torch.zeros(4, 9)
        )
