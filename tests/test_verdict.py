"""The verdict from differences at many steps: right, wrong, or a reason, each by its evidence."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_differences import FUNCTIONS, line

from minilora import verdict as V
from minilora.verdict import settle


@pytest.mark.parametrize("off", [1e-5, -1e-5, 1e-3, 1.0, -2.0])
@pytest.mark.parametrize("name", ["sin", "exp", "cube", "reciprocal", "log"])
def test_a_right_slope_is_right_and_one_off_is_wrong(name, off):
    f, slope = FUNCTIONS[name]
    for x in (0.3, 1.7, 40.0):
        assert settle(line(f, x), slope(x), 1e-6).verdict == V.RIGHT
        assert settle(line(f, x), slope(x) * (1 + off), 1e-6).verdict == V.WRONG


def test_where_rounding_is_worse_than_its_bound_nobody_is_accused():
    """Terms of 1e8 cancel: values are wrong by 1e-8, which their size of 1 does not show."""
    f, _ = FUNCTIONS["terms that cancel"]
    for x in np.random.default_rng(0).uniform(0.5, 2.0, 50):
        assert settle(line(f, x), 1.0, 1e-6).verdict in (V.RIGHT, V.FLOAT32)
        assert settle(line(f, x), 1.01, 1e-6).verdict == V.WRONG
        # At the finest steps it stands still, as a staircase of slope zero does.
        assert settle(line(f, x), 0.0, 1e-6).verdict == V.FLOAT32


def test_a_staircase_has_a_slope_of_zero_and_nothing_is_said_of_that_of_the_line_it_follows():
    """floor climbs by one in each unit. Rounding makes such staircases of lines, too."""
    for x in (0.5, 7.5):
        assert settle(line(np.floor, x), 0.0, 1e-6).verdict == V.RIGHT
        assert settle(line(np.floor, x), 1.0, 1e-6).verdict == V.HIDDEN
        assert settle(line(np.floor, x), 1000.0, 1e-6).verdict == V.WRONG


def test_a_zero_is_right_only_if_f_stands_still():
    assert settle(line(lambda x: 1e12 + x, 1.0), 0.0, 1e-6).verdict == V.WRONG
    assert settle(line(lambda x: 1e12 + 0 * x, 1.0), 0.0, 1e-6).verdict == V.RIGHT
    assert settle(line(lambda x: np.maximum(x, 0), -0.1), 0.0, 1e-6).verdict == V.RIGHT


@pytest.mark.parametrize("f, x, slope, verdict", [
    (np.abs, 0.0, 0.3, V.KINK), (np.floor, 2.0, 0.0, V.KINK), (np.sign, 0.0, 0.0, V.KINK),
    (lambda x: np.sqrt(np.abs(x)), 0.0, 0.0, V.KINK), (lambda x: 1e-12 * np.abs(x - 1e5), 1e5, 3e-13, V.KINK),
    (lambda x: np.sqrt(x), 0.0, 0.0, V.NOT_FINITE), (lambda x: np.sin(x) + 1e13, 1.0, math.cos(1.0), V.HIDDEN),
    (lambda x: np.sin(1e14 * x), 1.0, 0.0, V.HIDDEN), (lambda x: np.sin(1e14 * x), 1.0, 6e13, V.HIDDEN),
    (lambda x: np.sin(x.astype(np.float32)).astype(np.float64), 0.3, math.cos(0.3), V.FLOAT32),
    (lambda x: x + np.sin(x.astype(np.float32)), 0.3, 1 + math.cos(0.3), V.FLOAT32),
])  # fmt: skip
def test_why_nothing_can_be_said_is_said(f, x, slope, verdict):
    with np.errstate(invalid="ignore"):
        quiet = lambda x: None if not np.isfinite(f(x)).all() else f(x)
        assert settle(line(quiet, x), slope, 1e-6).verdict == verdict


@given(x=st.floats(0.5, 2.0), k=st.integers(-900, 900), wrong=st.sampled_from([1.0, 1 + 1e-5, 0.0, -1.0]))
def test_the_verdict_does_not_depend_on_what_f_is_multiplied_by(x, k, wrong):
    scaled = line(lambda x: 2.0**k * np.sin(x), x)
    verdict = settle(scaled, 2.0**k * wrong * math.cos(x), 1e-6).verdict
    assert verdict == (V.RIGHT if wrong == 1.0 else V.WRONG)
