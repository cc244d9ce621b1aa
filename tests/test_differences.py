"""Slopes from differences: their bounds hold, and scale with the function."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.differences import Line, norm

FUNCTIONS = {
    "sin": (np.sin, np.cos), "exp": (np.exp, np.exp), "cube": (lambda x: x * x * x, lambda x: 3 * x * x),
    "reciprocal": (lambda x: 1 / x, lambda x: -1 / (x * x)), "log": (np.log, lambda x: 1 / x),
    "a line on a plateau": (lambda x: 3 * x + 1e6, lambda x: 3 + 0 * x),
    "terms that cancel": (lambda x: (x + 1e8) - 1e8, lambda x: 1 + 0 * x),
}  # fmt: skip


def line(f, x, dy=None, where=slice(0, 1), v=None):
    def quiet(x):
        with np.errstate(all="ignore"):
            return f(x)

    x = np.atleast_1d(np.array(x, np.float64))
    y = f(x)
    dy = np.ones(y.size) if dy is None else dy
    return Line(quiet, x, where, np.ones(1) if v is None else v, dy, y)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(x=st.floats(0.1, 10.0), k=st.integers(3, 30))
def test_a_slope_is_right_within_its_bounds(name, x, k):
    """Truncation and rounding together, where the step is small against the function's scale."""
    f, slope = FUNCTIONS[name]
    if name == "terms that cancel":
        return
    found = line(f, x).estimate(2.0**-k * x)
    assert abs(found.slope - slope(x)) <= found.truncation + found.noise


@given(x=st.floats(0.5, 2.0), k=st.integers(-900, 900))
def test_everything_scales_with_the_function_to_the_bit(x, k):
    """A power of two moves no digit: slopes and bounds are those of f itself."""
    factor = 2.0**k
    plain, scaled = line(np.sin, x), line(lambda x: factor * np.sin(x), x)
    for h in (2.0**-3, 2.0**-15, 2.0**-27):
        a, b = plain.estimate(h), scaled.estimate(h)
        assert (b.slope, b.truncation, b.kink) == (factor * a.slope, factor * a.truncation, factor * a.kink)
        if abs(k) < 400:  # beyond it, the root of the squares is taken in another way
            assert b.noise == pytest.approx(factor * a.noise, rel=1e-12)


@pytest.mark.parametrize("n", [1, 100, 10_000])
def test_the_bound_on_rounding_grows_with_the_root_of_the_outputs(n):
    """n equal outputs in a direction that moves them all: their errors are independent, their slopes add."""
    x = np.full(n, 0.7)
    moving = Line(np.sin, x, slice(0, n), np.ones(n), np.ones(n), np.sin(x))
    one = line(np.sin, 0.7).estimate(2.0**-15)
    all_ = moving.estimate(2.0**-15)
    assert all_.slope == pytest.approx(n * one.slope, rel=1e-9)
    assert all_.noise == pytest.approx(math.sqrt(n) * one.noise, rel=0.2)


def test_outputs_that_stay_are_not_rounded_anew():
    f = lambda x: np.array([np.sin(x[0]), 1e12, 1e12])
    assert line(f, 0.7).estimate(2.0**-15).noise < 1e-9
    stays = lambda x: np.array([1e12 + 0 * x[0]])
    assert line(stays, 0.7).estimate(2.0**-15).noise > 1.0  # none moves: each may have been about to


@pytest.mark.parametrize("values", [[3.0, -4.0], [3e-300, -4e-300], [3e300, 4e300], [0.0], []])
def test_the_norm_is_that_of_any_float(values):
    a = np.array(values)
    largest = np.abs(a).max(initial=0.0) or 1.0
    assert norm(a) == pytest.approx(largest * np.sqrt(((a / largest) ** 2).sum()), rel=1e-14)


@pytest.mark.parametrize("x", [0.0, 1e-200, -3e-7, 1.0, 1e5, -1e12])
def test_the_steps_go_down_from_what_is_coarse_for_any_function(x):
    steps = line(lambda x: x, x).steps()
    assert steps[0] >= max(2.0**6, abs(x) / 128) and all(a == 2 * b for a, b in zip(steps, steps[1:], strict=False))
    if x:
        assert abs(x) * 2.0**-35 < steps[-1] < abs(x) * 2.0**-30
