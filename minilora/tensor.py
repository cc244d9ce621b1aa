"""An array that remembers how to differentiate itself. Knows nothing of neural networks.

An operation says what it computed. For each input it also says how a gradient of its output
becomes a gradient of that input (a vector-Jacobian product, VJP):

    y = record(a * b, (x, lambda dy: dy * b), (w, lambda dy: dy * a))

`record` keeps only the pairs whose input needs a gradient. Dropping a pair drops its closure, and
with the closure the activation it held alive: freezing a weight is an edge that is not there.
"""

import numbers
from types import SimpleNamespace

import numpy as np

from .backend import get_array_module
from .graph import Node, backpropagate, is_recording


def record(y, *edges):
    """The result `y` of an op as a Tensor, with an edge to each input that needs a gradient.

    An edge is `(input, vjp)` with `vjp(dy) -> dinput`, or, where inputs share backward work,
    `((a, b, ...), vjp)` with `vjp(dy) -> (da, db, ...)`. A gradient may have the broadcast shape
    of its input; the engine sums it back. VJPs close over arrays and shapes, never over Tensors.
    An input that is None (a bias that is not there) has no edge.
    """
    out = Tensor(y)
    if not is_recording():
        return out
    kept = []
    for inputs, vjp in edges:
        if not isinstance(inputs, tuple):
            inputs = (inputs,)
        nodes = tuple([None if t is None else t.node for t in inputs])
        if nodes.count(None) < len(nodes):
            kept.append((nodes, vjp))
    if kept:
        out.node = Node(y.shape, tuple(kept))
    return out


def check_same(op, *tensors):
    """Raise TypeError unless all `tensors`, except None, share a backend and a dtype.

    Nothing is promoted silently.
    """
    first = tensors[0].data
    for t in tensors:
        if t is None:
            continue
        if type(t.data) is not type(first):
            # The refusal of two backends is written there.
            get_array_module(first, t.data)
        if t.data.dtype != first.dtype:
            names = " and ".join(sorted({first.dtype.name, t.data.dtype.name}))
            raise TypeError(
                f"{op} mixes {names}; convert one side with .astype before the Tensor is made"
            )


def check_same_layout(who, arrays, expected):
    """Raise ValueError unless {name: array} has the names, shapes and dtypes of `expected`."""
    layout = {name: (a.shape, a.dtype.name) for name, a in arrays.items()}
    wanted = {name: (a.shape, a.dtype.name) for name, a in expected.items()}
    differing = [name for name in wanted | layout if layout.get(name) != wanted.get(name)]
    if differing:
        lines = [
            f"{name} is {layout.get(name, 'absent')}, not {wanted.get(name, 'absent')}"
            for name in differing[:4]
        ]
        raise ValueError(f"{who}: {len(differing)} arrays do not fit: {'; '.join(lines)}")


def _picks_once(index):
    """Is `index` made of integers, slices, None and ...? Then no element is picked twice."""
    items = index if isinstance(index, tuple) else (index,)
    return all(type(item) in (int, slice, type(None), type(...)) for item in items)


def _check_broadcast(op, a, b, but_last=0):
    """Raise ValueError unless shapes `a` and `b` broadcast, but for their `but_last` last axes."""
    leading_a = a[: max(0, len(a) - but_last)]
    leading_b = b[: max(0, len(b) - but_last)]
    try:
        np.broadcast_shapes(leading_a, leading_b)
    except ValueError:
        raise ValueError(f"{op}: shapes {a} and {b} do not broadcast; reshape one") from None


def _as_array(data):
    """A number, a list or an array of any backend, as the array that a Tensor is to hold."""
    if isinstance(data, Tensor):
        raise TypeError(
            "Tensor(tensor) is ambiguous; write Tensor(t.data) for a new leaf that shares its array"
        )
    if not hasattr(data, "dtype") or isinstance(data, np.generic):
        return np.asarray(data)
    # It refuses what is no array.
    get_array_module(data)
    return data


# NumPy's ufuncs that are operators, and what a Tensor calls them where it stands on the right.
_REFLECTED = {
    "add": "__radd__",
    "subtract": "__rsub__",
    "multiply": "__rmul__",
    "divide": "__rtruediv__",
    "matmul": "__rmatmul__",
}
# How to write with Tensors what NumPy has a function for.
_WRITE = {
    "add": "a + b",
    "subtract": "a - b",
    "multiply": "a * b",
    "divide": "a / b",
    "negative": "-t",
    "matmul": "a @ b",
    "dot": "a @ b",
    "square": "t * t",
    "exp": "t.exp()",
    "log": "t.log()",
    "tanh": "t.tanh()",
    "sum": "t.sum(axis)",
    "mean": "t.mean(axis)",
    "reshape": "t.reshape(shape)",
    "ravel": "t.reshape(-1)",
    "transpose": "t.transpose(axes)",
    "swapaxes": "t.transpose(axes)",
    "squeeze": "t.reshape(shape)",
    "expand_dims": "t[:, None]",
    "take": "t[ids]",
    "where": "t * mask, with a mask of zeros and ones",
    "equal": "t.data == other",
    "not_equal": "t.data != other",
    "less": "t.data < other",
    "less_equal": "t.data <= other",
    "greater": "t.data > other",
    "greater_equal": "t.data >= other",
}


def _refuse(name):
    """Raise TypeError for NumPy's function `name` on a Tensor, with what to write instead."""
    if name in _WRITE:
        raise TypeError(
            f"np.{name} does not take a Tensor; write {_WRITE[name]}, "
            "or give it t.data for values without a gradient"
        )
    raise TypeError(
        f"np.{name} does not take a Tensor; np.{name}(t.data) computes on its values, "
        "without a gradient"
    )


class Tensor:
    """An array of floats, and the node that knows where it came from.

    Shapes: `data`, NumPy or CuPy, has any shape; `grad` is an array like it, on leaves only.
    Every operation keeps the dtype: float32, or float64 for checking.
    Raises: TypeError for data of another dtype, and for operands of two backends or two dtypes;
    ValueError, with both shapes, for shapes that do not fit.
    Source: reverse-mode differentiation, Griewank & Walther, "Evaluating Derivatives", chapter 3.

    >>> x = Tensor([1.0, 2.0], requires_grad=True)
    >>> (x * x).sum().backward()
    >>> x.grad
    array([2., 4.])
    """

    __slots__ = ("data", "node")

    def __init__(self, data, requires_grad=False):
        # The usual case is passed over: a step makes hundreds of Tensors.
        if type(data) is not np.ndarray:
            data = _as_array(data)
        dtype = data.dtype
        # "f" is float32 and "d" float64. To compare dtypes takes ten times as long as two letters.
        if dtype.char not in "fd" or not dtype.isnative:
            raise TypeError(
                f"a Tensor holds float32 or float64, got {dtype}; convert with .astype(np.float32)"
            )
        self.data = data
        self.node = Node(data.shape) if requires_grad else None

    shape = property(lambda self: self.data.shape)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    dtype = property(lambda self: self.data.dtype)
    nbytes = property(lambda self: self.data.nbytes)
    xp = property(lambda self: get_array_module(self.data))
    requires_grad = property(lambda self: self.node is not None)

    @property
    def grad(self):
        """The accumulated gradient of a leaf, or None. Assign None to clear it."""
        return None if self.node is None else self.node.grad

    @grad.setter
    def grad(self, value):
        if self.node is None:
            raise ValueError(
                "a frozen tensor has no gradient; make it with Tensor(data, requires_grad=True)"
            )
        self.node.grad = value

    def __repr__(self):
        return f"Tensor({self.data}, requires_grad={self.requires_grad})"

    def item(self):
        """The single value as a Python float. On a GPU this waits for it: never inside a step."""
        return self.data.item()

    def backward(self, dy=None):
        """Add this tensor's gradient, weighted by `dy`, to the `.grad` of every leaf below it.

        Shapes: `dy` like this tensor; it may be left out (one) for a single number.
        Raises: ValueError if nothing here needs a gradient, or the shapes differ.
        """
        xp = get_array_module(self.data)
        if self.node is None:
            raise ValueError(
                "nothing to differentiate: no input requires a gradient, or no_grad() was active"
            )
        if dy is None:
            if self.size != 1:
                raise ValueError(
                    f"backward() needs one number, got shape {self.shape}; use .sum(), or pass dy"
                )
            dy = xp.ones_like(self.data)
        dy = Tensor(dy)
        check_same("backward(dy)", self, dy)
        if dy.shape != self.shape:
            raise ValueError(
                f"backward(dy) got dy of shape {dy.shape} for a tensor of shape {self.shape}"
            )
        backpropagate(self.node, dy.data)

    def _operand(self, op, other):
        """`other` as an operand of `self`: a Tensor, an array (a constant) or a Python number."""
        if not isinstance(other, Tensor):
            if isinstance(other, numbers.Real):
                # A Python number has no dtype of its own: it takes that of the array.
                return SimpleNamespace(data=float(other), node=None)
            other = Tensor(other)
        check_same(op, self, other)
        if self.shape != other.shape:
            _check_broadcast(op, self.shape, other.shape)
        return other

    # NumPy's functions would take a Tensor for one opaque object, and compute nonsense from it.

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        """`array * tensor` comes here, from NumPy and from CuPy. Other ufuncs are refused."""
        name = _REFLECTED.get(ufunc.__name__)
        is_operator = name and method == "__call__" and not kwargs and len(inputs) == 2
        if is_operator and not isinstance(inputs[0], Tensor):
            return getattr(self, name)(inputs[0])
        return _refuse(ufunc.__name__)

    def __array_function__(self, function, types, args, kwargs):
        """np.argmax(t), np.where(mask, t, 0) and the like are refused; np.shape(t) is harmless."""
        if function in (np.shape, np.ndim, np.size):
            return function(self.data)
        return _refuse(function.__name__)

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "a Tensor is not an array, and nothing that is written into an array has a gradient; "
            "for the values take t.data"
        )

    def _compare(self, other):
        raise TypeError(
            "a Tensor has no order and no equality; compare its values: t.data == other, "
            "or t.item() < 1.0"
        )

    __eq__ = _compare
    __ne__ = _compare
    __lt__ = _compare
    __le__ = _compare
    __gt__ = _compare
    __ge__ = _compare
    # It is still an object of its own, in a set or as a key.
    __hash__ = object.__hash__

    def __bool__(self):
        raise TypeError("a Tensor is neither true nor false; ask t.item(), or `t is not None`")

    def __add__(self, other):
        other = self._operand("+", other)
        return record(self.data + other.data, (self, lambda dy: dy), (other, lambda dy: dy))

    def __mul__(self, other):
        other = self._operand("*", other)
        a = self.data
        b = other.data
        return record(a * b, (self, lambda dy: dy * b), (other, lambda dy: dy * a))

    def __truediv__(self, other):
        other = self._operand("/", other)
        a = self.data
        b = other.data
        return record(a / b, (self, lambda dy: dy / b), (other, lambda dy: -dy * a / (b * b)))

    def __rtruediv__(self, other):
        # number / tensor, or array / tensor
        other = self._operand("/", other)
        a = other.data
        b = self.data
        return record(a / b, (self, lambda dy: -dy * a / (b * b)))

    def __sub__(self, other):
        other = self._operand("-", other)
        return record(self.data - other.data, (self, lambda dy: dy), (other, lambda dy: -dy))

    def __rsub__(self, other):
        return -self + other

    def __neg__(self):
        return record(-self.data, (self, lambda dy: -dy))

    __radd__ = __add__
    __rmul__ = __mul__

    def __matmul__(self, other):
        """`self @ other` as NumPy does it: (..., n, k) @ (..., k, m) -> (..., n, m).

        A 1-D operand is a vector: a row on the left, a column on the right.
        """
        if not isinstance(other, Tensor):
            other = Tensor(other)
        check_same("@", self, other)
        if min(self.ndim, other.ndim) == 0 or self.shape[-1] != other.shape[max(0, other.ndim - 2)]:
            raise ValueError(
                f"@: shapes {self.shape} and {other.shape} do not chain: "
                "(n, k) @ (k, m) needs equal k"
            )
        if other.ndim == 1:
            return (self @ other.reshape(-1, 1)).reshape(self.shape[:-1])
        if self.ndim == 1:
            y = self.reshape(1, -1) @ other
            return y.reshape(y.shape[:-2] + y.shape[-1:])
        _check_broadcast("@", self.shape, other.shape, but_last=2)
        a = self.data
        b = other.data
        return record(
            a @ b,
            (self, lambda dy: dy @ b.swapaxes(-1, -2)),
            (other, lambda dy: a.swapaxes(-1, -2) @ dy),
        )

    def __rmatmul__(self, other):
        return Tensor(other) @ self

    def sum(self, axis=None, keepdims=False):
        """The sum over `axis` (an int, a tuple, or None for all)."""
        xp = get_array_module(self.data)
        shape = self.shape
        y = self.data.sum(axis=axis, keepdims=True)
        # Each summand has the gradient of its sum.
        y_shape = y.shape
        dself = lambda dy: xp.broadcast_to(dy.reshape(y_shape), shape)
        if not keepdims:
            y = y.squeeze(axis)
        return record(y, (self, dself))

    def mean(self, axis=None, keepdims=False):
        """The mean over `axis`. Raises ValueError if there is nothing to average."""
        total = self.sum(axis, keepdims)
        if self.size == 0:
            raise ValueError(f"the mean of an empty tensor of shape {self.shape} is not defined")
        return total / (self.size // total.size)

    def reshape(self, *shape):
        """The same numbers in another shape: `x.reshape(2, 3)` or `x.reshape((2, 3))`."""
        before = self.shape
        return record(self.data.reshape(*shape), (self, lambda dy: dy.reshape(before)))

    def transpose(self, *axes):
        """The axes in another order, by default reversed: `x.transpose(1, 0)` or `((1, 0))`."""
        if axes and isinstance(axes[0], tuple):
            axes = axes[0]
        if not axes:
            axes = tuple(reversed(range(self.ndim)))
        inverse = tuple(int(i) for i in np.argsort([a % self.ndim for a in axes]))
        return record(self.data.transpose(axes), (self, lambda dy: dy.transpose(inverse)))

    def exp(self):
        """e to the power of each element."""
        y = get_array_module(self.data).exp(self.data)
        return record(y, (self, lambda dy: dy * y))

    def log(self):
        """The natural logarithm of each element."""
        x = self.data
        return record(get_array_module(x).log(x), (self, lambda dy: dy / x))

    def tanh(self):
        """The hyperbolic tangent of each element."""
        y = get_array_module(self.data).tanh(self.data)
        return record(y, (self, lambda dy: dy * (1 - y * y)))

    def __getitem__(self, index):
        """NumPy's indexing with integers, slices, None, ... and arrays."""
        xp = get_array_module(self.data)
        shape = self.shape

        def dself(dy):
            dx = xp.zeros(shape, dy.dtype)
            if _picks_once(index):
                dx[index] = dy
            else:
                # An element picked twice gets both gradients; `dx[index] += dy` would keep one.
                xp.add.at(dx, index, dy)
            return dx

        return record(xp.asarray(self.data[index]), (self, dself))
