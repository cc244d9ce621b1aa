"""The gradient checker as a product: its verdicts, what it names, and that it raises no false alarm."""

import functools
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compared import functions as table
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import arrays, rngs, shapes

from minilora import Tensor, check_vjp, gradcheck, no_grad
from minilora import functional as F
from minilora.backend import to_device
from minilora.gradcheck import CannotCompareError, GradientError, Report

ROOT = Path(__file__).resolve().parent.parent

square = lambda x: x * x
square_vjp = lambda dy, x: (2 * x * dy,)
zero_vjp = lambda dy, *xs: tuple(np.zeros_like(x) for x in xs)

# --- the table of functions ------------------------------------------------------------------------------------------

SMALL = [*table.SMALL, *table.SCALED, *table.UNDECIDED, *table.WRONG]
# No larger than takes a moment; .ci/run asks for five million.
LARGEST = int(os.environ.get("LARGEST", 500_000))
LARGE_NAMES = [row.name for row in table.large(LARGEST)]


def verdict(f, vjp, *inputs):
    """(one of the three verdicts, the report or the error)."""
    try:
        report = check_vjp(f, vjp, *inputs)
    except GradientError as error:
        return table.REJECT, error
    except ValueError as error:
        return table.CANNOT, error
    return table.ACCEPT, report


def check_row(row, scale):
    found, said = verdict(*row.make(scale), *[np.array(x) for x in row.inputs])
    assert found == row.verdict, str(said)
    if found == table.ACCEPT:
        assert said.skipped == row.skipped and said.worst <= 1e-6
        assert said.compared == sum(np.size(x) for x in row.inputs) - row.skipped
    if found == table.REJECT:
        assert abs(said.analytic - said.numerical) > said.allowed


def test_the_table_is_large_and_its_names_differ():
    assert len(table.SMALL) + len(table.SCALED) >= 60 and len(table.UNDECIDED) >= 20 and len(table.WRONG) >= 100
    names = [row.name for row in SMALL] + LARGE_NAMES
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", SMALL, ids=lambda row: row.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_function_gets_the_verdict_it_is_owed_whatever_it_is_multiplied_by(row):
    for scale in (1.0, 1e-30, 1e30):
        check_row(row, scale)


@functools.cache
def large_rows():
    return {row.name: row for row in table.large(LARGEST)}


# The largest are asked once, the others at another scale too.
ONCE = [name for name in LARGE_NAMES if "million" in name or "M numbers" in name]
SEVERAL = [name for name in LARGE_NAMES if name not in ONCE]


@pytest.mark.parametrize("name, scale", [*[(name, 1.0) for name in LARGE_NAMES],
                                         *zip(SEVERAL, itertools.cycle([1e-30, 1e30]), strict=False)])  # fmt: skip
def test_so_does_a_function_of_many_numbers(name, scale):
    check_row(large_rows()[name], scale)


@pytest.mark.parametrize("row", table.SMALL, ids=lambda row: row.name)
def test_no_seed_accuses_a_right_gradient(row):
    for seed in range(1, 4):
        assert check_vjp(*row.make(1.0), *row.inputs, rng=np.random.default_rng(seed)).skipped == row.skipped


# --- what passes -----------------------------------------------------------------------------------------------------


def test_a_right_gradient_gives_a_report_that_is_true_and_says_how_much_was_compared():
    report = check_vjp(square, square_vjp, np.ones((2, 3)))
    assert isinstance(report, Report) and report and report.compared == 6 and 0 <= report.worst < 1e-6
    assert report.skipped == 0 and report.reasons == ()


@given(arrays(shapes(max_dims=2)), arrays(shapes(max_dims=2)), st.booleans())
def test_several_inputs_of_any_shape_and_outputs_of_any_shape(x, w, scalar):
    """Also 0-d inputs, numbers as outputs, and lists of gradients."""
    if scalar:
        f = lambda x, w: float(np.sum(x * x) * np.sum(w))
        vjp = lambda dy, x, w: [2 * x * w.sum() * dy, np.full(w.shape, (x * x).sum() * dy)]
    else:
        f = lambda x, w: np.multiply.outer(np.sin(x), w)
        vjp = lambda dy, x, w: (
            np.cos(x) * np.tensordot(dy, w, w.ndim), np.tensordot(np.sin(x), dy, x.ndim))  # fmt: skip
    report = check_vjp(f, vjp, x, w)
    assert report.compared + report.skipped == x.size + w.size
    with pytest.raises(GradientError, match="input 1"):
        check_vjp(f, lambda dy, x, w: (vjp(dy, x, w)[0], 1.001 * vjp(dy, x, w)[1] + 1e-3), x, w)


@pytest.mark.parametrize("x", [np.array(3.0), 3.0, np.float64(3.0)], ids=["0-d array", "float", "np.float64"])
@pytest.mark.parametrize("bare", [True, False])
def test_a_single_number_may_be_the_input_and_its_gradient_may_come_bare(x, bare):
    assert check_vjp(square, lambda dy, x: 2 * x * dy if bare else (2 * x * dy,), x).compared == 1
    with pytest.raises(GradientError, match="at input 0\n1 of 1 numbers is wrong: each is 1.001 times"):
        check_vjp(square, lambda dy, x: 2.002 * x * dy if bare else (2.002 * x * dy,), x)


def test_a_single_gradient_may_come_bare():
    assert check_vjp(square, lambda dy, x: 2 * x * dy, np.ones((1, 3))).compared == 3


SMOOTH = {
    "exp": (np.exp, np.exp, [-5.0, 0.0, 5.0]),
    "square": (square, lambda x: 2 * x, [-1.0, 0.0, 1e-13, 1e3]),
    "cube": (lambda x: x * x * x, lambda x: 3 * x * x, [-2.0, 0.0, 1e-7, 1e-5, 1e-3, 1e3]),
    "fourth power": (lambda x: x**4, lambda x: 4 * x**3, [0.0, 1e-5, 1e-2, 1e3]),
    "log": (np.log, lambda x: 1 / x, [1e-12, 1e-3, 1.0, 1e3]),
    "sqrt": (np.sqrt, lambda x: 0.5 / np.sqrt(x), [1e-12, 1e-3, 1.0, 1e3]),
    "reciprocal": (lambda x: 1 / x, lambda x: -1 / (x * x), [-1e-9, 1e-3, 1.0, 1e3]),
    "sin": (np.sin, np.cos, [0.0, np.pi / 3, 1e3, 1e6]),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2, [0.0, 5.0, 30.0]),
    "linear": (lambda x: 3 * x, lambda x: 3 + 0 * x, [0.0, 1e3, 1e9]),
    "line far from zero": (lambda x: x + 1000.0, lambda x: 1 + 0 * x, [0.0, 1.0]),
    "floor": (np.floor, lambda x: 0 * x, [0.5, 1000.5]),
    "constant": (lambda x: 0 * x + 7.0, lambda x: 0 * x, [0.0, 1.0]),
    "sum of a softmax": (lambda x: softmax(x).sum(), lambda x: 0 * x, [0.0, 0.3, 1.0]),
}


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("name, point", [(name, x) for name, (*_, xs) in SMOOTH.items() for x in xs])
def test_no_false_alarm_on_a_smooth_function(name, point):
    f, slope, _ = SMOOTH[name]
    report = check_vjp(f, lambda dy, x: (dy * slope(x),), np.array([point, point * 1.25]))
    assert (report.compared, report.skipped) == (2, 0)


@given(rngs, shapes(1, 2))
def test_no_false_alarm_on_a_random_smooth_function(rng, shape):
    """A sum of sines with random amplitudes, frequencies and phases, at a random point."""
    a, w, p = rng.normal(size=(3, 4))
    f = lambda x: sum(a[i] * np.sin(w[i] * x + p[i]) for i in range(4))
    slope = lambda x: sum(a[i] * w[i] * np.cos(w[i] * x + p[i]) for i in range(4))
    x = rng.normal(size=shape) * rng.choice([1e-3, 1.0, 1e2])
    assert check_vjp(f, lambda dy, x: (dy * slope(x),), x)


@given(rngs)
def test_no_false_alarm_on_a_sum_whose_terms_cancel(rng):
    """The slope is zero and the values are not: all that moves is rounding, in f and in its vjp."""
    x = rng.normal(size=(2, 3))
    f = lambda x: np.array([softmax(row).sum() for row in x])

    def vjp(dy, x):
        return np.array([softmax(row) * (d - (softmax(row) * d).sum()) for row, d in zip(x, dy, strict=True)])

    assert check_vjp(f, zero_vjp, x).compared == 6
    assert check_vjp(f, vjp, x).compared == 6


@given(rngs)
def test_any_generator_gives_a_cotangent_that_shows_a_thousandth(rng):
    assert check_vjp(square, square_vjp, np.ones(3), rng=rng)
    with pytest.raises(GradientError):
        check_vjp(square, lambda dy, x: (2.002 * x * dy,), np.ones(3), rng=rng)


def test_what_cannot_be_compared_is_counted_and_named_and_not_counted_as_compared():
    relu = lambda x: np.maximum(x, 0)
    report = check_vjp(relu, lambda dy, x: (dy * (x > 0),), np.array([1.3, 0.0, -1.0, 0.0]))
    assert (report.compared, report.skipped) == (2, 2)
    (reason,) = report.reasons
    assert "2 of input 0: f has a kink there, first at input 0[1]" in reason and "move the input away" in reason


def test_a_larger_rtol_compares_what_rounding_hides_from_a_smaller():
    f = lambda x: x * 1e-9 + 1e3 * np.cos(1e-3 * x)
    vjp = lambda dy, x: (dy * (1e-9 - np.sin(1e-3 * x)),)
    flat = np.array([1e-6, 1e-6 * (1 + 1e-6)])
    with pytest.raises(CannotCompareError, match="rounding hides the slope.*larger rtol"):
        check_vjp(lambda x: np.sin(x) + 1e13, lambda dy, x: dy * np.cos(x), np.array([1.0]))
    assert check_vjp(lambda x: np.sin(x) + 1e9, lambda dy, x: dy * np.cos(x), np.array([1.0]), rtol=1e-3).compared == 1
    assert check_vjp(f, vjp, flat, rtol=1e-2)


def soft(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


logistic = lambda x: 1 / (1 + np.exp(-x))
erf = np.vectorize(math.erf)
erfc = np.vectorize(math.erfc)
# Right gradients of formulas that lose digits inside: saturated, cancelling, or in fewer digits. What can be seen of
# them differs; that they are wrong may never be said.
ROUNDED = {
    "a saturated softmax": (soft, lambda dy, z: soft(z) * (dy - (soft(z) * dy).sum()), [0.0, -200.0]),
    "log-sum-exp less its largest": (
        lambda z: np.log(np.exp(z - z.max()).sum()) + z.max() - z[0],
        lambda dy, z: dy * (soft(z) - np.array([1.0, 0.0])), [0.0, -40.0]),
    "softplus far below zero": (lambda z: np.log(1 + np.exp(z)), lambda dy, z: dy * logistic(z), [-40.0, -33.0]),
    "one less a sigmoid": (lambda x: 1 - logistic(x), lambda dy, x: -dy * logistic(x) * logistic(-x), [40.0]),
    "log of a sigmoid": (lambda x: np.log(logistic(x)), lambda dy, x: dy * logistic(-x), [100.0]),
    "log of a tanh": (lambda x: np.log(np.tanh(x)), lambda dy, x: dy * 2 / np.sinh(2 * x), [100.0]),
    "gelu by erf, far below zero": (
        lambda x: 0.5 * x * (1 + erf(x / 2**0.5)),
        lambda dy, x: dy * (0.5 * erfc(-x / 2**0.5) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)), [-8.2, -9.0, -7.0]),
    "one less a cosine": (lambda x: 1 - np.cos(x), lambda dy, x: dy * np.sin(x), [1e-9, 1e-5]),
    "one less a cosine, over x squared": (
        lambda x: (1 - np.cos(x)) / x**2,
        lambda dy, x: dy * (np.sin(x) / x**2 - 4 * np.sin(x / 2) ** 2 / x**3), [1e-3, 1e-2]),
    "log of a sum with one": (lambda x: np.log(1 + x * x), lambda dy, x: dy * 2 * x / (1 + x * x), [1e-9, 1e-4]),
    "log of cosh": (lambda x: np.log(np.cosh(x)), lambda dy, x: dy * np.tanh(x), [1e-8, 1.3e-4]),
    "log of one and x, over x": (
        lambda x: np.log(1 + x) / x, lambda dy, x: dy * (1 / (x * (1 + x)) - np.log1p(x) / x**2), [3.7e-6, 0.1]),
    "a distance by its square": (
        lambda x: np.sqrt(np.maximum(x * x - 2e4 * x + 1e8, 0)), lambda dy, x: dy * np.sign(x - 1e4), [1e4 + 1e-4]),
    "a slow body's energy in relativity": (
        lambda v: 9e16 * (1 / np.sqrt(1 - (v / 3e8) ** 2) - 1), lambda dy, v: dy * v / (1 - (v / 3e8) ** 2) ** 1.5,
        [10.0, 1000.0, 3e5]),
    "float32 inside": (lambda x: np.sin(x.astype(np.float32)).astype(float), lambda dy, x: dy * np.cos(x),
                       [0.01, 0.0037, 0.013, 130.0]),
    "float16 inside": (lambda x: (x.astype(np.float16) ** 2).astype(float), lambda dy, x: 2 * dy * x, [1.0, 2.0, 3.0]),
    "three decimals": (lambda x: np.round(x, 3), lambda dy, x: dy, [0.3, 1.7]),
    "nothing but rounding": (
        lambda x: np.dot([0.3, 0.7], (x + x[::-1]) - (x + x[::-1]).mean()),
        lambda dy, x: (lambda u: u + u[::-1])(dy * np.array([0.3, 0.7]) - (dy * np.array([0.3, 0.7])).mean()),
        [0.1, -0.2]),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUNDED)
def test_a_right_gradient_is_not_accused_where_digits_are_lost(name):
    f, vjp, x = ROUNDED[name]
    for scale in (1.0, 1e-30, 1e30):
        scaled = lambda x, s=scale: s * f(x)
        found, said = verdict(scaled, lambda dy, x, s=scale: vjp(s * dy, x), np.array(x))
        assert found != table.REJECT, str(said)


@pytest.mark.parametrize("scale", [20, 50, 100, 300])
def test_no_softmax_is_accused_however_saturated(scale):
    vjp = lambda dy, z: soft(z) * (dy - (soft(z) * dy).sum(-1, keepdims=True))
    for seed in range(6):
        # A large one goes along directions, and takes its time.
        for shape in ((4, 6), (60, 50))[: 2 if seed == 0 else 1]:
            z = np.random.default_rng(seed).normal(size=shape) * scale
            assert verdict(soft, vjp, z)[0] != table.REJECT


@settings(max_examples=10)
@given(rngs, st.sampled_from([0.0, 1e4, 1e8, 1e10]), st.sampled_from([np.sin, np.tanh, np.exp]))
def test_a_loss_beside_a_large_number_is_never_accused_and_counts_add_up(rng, offset, f):
    x = rng.normal(size=2500) * 10.0 ** rng.integers(-3, 2)
    slope = {np.sin: np.cos, np.tanh: lambda x: 1 / np.cosh(x) ** 2, np.exp: np.exp}[f]
    w = rng.normal(size=x.size)
    found, said = verdict(lambda x: offset + (w * f(x)).mean(), lambda dy, x: dy * w * slope(x) / x.size, x)
    assert found != table.REJECT, str(said)
    if found == table.ACCEPT:
        assert said.compared + said.skipped == x.size and said.worst <= 1e-6


ZERO_IS_WRONG = {
    "log of one and x": (lambda x: np.log(1 + x), 1e-12), "log of cosh": (lambda x: np.log(np.cosh(x)), 1.3e-4),
    "cosh less one": (lambda x: np.cosh(x) - 1, 1.3e-4),
    "a sum that takes it back": (lambda x: (x + 1e6) - 1e6, 3.7e-6),
    "float32 inside": (lambda x: np.sin(x.astype(np.float32)).astype(float), 3.7e-4),
}  # fmt: skip


@pytest.mark.parametrize("name", ZERO_IS_WRONG)
def test_a_zero_is_not_right_because_the_finest_steps_are_lost(name):
    f, x = ZERO_IS_WRONG[name]
    assert verdict(f, zero_vjp, np.array([x]))[0] != table.ACCEPT


MASKLESS = {
    "relu": lambda x: np.maximum(x, 0), "its sum": lambda x: np.maximum(x, 0).sum(),
    "clip": lambda x: np.clip(x, -0.4, 5), "where": lambda x: np.where(x > 0, x, 0.0), "largest": lambda x: x.max(),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKLESS)
@pytest.mark.parametrize("x", [[-0.5, -1.2], [0.3, -0.5, 2.0], [-100.0, -3.0]])
def test_a_slope_where_f_stands_still_is_wrong(name, x):
    """The vjp that forgot its mask."""
    with pytest.raises(GradientError):
        check_vjp(MASKLESS[name], lambda dy, x: dy * np.ones_like(x), np.array(x))


# --- what is caught --------------------------------------------------------------------------------------------------


def test_the_error_carries_the_input_the_index_and_both_values():
    def vjp(dy, a, b):
        db = a * dy
        db[1, 2] += 0.25
        return b * dy, db

    a, b = np.random.default_rng(0).uniform(1, 2, (2, 2, 3))
    with pytest.raises(GradientError) as caught:
        check_vjp(lambda a, b: a * b, vjp, a, b)
    error = caught.value
    assert (error.input, error.index, error.wrong, error.of, error.pattern) == ("input 1", (1, 2), 1, 6, None)
    assert error.analytic - error.numerical == pytest.approx(0.25, rel=1e-6) and 0 < error.allowed < 1e-5
    first, second = str(error).split("\n")
    shown = [float(first.split(word)[1].split()[0].strip(",")) for word in ("gradient ", "differences ", "allowed ")]
    assert shown == pytest.approx([error.analytic, error.numerical, error.allowed], rel=0.05)
    assert first.endswith("at input 1[1, 2]") and second == "1 of 6 numbers is wrong"


@pytest.mark.parametrize("scale", [1e-300, -1.23456789e-30, 1.0, -9.87654321e300])
def test_the_numbers_stand_in_the_first_eighty_characters(scale):
    """Where pytest cuts its summary line, with the name of the input, however long, behind them."""
    deep = {"a layer with quite a long name": [{"and a weight in it": np.full((2, 2), 1.5)}]}
    name = lambda x: x["a layer with quite a long name"][0]["and a weight in it"]
    with pytest.raises(GradientError) as caught:
        check_vjp(lambda x: scale * name(x), lambda dy, x: ({"a layer with quite a long name": [
            {"and a weight in it": 3 * scale * dy}]},), deep)  # fmt: skip
    start = str(caught.value)[:80]
    assert all(f"{number:.9g}" in start for number in (caught.value.analytic, caught.value.numerical))
    assert "allowed" in start and caught.value.input in str(caught.value)


PATTERNS = {
    "the sign is wrong": (np.sin, lambda dy, x: -dy * np.cos(x)),
    "each is 0.5 times the derivative: is a factor of 2 missing?": (square, lambda dy, x: dy * x),
    "each is 3 times the derivative: is a factor of 3 too much?": (np.exp, lambda dy, x: 3 * dy * np.exp(x)),
    "the gradient is zero everywhere": (np.sin, lambda dy, x: 0 * x),
    "it is the transpose of the derivative": (lambda x: x.T, lambda dy, x: dy),
    "it is the derivative shifted by -2": None,
    "it is the derivative shifted by +1 along axis 0": (
        lambda x: np.roll(x, 1, 0), lambda dy, x: dy),
    "the derivative is this gradient averaged over axis 1": (
        lambda x: np.tile(x.mean(1, keepdims=True), (1, 5)), lambda dy, x: dy),
    "the derivative is this gradient summed over axis 0": (
        lambda x: np.tile(x.sum(0, keepdims=True), (5, 1)), lambda dy, x: dy),
}  # fmt: skip


@pytest.mark.parametrize("pattern", [name for name, case in PATTERNS.items() if case])
def test_the_kind_of_mistake_is_named(pattern):
    f, vjp = PATTERNS[pattern]
    x = np.random.default_rng(0).normal(size=(5, 5))
    with pytest.raises(GradientError) as caught:
        check_vjp(f, vjp, x)
    assert pattern in str(caught.value) and pattern in caught.value.pattern and caught.value.wrong > 1


def test_a_sum_that_was_forgotten_is_named_by_its_axis():
    b = np.ones(3)
    with pytest.raises(GradientError, match=r"shape \(3,\).*shape \(2, 3\): sum it over axis 0") as caught:
        check_vjp(lambda x, b: x + b, lambda dy, x, b: (dy, dy), np.ones((2, 3)), b)
    assert caught.value.input == "input 1" and "axis 0" in caught.value.pattern


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size, where", [(1, 0), (3, 0), (3, 2), (5000, 4000)])
def test_a_gradient_that_is_not_finite_is_an_error_at_its_index(bad, size, where):
    def vjp(dy, x):
        dx = 2 * x * dy
        dx[where] = bad
        return (dx,)

    with pytest.raises(GradientError, match=rf"{bad} at input 0\[{where}\]") as caught:
        check_vjp(square, vjp, np.ones(size))
    assert caught.value.index == (where,)


@pytest.mark.parametrize("gradients", [(), (1.0, 2.0), None, "x", {0: 1.0}], ids=repr)
def test_a_wrong_number_of_gradients_is_an_error(gradients):
    with pytest.raises(GradientError, match="one gradient per input: 1 inputs, got"):
        check_vjp(square, lambda dy, x: gradients, np.ones(2))


@pytest.mark.parametrize("gradient", [np.ones(3), np.ones((1, 2)), np.ones(()), 1.0], ids=repr)
def test_a_gradient_of_the_wrong_shape_is_an_error_with_both_shapes(gradient):
    with pytest.raises(GradientError, match=rf"shape \(2,\).*shape {str(np.shape(gradient)).replace('(', '.')[:-1]}"):
        check_vjp(square, lambda dy, x: (gradient,), np.ones(2))


def test_none_is_no_gradient_and_right_where_the_derivative_is_zero():
    assert check_vjp(lambda x, w: x * x, lambda dy, x, w: (2 * x * dy, None), np.ones(2), np.ones(3)).compared == 5
    with pytest.raises(GradientError, match="gradient 0, differences .* at input 1"):
        check_vjp(lambda x, w: x * w, lambda dy, x, w: (w * dy, None), np.ones(2), np.ones(2))


def test_a_vjp_may_spoil_what_it_is_given():
    """It works on copies: the comparison uses the true inputs and the true cotangent."""

    def vjp(dy, x):
        dx = 2 * x * dy
        dy *= 0
        x *= 0
        return (dx,)

    x = np.arange(1.0, 4.0)
    assert check_vjp(square, vjp, x)
    assert np.array_equal(x, [1, 2, 3])


def test_a_function_may_return_the_same_array_from_each_call_or_its_own_input():
    buffer = np.empty(3)

    def into_a_buffer(x):
        np.multiply(x, x, out=buffer)
        return buffer

    x = np.arange(1.0, 4.0)
    assert check_vjp(into_a_buffer, square_vjp, x).compared == 3
    assert check_vjp(lambda x: x, lambda dy, x: dy, x).compared == 3
    assert check_vjp(lambda x, w: w, lambda dy, x, w: (None, dy), x, x).compared == 6
    with pytest.raises(GradientError):
        check_vjp(into_a_buffer, lambda dy, x: x * dy, x)


# --- what cannot be checked is named ---------------------------------------------------------------------------------

KINKS = {
    "|x| at 0, where the symmetric difference agrees by luck": (np.abs, lambda x: np.sign(x), 0.0),
    "relu at 0": (lambda x: np.maximum(x, 0), lambda x: x > 0, 0.0),
    "floor at an integer": (np.floor, lambda x: 0 * x, 2.0),
    "sign at 0": (np.sign, lambda x: 0 * x, 0.0),
    "square root of |x| at 0": (
        lambda x: np.sqrt(np.abs(x)), lambda x: np.where(x > 0, 0.5 / np.sqrt(np.maximum(x, 1e-9)), 0), 0.0),
}  # fmt: skip


@pytest.mark.parametrize("kink", KINKS)
def test_a_point_without_a_derivative_is_named(kink):
    f, slope, x0 = KINKS[kink]
    vjp = lambda dy, x: (dy * slope(x),)
    with pytest.raises(CannotCompareError, match=r"nothing of input 0.*kink there, first at input 0\[0\].*move"):
        check_vjp(f, vjp, np.array([x0]))
    report = check_vjp(f, vjp, np.array([1.3, x0]))
    assert (report.compared, report.skipped) == (1, 1) and "kink there, first at input 0[1]" in report.reasons[0]


@pytest.mark.parametrize("kink", [name for name in KINKS if "by luck" not in name])
def test_a_point_without_a_derivative_is_named_among_many(kink):
    f, slope, x0 = KINKS[kink]
    x = np.full(3000, 1.3)
    x[1] = x0
    report = check_vjp(f, lambda dy, x: (dy * slope(x),), x)
    assert report.compared + report.skipped == 3000 and report.skipped <= 1


@given(st.floats(1e-12, 0.99))
def test_a_kink_nearby_is_never_blamed_on_the_gradient_and_passed_by_a_finer_step(distance):
    x = np.array([distance * 1e-5])
    assert check_vjp(lambda x: np.maximum(x, 0), lambda dy, x: (dy * (x > 0),), x).compared == 1
    with pytest.raises(GradientError):
        check_vjp(lambda x: np.maximum(x, 0), zero_vjp, x)


@pytest.mark.parametrize("slope", [5.0, -1.0, 1.001])
def test_at_a_kink_a_slope_beyond_both_sides_is_wrong(slope):
    with pytest.raises(GradientError):
        check_vjp(lambda x: np.maximum(x, 0), lambda dy, x: slope * dy, np.array([0.0]))


def test_a_function_that_is_not_deterministic_is_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="f is not deterministic.*differ by"):
        check_vjp(lambda x: x * rng.uniform(0.9, 1.1, x.shape), lambda dy, x: (dy,), np.ones(3))
    sizes = itertools.count(1)
    with pytest.raises(ValueError, match="f is not deterministic.*1 numbers against 2"):
        check_vjp(lambda x: np.ones(next(sizes)) * x, lambda dy, x: (dy,), np.ones(1))


def test_a_vjp_that_draws_random_numbers_does_not_pass_for_a_blurred_zero():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="vjp is not deterministic.*input 0 differ by"):
        check_vjp(lambda x: softmax(x).sum(), lambda dy, x: 1e-17 * rng.normal(size=x.shape), np.ones(4) / 3)


@pytest.mark.parametrize("f, x, shown", [
    (np.log, -1.0, "f[0] is nan"), (np.log, 0.0, "f[0] is -inf"), (np.exp, 1e3, "f[0] is inf")])  # fmt: skip
def test_a_function_that_is_not_finite_there_is_named(f, x, shown):
    with np.errstate(all="ignore"), pytest.raises(ValueError) as caught:
        check_vjp(f, zero_vjp, np.array([x]))
    assert "not finite at these inputs" in str(caught.value) and shown in str(caught.value)


def test_a_function_that_is_not_finite_on_one_side_is_named():
    with pytest.raises(CannotCompareError, match=r"or fails, beside it, first at input 0\[0\]: choose inputs inside"):
        check_vjp(np.sqrt, zero_vjp, np.array([0.0]))


def test_a_function_that_raises_beside_its_inputs_is_outside_its_domain_there():
    def strict_root(x):
        if (x < 0).any():
            raise ValueError("negative")
        return np.sqrt(x)

    assert check_vjp(strict_root, lambda dy, x: dy * 0.5 / np.sqrt(x), np.array([1e-9, 2.0])).compared == 2
    with pytest.raises(CannotCompareError, match="not finite, or fails, beside it"):
        check_vjp(strict_root, zero_vjp, np.array([0.0]))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("late", [False, True])
def test_a_function_that_writes_to_its_inputs_is_named(which, late):
    calls = itertools.count()

    def f(*xs):
        if not late or next(calls) > 5:
            xs[which][0] += 1
        return xs[0] * xs[1]

    a, b = np.ones((2, 3))
    with pytest.raises(ValueError, match=f"writes to its input {which}" if not late else "writes to its input"):
        check_vjp(f, lambda dy, a, b: (dy * b, dy * a), a, b)
    assert np.array_equal([a, b], np.ones((2, 3)))  # and the caller's arrays are unharmed


@pytest.mark.parametrize("inputs", [(), (np.zeros((0, 3)),), (np.arange(3),)], ids=["none", "an empty one", "integers"])
def test_a_check_that_would_compare_nothing_is_refused(inputs):
    with pytest.raises(ValueError, match="nothing to compare"):
        check_vjp(lambda *xs: np.ones(2), lambda dy, *xs: [None] * len(xs), *inputs)


def test_a_slope_that_drowns_in_rounding_does_not_pass_for_zero():
    """1e10 + x moves by a few units in the last place at a small step, and by many at a larger one."""
    with pytest.raises(GradientError):
        check_vjp(lambda x: x + 1e10, zero_vjp, np.ones(2))
    assert check_vjp(lambda x: x + 1e10, lambda dy, x: dy, np.ones(2)).compared == 2


def test_a_gradient_three_thousandths_wrong_does_not_pass_because_the_value_is_large():
    with pytest.raises(GradientError):
        check_vjp(lambda x: x + 1e6, lambda dy, x: 1.003 * dy, np.ones(2))
    assert check_vjp(lambda x: x + 1e3, lambda dy, x: dy, np.ones(2))


def test_float32_inside_is_told_from_a_kink():
    x = np.random.default_rng(0).normal(size=5)
    with pytest.raises(CannotCompareError, match="rounded to fewer digits than float64 has.*keep the dtype"):
        check_vjp(lambda x: np.sin(x.astype(np.float32)).astype(np.float64), lambda dy, x: dy * np.cos(x), x)


def test_pytest_shows_the_message_alone(tmp_path):
    """The frames of the checker are hidden, and the summary line has the numbers."""
    test = tmp_path / "test_mine.py"
    test.write_text(
        "import numpy as np\nfrom minilora import check_vjp\n\n"
        "def test_square():\n    check_vjp(lambda x: x * x, lambda dy, x: dy * x, np.ones((20, 20)))\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(test)]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    )
    shown = result.stdout
    assert "gradcheck.py" not in shown and "compare.py" not in shown and len(shown.splitlines()) < 25
    (summary,) = [line for line in shown.splitlines() if line.startswith("FAILED")]
    assert "differences" in summary and "allowed" in summary


# --- functions of Tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_it_takes_tensors_and_arrays_of_any_float_dtype_on_any_backend(xp, dtype):
    def f(x, w):
        assert x.dtype == w.dtype == np.float64 and type(x.data) is xp.ndarray
        return (x @ w).tanh()

    x, w = (to_device(np.full(shape, 0.3, dtype), xp) for shape in ((2, 3), (3, 2)))
    assert gradcheck(f, x, w).compared == 12
    if dtype != "float16":  # which no Tensor holds
        original = Tensor(x, requires_grad=True)
        assert gradcheck(f, original, w).compared == 12
        assert original.grad is None and type(original.data) is xp.ndarray and original.dtype == dtype


def test_inputs_and_outputs_of_a_function_of_tensors_may_be_nested_and_ids_pass(xp):
    x = {"w": to_device(np.full((3, 2), 0.3), xp), "ids": to_device(np.array([2, 0]), xp)}

    def f(x, b):
        assert type(x["ids"]) is xp.ndarray and type(x["w"].data) is xp.ndarray
        rows = x["w"][x["ids"]] + b
        return {"rows": rows.tanh(), "both": (rows * rows, rows.sum())}

    assert gradcheck(f, x, to_device(np.ones(2), xp)).compared == 8
    detached = lambda x, b: {"rows": x["w"] * 2.0, "both": Tensor(x["w"].data) * b}
    with pytest.raises(GradientError, match=r"at input 0\['w'\]\[0, 0\]"):
        gradcheck(detached, x, to_device(np.ones(2), xp))


def test_where_nothing_is_recorded_there_is_nothing_to_check():
    with no_grad(), pytest.raises(ValueError, match=r"no_grad\(\).*outside"):
        gradcheck(lambda x: x * 1.0, np.ones(2))


def test_a_wrong_gradient_is_caught_on_any_backend(xp):
    """The wrong op is the user's own: it leaves the graph with `.data` and comes back."""
    detached = lambda x: x * Tensor(x.data)  # x² with half its gradient
    with pytest.raises(GradientError, match=r"at input 0\[0, 0\]\n6 of 6 numbers are wrong: each is 0.5 times"):
        gradcheck(detached, to_device(np.full((2, 3), 0.7), xp))
    with pytest.raises(GradientError, match="gradient 0, .*\n.*zero everywhere"):
        gradcheck(lambda x: Tensor(x.data * x.data), to_device(np.full((2, 3), 0.7), xp))


def test_a_large_input_is_checked_on_any_backend(xp):
    x = to_device(np.random.default_rng(0).normal(size=(60, 50)), xp)
    assert gradcheck(lambda x: (x * 0.5).tanh(), x).compared == 3000
    with pytest.raises(GradientError, match=r"at input 0\[\d+, \d+\]\n7 of the 7 looked at are wrong: each is 0.5"):
        gradcheck(lambda x: x * Tensor(x.data), x)


def test_an_input_that_does_not_matter_has_a_gradient_of_zero():
    assert gradcheck(lambda x, w: x * x, np.ones(2), np.ones(3)).compared == 5


def test_a_function_of_tensors_must_return_tensors():
    for f, shown in ((lambda x: x.data, "f returned ndarray"), (lambda x: (x, x.data), r"f\[1\] returned ndarray")):
        with pytest.raises(TypeError, match=f"{shown}, not a Tensor.*check_vjp"):
            gradcheck(f, np.ones(2))
    with pytest.raises(TypeError, match="f returned None"):
        gradcheck(lambda x: None, np.ones(2))


@pytest.mark.parametrize("x, shown", [
    (3.0, "expected NumPy or CuPy arrays, got float"), ([1.0], "expected NumPy or CuPy arrays, got float"),
    (1j, "complex"), (np.array([1j]), "complex"), (object(), "got object")], ids=repr)  # fmt: skip
def test_an_input_of_a_function_of_tensors_must_be_an_array(x, shown):
    with pytest.raises(TypeError, match=shown):
        gradcheck(lambda x: x, x)


def test_a_function_of_tensors_that_writes_to_its_input_is_named(xp):
    def f(x):
        x.data[0] += 1
        return x * 2

    with pytest.raises(ValueError, match="writes to its input 0"):
        gradcheck(f, to_device(np.ones(3), xp))


def test_dropout_without_a_fixed_generator_is_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="not deterministic"):
        gradcheck(lambda x: F.dropout(x, 0.5, rng), np.ones(50))


# --- threads ---------------------------------------------------------------------------------------------------------


def test_checks_in_many_threads_do_not_disturb_each_other():
    from concurrent.futures import ThreadPoolExecutor

    rows = table.SMALL[:12] * 3
    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(lambda row: check_vjp(*row.make(1.0), *row.inputs), rows))
    assert reports == [check_vjp(*row.make(1.0), *row.inputs) for row in rows]
