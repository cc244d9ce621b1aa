"""The gradient checker as a product: what it catches, what it names, and that it raises no false alarm."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import arrays, rngs, shapes

from minilora import Tensor, check_vjp, gradcheck, no_grad
from minilora import functional as F
from minilora.backend import to_device
from minilora.gradcheck import GradientError, Report

square = lambda x: x * x
square_vjp = lambda dy, x: (2 * x * dy,)
zero_vjp = lambda dy, *xs: tuple(np.zeros_like(x) for x in xs)

# --- what passes -----------------------------------------------------------------------------------------------------


def test_a_right_gradient_gives_a_report_that_is_true_and_says_how_much_was_compared():
    report = check_vjp(square, square_vjp, np.ones((2, 3)))
    assert isinstance(report, Report) and report and report.compared == 6 and 0 <= report.worst < 1e-6


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
    assert check_vjp(f, vjp, x, w).compared == x.size + w.size
    with pytest.raises(GradientError, match="input 1"):
        check_vjp(f, lambda dy, x, w: (vjp(dy, x, w)[0], 1.001 * vjp(dy, x, w)[1] + 1e-3), x, w)


@pytest.mark.parametrize("x", [np.array(3.0), 3.0, np.float64(3.0)], ids=["0-d array", "float", "np.float64"])
@pytest.mark.parametrize("bare", [True, False])
def test_a_single_number_may_be_the_input_and_its_gradient_may_come_bare(x, bare):
    assert check_vjp(square, lambda dy, x: 2 * x * dy if bare else (2 * x * dy,), x).compared == 1
    with pytest.raises(GradientError):
        check_vjp(square, lambda dy, x: 2.002 * x * dy if bare else (2.002 * x * dy,), x)


def test_a_single_gradient_may_come_bare():
    assert check_vjp(square, lambda dy, x: 2 * x * dy, np.ones((1, 3))).compared == 3


SMOOTH = {
    "exp": (np.exp, np.exp, [-5.0, 0.0, 5.0]),
    "square": (square, lambda x: 2 * x, [-1.0, 0.0, 1e-13, 1e3]),
    "cube": (lambda x: x * x * x, lambda x: 3 * x * x, [-2.0, 0.0, 1e-7, 1e-5, 1e-3, 1e3]),
    "fourth power": (lambda x: x**4, lambda x: 4 * x**3, [0.0, 1e-5, 1e-2, 1e3]),
    "log": (np.log, lambda x: 1 / x, [1e-3, 1.0, 1e3]),
    "sqrt": (np.sqrt, lambda x: 0.5 / np.sqrt(x), [1e-3, 1.0, 1e3]),
    "reciprocal": (lambda x: 1 / x, lambda x: -1 / (x * x), [-1e-3, 1e-3, 1.0, 1e3]),
    "sin": (np.sin, np.cos, [0.0, np.pi / 2, 1e3]),
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
    assert check_vjp(f, lambda dy, x: (dy * slope(x),), np.array([point, point * 1.25]))


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
    """The slope is zero and the values are not: all that moves is rounding."""
    x = rng.normal(size=(2, 3))
    assert check_vjp(lambda x: np.array([softmax(row).sum() for row in x]), zero_vjp, x)


# --- what is caught --------------------------------------------------------------------------------------------------


def test_the_message_names_the_input_the_index_and_both_values():
    def vjp(dy, a, b):
        db = a * dy
        db[1, 2] += 0.25
        return b * dy, db

    a, b = np.random.default_rng(0).uniform(1, 2, (2, 2, 3))
    with pytest.raises(GradientError) as error:
        check_vjp(lambda a, b: a * b, vjp, a, b)
    message = str(error.value)
    assert all(part in message for part in ("input 1", "(2, 3)", "index (1, 2)"))
    analytic, numerical = (float(message.split(word)[1].split()[0].strip(",")) for word in ("gradient says", " say "))
    assert analytic - numerical == pytest.approx(0.25, rel=1e-6)
    assert error.value.where == "input 1 of shape (2, 3), index (1, 2)"
    assert (analytic, numerical) == pytest.approx((error.value.analytic, error.value.numerical), rel=1e-10)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size, where", [(1, 0), (3, 0), (3, 2)])
def test_a_gradient_that_is_not_finite_is_an_error_at_its_index(bad, size, where):
    def vjp(dy, x):
        dx = 2 * x * dy
        dx[where] = bad
        return (dx,)

    with pytest.raises(GradientError, match=rf"index \({where},\)"):
        check_vjp(square, vjp, np.ones(size))


def test_large_inputs_go_along_random_directions_and_still_show_a_thousandth():
    x = np.random.default_rng(0).normal(size=(60, 50))
    report = check_vjp(np.sin, lambda dy, x: (dy * np.cos(x),), x)
    assert report.compared == 20
    assert check_vjp(np.sin, lambda dy, x: (dy * np.cos(x),), x, directions=3).compared == 3
    assert check_vjp(np.sin, lambda dy, x: (dy * np.cos(x),), x, max_elements=3000).compared == 3000

    def one_row_wrong(dy, x):
        dx = dy * np.cos(x)
        dx[7] *= 1.001
        return (dx,)

    for planted in (lambda dy, x: (1.001 * dy * np.cos(x),), one_row_wrong):
        with pytest.raises(GradientError, match="random direction 0"):
            check_vjp(np.sin, planted, x)


@given(rngs)
def test_any_generator_gives_a_cotangent_that_shows_a_thousandth(rng):
    assert check_vjp(square, square_vjp, np.ones(3), rng=rng)
    with pytest.raises(GradientError):
        check_vjp(square, lambda dy, x: (2.002 * x * dy,), np.ones(3), rng=rng)


@pytest.mark.parametrize("gradients", [(), (1.0, 2.0), None, "x", {0: 1.0}], ids=repr)
def test_a_wrong_number_of_gradients_is_an_error(gradients):
    with pytest.raises(GradientError, match="one gradient per input: 1 inputs, got"):
        check_vjp(square, lambda dy, x: gradients, np.ones(2))


@pytest.mark.parametrize("gradient", [np.ones(3), np.ones((1, 2)), np.ones(()), None], ids=repr)
def test_a_gradient_of_the_wrong_shape_is_an_error_with_both_shapes(gradient):
    with pytest.raises(GradientError, match=rf"shape \(2,\).*shape {str(np.shape(gradient)).replace('(', '.')[:-1]}"):
        check_vjp(square, lambda dy, x: (gradient,), np.ones(2))


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


# --- what cannot be checked is named ---------------------------------------------------------------------------------

KINKS = {
    "|x| at 0, where the symmetric difference agrees by luck": (np.abs, lambda x: np.sign(x), 0.0),
    "relu at 0": (lambda x: np.maximum(x, 0), lambda x: x > 0, 0.0),
    "relu a little above 0": (lambda x: np.maximum(x, 0), lambda x: x > 0, 3e-6),
    "relu a little below 0": (lambda x: np.maximum(x, 0), lambda x: x > 0, -7e-6),
    "floor at an integer": (np.floor, lambda x: 0 * x, 2.0),
    "sign at 0": (np.sign, lambda x: 0 * x, 0.0),
    "square root of |x| at 0": (
        lambda x: np.sqrt(np.abs(x)), lambda x: np.where(x > 0, 0.5 / np.sqrt(np.maximum(x, 1e-9)), 0), 0.0),
    "faster than the step can see": (lambda x: np.sin(1e6 * x), lambda x: 1e6 * np.cos(1e6 * x), 1.0),
}  # fmt: skip
CASES = [(kink, many) for kink in KINKS for many in (False, True) if not (many and "a little" in kink)]


@pytest.mark.parametrize("kink, many", CASES)
def test_a_point_without_a_derivative_is_named(kink, many):
    """Alone, or one among 3000 elements (of which a direction moves each by too little to come near a kink)."""
    f, slope, x0 = KINKS[kink]
    x = np.full(3000, 1.3) if many else np.array([1.3, 0.0])
    x[1] = x0
    where = "random direction 0" if many else "index" if kink.startswith("faster") else r"index \(1,\)"
    with pytest.raises(ValueError, match=f"input 0.*{where}.*not differentiable"):
        check_vjp(f, lambda dy, x: (dy * slope(x),), x)


@given(st.floats(0, 0.99))
def test_a_kink_within_the_step_is_never_blamed_on_the_gradient(distance):
    relu = lambda x: np.maximum(x, 0)
    with pytest.raises(ValueError, match="not differentiable"):
        check_vjp(relu, lambda dy, x: (dy * (x > 0),), np.array([distance * 1e-5]))


def test_a_function_that_is_not_deterministic_is_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="not deterministic.*differ by"):
        check_vjp(lambda x: x * rng.uniform(0.9, 1.1, x.shape), lambda dy, x: (dy,), np.ones(3))
    sizes = itertools.count(1)
    with pytest.raises(ValueError, match=r"not deterministic.*shapes \(1,\) and \(2,\)"):
        check_vjp(lambda x: np.ones(next(sizes)) * x, lambda dy, x: (dy,), np.ones(1))


@pytest.mark.parametrize("f, x", [(np.log, -1.0), (np.log, 0.0), (np.log, 1e-6), (np.exp, 1e3), (np.sqrt, 0.0)])
def test_a_function_that_is_not_finite_there_is_named(f, x):
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="not finite at or near"):
        check_vjp(f, zero_vjp, np.array([x]))


@pytest.mark.parametrize("which", [0, 1])
def test_a_function_that_writes_to_its_inputs_is_named(which):
    def f(*xs):
        xs[which][0] += 1
        return xs[0] * xs[1]

    a, b = np.ones((2, 3))
    with pytest.raises(ValueError, match=f"writes to its input {which}"):
        check_vjp(f, zero_vjp, a, b)
    assert np.array_equal([a, b], np.ones((2, 3)))  # and the caller's arrays are unharmed


@pytest.mark.parametrize("x", [np.arange(3), np.array([True]), 3, np.array([1j]), np.array(["a"])], ids=repr)
def test_an_input_that_holds_no_floats_is_named_with_the_remedy(x):
    with pytest.raises(TypeError, match="input 1 holds .*close over it"):
        check_vjp(lambda w, x: w, zero_vjp, np.ones(2), x)


@pytest.mark.parametrize("returned, shown", [
    (lambda x: x.astype(np.float32), "float32"),
    (lambda x: x.astype(np.int64), "int64"),
    (lambda x: x * 1j, "complex128"),
    (lambda x: (x, x), "2 values"),
    (lambda x: [x, x, x], "3 values"),
    (lambda x: None, "object"),
])  # fmt: skip
def test_an_output_that_is_not_one_float64_array_is_named(returned, shown):
    with pytest.raises(TypeError, match=f"f returned {shown}"):
        check_vjp(returned, zero_vjp, np.ones(2))


@pytest.mark.parametrize("inputs", [(), (np.zeros((0, 3)),)], ids=["no inputs", "an empty input"])
def test_a_check_that_would_compare_nothing_is_refused(inputs):
    with pytest.raises(ValueError):
        check_vjp(lambda *xs: np.ones(2), lambda dy, *xs: xs, *inputs)


def test_a_slope_that_drowns_in_rounding_does_not_pass_for_zero():
    """1e10 + x moves by a few units in the last place: nothing was seen, so nothing may be called right."""
    with pytest.raises((ValueError, GradientError)):
        check_vjp(lambda x: x + 1e10, zero_vjp, np.ones(2))


def test_a_gradient_three_thousandths_wrong_does_not_pass_because_the_value_is_large():
    with pytest.raises((ValueError, GradientError)):
        check_vjp(lambda x: x + 1e6, lambda dy, x: 1.003 * dy, np.ones(2))
    assert check_vjp(lambda x: x + 1e3, lambda dy, x: dy, np.ones(2))


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


def test_where_nothing_is_recorded_there_is_nothing_to_check():
    with no_grad(), pytest.raises(ValueError, match=r"no_grad\(\).*outside"):
        gradcheck(lambda x: x * 1.0, np.ones(2))


def test_a_wrong_gradient_is_caught_on_any_backend(xp):
    """The wrong op is the user's own: it leaves the graph with `.data` and comes back."""
    detached = lambda x: x * Tensor(x.data)  # x² with half its gradient
    with pytest.raises(GradientError, match=r"input 0 of shape \(2, 3\), index \(0, 0\)"):
        gradcheck(detached, to_device(np.full((2, 3), 0.7), xp))
    with pytest.raises(GradientError, match="the gradient says 0,"):
        gradcheck(lambda x: Tensor(x.data * x.data), to_device(np.full((2, 3), 0.7), xp))


def test_an_input_that_does_not_matter_has_a_gradient_of_zero():
    assert gradcheck(lambda x, w: x * x, np.ones(2), np.ones(3)).compared == 5


def test_a_function_of_tensors_must_return_one_tensor():
    for f, shown in ((lambda x: x.data, "ndarray"), (lambda x: (x, x), "tuple"), (lambda x: None, "NoneType")):
        with pytest.raises(TypeError, match=f"returned {shown}, not a Tensor.*check_vjp"):
            gradcheck(f, np.ones(2))


@pytest.mark.parametrize("x", [3.0, [1.0], "x", None], ids=repr)
def test_an_input_of_a_function_of_tensors_must_be_an_array(x):
    with pytest.raises(TypeError, match="expected NumPy or CuPy arrays, got"):
        gradcheck(lambda x: x, x)


def test_integers_are_refused_for_functions_of_tensors_too():
    with pytest.raises(TypeError, match="input 0 holds int64"):
        gradcheck(lambda x: x, np.arange(3))


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
