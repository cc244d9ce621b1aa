"""Patterns of wrong gradients: each is named, and what has no pattern gets no name."""

import numpy as np
import pytest
from hypothesis import given
from strategies import rngs

from minilora.mistakes import GradientError, pattern, shape_mistake

D = np.random.default_rng(0).normal(size=(5, 5))


@pytest.mark.parametrize("wrong, named", [
    (0 * D, "the gradient is zero everywhere"),
    (-D, "the sign is wrong"),
    (D / 2, "each is 0.5 times the derivative: is a factor of 2 missing?"),
    (1.5 * D, "each is 1.5 times the derivative: is a factor of 1.5 too much?"),
    (-3 * D, "each is -3 times the derivative: sign and factor are wrong"),
    (D.T, "it is the transpose of the derivative"),
    (np.roll(D, 1, 0), "it is the derivative shifted by +1 along axis 0"),
    (np.roll(D, -1, 1), "it is the derivative shifted by -1 along axis 1"),
])  # fmt: skip
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_a_pattern_is_named_at_any_scale(wrong, named, scale):
    assert pattern(scale * wrong, scale * D).startswith(named)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_forgotten_sum_or_mean_over_an_axis_is_named(axis):
    total = np.broadcast_to(D.sum(axis, keepdims=True), D.shape)
    assert pattern(D, total) == f"the derivative is this gradient summed over axis {axis}"
    assert pattern(D, total / 5) == f"the derivative is this gradient averaged over axis {axis}"


@given(rngs)
def test_what_has_no_pattern_gets_no_name(rng):
    a, b = rng.normal(size=(2, 4, 5))
    assert pattern(a, b) is None and pattern(a, 0 * b) is None
    one = b.copy()
    one[1, 2] *= 2
    assert pattern(one, b) is None


def test_a_hundredth_beside_a_pattern_is_no_pattern():
    assert pattern(D.T + 0.01, D) is None and pattern(D.T + 0.01, D, error=0.02) is not None


@pytest.mark.parametrize("got, wanted, hint", [
    ((2, 3), (3,), "sum it over axis 0, along which the input was broadcast"),
    ((2, 3), (1, 3), "sum it over axis 0, along which the input was broadcast"),
    ((4, 2, 3), (2, 1), "sum it over axes 0 and 2, along which the input was broadcast"),
    ((2, 3), (3, 2), "it is the shape of the transpose"),
    ((3,), (2, 3), "an axis is missing: is it summed over too many, or without keepdims?"),
    ((2, 3), (5,), None), ((4,), (5,), None), ((2, 3), (2, 4), None),
])  # fmt: skip
def test_a_wrong_shape_is_explained_where_it_can_be(got, wanted, hint):
    assert shape_mistake(got, wanted) == hint


def test_an_error_has_all_its_attributes_and_no_others():
    error = GradientError("why", input="input 0", index=(1,))
    assert (str(error), error.input, error.index, error.seed, error.pattern) == ("why", "input 0", (1,), None, None)
    assert isinstance(error, AssertionError)
    with pytest.raises(TypeError, match="no .'where'.; it has"):
        GradientError("why", where=3)
