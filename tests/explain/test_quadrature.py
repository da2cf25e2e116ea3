"""The path integral: exact where it must be, and finer where it is off."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from miaotui.explain.quadrature import Integral, PathIntegral

Vector = NDArray[np.float64]


def integrate(
    path: PathIntegral, value: Callable[[float], float], slope: Callable[[float], Vector]
) -> Integral:
    while wanted := path.wanted():
        values = [value(point) for point in wanted]
        path.add(wanted, values, np.stack([slope(point) for point in wanted]))
    return path.result()


def test_polynomials_of_degree_three_are_exact_at_once() -> None:
    found = integrate(
        PathIntegral(pieces=1),
        lambda x: x**4 / 4 + 3 * x,
        lambda x: np.array([x**3, 3.0]),
    )
    assert len(found.points) == 3
    np.testing.assert_allclose(found.total, [1 / 4, 3.0], rtol=1e-14)
    assert found.gap == pytest.approx(0, abs=1e-14)
    assert found.weights.sum() == pytest.approx(1)
    assert found.within


def test_points_gather_where_the_function_turns() -> None:
    steep = 200.0

    def value(x: float) -> float:
        return float(np.tanh(steep * (x - 0.1)))

    def slope(x: float) -> Vector:
        return np.array([steep / np.cosh(steep * (x - 0.1)) ** 2])

    found = integrate(PathIntegral(), value, slope)
    assert found.within
    assert abs(found.gap) < 0.02
    near = np.abs(found.points - 0.1) < 0.05
    assert near.sum() > 0.5 * len(found.points)
    assert len(found.points) < 100


def test_errors_that_cancel_are_seen() -> None:
    """Odd about the middle: the whole sum is right at once, its halves are not."""
    bump = 40.0

    def value(x: float) -> float:
        return float(np.exp(-bump * (x - 0.27) ** 2) + np.exp(-bump * (x - 0.73) ** 2))

    def slope(x: float) -> Vector:
        left = -2 * bump * (x - 0.27) * np.exp(-bump * (x - 0.27) ** 2)
        right = -2 * bump * (x - 0.73) * np.exp(-bump * (x - 0.73) ** 2)
        return np.array([left, right])

    path = PathIntegral(absolute=1e-6, relative=0, max_points=2000)
    found = integrate(path, value, slope)
    assert found.within
    each = np.exp(-bump * 0.73**2) - np.exp(-bump * 0.27**2)
    np.testing.assert_allclose(found.total, [each, -each], atol=1e-6)


def test_it_ends_and_says_so_where_points_run_out() -> None:
    chance = np.random.default_rng(0)
    found = integrate(
        PathIntegral(max_points=33), lambda x: x, lambda x: chance.normal(size=3) * 100
    )
    assert not found.within
    assert len(found.points) <= 33
    assert abs(found.gap) > 0.02


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 9"):
        PathIntegral(max_points=8)
