"""Is this VJP the derivative? For functions of Tensors, and for anybody's NumPy function.

The output is weighted by a random cotangent `dy`, so that every function has one number to
differentiate: φ(x) = Σ dy · f(x). A cotangent of ones would be blind. The rows of a softmax or of a
layer norm have constant sums, so under ones the true gradient is zero, and a backward that returns
zero passes.
"""

import numbers
from collections import namedtuple

import numpy as np

from .backend import check_rng, get_array_module, to_device, to_numpy
from .compare import Comparison
from .directions import Directions, components, direction
from .graph import is_recording
from .mistakes import CannotCompareError, GradientError
from .structure import leaves, with_leaves
from .subject import Subject, is_constant, is_float
from .tensor import Tensor

__all__ = ["CannotCompareError", "GradientError", "Report", "check_vjp", "direction", "gradcheck"]

# How many numbers were compared; the largest relative error among them, which is at most rtol; how
# many could not be compared, and why, a sentence for each reason. Numbers of an input that is too
# large to be compared one by one count as compared where a direction moved them and agreed.
Report = namedtuple("Report", "compared worst skipped reasons")


def gradcheck(f, *inputs, rng=None, rtol=1e-6, max_elements=2000, directions=2):
    """Check the backward pass of `f`, a function of Tensors, by central differences in float64.

    The options, the report and the errors are those of `check_vjp`.

    Shapes: `inputs` are float arrays or Tensors of any shape, NumPy's or CuPy's, of which a copy in
    float64 is used, or lists, tuples and dicts of them. Integers (ids) pass through as they are.
    `f(*inputs)` gets Tensors in their places, and returns one of any shape, or lists, tuples and
    dicts of them.
    Source: the cotangent follows HIPS/autograd's `check_vjp`.

    >>> gradcheck(lambda x, w: (x @ w).tanh(), np.ones((2, 3)), np.full((3, 4), 0.1)).compared
    18
    """
    __tracebackhide__ = True
    if not is_recording():
        raise ValueError("gradcheck under no_grad() has no gradient to check; call it outside")
    flat = [x.data if isinstance(x, Tensor) else x for _, x in leaves(inputs, "input")]
    # Where a float input lives; None for what passes through as it is.
    homes = [get_array_module(x) if is_float(x) else None for x in flat]

    def call(values):
        """(the Tensors that stand for float inputs, None for the others; f of them)."""
        arguments = []
        tensors = []
        for (_, x), given, xp in zip(leaves(values, ""), flat, homes, strict=True):
            t = None if xp is None else Tensor(to_device(x, xp), requires_grad=True)
            tensors.append(t)
            arguments.append(given if t is None else t)
        y = f(*with_leaves(values, iter(arguments)))
        for path, leaf in leaves(y, "f"):
            if not isinstance(leaf, Tensor) and not is_constant(leaf):
                raise TypeError(
                    f"gradcheck: {path} returned {type(leaf).__name__}, not a Tensor; "
                    "for plain arrays use check_vjp"
                )
        return tensors, y

    def vjp(dy, *values):
        tensors, y = call(values)
        for (_, part), (_, dpart) in zip(leaves(y, ""), leaves(dy, ""), strict=True):
            if isinstance(part, Tensor) and part.requires_grad:
                part.backward(to_device(dpart, get_array_module(part.data)))
        gradients = []
        for t in tensors:
            # A float input that f does not use has no gradient either, which is to say zero.
            has_gradient = t is not None and t.grad is not None
            gradients.append(to_numpy(t.grad) if has_gradient else None)
        return with_leaves(values, iter(gradients))

    def forward(*values):
        tensors, y = call(values)
        for (_, x), t in zip(leaves(values, ""), tensors, strict=True):
            if t is not None:
                # If f wrote to its input on a device, check_vjp sees it here.
                x[...] = to_numpy(t.data)
        return with_leaves(y, iter([_on_host(part) for _, part in leaves(y, "")]))

    return check_vjp(
        forward,
        vjp,
        *with_leaves(inputs, iter([_on_host(x) for x in flat])),
        rng=rng,
        rtol=rtol,
        max_elements=max_elements,
        directions=directions,
    )


def _on_host(value):
    """An array of either backend, or that of a Tensor, as NumPy's; anything else as it is."""
    if isinstance(value, Tensor):
        value = value.data
    if hasattr(value, "dtype") and not isinstance(value, np.generic):
        return to_numpy(value)
    return value


def check_vjp(f, vjp, *inputs, rng=None, rtol=1e-6, max_elements=2000, directions=2):
    """Check a hand-written gradient, `vjp(dy, *inputs)`, of a function `y = f(*inputs)`.

    No Tensor is needed: `f` and `vjp` take and return NumPy arrays (or numbers), in float64, or
    lists, tuples and dicts of them. `rng` (default: seed 0) draws the cotangent and the directions.

    An input of up to `max_elements` numbers is compared one by one. Of a larger one many move at
    once: all of them along `directions` seeded directions and one that follows the signs of the
    gradient, and the first and last of each axis. In a seeded direction number i moves by v_i =
    u_i s_i min / |g_i s_i|, where s_i = max(1, |x_i|), u_i is 0.5 to 1 with a random sign, and min
    is the least |g s|, but at least 2⁻¹³ of the largest (what lies below moves in directions of its
    own). So all terms of Σ g v are of one size, up to u. Of n numbers one, off by ρ times its
    gradient, is found with a probability of at least 1 - 1e-7 if

        ρ > 11 rtol √n + 2 noise / min             (2.5 % of 5,000,000 numbers; its own size is 1),

    for then it shows beside rtol |Σ g v|, which is below 5.3 rtol min √n for all but 1e-7 of the
    seeds. Errors of several numbers may cancel in one direction, with a probability of at most
    that bound divided by ρ; they would have to do so in each. An error of all numbers alike shows
    in full along the gradient's signs. Whatever disagrees is traced to a number, by halving.

    Shapes: inputs of any shape, dy like y; `vjp` returns one gradient for each input, of its shape
    and structure, or None for "no gradient". Integers, booleans and texts are passed to `f` as they
    are, and their gradient is None.
    Returns: `Report(compared, worst, skipped, reasons)`, which is always true.
    Raises: GradientError for a wrong gradient, with its attributes; CannotCompareError if nothing
    of an input can be compared, with the reason and what would help; ValueError if `f` is not
    deterministic, not finite, or writes to its inputs; TypeError for inputs and outputs that have
    no derivative.
    Source: central differences with Richardson's extrapolation, at steps that fit f; what they may
    be wrong by is derived in `differences.py`.

    >>> check_vjp(lambda x: x * x, lambda dy, x: (dy * 2 * x,), np.array([1.0, 2.0])).compared
    2
    >>> check_vjp(lambda x: x * x, lambda dy, x: (dy * x,), np.array([1.0, 2.0]))
    Traceback (most recent call last):
    minilora.mistakes.GradientError: gradient 0.6369..., differences 1.2739..., ... at input 0[0]
    2 of 2 numbers are wrong: each is 0.5 times the derivative: is a factor of 2 missing?
    """
    __tracebackhide__ = True
    rng = check_rng(np.random.default_rng(0) if rng is None else rng)
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must lie between 0 and 1, got {rtol}; the default is 1e-6")
    for name, value in (("max_elements", max_elements), ("directions", directions)):
        if not isinstance(value, numbers.Integral) or value < 0:
            raise ValueError(f"{name} must be a whole number from 0 on, got {value!r}")
    subject = Subject(f, vjp, inputs)
    # No component of the cotangent is small, so every element of y counts.
    dy = components(rng, subject.y.size)
    gradients = subject.gradients(dy)

    compared = 0
    worst = 0.0
    skipped = 0
    reasons = []
    for k, x in enumerate(subject.xs):
        if x.size <= max(1, max_elements):
            comparison = Comparison(subject, k, dy, gradients[k], rtol)
            comparison.compare()
        else:
            comparison = Directions(subject, k, dy, gradients[k], rtol, rng)
            comparison.compare(directions)
        # If f changed an input that was to stay, nothing of this counts.
        subject.check_unwritten()
        if comparison.failure is not None:
            subject.check_repeats()
            raise comparison.failure
        if comparison.compared == 0 and x.size:
            why = "; ".join(comparison.reasons())
            raise CannotCompareError(f"nothing of {subject.paths[k]} could be compared: {why}")
        compared += comparison.compared
        worst = max(worst, comparison.worst)
        skipped += sum(comparison.skipped.values())
        reasons += comparison.reasons()
    if compared == 0:
        shapes = [x.shape for x in subject.xs]
        raise ValueError(f"there is nothing to compare: inputs of shapes {shapes} hold no number")
    return Report(compared, worst, skipped, tuple(reasons))
