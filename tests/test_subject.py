"""How a function and its VJP are called: nested inputs, what passes through, and every misuse by its name."""

from collections import OrderedDict, namedtuple

import numpy as np
import pytest

from minilora import Tensor, check_vjp
from minilora.gradcheck import GradientError

square = lambda x: x * x
square_vjp = lambda dy, x: (2 * x * dy,)
zero_vjp = lambda dy, *xs: tuple(np.zeros_like(x) for x in xs)

# --- lists, dicts, integers ------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "left right")


def test_inputs_and_outputs_may_be_nested_and_keep_their_types():
    x = {"w": np.full((2, 3), 0.5), "rest": [np.ones(3), Pair(np.array(2.0), 3.0)], "ids": np.array([1, 0])}
    seen = []

    def f(x, scale):
        seen.append(x)
        assert isinstance(x["rest"][1], Pair) and isinstance(x["rest"], list)
        y = x["w"] * x["rest"][0] * scale
        return OrderedDict(rows=y[x["ids"]], two=(x["rest"][1].left * x["rest"][1].right, np.array([7])))

    def vjp(dy, x, scale):
        assert isinstance(dy, OrderedDict) and dy["two"][1] is None
        rows = dy["rows"][np.argsort(x["ids"])]
        left, right = x["rest"][1]
        dx = {
            "w": rows * x["rest"][0] * scale,
            "rest": [(rows * x["w"]).sum(0) * scale, (dy["two"][0] * right, dy["two"][0] * left)],
            "ids": None,
        }
        return dx, (rows * x["w"] * x["rest"][0]).sum()

    assert check_vjp(f, vjp, x, 1.5).compared == 6 + 3 + 2 + 1
    assert all(np.array_equal(given["ids"], [1, 0]) for given in seen)

    def wrong(dy, x, scale):
        dx, dscale = vjp(dy, x, scale)
        return {**dx, "rest": [dx["rest"][0], Pair(dx["rest"][1][0], 2 * dx["rest"][1][1])]}, dscale

    with pytest.raises(GradientError, match=r"at input 0\['rest'\]\[1\]\[1\]") as caught:
        check_vjp(f, wrong, x, 1.5)
    assert caught.value.input == "input 0['rest'][1][1]" and caught.value.index == ()


def test_integers_booleans_and_texts_pass_through_untouched():
    def f(x, ids, mask, mode, n, nothing):
        assert ids.dtype == np.int32 and mask.dtype == bool and (mode, n, nothing) == ("sum", 3, None)
        return (x * mask)[ids] * n

    def vjp(dy, x, ids, mask, mode, n, nothing):
        dx = np.zeros_like(x)
        np.add.at(dx, ids, dy)
        return dx * mask * n, None, None, None, None, None

    x, ids, mask = np.ones(3), np.array([0, 0, 2], np.int32), np.array([True, True, False])
    assert check_vjp(f, vjp, x, ids, mask, "sum", 3, None).compared == 3
    with pytest.raises(GradientError, match="input 1 has no derivative, but its gradient is int32; return None"):
        check_vjp(f, lambda dy, x, ids, *rest: (*vjp(dy, x, ids, *rest)[:1], ids, *[None] * 4),
                  x, ids, mask, "sum", 3, None)  # fmt: skip


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("x", [[np.ones(2)], [np.ones(2), np.ones(3)], {"a": np.ones(2)}, [[np.ones(2)]]],
                         ids=["one in a list", "two", "dict", "list in a list"])  # fmt: skip
def test_the_gradient_of_a_single_nested_input_may_come_bare(x, bare):
    f = lambda x: [leaf * leaf for leaf in flat(x)]

    def vjp(dy, x):
        dx = like(x, iter([2 * leaf * d for leaf, d in zip(flat(x), dy, strict=True)]))
        return dx if bare else (dx,)

    assert check_vjp(f, vjp, x).compared == sum(leaf.size for leaf in flat(x))


def flat(x):
    values = x.values() if isinstance(x, dict) else x
    return [leaf for v in values for leaf in (flat(v) if isinstance(v, (list, dict)) else [v])]


def like(x, new):
    if isinstance(x, dict):
        return {key: like(v, new) for key, v in x.items()}
    return [like(v, new) for v in x] if isinstance(x, list) else next(new)


@pytest.mark.parametrize("returned, shown", [
    (lambda dy, x: ({"a": dy["a"]},), r"input 0 is a dict of \['a', 'b'\], but its gradient is \['a'\]"),
    (lambda dy, x: (dy["a"],), "input 0 is a dict of .*, but its gradient is float64"),
    (lambda dy, x: ({"a": dy["a"], "b": [dy["b"][0]]},), r"input 0\['b'\] is a list of 2, but .* a list of 1"),
    (lambda dy, x: ({"a": dy["a"], "b": dy["b"][0]},), r"input 0\['b'\] is a list of 2, but its gradient is float64"),
])  # fmt: skip
def test_a_gradient_of_another_structure_is_named_by_its_path(returned, shown):
    x = {"a": np.ones(2), "b": [np.ones(3), np.ones(1)]}
    with pytest.raises(GradientError, match=shown):
        check_vjp(lambda x: x, returned, x)


# --- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x, shown", [
    (np.array([1j]), "input 1 holds complex numbers.*real and the imaginary part"),
    (1j, "input 1 holds complex numbers"),
    (Tensor(np.ones(2)), "input 1 is a Tensor.*gradcheck"),
    (np.array([1, None]), "input 1: expected NumPy arrays.*an array of object"),
    (object(), "input 1: expected NumPy arrays.*got object.*close over"),
    (np.ma.masked_array([1.0]), "input 1 is a masked array"),
    ({"a": [1j]}, r"input 1\['a'\]\[0\] holds complex"),
], ids=lambda v: "" if isinstance(v, str) else repr(v)[:20])  # fmt: skip
def test_an_input_that_cannot_be_one_is_named_with_the_remedy(x, shown):
    with pytest.raises(TypeError, match=shown):
        check_vjp(lambda w, x: w, zero_vjp, np.ones(2), x)


@pytest.mark.parametrize("returned, shown", [
    (lambda x: x.astype(np.float32), "f returned float32"),
    (lambda x: {"a": x, "b": (x, x.astype(np.float16))}, r"f\['b'\]\[1\] returned float16"),
    (lambda x: x.astype(np.int64), "f returned int64: nothing of it has a derivative"),
    (lambda x: x * 1j, "the output of f holds complex numbers"),
    (lambda x: None, "f returned None; is its `return` missing"),
    (lambda x: (x, None), r"f\[1\] returned None"),
    (lambda x: [], "f returned a list of 0: nothing of it has a derivative"),
    (lambda x: "yes", "f returned str: nothing of it"),
    (lambda x: Tensor(x), "f returned a Tensor; for functions of Tensors use gradcheck"),
    (lambda x: object(), "f returned object; return arrays"),
])  # fmt: skip
def test_an_output_that_has_no_derivative_is_named(returned, shown):
    with pytest.raises(TypeError, match=shown):
        check_vjp(returned, zero_vjp, np.ones(2))


@pytest.mark.parametrize("f, vjp, shown", [
    (square, lambda x: 2 * x, r"vjp is called as vjp\(dy, \*inputs\), here with 2 arguments, and takes \(x\)"),
    (square, lambda dy: dy, r"vjp is called as .* and takes \(dy\)"),
    (lambda x, w: x, lambda dy, x: dy, r"f is called as f\(\*inputs\), here with 1 arguments, and takes \(x, w\)"),
])  # fmt: skip
def test_a_signature_that_does_not_fit_is_named(f, vjp, shown):
    with pytest.raises(TypeError, match=shown):
        check_vjp(f, vjp, np.ones(2))


def test_a_shape_that_depends_on_the_values_is_named():
    f = lambda x: x[x > 1.0]
    with pytest.raises(TypeError, match="f returned 1 numbers, and beside its inputs 2"):
        check_vjp(f, lambda dy, x: np.where(x > 1.0, dy, 0.0), np.array([1.0 - 1e-6, 2.0]))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_arrays_of_any_float_dtype_order_and_flags_are_taken(order, dtype):
    x = np.array(np.random.default_rng(0).normal(size=(3, 4)), dtype=dtype, order=order)[:, ::2]
    x.setflags(write=False)

    def f(x):
        assert x.dtype == np.float64
        return x * x

    assert check_vjp(f, square_vjp, x).compared == 6


@pytest.mark.parametrize("options, shown", [
    ({"rtol": -1}, "rtol must lie between 0 and 1, got -1"), ({"rtol": float("nan")}, "got nan"),
    ({"max_elements": -1}, "max_elements must be a whole number"), ({"directions": 1.5}, "directions must be a whole"),
])  # fmt: skip
def test_an_option_out_of_range_is_named(options, shown):
    with pytest.raises(ValueError, match=shown):
        check_vjp(square, square_vjp, np.ones(2), **options)


@pytest.mark.parametrize("f, vjp, rng, shown", [
    (3, square_vjp, None, r"f must be a function, called as f\(\*inputs\); got 3"),
    (square, None, None, "vjp must be a function.*got None"), (square, square_vjp, 0, "rng must be a numpy.random.Gen"),
])  # fmt: skip
def test_what_is_no_function_or_generator_is_named(f, vjp, rng, shown):
    with pytest.raises(TypeError, match=shown):
        check_vjp(f, vjp, np.ones(2), rng=rng)


def test_masked_arrays_are_refused_wherever_they_come_from():
    masked = lambda x: np.ma.masked_array(x, [1, 0])
    with pytest.raises(TypeError, match="f returned a masked array"):
        check_vjp(masked, square_vjp, np.ones(2))
    with pytest.raises(GradientError, match="gradient of input 0 is a masked array"):
        check_vjp(square, lambda dy, x: masked(2 * x * dy), np.ones(2))


def test_a_gradient_that_is_no_array_is_named():
    with pytest.raises(GradientError, match="gradient of input 0 is no array"):
        check_vjp(square, lambda dy, x: ([[1, 2], [3]],), np.ones(2))


def test_any_exception_beside_the_inputs_means_that_f_is_not_defined_there():
    table = np.linspace(0, 1, 9) ** 2
    cell = lambda x: np.floor(x * 8).astype(int)
    f = lambda x: table[cell(x)] + (x * 8 - cell(x)) * (table[cell(x) + 1] - table[cell(x)])
    vjp = lambda dy, x: dy * 8 * (table[cell(x) + 1] - table[cell(x)])
    assert check_vjp(f, vjp, np.array([0.33, 0.9, 1 - 1e-6])).compared == 3
    with pytest.raises(GradientError, match="each is 2 times"):
        check_vjp(f, lambda dy, x: 2 * vjp(dy, x), np.array([0.33, 0.9]))


def test_a_function_that_changes_later_is_named_before_anybody_is_accused():
    calls = iter(range(10**6))
    with pytest.raises(ValueError, match="f is not deterministic: after some calls"):
        check_vjp(lambda x: x * (1 + (next(calls) > 1)), lambda dy, x: dy, np.ones(3))


@pytest.mark.filterwarnings("error")
def test_inputs_of_any_size_are_moved_without_a_warning():
    largest = np.finfo(np.float64).max
    f = lambda x, m: np.where(m < 0, 0.0, x)
    vjp = lambda dy, x, m: (np.where(m < 0, 0.0, dy), None)
    assert check_vjp(f, vjp, np.ones(3), np.array([0.5, -largest, 0.5])).compared > 3
    report = check_vjp(lambda x, m: np.exp(x + m), lambda dy, x, m: (dy * np.exp(x + m), dy * np.exp(x + m)),
                       np.ones(3), np.array([0.0, -np.inf, 0.0]))  # fmt: skip
    assert (report.compared, report.skipped) == (5, 1)
    assert check_vjp(lambda x: x / 1e300, lambda dy, x: dy / 1e300, np.linspace(1e307, 2e307, 3000)).compared == 3000


@pytest.mark.parametrize("n", [0, 1])
def test_one_number_is_compared_alone_whatever_the_limit(n):
    assert check_vjp(square, square_vjp, np.array(3.0), max_elements=n).compared == 1
