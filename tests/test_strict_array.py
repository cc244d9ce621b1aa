"""The stand-in for CuPy: it must refuse what CuPy refuses, or the backend tests prove nothing."""

import copy

import numpy as np
import pytest
import strict_array as sx
from strict_array import ndarray

from minilora import Tensor
from minilora.backend import get_array_module, to_device, to_numpy
from minilora.tensor import record

HOST = np.arange(6.0).reshape(2, 3)

REFUSED = {
    "host operand on the right": lambda x: x + HOST,
    "host operand on the left": lambda x: HOST * x,
    "host operand in place": lambda x: x.__iadd__(HOST),
    "host matrix": lambda x: x @ HOST.T,
    "host matrix on the left": lambda x: HOST.T @ x,
    "host array in a comparison": lambda x: x < HOST,
    "0-d host operand": lambda x: x * np.array(2.0),
    "list operand": lambda x: x + [1.0, 2.0, 3.0],
    "host index": lambda x: x[np.array([0, 1])],
    "host index in a tuple": lambda x: x[:, np.array([0, 1])],
    "list index": lambda x: x[[0, 1]],
    "host value": lambda x: x.__setitem__(0, HOST[0]),
    "list value": lambda x: x.__setitem__(0, [1.0, 2.0, 3.0]),
    "np ufunc": lambda x: np.exp(x),
    "np ufunc of both": lambda x: np.add(HOST, x),
    "np ufunc into it": lambda x: np.tanh(HOST, out=x),
    "np reduction": lambda x: np.sum(x),
    "np shape function": lambda x: np.stack([x, x]),
    "np conversion": lambda x: np.asarray(x),
    "np conversion of a list": lambda x: np.array([x, x]),
    "np assignment": lambda x: HOST.copy().__setitem__(..., x),
    "np scatter": lambda x: np.add.at(HOST.copy(), 0, x[0]),
    "own function of a host array": lambda x: sx.exp(HOST),
    "own function of a list": lambda x: sx.exp([1.0]),
    "own stack of host arrays": lambda x: sx.stack([x, HOST]),
    "own scatter into a host array": lambda x: sx.add.at(HOST.copy(), 0, x[0]),
    "own scatter by a host index": lambda x: sx.add.at(x, np.array([0]), x[:1]),
    "own output on the host": lambda x: sx.exp(x, out=HOST.copy()),
    "a NumPy argument that CuPy lacks": lambda x: x.max(axis=0, initial=0.0),
    "a NumPy keyword that CuPy lacks": lambda x: sx.exp(x, where=True),
}
SAME_IN_NUMPY = [name for name in REFUSED if not name.startswith(("own", "a NumPy"))]

AGREES = {
    "arithmetic": lambda xp, x: (2 - x) * x / 3.0 + x**2 - (-x) + 1 / (x + 1),
    "matrix product": lambda xp, x: x @ x.T,
    "comparison": lambda xp, x: (x > 2) & (x <= 4) | (x == 0),
    "pick": lambda xp, x: x[1, 2],
    "slice": lambda xp, x: x[:, None, ::2],
    "device index": lambda xp, x: x[xp.asarray([1, 0, 1])],
    "sum": lambda xp, x: x.sum(),
    "sum over an axis": lambda xp, x: x.sum(axis=-1, keepdims=True),
    "mean and max": lambda xp, x: x.mean(-1) - x.max(axis=1),
    "reshape": lambda xp, x: x.reshape(3, 2) + x.reshape((3, 2)).transpose(1, 0).T,
    "squeeze": lambda xp, x: x[None].squeeze(0).swapaxes(0, 1),
    "functions": lambda xp, x: xp.exp(-x) + xp.log(x + 1) * xp.sqrt(x) - xp.tanh(x),
    "made": lambda xp, x: xp.zeros((2, 3), x.dtype) + xp.full((2, 3), 2.0, x.dtype) + xp.arange(3) + xp.ones_like(x),
    "joined": lambda xp, x: xp.concatenate([xp.stack([x, x], axis=0), x[None]], axis=0),
    "broadcast": lambda xp, x: xp.broadcast_to(x[:, :1], (2, 5)),
    "triangle": lambda xp, x: xp.triu(xp.full((3, 3), -1.0), 1),
    "where": lambda xp, x: xp.where(xp.isfinite(x), x, 0.0),
}


@pytest.mark.parametrize("offence", REFUSED)
def test_it_refuses(offence):
    with pytest.raises(TypeError):
        REFUSED[offence](sx.asarray(HOST))


@pytest.mark.parametrize("offence", SAME_IN_NUMPY)
def test_and_refuses_only_because_the_array_is_on_the_device(offence):
    """The same line is fine when everything in it is NumPy's (with the shape that the line needs)."""
    REFUSED[offence](HOST[:, :2].copy() if "matrix on the left" in offence else HOST.copy())


@pytest.mark.parametrize("expression", AGREES)
def test_its_numbers_are_numpys_and_its_results_stay_on_the_device(expression):
    ours, theirs = AGREES[expression](sx, sx.asarray(HOST)), AGREES[expression](np, HOST)
    assert type(ours) is ndarray
    assert ours.dtype == np.asarray(theirs).dtype and ours.shape == np.asarray(theirs).shape
    assert np.array_equal(ours.get(), theirs)


def test_a_reduction_is_a_0d_array_that_item_and_float_bring_home():
    total = sx.asarray(HOST).sum()
    assert (type(total), total.shape, total.item(), float(total), bool(total > 1)) == (ndarray, (), 15.0, 15.0, True)


@pytest.mark.parametrize("bring, name", [
    (float, "float"), (int, "int"), (bool, "bool"), (lambda x: x.item(), "item"), (lambda x: x.tolist(), "tolist"),
    (lambda x: x.tobytes(), "tobytes"), (lambda x: x.get(), "get"), (sx.asnumpy, "get"),
], ids=["float", "int", "bool", "item", "tolist", "tobytes", "get", "asnumpy"])  # fmt: skip
def test_each_way_to_the_host_is_counted_as_a_wait(bring, name):
    x = sx.asarray(HOST).sum()
    sx.WAITS.clear()
    bring(x)
    assert sx.WAITS == {name: 1}


def test_moving_there_and_back_copies():
    host = HOST.copy()
    x = sx.asarray(host)
    host[:] = 0
    back = x.get()
    back[:] = 0
    assert np.array_equal(sx.asnumpy(x), HOST)
    assert sx.asarray(x) is not host and np.array_equal(copy.deepcopy(x).get(), HOST)


def test_views_and_in_place_work_on_the_same_memory():
    x = sx.asarray(HOST)
    view = x[0]
    view += 10.0
    sx.exp(x[1], out=view)
    sx.add.at(x, (0, sx.asarray([1, 1])), 1.0)
    assert np.array_equal(x.get(), np.stack([np.exp(HOST[1]) + [0, 2, 0], HOST[1]]))


def test_the_backend_sees_one_array_module():
    x = sx.asarray(HOST)
    assert get_array_module(x, x) is sx
    assert to_device(x, sx) is x and np.array_equal(to_numpy(x), HOST)
    with pytest.raises(TypeError, match="numpy and strict_array"):
        get_array_module(x, HOST)


def test_a_stray_np_call_in_an_op_is_caught():
    """The purpose of this module, on two ops that work with NumPy and would fail on a GPU."""
    forward = lambda x: record(np.exp(x.data), (x, lambda dy: dy * np.exp(x.data)))
    backward = lambda x: record(x.data * 2, (x, lambda dy: np.multiply(dy, 2)))
    for op in (forward, backward):
        op(Tensor(HOST, requires_grad=True)).backward(HOST)
    device = Tensor(sx.asarray(HOST), requires_grad=True)
    with pytest.raises(TypeError):
        forward(device)
    y = backward(device)
    with pytest.raises(TypeError):
        y.backward(sx.asarray(HOST))
