"""The function under test and its VJP, as functions of one flat array. Compares nothing.

Whoever wrote them may have mistaken how they are called, what they may return, or whether they may
write to their inputs. Each of these mistakes has its message here.
"""

import inspect

import numpy as np

from .mistakes import GradientError, shape_mistake
from .structure import leaves, with_leaves
from .tensor import Tensor


def is_float(value):
    """Is it a float, or an array (NumPy's or CuPy's) of floats?"""
    dtype = getattr(value, "dtype", None)
    return isinstance(value, float) or (dtype is not None and np.dtype(dtype).kind == "f")


def is_constant(value):
    """Is it what has no derivative and passes through: integers, booleans, texts, dates, None?"""
    if value is None or isinstance(value, (int, str, bytes)):
        return True
    dtype = getattr(value, "dtype", None)
    return dtype is not None and np.dtype(dtype).kind in "biuSUMm"


def bracketed(index):
    """An index as one writes it, [1, 2]; nothing for that of a single number."""
    return f"[{', '.join(str(int(i)) for i in index)}]" if len(index) else ""


class Subject:
    """`f` and `vjp` with their inputs.

    `paths`, `xs`: the float inputs, in float64, wherever they stand in lists and dicts.
    `y`: the float64 outputs, flat, one after the other.
    Raises: TypeError for inputs and outputs that have no derivative, and for a signature that does
    not fit; ValueError if `f` is not deterministic, not finite, or writes to its inputs.
    """

    def __init__(self, f, vjp, inputs):
        __tracebackhide__ = True
        self.f = f
        self.vjp = vjp
        self.inputs = inputs
        # Every leaf of the inputs, its path, and where among them the float inputs stand.
        self.values = []
        self.names = []
        self.places = []
        for i, value in enumerate(inputs):
            for path, leaf in leaves(value, f"input {i}"):
                if _is_differentiable(path, leaf):
                    leaf = np.array(leaf, np.float64, order="C")
                    self.places.append(len(self.values))
                self.values.append(leaf)
                self.names.append(path)
        self.paths = [self.names[place] for place in self.places]
        self.xs = [self.values[place] for place in self.places]
        _check_signature("f", f, "f(*inputs)", inputs)
        _check_signature("vjp", vjp, "vjp(dy, *inputs)", (None, *inputs))
        self._evaluate()

    def _evaluate(self):
        """Compute `y`, twice, and refuse what cannot be checked."""
        __tracebackhide__ = True
        # From here on f gets these in the places of the inputs that stay where they are. To copy
        # them for each call would take longer than the call.
        self.shared = self._copies()
        self.y = self._first()
        self.check_unwritten()
        second = self._flat(self._call(self.shared))
        if not np.array_equal(self.y, second):
            gap = f"{self.y.size} numbers against {second.size}"
            if self.y.shape == second.shape:
                gap = f"they differ by {np.max(np.abs(self.y - second)):.3g}"
            raise ValueError(
                f"f is not deterministic: two calls on the same inputs, and {gap}; "
                "fix its randomness"
            )

    def _copies(self):
        return [v.copy() if isinstance(v, np.ndarray) else v for v in self.values]

    def _call(self, values):
        return self.f(*with_leaves(self.inputs, iter(values)))

    def _first(self):
        """f of the inputs as they are, flat; every complaint that its output deserves."""
        __tracebackhide__ = True
        self.output = self._call(self.shared)
        outputs = _float_outputs(self.output)
        if not outputs:
            raise TypeError(f"f returned {_shown(self.output)}: nothing of it has a derivative")
        for path, y in outputs:
            _check_finite(path, y)
        # Kept to see whether f returns the same array, written anew, from each call.
        self.raw = [y for _, y in outputs]
        return self._flat(self.output)

    def _flat(self, output):
        """The float64 numbers of an output of f, in an array that f will not write anew."""
        if type(output) is np.ndarray and output.dtype == np.float64:
            flat = [output.reshape(-1)]
        else:
            flat = [y.reshape(-1) for _, y in _float_outputs(output)]
        rewritten = any(np.may_share_memory(y, raw) for y in flat for raw in self.raw)
        return flat[0] if len(flat) == 1 and not rewritten else np.concatenate(flat)

    def check_repeats(self):
        """Raise ValueError if f of the inputs has become another than it was."""
        __tracebackhide__ = True
        again = self._flat(self._call(self.shared))
        if not np.array_equal(self.y, again):
            raise ValueError(
                "f is not deterministic: after some calls it returns other values for the same "
                "inputs; fix its randomness"
            )

    def check_unwritten(self):
        """Raise ValueError if f has written to an input that was to stay where it is."""
        __tracebackhide__ = True
        for name, value, shared in zip(self.names, self.values, self.shared, strict=True):
            if not isinstance(value, np.ndarray):
                continue
            if not np.array_equal(value, shared, equal_nan=value.dtype.kind == "f"):
                raise ValueError(f"f writes to its {name}; compute out of place, or copy it first")

    def along(self, k):
        """f as a function of float input k alone, flat in and out; None where it is not finite."""
        place = self.places[k]
        shape = self.xs[k].shape

        def f(x):
            values = list(self.shared)
            values[place] = x.reshape(shape)
            try:
                # Beside its inputs f may leave its domain. Its author need not have guarded that.
                with np.errstate(all="ignore"):
                    output = self._call(values)
            except Exception:
                return None
            y = self._flat(output)
            if y.size != self.y.size:
                raise TypeError(
                    f"f returned {self.y.size} numbers, and beside its inputs {y.size}; the shape "
                    "of the output must not depend on the values"
                )
            return y

        return f

    def gradients(self, dy, xs=None):
        """What vjp returns for the flat cotangent `dy`: float64 arrays like `xs`, finite.

        The cotangent gets the structure of the output, with None for outputs without a derivative.
        Raises: GradientError for another structure, shape, or what is not finite.
        """
        __tracebackhide__ = True
        values = self._copies()
        if xs is not None:
            for place, x in zip(self.places, xs, strict=True):
                values[place] = x.copy()
        cotangents = []
        start = 0
        for path, leaf in leaves(self.output, "f"):
            if not _is_output(path, leaf):
                cotangents.append(None)
                continue
            stop = start + np.size(leaf)
            cotangents.append(dy[start:stop].copy().reshape(np.shape(leaf)))
            start = stop
        cotangent = with_leaves(self.output, iter(cotangents))
        returned = self.vjp(cotangent, *with_leaves(self.inputs, iter(values)))
        found = []
        for i, gradient in enumerate(_one_for_each(self.inputs, returned)):
            found.extend(_matched(self.inputs[i], gradient, f"input {i}"))
        for name, value, gradient in zip(self.names, self.values, found, strict=True):
            if gradient is not None and not is_float(value):
                raise GradientError(
                    f"{name} has no derivative, but its gradient is {_shown(gradient)}; "
                    "return None for it",
                    input=name,
                )
        named = zip(self.places, self.paths, self.xs, strict=True)
        return [_checked_gradient(path, x, found[place]) for place, path, x in named]


def _shown(value):
    """What somebody returned, in a word or two."""
    if value is None:
        return "None"
    if hasattr(value, "dtype"):
        return f"{value.dtype}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def _check_signature(who, function, form, arguments):
    __tracebackhide__ = True
    if not callable(function):
        raise TypeError(f"{who} must be a function, called as {form}; got {function!r:.60}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # Functions written in C may have none. What is wrong with them, the call says.
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        raise TypeError(
            f"{who} is called as {form}, here with {len(arguments)} arguments, "
            f"and takes {signature}"
        ) from None


def _is_differentiable(path, leaf):
    """Is this input an array (or number) of floats? Raises TypeError for what no input can be."""
    __tracebackhide__ = True
    if isinstance(leaf, Tensor):
        raise TypeError(
            f"{path} is a Tensor, and check_vjp takes NumPy arrays: pass t.data, or, for a "
            "function of Tensors, use gradcheck"
        )
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(f"{path} is a masked array; pass .filled(), and its mask beside it")
    if _is_complex(leaf):
        raise TypeError(_about_complex(path))
    known = isinstance(leaf, (np.ndarray, np.generic, float, int, str, bytes, type(None)))
    if known and is_float(leaf):
        return True
    if known and is_constant(leaf):
        return False
    shown = type(leaf).__name__
    if known:
        shown = f"an array of {leaf.dtype}"
    raise TypeError(
        f"{path}: expected NumPy arrays of floats or integers, lists or dicts of them, got "
        f"{shown}; gradcheck takes Tensors and CuPy's arrays; close over anything else: "
        "lambda x: f(x, other)"
    )


def _is_complex(leaf):
    dtype = getattr(leaf, "dtype", None)
    return isinstance(leaf, complex) or (dtype is not None and np.dtype(dtype).kind == "c")


def _about_complex(path):
    return (
        f"{path} holds complex numbers; a derivative here is one by real numbers: pass the real "
        "and the imaginary part as two inputs, and return both parts of the output"
    )


def _is_output(path, leaf):
    """Is this output an array (or number) of float64? Raises TypeError for what none can be."""
    __tracebackhide__ = True
    if leaf is None:
        raise TypeError(f"{path} returned None; is its `return` missing?")
    if isinstance(leaf, Tensor):
        raise TypeError(f"{path} returned a Tensor; for functions of Tensors use gradcheck")
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(f"{path} returned a masked array; return .filled()")
    if _is_complex(leaf):
        raise TypeError(_about_complex(f"the output of {path}"))
    if is_float(leaf) and np.asarray(leaf).dtype.itemsize < 8:
        raise TypeError(
            f"{path} returned {leaf.dtype} for float64 inputs; "
            "keep the dtype, or differences cannot be taken"
        )
    if not is_float(leaf) and not is_constant(leaf):
        raise TypeError(f"{path} returned {_shown(leaf)}; return arrays, or lists or dicts of them")
    return is_float(leaf)


def _float_outputs(output):
    """[(path, array)] of those outputs that have a derivative."""
    __tracebackhide__ = True
    return [(path, np.asarray(y)) for path, y in leaves(output, "f") if _is_output(path, y)]


def _check_finite(path, y):
    __tracebackhide__ = True
    finite = np.isfinite(y)
    if not finite.all():
        index = np.argwhere(~finite)[0]
        raise ValueError(
            f"f is not finite at these inputs: {path}{bracketed(index)} is {y[tuple(index)]}; "
            "choose inputs inside its domain"
        )


def _one_for_each(inputs, returned):
    """The gradients that vjp returned, as a sequence with one for each input."""
    __tracebackhide__ = True
    n = len(inputs)
    alone = n == 1 and isinstance(inputs[0], (tuple, list, dict))
    if alone and _same_structure(inputs[0], returned):
        return (returned,)
    if n == 1 and not alone and (hasattr(returned, "dtype") or isinstance(returned, (int, float))):
        return (returned,)
    if returned is None:
        raise GradientError(
            f"vjp must return one gradient per input: {n} inputs, got None; is its `return` "
            "missing? For an input without a gradient return None in its place"
        )
    if not isinstance(returned, (tuple, list)):
        raise GradientError(
            f"vjp must return one gradient per input: {n} inputs, got {_shown(returned)}"
        )
    if len(returned) != n:
        raise GradientError(
            f"vjp must return one gradient per input: {n} inputs, got {len(returned)}"
        )
    return returned


def _same_structure(value, other):
    """Do both hold leaves in the same places? A list and a tuple count as the same."""
    return {path for path, _ in leaves(value, "")} == {path for path, _ in leaves(other, "")}


def _matched(value, gradient, path):
    """The leaves of `gradient`, one for each leaf of the input `value`, whose structure it has."""
    __tracebackhide__ = True
    if gradient is None:
        return [None for _ in leaves(value, path)]
    if isinstance(value, dict):
        if not isinstance(gradient, dict) or set(gradient) != set(value):
            shown = list(gradient) if isinstance(gradient, dict) else _shown(gradient)
            raise GradientError(
                f"{path} is a dict of {list(value)}, but its gradient is {shown}", input=path
            )
        keys = list(value)
    elif isinstance(value, (list, tuple)):
        if not isinstance(gradient, (list, tuple)) or len(gradient) != len(value):
            raise GradientError(
                f"{path} is {_shown(value)}, but its gradient is {_shown(gradient)}", input=path
            )
        keys = range(len(value))
    else:
        return [gradient]
    found = []
    for key in keys:
        found.extend(_matched(value[key], gradient[key], f"{path}[{key!r}]"))
    return found


def _checked_gradient(path, x, dx):
    """The gradient of one float input in float64; zeros for None."""
    __tracebackhide__ = True
    if dx is None:
        return np.zeros_like(x)
    if isinstance(dx, np.ma.MaskedArray):
        raise GradientError(
            f"the gradient of {path} is a masked array; return .filled()", input=path
        )
    try:
        dx = np.asarray(dx)
    except ValueError:
        raise GradientError(f"the gradient of {path} is no array: {dx!r:.60}", input=path) from None
    if dx.dtype.kind not in "fbiu":
        raise GradientError(
            f"the gradient of {path} holds {dx.dtype}, not real numbers", input=path
        )
    if dx.shape != x.shape:
        hint = shape_mistake(dx.shape, x.shape)
        message = f"{path} has shape {x.shape}, but its gradient has shape {dx.shape}"
        if hint:
            message += f": {hint}"
        raise GradientError(message, input=path, pattern=hint)
    dx = np.array(dx, np.float64, order="C")
    finite = np.isfinite(dx)
    if not finite.all():
        index = tuple(int(j) for j in np.argwhere(~finite)[0])
        raise GradientError(
            f"the gradient says {dx[index]} at {path}{bracketed(index)}",
            input=path,
            index=index,
            analytic=float(dx[index]),
            wrong=int(np.count_nonzero(~finite)),
            of=dx.size,
        )
    return dx
