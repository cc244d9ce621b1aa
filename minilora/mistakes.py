"""What the checker raises, and what kind of mistake a wrong gradient looks like. Decides nothing.

The patterns are hints for a message: that the gradient is wrong was found before.
"""

import numpy as np

# How well a pattern must fit, relative to the largest number.
FIT = 1e-4
DETAILS = ("input", "index", "analytic", "numerical", "allowed", "wrong", "of", "pattern", "seed")


class GradientError(AssertionError):
    """The gradient under test is not the derivative. The message says where, and shows both values.

    Attributes, None where they say nothing: `input` (a path such as "input 0['w']"), `index` (a
    tuple, or None if the error shows only along a direction), `analytic` (what the gradient says),
    `numerical` (what differences say), `allowed` (by how much they may differ), `wrong` and `of`
    (how many numbers were found wrong, of how many that were looked at), `pattern` (what kind of
    mistake it looks like) and `seed` (of the direction: `gradcheck.direction(x, seed)`).
    It is an AssertionError, as that of a failed test.
    """

    def __init__(self, message, **details):
        super().__init__(message)
        for name in DETAILS:
            setattr(self, name, details.pop(name, None))
        if details:
            raise TypeError(f"GradientError has no {sorted(details)}; it has {DETAILS}")


class CannotCompareError(ValueError):
    """Nothing of an input could be compared, so nothing is said of its gradient. It says why."""


def pattern(analytic, numerical, error=0.0):
    """A sentence on how `analytic` comes from the derivative `numerical`, or None.

    Shapes: both arrays of one shape; `error` bounds what each number of `numerical` is wrong by.

    >>> pattern(np.array([1.0, 2.0]), np.array([2.0, 4.0]))
    'each is 0.5 times the derivative: is a factor of 2 missing?'
    """
    size = np.abs(numerical).max(initial=0.0)
    allowed = FIT * size + error

    def fits(candidate):
        return candidate.shape == numerical.shape and np.abs(analytic - candidate).max() <= allowed

    if size == 0 or analytic.shape != numerical.shape:
        return None
    if not analytic.any():
        return "the gradient is zero everywhere: is a term or an edge missing?"
    if fits(-numerical):
        return "the sign is wrong"
    ratio = float(np.vdot(numerical / size, analytic) / np.vdot(numerical / size, numerical))
    if fits(ratio * numerical):
        return f"each is {ratio:.6g} times the derivative: {_factor(ratio)}"
    if analytic.size == 1:
        return None
    if analytic.ndim > 1 and fits(numerical.swapaxes(-1, -2)):
        return "it is the transpose of the derivative"
    for axis, n in enumerate(analytic.shape):
        if n == 1:
            continue
        summed = analytic.sum(axis, keepdims=True)
        for total, word in ((summed, "summed"), (summed / n, "averaged")):
            whole = np.broadcast_to(total, analytic.shape)
            if np.abs(whole - numerical).max() <= allowed:
                return f"the derivative is this gradient {word} over axis {axis}"
    for axis, n in enumerate(analytic.shape):
        for shift in (1, -1):
            # At the border, either the other end or a zero may have come in.
            inner = [slice(None)] * analytic.ndim
            inner[axis] = slice(1, n - 1)
            gap = analytic - np.roll(numerical, shift, axis)
            if n > 3 and np.abs(gap[tuple(inner)]).max() <= allowed:
                return f"it is the derivative shifted by {shift:+d} along axis {axis}"
    return None


def _factor(ratio):
    if ratio < 0:
        return "sign and factor are wrong"
    if ratio < 1:
        return f"is a factor of {1 / ratio:.6g} missing?"
    return f"is a factor of {ratio:.6g} too much?"


def shape_mistake(got, wanted):
    """How a gradient of shape `got` becomes one of shape `wanted`: a sentence, or None.

    >>> shape_mistake((8, 3), (3,))
    'sum it over axis 0, along which the input was broadcast'
    """
    if len(got) > 1 and got == wanted[::-1]:
        return "it is the shape of the transpose"
    added = len(got) - len(wanted)
    if added < 0:
        return "an axis is missing: is it summed over too many, or without keepdims?"
    stretched = [added + i for i, n in enumerate(wanted) if n == 1 and got[added + i] != 1]
    axes = [*range(added), *stretched]
    kept = tuple(1 if added + i in axes else n for i, n in enumerate(got[added:]))
    if kept != wanted or not axes:
        return None
    word = "axis" if len(axes) == 1 else "axes"
    names = " and ".join(str(axis) for axis in axes)
    return f"sum it over {word} {names}, along which the input was broadcast"
