"""A stand-in for CuPy on machines without a GPU: CuPy's names over host memory, and none of NumPy's forgiveness.

An array of this module mixes with its own kind and with numbers, and with nothing else: a host array or a list as an
operand, an index or a value, `np.exp(x)`, `np.sum(x)` and `np.asarray(x)` are all a TypeError. Reductions and
picks of one element are 0-d arrays, as on a GPU. Only functions and arguments that CuPy 13 has are here.
"""

import collections
import operator

import numpy as np

float16, float32, float64, int32, int64 = np.float16, np.float32, np.float64, np.int32, np.int64
newaxis, inf, nan, pi = None, float("inf"), float("nan"), np.pi

_ARRAYS = {"A", "a", "x", "x1", "x2", "m", "y", "condition", "array", "out", "b"}  # these are arrays (or numbers)
_LISTS = {"tup"}  # parameters that are sequences of arrays


# How often each operation was asked for: on a GPU every one of them launches a kernel. Views are free.
CALLS = collections.Counter()
# How often numbers went to the host: on a GPU each of these waits until all that was asked before is computed.
WAITS = collections.Counter()
FREE = {"empty", "empty_like", "reshape", "swapaxes", "transpose", "broadcast_to", "squeeze"}


class ndarray:
    """An array on the pretended device."""

    __array_ufunc__ = None  # np.exp(x) and np_array * x are refused; `x.__rmul__` then refuses the host array
    __slots__ = ("_host", "__weakref__")

    shape = property(lambda self: self._host.shape)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    dtype = property(lambda self: self._host.dtype)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    T = property(lambda self: _wrap(self._host.T))
    device = property(lambda self: "strict")

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed; move it with asnumpy(x) or x.get()")

    def __array_function__(self, func, types, args, kwargs):
        raise TypeError(f"numpy.{func.__name__} was given an array of this device")

    def __repr__(self):
        return f"strict_{self._host!r}"

    def __len__(self):
        return len(self._host)

    def __getitem__(self, index):
        if any(isinstance(i, ndarray) for i in (index if isinstance(index, tuple) else (index,))):
            CALLS["take"] += 1
        return _wrap(self._host[_index(index)])

    def __setitem__(self, index, value):
        CALLS["put"] += 1
        self._host[_index(index)] = _operand(value)

    def __copy__(self):
        return _wrap(self._host.copy())

    def __deepcopy__(self, memo):
        return _wrap(self._host.copy())

    def get(self):
        """A copy on the host."""
        WAITS["get"] += 1
        return self._host.copy()

    def view(self, dtype):
        """The same memory as numbers of another size: CuPy asks that it be in one piece."""
        if not self._host.flags.c_contiguous:
            raise ValueError("the array must be C-contiguous to be viewed in another dtype")
        return _wrap(self._host.view(dtype))


def _wrap(host):
    x = object.__new__(ndarray)
    x._host = np.asarray(host)
    return x


def _operand(x):
    """The host memory of an array of this module, or a number; anything else is refused."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, (bool, int, float, np.generic)):
        return x
    raise TypeError(f"Unsupported type {type(x)}: this device computes with its own arrays and with numbers")


def _index(i):
    if isinstance(i, tuple):
        return tuple(_index(j) for j in i)
    if isinstance(i, (np.ndarray, list)):
        raise TypeError(f"Unsupported index {type(i)}: move it to the device")
    return i._host if isinstance(i, ndarray) else i


def _convert(name, value):
    if name in _ARRAYS:
        return value if value is None else _operand(value)
    if name in _LISTS:
        return [_operand(v) for v in value]
    if isinstance(value, (np.ndarray, ndarray)):
        raise TypeError(f"{name} must not be an array, got {type(value)}")
    return value


def _call(function, names, args, kwargs):
    """function(*args, **kwargs) on host memory, if every argument is one that CuPy has too."""
    if len(args) > len(names) or not set(kwargs) <= set(names):
        raise TypeError(f"{function.__name__}: CuPy takes {', '.join(names)}; got {len(args)} and {', '.join(kwargs)}")
    if function.__name__ not in FREE:
        CALLS[function.__name__] += 1
    given = [_convert(name, value) for name, value in zip(names, args, strict=False)]
    host = function(*given, **{name: _convert(name, value) for name, value in kwargs.items()})
    out = kwargs.get("out")
    return _wrap(host) if out is None else out


def _method(name, *names):
    def method(self, *args, **kwargs):
        return _call(getattr(self._host, name), names, args, kwargs)

    return method


def _spread(name):
    """A method that takes its one argument as a tuple or spread out: reshape(2, 3) is reshape((2, 3))."""

    def method(self, *args):
        return _wrap(getattr(self._host, name)(*args))

    return method


def _function(name, *names):
    def function(*args, **kwargs):
        return _call(getattr(np, name), names, args, kwargs)

    return function


UFUNCS = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide, "floordiv": np.floor_divide,
    "mod": np.remainder, "pow": np.power, "matmul": np.matmul, "eq": np.equal, "ne": np.not_equal, "lt": np.less,
    "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "and_": np.bitwise_and, "or_": np.bitwise_or,
    "lshift": np.left_shift, "rshift": np.right_shift,
}  # fmt: skip


def _binary(name):
    def method(self, other):
        CALLS[name] += 1
        asks = getattr(other, "__array_ufunc__", None)
        if asks and not isinstance(other, (ndarray, np.ndarray, np.generic)):
            return asks(UFUNCS[name], "__call__", self, other)  # a Tensor on the right, as CuPy does it
        return _wrap(getattr(operator, name)(self._host, _operand(other)))

    def reflected(self, other):
        CALLS[name] += 1
        return _wrap(getattr(operator, name)(_operand(other), self._host))

    def in_place(self, other):
        CALLS[name] += 1
        self._host[...] = getattr(operator, f"i{name}")(self._host, _operand(other))
        return self

    return method, reflected, in_place


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    for _prefix, _f in zip(("", "r", "i"), _binary(_name), strict=True):
        setattr(ndarray, f"__{_prefix}{_name}__", _f)
for _name in ("lshift", "rshift"):
    for _prefix, _f in zip(("", "r", "i"), _binary(_name), strict=True):
        setattr(ndarray, f"__{_prefix}{_name}__", _f)
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_"):
    setattr(ndarray, f"__{_name.strip('_')}__", _binary(_name)[0])
for _name, _f in (("neg", operator.neg), ("abs", operator.abs), ("invert", operator.invert)):
    setattr(ndarray, f"__{_name}__", lambda self, f=_f: _wrap(f(self._host)))



def _to_host(name, convert):
    def method(self, *args):
        WAITS[name] += 1
        return convert(self._host, *args)

    return method


for _type in (float, int, bool):
    setattr(ndarray, f"__{_type.__name__}__", _to_host(_type.__name__, _type))
for _name in ("item", "tolist", "tobytes"):
    setattr(ndarray, _name, _to_host(_name, getattr(np.ndarray, _name)))
for _name in ("reshape", "transpose"):
    setattr(ndarray, _name, _spread(_name))
for _name, _names in {
    "astype": "dtype order casting subok copy", "copy": "order", "ravel": "order", "flatten": "order", "fill": "value",
    "squeeze": "axis", "swapaxes": "axis1 axis2", "argsort": "axis", "argmax": "axis dtype out keepdims",
    "sum": "axis dtype out keepdims", "mean": "axis dtype out keepdims", "max": "axis out keepdims",
    "min": "axis out keepdims", "any": "axis out keepdims", "all": "axis out keepdims",
}.items():  # fmt: skip
    setattr(ndarray, _name, _method(_name, *_names.split()))
for _name, _names in {
    "empty": "shape dtype order", "zeros": "shape dtype order", "ones": "shape dtype order",
    "full": "shape fill_value dtype order", "arange": "start stop step dtype", "eye": "N M k dtype order",
    "empty_like": "a dtype order subok shape", "zeros_like": "a dtype order subok shape",
    "ones_like": "a dtype order subok shape", "full_like": "a fill_value dtype order subok shape",
    "exp": "x out", "log": "x out", "sqrt": "x out", "tanh": "x out", "sin": "x out", "cos": "x out",
    "square": "x out", "abs": "x out",
    "sign": "x out", "floor": "x out", "isfinite": "x out", "isnan": "x out", "negative": "x out",
    "add": "x1 x2 out", "subtract": "x1 x2 out", "multiply": "x1 x2 out", "maximum": "x1 x2 out",
    "minimum": "x1 x2 out", "matmul": "x1 x2 out", "where": "condition x y", "triu": "m k", "tril": "m k",
    "sum": "a axis dtype out keepdims", "mean": "a axis dtype out keepdims", "max": "a axis out keepdims",
    "argmax": "a axis dtype out keepdims", "argsort": "a axis", "broadcast_to": "array shape",
    "tile": "A reps", "repeat": "a repeats axis", "ascontiguousarray": "a dtype",
    "concatenate": "tup axis out", "stack": "tup axis out", "swapaxes": "a axis1 axis2", "array_equal": "x1 x2",
}.items():  # fmt: skip
    globals()[_name] = _function(_name, *_names.split())


def split(ary, indices_or_sections, axis=0):
    """Views, cut at the indices."""
    return [_wrap(part) for part in np.split(_operand(ary), indices_or_sections, axis=axis)]


def einsum(subscripts, *operands):
    """Sums of products, written with indices."""
    CALLS["einsum"] += 1
    return _wrap(np.einsum(subscripts, *map(_operand, operands)))


def asarray(a, dtype=None):
    """`a` on the device: itself if it is there, a copy if it comes from the host."""
    if isinstance(a, ndarray):
        return a if dtype in (None, a.dtype) else a.astype(dtype)
    return _wrap(np.array(a, dtype))


def array(obj, dtype=None, copy=True):
    """A new array on the device."""
    return _wrap(np.array(obj._host if isinstance(obj, ndarray) else obj, dtype, copy=copy))


def asnumpy(a):
    """A copy on the host."""
    return a.get() if isinstance(a, ndarray) else np.asarray(a)


def _add_at(a, indices, b):
    CALLS["add.at"] += 1
    np.add.at(_operand(a), _index(indices), _operand(b))


globals()["add"].at = _add_at
