"""Is this VJP the derivative? For functions of Tensors, and for anybody's NumPy function with a hand-written gradient.

The output is weighted by a random cotangent `dy`, so that every function has one number, φ(x) = Σ dy · f(x), to
differentiate. A cotangent of ones would be blind: the rows of a softmax or of a layer norm have constant sums, so
under ones the true gradient is zero, and a backward that returns zero passes.
"""

import math
import numbers
from collections import namedtuple

import numpy as np

from .backend import get_array_module, to_device, to_numpy
from .graph import is_recording
from .tensor import Tensor

Report = namedtuple("Report", "compared worst")  # how many numbers were compared; the largest relative error seen


class GradientError(AssertionError):
    """The gradient under test is not the derivative. The message says where, and shows both values.

    Shapes: none. Raises: it is raised, by `gradcheck` and `check_vjp`. Source: an AssertionError, as a failed test is.
    """


def gradcheck(f, *inputs, rng=None, rtol=1e-6, step=1e-5, max_elements=2000, directions=20):
    """Check the backward pass of `f`, a function of Tensors, against central differences in float64.

    Shapes: `inputs` are float arrays or Tensors of any shape (a copy in float64 is used), `f(*tensors)` returns one
    Tensor of any shape. An input of up to `max_elements` is compared element by element, a larger one along
    `directions` random directions. Returns `Report(compared, worst)`, which is always true.
    Raises: GradientError at the first mismatch, with input, index and both values; ValueError if `f` cannot be
    checked (not deterministic, not differentiable here, not finite, writes to its inputs); TypeError for no floats.
    Source: the cotangent follows HIPS/autograd's `check_vjp`; differences with Richardson's extrapolation.

    >>> gradcheck(lambda x, w: (x @ w).tanh(), np.ones((2, 3)), np.full((3, 4), 0.1)).compared
    18
    """
    if not is_recording():
        raise ValueError("gradcheck under no_grad() has no gradient to check; call it outside")
    arrays = [x.data if isinstance(x, Tensor) else x for x in inputs]
    devices = [get_array_module(a) for a in arrays]

    def call(*xs):
        leaves = [Tensor(to_device(x, xp), requires_grad=True) for x, xp in zip(xs, devices, strict=True)]
        y = f(*leaves)
        if not isinstance(y, Tensor):
            raise TypeError(f"gradcheck: f returned {type(y).__name__}, not a Tensor; for plain arrays use check_vjp")
        return leaves, y

    def vjp(dy, *xs):
        leaves, y = call(*xs)
        if y.requires_grad:
            y.backward(to_device(dy, get_array_module(y.data)))
        return [np.zeros_like(x) if t.grad is None else to_numpy(t.grad) for x, t in zip(xs, leaves, strict=True)]

    def forward(*xs):
        leaves, y = call(*xs)
        for x, t in zip(xs, leaves, strict=True):
            x[...] = to_numpy(t.data)  # if f wrote to its input on a device, let check_vjp see it
        return to_numpy(y.data)

    arrays = [to_numpy(a) for a in arrays]
    return check_vjp(
        forward, vjp, *arrays, rng=rng, rtol=rtol, step=step, max_elements=max_elements, directions=directions
    )


def check_vjp(f, vjp, *inputs, rng=None, rtol=1e-6, step=1e-5, max_elements=2000, directions=20):
    """Check a hand-written gradient: `vjp(dy, *inputs)` returns one array per input, for `y = f(*inputs)`.

    No Tensor is needed: `f` and `vjp` take and return NumPy arrays (or numbers). Everything runs in float64.
    Shapes: inputs of any shape, dy like y, and each returned gradient like its input.
    `rng` (default: seed 0) draws the cotangent and the directions; `step` is relative to max(1, |x|).
    Returns: as `gradcheck`. Raises: as `gradcheck`. Source: as `gradcheck`.

    >>> check_vjp(lambda x: x * x, lambda dy, x: (dy * 2 * x,), np.array([1.0, 2.0])).compared
    2
    >>> check_vjp(lambda x: x * x, lambda dy, x: (dy * x,), np.array([1.0, 2.0]))
    Traceback (most recent call last):
    minilora.gradcheck.GradientError: ... index (0,): the gradient says 0.7697..., central differences say 1.5395...
    """
    rng = rng or np.random.default_rng(0)
    xs = [_float64(i, x) for i, x in enumerate(inputs)]
    y = _evaluate(f, xs)
    again = _evaluate(f, xs)
    if not np.array_equal(y, again):
        gap = np.max(np.abs(y - again)) if y.shape == again.shape else f"the shapes {y.shape} and {again.shape}"
        raise ValueError(f"f is not deterministic: two calls on the same inputs differ by {gap}; fix its randomness")
    dy = rng.choice([-1.0, 1.0], y.shape) * rng.uniform(0.5, 1.5, y.shape)  # no component is small
    gradients = vjp(dy.copy(), *[x.copy() for x in xs])
    if len(xs) == 1 and isinstance(gradients, (np.ndarray, numbers.Real)):
        gradients = (gradients,)
    if not isinstance(gradients, (tuple, list)) or len(gradients) != len(xs):
        got = len(gradients) if isinstance(gradients, (tuple, list)) else type(gradients).__name__
        raise GradientError(f"vjp must return one gradient per input: {len(xs)} inputs, got {got}")

    compared, worst = 0, 0.0
    for i, (x, dx) in enumerate(zip(xs, gradients, strict=True)):
        dx = np.asarray(dx, np.float64)
        if dx.shape != x.shape:
            raise GradientError(f"input {i} has shape {x.shape}, but its gradient has shape {dx.shape}")
        if not np.isfinite(dx).all():
            index = tuple(int(j) for j in np.argwhere(~np.isfinite(dx))[0])
            raise GradientError(f"input {i} of shape {x.shape}, index {index}: the gradient says {dx[index]}")
        largest = np.abs(dx).max(initial=0.0)
        for where, direction in _directions(x, max_elements, directions, rng):
            phi = lambda t: _evaluate(f, [*xs[:i], x + t * direction, *xs[i + 1 :]])
            h = step * max(1.0, float(np.abs(x[direction != 0]).max(initial=0.0)))
            numerical, noise = _derivative(phi, y, dy, h, f"input {i} of shape {x.shape}, {where}")
            if noise > max(1e-6, 1e-3 * max(abs(numerical), largest)):
                raise ValueError(f"input {i}: f is so large that rounding hides slopes under {noise:.3g}; rescale it")
            analytic = float(np.sum(dx * direction))
            error, size = abs(analytic - numerical), max(abs(analytic), abs(numerical))
            if not error <= rtol * size + noise:
                raise GradientError(
                    f"input {i} of shape {x.shape}, {where}: the gradient says {analytic:.12g}, central differences "
                    f"say {numerical:.12g} (off by {error:.3g}, allowed {rtol * size + noise:.3g})"
                )
            compared += 1
            worst = max(worst, error / size if size > noise else 0.0)
    if compared == 0:
        raise ValueError(f"there is nothing to compare: inputs of shapes {[x.shape for x in xs]} hold no number")
    return Report(compared, worst)


def _float64(i, x):
    x = np.asarray(x)
    if x.dtype.kind != "f":
        raise TypeError(f"input {i} holds {x.dtype}: only floats have a derivative; close over it: lambda x: f(x, ids)")
    return x.astype(np.float64)


def _evaluate(f, xs):
    """f(*xs) as a float64 array, with what makes a function uncheckable named."""
    given = [np.array(x) for x in xs]
    y = f(*given)
    for i, (x, now) in enumerate(zip(xs, given, strict=True)):
        if not np.array_equal(x, now, equal_nan=True):
            raise ValueError(f"f writes to its input {i}; compute out of place, or copy it first")
    if isinstance(y, (tuple, list)):
        raise TypeError(f"f returned {len(y)} values; return one array, or check one output at a time")
    y = np.asarray(y)
    if y.dtype.kind != "f" or y.dtype.itemsize < 8:
        raise TypeError(f"f returned {y.dtype} for float64 inputs; keep the dtype, or differences cannot be taken")
    if not np.isfinite(y).all():
        raise ValueError("f is not finite at or near these inputs; choose others, or a smaller step")
    return y


def _directions(x, max_elements, n, rng):
    """What to move `x` along: each element in turn if there are few, else random directions of length one."""
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
    """The derivative of Σ dy · phi(t) at 0, and a bound on its rounding noise; ValueError if there is none.

    Richardson: (4 D(h/2) - D(h)) / 3 cancels the h² error of the central difference D. If D changes between h and
    h/2, or the two one-sided slopes stay apart as h shrinks (for a smooth function their gap halves), it has a kink.
    """
    (up, down), (half_up, half_down) = ((phi(t), phi(-t)) for t in (h, h / 2))
    wide = float(np.sum(dy * (up - down))) / (2 * h)
    narrow = float(np.sum(dy * (half_up - half_down))) / h
    gap = float(np.sum(np.abs(up - 2 * y + down))) / h
    half_gap = float(np.sum(np.abs(half_up - 2 * y + half_down))) / (h / 2)
    moved = (up != y) | (down != y) | (half_up != y) | (half_down != y)  # what does not move does not round either
    size = float(np.sum(np.abs(dy * y)[moved])) + 0.1  # 0.1: y may be small only because large terms cancelled
    noise = 200 * np.finfo(np.float64).eps * size / h
    slope = max(abs(wide), abs(narrow))
    scale = 1e-3 * slope + 10 * noise + h
    if abs(wide - narrow) > scale or (half_gap > 0.75 * gap and half_gap > scale):
        raise ValueError(f"{where}: f is not differentiable here, or bends within ±{h:.3g}; move the input or the step")
    return (4 * narrow - wide) / 3, noise
