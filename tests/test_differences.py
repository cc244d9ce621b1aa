"""Slopes from differences: the bounds hold, they scale with the function, and each verdict needs its evidence."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import differences as D
from minilora.differences import Line, norm, settle

FUNCTIONS = {
    "sin": (np.sin, np.cos), "exp": (np.exp, np.exp), "cube": (lambda x: x * x * x, lambda x: 3 * x * x),
    "reciprocal": (lambda x: 1 / x, lambda x: -1 / (x * x)), "log": (np.log, lambda x: 1 / x),
    "a line on a plateau": (lambda x: 3 * x + 1e6, lambda x: 3 + 0 * x),
    "terms that cancel": (lambda x: (x + 1e8) - 1e8, lambda x: 1 + 0 * x),
}  # fmt: skip


def line(f, x, dy=None, where=slice(0, 1), v=None):
    x = np.atleast_1d(np.array(x, np.float64))
    y = f(x)
    dy = np.ones(y.size) if dy is None else dy
    return Line(f, x, where, np.ones(1) if v is None else v, dy, y)


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
    """A power of two moves no digit: slopes, bounds and verdicts are those of f itself."""
    factor = 2.0**k
    plain, scaled = line(np.sin, x), line(lambda x: factor * np.sin(x), x)
    for h in (2.0**-3, 2.0**-15, 2.0**-27):
        a, b = plain.estimate(h), scaled.estimate(h)
        assert (b.slope, b.truncation, b.kink) == (factor * a.slope, factor * a.truncation, factor * a.kink)
        if abs(k) < 400:  # beyond it, the root of the squares is taken in another way
            assert b.noise == pytest.approx(factor * a.noise, rel=1e-12)
    for wrong in (1.0, 1 + 1e-5, 0.0, -1.0):
        verdicts = [
            settle(line(lambda x, s=s: s * np.sin(x), x), s * wrong * math.cos(x), 1e-6).verdict for s in (1.0, factor)
        ]
        assert verdicts[0] == verdicts[1] == (D.RIGHT if wrong == 1.0 else D.WRONG)


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


@pytest.mark.parametrize("off", [1e-5, -1e-5, 1e-3, 1.0, -2.0])
@pytest.mark.parametrize("name", ["sin", "exp", "cube", "reciprocal", "log"])
def test_a_right_slope_is_right_and_one_off_is_wrong(name, off):
    f, slope = FUNCTIONS[name]
    for x in (0.3, 1.7, 40.0):
        assert settle(line(f, x), slope(x), 1e-6).verdict == D.RIGHT
        assert settle(line(f, x), slope(x) * (1 + off), 1e-6).verdict == D.WRONG


def test_where_rounding_is_worse_than_its_bound_nobody_is_accused():
    """Terms of 1e8 cancel: values are wrong by 1e-8, which their size of 1 does not show."""
    f, _ = FUNCTIONS["terms that cancel"]
    for x in np.random.default_rng(0).uniform(0.5, 2.0, 50):
        assert settle(line(f, x), 1.0, 1e-6).verdict in (D.RIGHT, D.FLOAT32)
        assert settle(line(f, x), 1.01, 1e-6).verdict == D.WRONG
        # At the finest steps it stands still, as a staircase of slope zero does.
        assert settle(line(f, x), 0.0, 1e-6).verdict == D.FLOAT32


def test_a_staircase_has_a_slope_of_zero_and_nothing_is_said_of_that_of_the_line_it_follows():
    """floor climbs by one in each unit. Rounding makes such staircases of lines, too."""
    for x in (0.5, 7.5):
        assert settle(line(np.floor, x), 0.0, 1e-6).verdict == D.RIGHT
        assert settle(line(np.floor, x), 1.0, 1e-6).verdict == D.HIDDEN
        assert settle(line(np.floor, x), 1000.0, 1e-6).verdict == D.WRONG


def test_a_zero_is_right_only_if_f_stands_still():
    assert settle(line(lambda x: 1e12 + x, 1.0), 0.0, 1e-6).verdict == D.WRONG
    assert settle(line(lambda x: 1e12 + 0 * x, 1.0), 0.0, 1e-6).verdict == D.RIGHT
    assert settle(line(lambda x: np.maximum(x, 0), -0.1), 0.0, 1e-6).verdict == D.RIGHT


@pytest.mark.parametrize("f, x, slope, verdict", [
    (np.abs, 0.0, 0.3, D.KINK), (np.floor, 2.0, 0.0, D.KINK), (np.sign, 0.0, 0.0, D.KINK),
    (lambda x: np.sqrt(np.abs(x)), 0.0, 0.0, D.KINK), (lambda x: 1e-12 * np.abs(x - 1e5), 1e5, 3e-13, D.KINK),
    (lambda x: np.sqrt(x), 0.0, 0.0, D.NOT_FINITE), (lambda x: np.sin(x) + 1e13, 1.0, math.cos(1.0), D.HIDDEN),
    (lambda x: np.sin(1e14 * x), 1.0, 0.0, D.HIDDEN), (lambda x: np.sin(1e14 * x), 1.0, 6e13, D.HIDDEN),
    (lambda x: np.sin(x.astype(np.float32)).astype(np.float64), 0.3, math.cos(0.3), D.FLOAT32),
    (lambda x: x + np.sin(x.astype(np.float32)), 0.3, 1 + math.cos(0.3), D.FLOAT32),
])  # fmt: skip
def test_why_nothing_can_be_said_is_said(f, x, slope, verdict):
    with np.errstate(invalid="ignore"):
        quiet = lambda x: None if not np.isfinite(f(x)).all() else f(x)
        assert settle(line(quiet, x), slope, 1e-6).verdict == verdict
