"""The operators of Tensor: NumPy's broadcasting, indexing and products; dtypes stay; errors show both sides."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import like, refuses
from strategies import arrays, broadcastable_shapes, integer_arrays, matmul_shapes, rngs, shapes

from minilora import Tensor, gradcheck
from minilora.backend import to_device, to_numpy

ARITHMETIC = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
every_operator = pytest.mark.parametrize("operator", ARITHMETIC.values(), ids=ARITHMETIC)


# --- arithmetic ------------------------------------------------------------------------------------------------------


@every_operator
@settings(max_examples=15)
@given(rngs, broadcastable_shapes())
def test_arithmetic_broadcasts_as_numpy_does_and_sums_gradients_back(operator, rng, both):
    a, b = (rng.uniform(0.5, 2, shape) for shape in both)
    y = operator(Tensor(a), Tensor(b))
    assert np.array_equal(y.data, operator(a, b)) and y.shape == np.broadcast_shapes(*both)
    assert gradcheck(operator, a, b).compared == a.size + b.size


@every_operator
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_number_on_either_side_leaves_the_dtype_alone(operator, dtype, xp):
    x = np.array([[1.0, 2.0], [3.0, 4.0]], dtype)
    for number in (2, 0.5, True, np.float64(0.5), np.float32(0.5), np.int64(2)):
        for compute in (lambda t, n=number: operator(t, n), lambda t, n=number: operator(n, t)):
            t = Tensor(to_device(x, xp), requires_grad=True)
            y = compute(t)
            y.sum().backward()
            assert y.dtype == t.grad.dtype == dtype and type(y.data) is xp.ndarray
            assert np.array_equal(to_numpy(y.data), compute(x.astype(np.float64)).astype(dtype))


@every_operator
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_array_on_either_side_is_a_constant(operator, dtype, xp):
    """`array * tensor` comes to the Tensor, not to NumPy, which would make an object array of Tensors."""
    a, b = np.array([[1.0], [2.0]], dtype), np.array([4.0, 8.0], dtype)
    for compute in (lambda t, c: operator(t, c), lambda t, c: operator(c, t)):
        t = Tensor(to_device(a, xp), requires_grad=True)
        y = compute(t, to_device(b, xp))
        assert type(y) is Tensor and y.dtype == dtype and np.array_equal(to_numpy(y.data), compute(a, b))
        y.sum().backward()
        assert gradcheck(lambda t, c=compute: c(t, like(t, b)), a) and t.grad.shape == a.shape


def test_a_constant_array_gets_no_gradient():
    x = Tensor(np.ones(2), requires_grad=True)
    assert sum(len(nodes) for nodes, _ in (np.ones(2) * x).node.edges) == 1


@given(integer_arrays(shapes()))
def test_minus_and_division_are_what_they_say(x):
    t = Tensor(x)
    assert np.array_equal((-t).data, -x) and np.array_equal((3 - t).data, 3 - x)
    assert np.array_equal((t - t).data, x - x) and np.array_equal((t / 4).data, x / 4)


def test_a_number_without_a_sign_is_subtracted_as_a_number_and_a_list_as_an_array(xp):
    """Minus np.uint8(1) would be 255."""
    t = Tensor(to_device(np.array([3.0, 5.0]), xp), requires_grad=True)
    assert np.array_equal(to_numpy((t - np.uint8(1)).data), [2, 4])
    assert np.array_equal(to_numpy((np.uint8(1) - t).data), [-2, -4])
    (t - np.uint8(1)).sum().backward()
    assert np.array_equal(to_numpy(t.grad), [1, 1])
    host = Tensor(np.array([3.0, 5.0]))
    assert np.array_equal((host - [1.0]).data, [2, 4]) and np.array_equal(([1.0, 2.0] - host).data, [-2, -3])


# --- products --------------------------------------------------------------------------------------------------------


@given(rngs, matmul_shapes())
def test_the_matrix_product_takes_every_shape_that_numpys_takes(rng, both):
    a, b = (rng.normal(size=shape) for shape in both)
    y = (Tensor(a) @ Tensor(b)).data
    assert y.shape == (a @ b).shape and np.allclose(y, a @ b, rtol=1e-13, atol=1e-14)
    assert gradcheck(lambda x, w: x @ w, a, b).compared == a.size + b.size


@given(st.data(), matmul_shapes())
def test_the_matrix_product_of_whole_numbers_is_exact_on_every_side(data, both):
    a, b = (data.draw(integer_arrays(shape)) for shape in both)
    expected = a @ b
    for y in (Tensor(a) @ Tensor(b), Tensor(a) @ b, a @ Tensor(b)):
        assert type(y) is Tensor and np.array_equal(y.data, expected)


# --- sums and shapes -------------------------------------------------------------------------------------------------


@st.composite
def shape_and_axes(draw):
    shape = draw(shapes(1, 3))
    ndim = len(shape)
    one = st.integers(-ndim, ndim - 1)
    some = st.lists(st.integers(0, ndim - 1), unique=True).map(tuple)
    return shape, draw(st.none() | one | some)


@given(shape_and_axes(), st.booleans(), rngs)
def test_sum_and_mean_over_any_axes(case, keepdims, rng):
    shape, axis = case
    x = rng.normal(size=shape)
    for name in ("sum", "mean"):
        f = lambda t, name=name: getattr(t, name)(axis, keepdims=keepdims)
        expected = getattr(x, name)(axis=axis, keepdims=keepdims)
        y = f(Tensor(x)).data
        assert y.shape == expected.shape and np.allclose(y, expected, rtol=1e-13, atol=1e-15)
        assert gradcheck(f, x)


@pytest.mark.parametrize("shape, axis", [((0,), None), ((0, 3), 0), ((0, 3), 1), ((2, 0), (0, 1))])
def test_the_mean_of_nothing_is_refused_and_its_sum_is_not(shape, axis):
    x = Tensor(np.zeros(shape), requires_grad=True)
    with pytest.raises(ValueError, match="mean of an empty tensor.*0"):
        x.mean(axis)
    x.sum().backward()
    assert x.sum().item() == 0.0 and x.grad.shape == shape


@given(arrays(shapes(0, 3)), st.data())
def test_reshape_and_transpose_move_gradients_back(x, data):
    axes = data.draw(st.permutations(range(x.ndim)))
    turned = [a - x.ndim if data.draw(st.booleans()) else a for a in axes]
    for f in (lambda t: t.transpose(*turned), lambda t: t.transpose(), lambda t: t.reshape(-1),
              lambda t: t.reshape((1, *x.shape)), lambda t: t.reshape(*reversed(x.shape), 1)):  # fmt: skip
        assert np.array_equal(f(Tensor(x)).data, f(x)) and gradcheck(f, x)


def test_transpose_takes_its_axes_spread_or_as_a_tuple():
    x = np.arange(6.0).reshape(1, 2, 3)
    assert Tensor(x).transpose(2, 0, 1).shape == Tensor(x).transpose((2, 0, 1)).shape == (3, 1, 2)


# --- indexing --------------------------------------------------------------------------------------------------------

INDICES = {
    "integer": lambda on: 1,
    "negative integer": lambda on: -1,
    "slice": lambda on: slice(1, None),
    "backward slice": lambda on: slice(None, None, -2),
    "empty slice": lambda on: slice(2, 2),
    "None": lambda on: None,
    "ellipsis": lambda on: ...,
    "mixed": lambda on: (slice(None), None, ..., 0),
    "all integers": lambda on: (1, 2, 3),
    "rows with repeats": lambda on: on([0, 2, 0, 0]),
    "a matrix of rows": lambda on: on([[0, 1], [2, 0]]),
    "pairs with repeats": lambda on: (on([0, 1, 0]), on([1, 1, 1])),
    "rows and a slice": lambda on: (on([2, 2]), slice(0, 2)),
    "a slice and columns": lambda on: (slice(None), on([1, 0, 1])),
    "an integer and columns": lambda on: (0, on([1, 1])),
    "a mask": lambda on: on([True, False, True]),
}


@pytest.mark.parametrize("index", INDICES)
def test_indexing_is_numpys_and_repeats_add_up(index, xp):
    x = np.random.default_rng(0).normal(size=(3, 4, 5))
    host = INDICES[index](np.array)
    on_device = lambda t: INDICES[index](lambda values: like(t, np.array(values)))
    t = Tensor(to_device(x, xp), requires_grad=True)
    y = t[on_device(t)]
    assert type(y.data) is xp.ndarray and np.array_equal(to_numpy(y.data), x[host])
    counts = np.zeros(x.shape)
    np.add.at(counts, host, 1.0)
    y.sum().backward()
    assert np.array_equal(to_numpy(t.grad), counts)
    if y.size:
        assert gradcheck(lambda t: t[on_device(t)] * 2.0, to_device(x, xp))


def test_iterating_goes_along_the_first_axis_and_ends():
    assert [row.data.tolist() for row in Tensor([[1.0, 2.0], [3.0, 4.0]])] == [[1, 2], [3, 4]]


# --- making tensors --------------------------------------------------------------------------------------------------


def test_a_tensor_shares_the_array_it_is_given_and_takes_lists_and_numbers_as_float64(xp):
    x = xp.zeros((2, 3), np.float32)
    t = Tensor(x)
    assert t.data is x and (t.shape, t.ndim, t.size, t.dtype) == ((2, 3), 2, 6, np.float32)
    assert Tensor([1.0, 2.0]).dtype == Tensor(3.0).dtype == np.float64 and Tensor(3.0).shape == ()
    assert Tensor(np.float32(3)).dtype == np.float32


def test_a_tensor_shows_its_values_and_whether_it_is_trainable():
    assert repr(Tensor([1.0], requires_grad=True)) == "Tensor([1.], requires_grad=True)"
    assert Tensor([[2.5]]).item() == 2.5


def test_it_composes_on_another_backend_from_start_to_end(device_xp):
    """All primitives in one function, forward and backward, with NumPy's numbers: to the bit, or on a GPU almost."""

    def f(x, w):
        h = ((x @ w).tanh() * 2 - 1).reshape(2, 2, 2).transpose(1, 0, 2)
        e = (h - h.mean(-1, keepdims=True)).exp()
        return -(e / e.sum(-1, keepdims=True))[..., 0].log().sum(0)[None, :].mean()

    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=(3, 2)).astype(np.float32)
    outcomes = []
    for module in (np, device_xp):
        tensors = [Tensor(to_device(a, module), requires_grad=True) for a in (x, w)]
        y = f(*tensors)
        y.backward()
        outcomes.append([to_numpy(a) for a in (y.data, *(t.grad for t in tensors))])
    tolerance = 0 if device_xp.__name__ == "strict_array" else 1e-4
    for ours, theirs in zip(*outcomes, strict=True):
        assert theirs.dtype == np.float32 and np.allclose(ours, theirs, tolerance, tolerance)
    assert gradcheck(f, x, w)


# --- what is refused -------------------------------------------------------------------------------------------------


def T(*shape, dtype=np.float64):
    return Tensor(np.ones(shape, dtype), requires_grad=True)


HELD, REMEDY = "float32 or float64", ".astype(np.float32)"
REFUSED = {  # what is wrong: (call, exception, what the message must show)
    "integers": (lambda: Tensor([1, 2]), TypeError, [HELD, "int64"]),
    "booleans": (lambda: Tensor(np.array([True])), TypeError, [HELD, "bool"]),
    "complex numbers": (lambda: Tensor(np.array([1j])), TypeError, [HELD, "complex128"]),
    "text": (lambda: Tensor("abc"), TypeError, [HELD, "<U3"]),
    "nothing": (lambda: Tensor(None), TypeError, [HELD, "object"]),
    "half precision": (lambda: T(2, dtype=np.float16), TypeError, [HELD, "float16", REMEDY]),
    "+, half precision": (lambda: T(2) + np.ones(2, np.float16), TypeError, ["float16", REMEDY]),
    "backward, dy in half precision": (lambda: T(2).backward(np.ones(2, np.float16)), TypeError, ["float16", REMEDY]),
    "bytes in another order": (lambda: T(2, dtype=np.dtype("f4").newbyteorder()), TypeError, [HELD, "f4", REMEDY]),
    "a tensor of a tensor": (lambda: Tensor(T(2)), TypeError, ["Tensor(t.data)"]),
    "ragged lists": (lambda: Tensor([[1.0], [2.0, 3.0]]), ValueError, []),
    "@, inner axes": (lambda: T(2, 3) @ T(2, 3), ValueError, ["(2, 3) and (2, 3)"]),
    "@, vectors": (lambda: T(2) @ T(3), ValueError, ["(2,)", "(3,)"]),
    "@, vector and matrix": (lambda: T(2) @ T(3, 2), ValueError, ["(2,)", "(3, 2)"]),
    "@, stacks": (lambda: T(2, 3, 4) @ T(3, 4, 5), ValueError, ["(2, 3, 4)", "(3, 4, 5)"]),
    "@, number": (lambda: T(2, 3) @ 2.0, ValueError, ["(2, 3)", "()"]),
    "@, number on the left": (lambda: 2.0 @ T(2, 3), ValueError, ["(2, 3)", "()"]),
    "@, dtypes": (lambda: T(2, 3) @ T(3, 2, dtype=np.float32), TypeError, ["float32", "float64"]),
    "+, complex number": (lambda: T(2) + 1j, TypeError, ["complex128"]),
    "+, text": (lambda: T(2) + "a", TypeError, ["<U1"]),
    "+, None": (lambda: T(2) + None, TypeError, ["object"]),
    "+, integers": (lambda: T(2) + np.arange(2), TypeError, ["int64"]),
    "reshape, size": (lambda: T(2, 3).reshape(4), ValueError, ["6", "(4,)"]),
    "sum, axis": (lambda: T(2, 3).sum(5), ValueError, ["5", "2"]),
    "mean, axis": (lambda: T(2, 3).mean(-3), ValueError, ["-3", "2"]),
    "transpose, axis": (lambda: T(2, 3).transpose(0, 2), ValueError, ["2"]),
    "transpose, repeated": (lambda: T(2, 3).transpose(0, 0), ValueError, []),
    "transpose, too few": (lambda: T(2, 3).transpose(0), ValueError, []),
    "index, too large": (lambda: T(2, 3)[2], IndexError, ["2"]),
    "backward of many numbers": (lambda: T(2, 3).backward(), ValueError, ["one number", "(2, 3)", ".sum()"]),
    "backward, dy shape": (lambda: T(2, 3).backward(np.ones(3)), ValueError, ["(3,)", "(2, 3)"]),
    "backward, dy would broadcast": (lambda: T(2, 3).backward(np.ones((1, 3))), ValueError, ["(1, 3)", "(2, 3)"]),
    "backward, dy dtype": (lambda: T(2).backward(np.ones(2, np.float32)), TypeError, ["float32", "float64"]),
    "backward, dy a list": (lambda: T(2).backward([1.0, 2.0, 3.0]), (TypeError, ValueError), []),
    "backward, dy of integers": (lambda: T(2).backward(np.ones(2, int)), TypeError, ["int64"]),
    "backward, dy a tensor": (lambda: T(2).backward(T(2)), TypeError, []),
    "backward of a constant": (lambda: Tensor(1.0).backward(), ValueError, ["requires a gradient"]),
}  # fmt: skip
REFUSED |= {f"{sign}, shapes": (lambda f=f: f(T(2, 3), T(4)), ValueError, ["(2, 3)", "(4,)"])
            for sign, f in ARITHMETIC.items()}  # fmt: skip
REFUSED |= {f"{sign}, shapes of an array": (lambda f=f: f(np.ones((2, 3)), T(4)), ValueError, ["(2, 3)", "(4,)"])
            for sign, f in ARITHMETIC.items()}  # fmt: skip
REFUSED |= {f"{sign}, dtypes": (lambda f=f: f(T(2), np.ones(2, np.float32)), TypeError, ["float32", "float64"])
            for sign, f in ARITHMETIC.items()}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_bad_input_is_refused_with_both_sides_shown(wrong):
    refuses(*REFUSED[wrong])


@pytest.mark.parametrize("dy", [2.0, 2], ids=repr)
def test_backward_of_one_number_takes_a_number_or_says_what_it_wants(dy):
    x = T(2)
    try:
        x.sum().backward(dy)
    except (TypeError, ValueError):
        assert x.grad is None
    else:
        assert np.array_equal(x.grad, [2, 2])


@every_operator
def test_operands_on_two_backends_are_refused_by_name(operator, device_xp):
    here, there = np.ones(2), to_device(np.ones(2), device_xp)
    for a, b in ((Tensor(here), Tensor(there)), (Tensor(there), here), (there, Tensor(here)), (here, Tensor(there))):
        with pytest.raises(TypeError, match="numpy") as error:
            operator(a, b)
        assert device_xp.__name__ in str(error.value) and "to_device" in str(error.value)


def test_a_cotangent_on_another_backend_is_refused_by_name(device_xp):
    with pytest.raises(TypeError, match="numpy"):
        Tensor(to_device(np.ones(2), device_xp), requires_grad=True).backward(np.ones(2))


def test_a_wrong_backward_leaves_gradients_as_they_were():
    x = T(2, 3)
    x.sum().backward()
    before = x.grad.copy()
    for dy in (np.ones(3), np.ones((2, 3), np.float32), np.ones((2, 3), int)):
        with pytest.raises((TypeError, ValueError)):
            (x * 2.0).backward(dy)
    assert np.array_equal(x.grad, before)


# --- NumPy's functions on a Tensor -----------------------------------------------------------------------------------

NUMPY_FUNCTIONS = {
    "argmax": lambda t: np.argmax(t, axis=-1), "where": lambda t: np.where([True, False, True], t, 0.0),
    "dot": lambda t: np.dot(np.ones(3), t), "array_equal": lambda t: np.array_equal(t, t.data),
    "count_nonzero": lambda t: np.count_nonzero(t), "transpose": lambda t: np.transpose(t),
    "concatenate": lambda t: np.concatenate([t, t]), "stack": lambda t: np.stack([t, t]),
    "tile": lambda t: np.tile(t, 2), "outer": lambda t: np.outer(t, t), "sum": lambda t: np.sum(t),
    "mean": lambda t: np.mean(t), "exp": lambda t: np.exp(t), "sqrt": lambda t: np.sqrt(t),
    "add": lambda t: np.add(t, np.ones(3)), "multiply": lambda t: np.multiply(t, t),
    "equal": lambda t: np.equal(t, 1.0), "isfinite": lambda t: np.isfinite(t), "allclose": lambda t: np.allclose(t, t),
    "einsum": lambda t: np.einsum("i->", t), "copyto": lambda t: np.copyto(np.ones(3), t),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMPY_FUNCTIONS)
def test_a_function_of_numpys_refuses_a_tensor_and_says_what_to_write(name):
    t = Tensor(np.array([1.0, 10.0, 100.0]), requires_grad=True)
    with pytest.raises(TypeError, match=rf"np\.{name} does not take a Tensor; .*t\.data.*without a gradient"):
        NUMPY_FUNCTIONS[name](t)


def test_what_to_write_instead_is_a_method_where_there_is_one():
    t = Tensor(np.ones((2, 3)))
    cases = [(np.exp, "t.exp()"), (np.sum, "t.sum(axis)"), (lambda t: np.dot(t, t), "a @ b"),
             (lambda t: np.where(True, t, 0), "t * mask")]  # fmt: skip
    for call, written in cases:
        with pytest.raises(TypeError) as caught:
            call(t)
        assert f"write {written}" in str(caught.value)
    assert (np.shape(t), np.ndim(t), np.size(t)) == ((2, 3), 2, 6)


@pytest.mark.parametrize("compare", [
    lambda t: t == 1.0, lambda t: t != t, lambda t: t < 1.0, lambda t: t >= np.ones(3), lambda t: np.ones(3) == t,
    lambda t: 1.0 > t, lambda t: bool(t), lambda t: t in [1.0, 2.0],
])  # fmt: skip
def test_a_tensor_is_not_compared_but_its_values_are(compare):
    with pytest.raises(TypeError, match=r"t\.data (==|>=) other|t\.item\(\)"):
        compare(Tensor(np.ones(3)))


def test_a_tensor_is_still_an_object_of_its_own():
    t, u = Tensor(np.ones(3)), Tensor(np.ones(3))
    assert len({t, u}) == 2 and {t: "mine"}[t] == "mine" and t in [u, t][1:]


def test_a_tensor_written_into_an_array_is_refused_in_our_words():
    t, a = Tensor(np.ones(3)), np.zeros((2, 3))
    for write in (lambda: a.__setitem__(0, t), lambda: np.asarray(t), lambda: np.array([t, t]), lambda: a.__iadd__(t)):
        with pytest.raises(TypeError, match="not an array.*t.data|np.add does not take a Tensor"):
            write()
    assert not a.any()


@pytest.mark.parametrize("operator", [lambda a, t: a + t, lambda a, t: a - t, lambda a, t: a * t, lambda a, t: a / t,
                                      lambda a, t: a @ t])  # fmt: skip
def test_an_array_or_a_numpy_number_on_the_left_is_still_an_operand(operator, xp):
    t = Tensor(to_device(np.arange(1.0, 4.0), xp), requires_grad=True)
    y = operator(to_device(np.full(3, 2.0), xp), t)
    assert isinstance(y, Tensor) and y.requires_grad and type(y.data) is xp.ndarray
    assert isinstance(np.float64(2.0) * t, Tensor)
