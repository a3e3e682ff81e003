"""The filters as the mathematics has them: a projection, and the minimum of a convex function."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from capt_peft.defences.filters import _divergence, _gradient, low_pass, smoothed


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (12, 5)])
@pytest.mark.parametrize("share", [0.1, 0.36, 0.5, 1.0])
def test_the_low_pass_filter_is_a_projection_that_is_its_own_adjoint(size, share):
    x, y = noise(2, 3, *size), noise(2, 3, *size, seed=1)
    once = low_pass(x, share)
    torch.testing.assert_close(low_pass(once, share), once, rtol=0, atol=1e-13)
    torch.testing.assert_close((once * y).sum(), (x * low_pass(y, share)).sum(), rtol=0, atol=1e-11)
    torch.testing.assert_close(low_pass(3 * x + y, share), 3 * once + low_pass(y, share), rtol=0, atol=1e-12)
    constant = torch.full((1, 3, *size), 0.3, dtype=torch.float64)
    torch.testing.assert_close(low_pass(constant, share), constant, rtol=0, atol=1e-14)
    assert once.shape == x.shape and once.square().sum() < x.square().sum()


@pytest.mark.parametrize(("periods", "kept"), [((0, 3), True), ((2, 2), True), ((3, 3), False), ((0, 5), False)])
def test_waves_within_the_radius_are_kept_and_others_vanish(periods, kept):
    """16 pixels have 8 periods at most: half of that is a radius of 4."""
    rows, columns = (2 * torch.pi * n * torch.arange(16, dtype=torch.float64) / 16 for n in periods)
    wave = torch.cos(rows[:, None] + columns + 0.3)[None, None]
    torch.testing.assert_close(low_pass(wave, 0.5), wave * kept, rtol=0, atol=1e-13)


def test_the_low_pass_filters_gradient_is_its_adjoint():
    x, y = noise(1, 3, 8, 8).requires_grad_(), noise(1, 3, 8, 8, seed=1)
    (gradient,) = torch.autograd.grad((low_pass(x, 0.36) * y).sum(), x)
    torch.testing.assert_close(gradient, low_pass(y, 0.36), rtol=0, atol=1e-13)


def test_divergence_is_the_gradients_transpose():
    x, p = noise(2, 3, 7, 5), noise(2, 2, 3, 7, 5, seed=1)
    torch.testing.assert_close((_gradient(x) * p).sum(), (x * _divergence(p)).sum(), rtol=0, atol=1e-12)


def total_variation(images):
    """The lengths of the gradients of the pixels, summed: (B, C)."""
    return _gradient(images).square().sum(0).sqrt().sum((2, 3))


def objective(z, x, weight):
    return (z - x).square().sum((2, 3)) / 2 + weight * total_variation(z)


@pytest.mark.parametrize("weight", [0.03, 0.1])
def test_smoothing_finds_the_minimum_that_another_solver_finds(weight):
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = x.numpy()[0, 0]

    def value(z, rounding):
        z = z.reshape(flat.shape)
        down, right = np.zeros_like(z), np.zeros_like(z)
        down[:-1], right[:, :-1] = z[1:] - z[:-1], z[:, 1:] - z[:, :-1]
        length = np.sqrt(down**2 + right**2 + rounding**2)
        a, b = down / length, right / length
        slope = z - flat
        slope[1:] += weight * a[:-1]
        slope[:-1] -= weight * a[:-1]
        slope[:, 1:] += weight * b[:, :-1]
        slope[:, :-1] -= weight * b[:, :-1]
        return ((z - flat) ** 2).sum() / 2 + weight * length.sum(), slope.ravel()

    found = flat.ravel()
    for rounding in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):  # the corner of the length at 0, ever less rounded
        options = {"maxiter": 20_000, "maxfun": 50_000, "ftol": 1e-16, "gtol": 1e-12}
        found = minimize(value, found, (rounding,), "L-BFGS-B", jac=True, options=options).x
    theirs = torch.from_numpy(found.reshape(x.shape))
    ours = smoothed(x, weight)
    torch.testing.assert_close(smoothed(x, weight, 3000), theirs, rtol=0, atol=2e-4)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
    assert objective(ours, x, weight) <= objective(theirs, x, weight) * (1 + 1e-4)


@pytest.mark.parametrize("weight", [0.03, 0.1])
def test_the_duality_gap_certifies_the_minimum(weight):
    """Every dual point bounds the minimum from below: here that of the result's own dual point, recovered from it."""
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = smoothed(x, weight)  # z = x - weight D'p, whose dual value is (|x|^2 - |z|^2) / 2
    bound = (x.square() - z.square()).sum((2, 3)) / 2
    primal = objective(z, x, weight)
    assert (bound <= primal + 1e-9).all()
    assert ((primal - bound) / primal).max() < 2e-3


@pytest.mark.parametrize("weight", [0.03, 0.1, 1.0])
def test_smoothing_lowers_the_total_variation_and_keeps_mean_and_flat_images(weight):
    x = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = smoothed(x, weight)
    assert (total_variation(z) < total_variation(x)).all() and (objective(z, x, weight) < objective(x, x, weight)).all()
    torch.testing.assert_close(z.mean((2, 3)), x.mean((2, 3)), rtol=0, atol=1e-12)
    flat = torch.full((1, 3, 6, 6), 0.3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(smoothed(flat, weight), flat, rtol=0, atol=1e-15)
    (gradient,) = torch.autograd.grad(smoothed(flat, weight).square().sum(), flat)
    assert torch.isfinite(gradient).all()  # the length of a gradient has none at 0


def test_a_step_between_two_halves_moves_by_what_the_formula_says():
    """Halves of heights a and b, n columns each, come nearer by weight / n on each side (exact where rows are alike)."""
    x = torch.zeros(1, 1, 6, 8, dtype=torch.float64)
    x[..., 4:] = 1
    z = smoothed(x, 0.1, 1000)
    expected = 0.1 / 4 + (1 - 2 * 0.1 / 4) * x
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-6)
