"""Is this VJP the derivative? For functions of Tensors, and for anybody's NumPy function.

The output is weighted by a random cotangent `dy`, so that every function has one number to
differentiate: φ(x) = Σ dy · f(x). A cotangent of ones would be blind. The rows of a softmax or of a
layer norm have constant sums, so under ones the true gradient is zero, and a backward that returns
zero passes.
"""

import math
import numbers
from collections import namedtuple

import numpy as np

from .backend import get_array_module, to_device, to_numpy
from .graph import is_recording
from .tensor import Tensor

# How many numbers were compared, and the largest relative error among them.
Report = namedtuple("Report", "compared worst")


class GradientError(AssertionError):
    """The gradient under test is not the derivative. The message says where, and shows both values.

    Where two values differ, they are attributes too: `where` (a text), `analytic`, `numerical`. It
    is an AssertionError, as that of a failed test.
    """

    def __init__(self, message, where=None, analytic=None, numerical=None):
        super().__init__(message)
        self.where = where
        self.analytic = analytic
        self.numerical = numerical


def gradcheck(
    f,
    *inputs,
    rng=None,
    rtol=1e-6,
    step=1e-5,
    max_elements=2000,
    directions=20,
):
    """Check the backward pass of `f`, a function of Tensors, by central differences in float64.

    The options are those of `check_vjp`. Returns `Report(compared, worst)`, which is always true.

    Shapes: `inputs` are float arrays or Tensors of any shape, of which a copy in float64 is used;
    `f(*tensors)` returns one Tensor of any shape.
    Raises: GradientError at the first mismatch, with input, index and both values; ValueError if
    `f` cannot be checked (not deterministic, not differentiable here, not finite, writes to its
    inputs); TypeError for inputs that are no floats.
    Source: the cotangent follows HIPS/autograd's `check_vjp`.

    >>> gradcheck(lambda x, w: (x @ w).tanh(), np.ones((2, 3)), np.full((3, 4), 0.1)).compared
    18
    """
    if not is_recording():
        raise ValueError("gradcheck under no_grad() has no gradient to check; call it outside")
    arrays = [x.data if isinstance(x, Tensor) else x for x in inputs]
    devices = [get_array_module(a) for a in arrays]

    def call(*xs):
        pairs = zip(xs, devices, strict=True)
        leaves = [Tensor(to_device(x, xp), requires_grad=True) for x, xp in pairs]
        y = f(*leaves)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"gradcheck: f returned {type(y).__name__}, not a Tensor; "
                "for plain arrays use check_vjp"
            )
        return leaves, y

    def vjp(dy, *xs):
        leaves, y = call(*xs)
        if y.requires_grad:
            y.backward(to_device(dy, get_array_module(y.data)))
        gradients = []
        for x, leaf in zip(xs, leaves, strict=True):
            # An input that f does not use has no gradient, which is to say zero.
            gradients.append(np.zeros_like(x) if leaf.grad is None else to_numpy(leaf.grad))
        return gradients

    def forward(*xs):
        leaves, y = call(*xs)
        for x, leaf in zip(xs, leaves, strict=True):
            # If f wrote to its input on a device, check_vjp sees it here.
            x[...] = to_numpy(leaf.data)
        return to_numpy(y.data)

    return check_vjp(
        forward,
        vjp,
        *[to_numpy(a) for a in arrays],
        rng=rng,
        rtol=rtol,
        step=step,
        max_elements=max_elements,
        directions=directions,
    )


def check_vjp(
    f,
    vjp,
    *inputs,
    rng=None,
    rtol=1e-6,
    step=1e-5,
    max_elements=2000,
    directions=20,
):
    """Check a hand-written gradient, `vjp(dy, *inputs)`, of a function `y = f(*inputs)`.

    No Tensor is needed: `f` and `vjp` take and return NumPy arrays (or numbers), in float64. An
    input of up to `max_elements` is compared element by element, a larger one along `directions`
    random directions. `rng` (default: seed 0) draws the cotangent and the directions. `step` is
    relative to max(1, |x|). Returns `Report(compared, worst)`.

    Shapes: inputs of any shape, dy like y; `vjp` returns one gradient for each input, of its shape.
    Raises: as `gradcheck`.
    Source: central differences with Richardson's extrapolation.

    >>> check_vjp(lambda x: x * x, lambda dy, x: (dy * 2 * x,), np.array([1.0, 2.0])).compared
    2
    >>> check_vjp(lambda x: x * x, lambda dy, x: (dy * x,), np.array([1.0, 2.0]))
    Traceback (most recent call last):
    minilora.gradcheck.GradientError: ... index (0,): the gradient says 0.7697..., ... say 1.5395...
    """
    rng = rng or np.random.default_rng(0)
    xs = [_float64(i, x) for i, x in enumerate(inputs)]
    y = _deterministic(f, xs)
    # No component of the cotangent is small, so every element of y counts.
    dy = rng.choice([-1.0, 1.0], y.shape) * rng.uniform(0.5, 1.5, y.shape)
    gradients = _checked_gradients(vjp(dy.copy(), *[x.copy() for x in xs]), xs)

    compared = 0
    worst = 0.0
    for i, (x, dx) in enumerate(zip(xs, gradients, strict=True)):
        largest = np.abs(dx).max(initial=0.0)
        for where, direction in _directions(x, max_elements, directions, rng):
            where = f"input {i} of shape {x.shape}, {where}"
            phi = lambda t: _evaluate(f, [*xs[:i], x + t * direction, *xs[i + 1 :]])
            h = step * max(1.0, float(np.abs(x[direction != 0]).max(initial=0.0)))
            numerical, noise = _derivative(phi, y, dy, h, where)
            if noise > max(1e-6, 1e-3 * max(abs(numerical), largest)):
                raise ValueError(
                    f"input {i}: f is so large that rounding hides slopes under {noise:.3g}; "
                    "rescale it"
                )
            analytic = float(np.sum(dx * direction))
            error = abs(analytic - numerical)
            size = max(abs(analytic), abs(numerical))
            allowed = rtol * size + noise
            if not error <= allowed:
                raise GradientError(
                    f"{where}: the gradient says {analytic:.12g}, central differences say "
                    f"{numerical:.12g} (off by {error:.3g}, allowed {allowed:.3g})",
                    where,
                    analytic,
                    numerical,
                )
            compared += 1
            if size > noise:
                worst = max(worst, error / size)
    if compared == 0:
        raise ValueError(
            f"there is nothing to compare: inputs of shapes {[x.shape for x in xs]} hold no number"
        )
    return Report(compared, worst)


def _deterministic(f, xs):
    """f(*xs), if a second call gives the same."""
    y = _evaluate(f, xs)
    second = _evaluate(f, xs)
    if np.array_equal(y, second):
        return y
    gap = f"the shapes {y.shape} and {second.shape}"
    if y.shape == second.shape:
        gap = np.max(np.abs(y - second))
    raise ValueError(
        f"f is not deterministic: two calls on the same inputs differ by {gap}; fix its randomness"
    )


def _checked_gradients(gradients, xs):
    """What a vjp returned, as float64 arrays: one for each input, of its shape, finite."""
    if len(xs) == 1 and isinstance(gradients, (np.ndarray, numbers.Real)):
        gradients = (gradients,)
    if not isinstance(gradients, (tuple, list)):
        raise GradientError(
            f"vjp must return one gradient per input: {len(xs)} inputs, "
            f"got {type(gradients).__name__}"
        )
    if len(gradients) != len(xs):
        raise GradientError(
            f"vjp must return one gradient per input: {len(xs)} inputs, got {len(gradients)}"
        )
    checked = []
    for i, (x, dx) in enumerate(zip(xs, gradients, strict=True)):
        dx = np.asarray(dx, np.float64)
        if dx.shape != x.shape:
            raise GradientError(
                f"input {i} has shape {x.shape}, but its gradient has shape {dx.shape}"
            )
        if not np.isfinite(dx).all():
            index = tuple(int(j) for j in np.argwhere(~np.isfinite(dx))[0])
            raise GradientError(
                f"input {i} of shape {x.shape}, index {index}: the gradient says {dx[index]}"
            )
        checked.append(dx)
    return checked


def _float64(i, x):
    x = np.asarray(x)
    if x.dtype.kind != "f":
        raise TypeError(
            f"input {i} holds {x.dtype}: only floats have a derivative; "
            "close over it: lambda x: f(x, ids)"
        )
    return x.astype(np.float64)


def _evaluate(f, xs):
    """f(*xs) as a float64 array; an error names whatever makes f impossible to check."""
    copies = [np.array(x) for x in xs]
    y = f(*copies)
    for i, (x, copy) in enumerate(zip(xs, copies, strict=True)):
        if not np.array_equal(x, copy, equal_nan=True):
            raise ValueError(f"f writes to its input {i}; compute out of place, or copy it first")
    if isinstance(y, (tuple, list)):
        raise TypeError(
            f"f returned {len(y)} values; return one array, or check one output at a time"
        )
    y = np.asarray(y)
    if y.dtype.kind != "f" or y.dtype.itemsize < 8:
        raise TypeError(
            f"f returned {y.dtype} for float64 inputs; "
            "keep the dtype, or differences cannot be taken"
        )
    if not np.isfinite(y).all():
        raise ValueError(
            "f is not finite at or near these inputs; choose others, or a smaller step"
        )
    return y


def _directions(x, max_elements, n, rng):
    """What to move `x` along: few elements one by one, else random directions of length one."""
    if x.size <= max_elements:
        for index in np.ndindex(x.shape):
            unit = np.zeros_like(x)
            unit[index] = 1.0
            yield f"index {index}", unit
    else:
        for k in range(n):
            v = rng.choice([-1.0, 1.0], x.shape) * rng.uniform(0.5, 1.5, x.shape)
            yield f"random direction {k}", v / math.sqrt(float(np.sum(v * v)))


def _derivative(phi, y, dy, h, where):
    """The derivative of Σ dy · phi(t) at 0, and a bound on its rounding noise.

    Richardson: (4 D(h/2) - D(h)) / 3 cancels the h² error of the central difference D. If D changes
    between h and h/2, or the two one-sided slopes stay apart as h shrinks (for a smooth function
    their gap halves), then f has a kink.
    """
    up = phi(h)
    down = phi(-h)
    half_up = phi(h / 2)
    half_down = phi(-h / 2)
    wide = float(np.sum(dy * (up - down))) / (2 * h)
    narrow = float(np.sum(dy * (half_up - half_down))) / h
    gap = float(np.sum(np.abs(up - 2 * y + down))) / h
    half_gap = float(np.sum(np.abs(half_up - 2 * y + half_down))) / (h / 2)
    # An element that does not move is not rounded anew. The 0.1: y may be small only because large
    # terms cancelled.
    moved = (up != y) | (down != y) | (half_up != y) | (half_down != y)
    size = float(np.sum(np.abs(dy * y)[moved])) + 0.1
    noise = 200 * np.finfo(np.float64).eps * size / h
    slope = max(abs(wide), abs(narrow))
    scale = 1e-3 * slope + 10 * noise + h
    if abs(wide - narrow) > scale or (half_gap > 0.75 * gap and half_gap > scale):
        raise ValueError(
            f"{where}: f is not differentiable here, or bends within ±{h:.3g}; "
            "move the input or the step"
        )
    return (4 * narrow - wide) / 3, noise
