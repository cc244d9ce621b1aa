"""Large inputs: directions whose terms are of one size, what they find, and how it is traced to an element."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import arrays, rngs, shapes

from minilora import check_vjp
from minilora.directions import LEVELS, components, direction, ends, equalized, scale
from minilora.gradcheck import GradientError

square = lambda x: x * x

# --- large inputs ----------------------------------------------------------------------------------------------------


def test_large_inputs_go_along_directions_and_count_every_number():
    x = np.random.default_rng(0).normal(size=(60, 50))
    calls = []

    def f(x):
        calls.append(1)
        return np.sin(x)

    vjp = lambda dy, x: (dy * np.cos(x),)
    assert check_vjp(f, vjp, x).compared == 3000 and len(calls) < 60
    assert check_vjp(f, vjp, x, directions=1).compared == 3000
    calls.clear()
    assert check_vjp(f, vjp, x, max_elements=3000).compared == 3000 and len(calls) > 6000


@pytest.mark.parametrize("factor", [1.001, -1.0, 0.0, 2.0])
@pytest.mark.parametrize("which", ["one", "one row", "one column", "all"])
def test_in_a_large_input_an_element_that_is_wrong_is_named(factor, which):
    x = np.random.default_rng(0).normal(size=(60, 50))
    wrong = {"one": (7, 11), "one row": (7,), "one column": (slice(None), 11), "all": (slice(None),)}[which]
    is_wrong = np.zeros(x.shape, bool)
    is_wrong[wrong] = True

    def vjp(dy, x):
        return dy * np.cos(x) * np.where(is_wrong, factor, 1.0)

    with pytest.raises(GradientError, match=r"at input 0\[\d+, \d+\]\n\d+ of the \d+ looked at") as caught:
        check_vjp(np.sin, vjp, x)
    assert is_wrong[caught.value.index] and caught.value.of < 20 and caught.value.wrong <= caught.value.of
    assert caught.value.analytic == pytest.approx(factor * caught.value.numerical, rel=1e-5, abs=1e-9)


@given(rngs, st.integers(0, 2999), st.sampled_from([-1.0, 0.0, 2.0]))
def test_a_single_wrong_element_is_found_by_any_generator(rng, i, factor):
    x = np.random.default_rng(0).normal(size=3000) + 3

    def vjp(dy, x):
        d = 2 * x * dy
        d[i] *= factor
        return d

    with pytest.raises(GradientError) as caught:
        check_vjp(square, vjp, x, rng=rng)
    assert caught.value.index == (i,)


@given(rngs)
def test_no_generator_accuses_a_right_gradient_of_a_large_input(rng):
    x = np.random.default_rng(0).normal(size=3000) * 10.0 ** (np.arange(3000) % 7 - 3)
    assert check_vjp(np.sin, lambda dy, x: dy * np.cos(x), x, rng=rng).compared == 3000
    assert check_vjp(lambda x: np.sin(x).sum(), lambda dy, x: dy * np.cos(x), x, rng=rng)


def test_where_no_element_can_be_named_the_seed_of_the_direction_is():
    """What the numbers do together is wrong, and what each does alone is hidden by rounding."""
    n = 10_000
    x = np.random.default_rng(0).normal(size=n)
    f = lambda x: 1e10 + np.sin(x).sum()
    assert check_vjp(f, lambda dy, x: dy * np.cos(x), x, rtol=1e-4)
    with pytest.raises(GradientError) as caught:
        check_vjp(f, lambda dy, x: dy * np.cos(x) * (1 + 1e-5), x)
    error = caught.value
    assert error.index is None and "no single one was found wrong" in str(error)
    assert f"direction(x, {error.seed}" in str(error) and direction(x, error.seed).shape == x.shape


def test_a_direction_is_what_its_seed_says():
    x = np.array([[0.5, -3.0], [0.0, 1e6]])
    v = direction(x, 7)
    assert np.array_equal(v, direction(x, 7)) and not np.array_equal(v, direction(x, 8))
    assert ((np.abs(v) >= 0.5 * np.maximum(1, np.abs(x))) & (np.abs(v) <= np.maximum(1, np.abs(x)))).all()
    assert (np.abs(direction(x, 7, relative=True)[0]) <= np.abs(x[0])).all()


@given(arrays(shapes(1, 2), 0.0, 1.0), rngs)
def test_terms_are_brought_to_one_size_but_for_those_too_small(size, rng):
    size = size.reshape(-1) * 10.0 ** rng.integers(-9, 1, size.size) * rng.integers(0, 2, size.size)
    v = components(rng, size.size)
    equal, small = equalized(v, size)
    terms = np.abs(equal / v) * size
    others = np.setdiff1d(np.arange(size.size), small)
    assert (np.sign(equal) == np.sign(v)).all() and (np.abs(equal) <= np.abs(v)).all()
    moved = others[size[others] > 0]
    assert np.allclose(terms[moved], terms[moved][:1]) if moved.size else not size.any()
    if small.size:
        assert size[small].max() < 2.0**-13 * size.max() and (size[size == 0].size == 0 or 0 in size[small])
    else:
        assert (size[size > 0] >= 2.0**-13 * size.max()).all()


def test_no_component_is_small_and_both_signs_occur():
    u = components(np.random.default_rng(0), 10_000)
    assert 0.5 <= np.abs(u).min() and np.abs(u).max() <= 1 and abs(np.sign(u).mean()) < 0.05


def test_sizes_are_those_of_the_elements():
    x = np.array([0.0, -0.5, 4.0])
    assert np.array_equal(scale(x), [1, 1, 4]) and np.array_equal(scale(x, relative=True), [1.5, 0.5, 4])
    assert np.array_equal(scale(np.zeros(2), relative=True), [1, 1])


@given(shapes(0, 3))
def test_the_ends_are_the_first_and_last_along_each_axis(shape):
    expected = np.zeros(shape, bool)
    for axis, n in enumerate(shape):
        for end in (0, n - 1):
            expected[(slice(None),) * axis + (end,)] = True
    assert np.array_equal(ends(shape), np.flatnonzero(expected))


@pytest.mark.parametrize("n", [2, 5])
def test_errors_of_several_elements_do_not_cancel_in_every_direction(n):
    """The bound: of each direction they escape with a probability of 10.6 rtol √n / ρ, here below 1e-3."""
    x = np.random.default_rng(0).normal(size=4000) + 4
    for seed in range(60):
        wrong = np.random.default_rng(seed).permutation(x.size)[:n]

        def vjp(dy, x, wrong=wrong):
            d = 2 * x * dy
            d[wrong] *= -1
            return d

        with pytest.raises(GradientError) as caught:
            check_vjp(square, vjp, x, rng=np.random.default_rng(seed))
        assert caught.value.index[0] in wrong


def test_elements_of_every_size_are_seen_among_their_like():
    """Gradients over twelve orders of magnitude: the smallest, negated, would vanish in a sum over all."""
    x = 10.0 ** np.linspace(-12, 0, 5000)
    f = lambda x: x * x
    assert check_vjp(f, lambda dy, x: 2 * x * dy, x).compared == 5000
    for i in (0, 1000, 2500, 4999):

        def vjp(dy, x, i=i):
            d = 2 * x * dy
            d[i] *= -1
            return d

        with pytest.raises(GradientError) as caught:
            check_vjp(f, vjp, x)
        assert caught.value.index == (i,)
    assert 2.0 ** (-13 * LEVELS) < 1e-11 and math.isclose(x[0], 1e-12)


def test_a_relu_with_many_exact_zeros_is_compared_beside_them():
    x = np.random.default_rng(0).normal(size=5000)
    x[::7] = 0.0
    report = check_vjp(lambda x: np.maximum(x, 0), lambda dy, x: dy * (x > 0), x)
    assert report.skipped == np.count_nonzero(x == 0) and report.compared == 5000 - report.skipped
    assert "f has a kink there, first at input 0[" in report.reasons[0]


def test_a_large_input_outside_the_domain_of_one_side_is_not_an_accusation():
    x = np.linspace(0.0, 1.0, 3000)
    report = check_vjp(np.sqrt, lambda dy, x: dy * 0.5 / np.sqrt(np.where(x == 0, 1.0, x)), x)
    assert (report.compared, report.skipped) == (2999, 1) and "not finite, or fails, beside it" in report.reasons[0]
