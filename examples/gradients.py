"""Is the gradient you wrote the derivative? Check your own NumPy code, and find a planted bug.

You learn to use `check_vjp` (plain NumPy, no Tensor needed) and `gradcheck` (functions of Tensors),
and why the check most people write first, with a cotangent of ones, cannot see two famous bugs.
Takes about a second.

    python examples/gradients.py [--quick] [--seed 0]
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import argparse

import numpy as np

from minilora import Tensor, check_vjp, gradcheck
from minilora.gradcheck import GradientError

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--quick", action="store_true", help="arrays of 2 x 5 instead of 8 x 24")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
rng = np.random.default_rng(args.seed)
x = rng.standard_normal((2, 5) if args.quick else (8, 24))

# 1. The code to be checked: yours. A forward, and a backward that turns dy, the gradient of the
# output, into dx, the gradient of the input.


def layer_norm(x, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + eps)


def layer_norm_vjp(dy, x, eps=1e-5):
    rstd = 1 / np.sqrt(x.var(-1, keepdims=True) + eps)
    y = layer_norm(x, eps)
    return rstd * (dy - dy.mean(-1, keepdims=True) - y * (dy * y).mean(-1, keepdims=True))


# 2. The planted bugs. One forgets that the standard deviation depends on x too: the third term is
# missing. The other is as wrong as can be: it says that a softmax never changes.


def layer_norm_two_terms(dy, x, eps=1e-5):
    rstd = 1 / np.sqrt(x.var(-1, keepdims=True) + eps)
    return rstd * (dy - dy.mean(-1, keepdims=True))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_zero(dy, x):
    return np.zeros_like(x)


# 3. The check most of us write first: differentiate f(x).sum() by differences. That is a cotangent
# of ones. The rows of a layer norm sum to 0 and those of a softmax to 1, whatever x is, so the true
# answer is zero everywhere.


def passes_with_ones(f, vjp, h=1e-5):
    numerical = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        numerical[index] = (f(x + step).sum() - f(x - step).sum()) / (2 * h)
    analytic = vjp(np.ones_like(x), x)
    return np.abs(analytic - numerical).max() < 1e-6


# 4. check_vjp draws the cotangent at random and raises at the first number that is wrong: which
# input, which index, what your gradient says there and what the differences say.


def verdict(check, *arguments):
    try:
        report = check(*arguments)
    except GradientError as error:
        return f"WRONG at {error.index}: says {error.analytic:+.6f}, is {error.numerical:+.6f}"
    n = report.compared
    return f"right: {n} numbers compared, largest relative error {report.worst:.1e}"


table = [("gradient under test", "with ones", "check_vjp, with a random cotangent")]
for name, f, vjp in [
    ("layer norm, three terms", layer_norm, layer_norm_vjp),
    ("layer norm, third term missing", layer_norm, layer_norm_two_terms),
    ("softmax, dx = 0", softmax, softmax_zero),
]:
    with_ones = "passes" if passes_with_ones(f, vjp) else "fails"
    table.append((name, with_ones, verdict(check_vjp, f, vjp, x)))

# 5. A function of Tensors brings its own backward, chained by the engine, so there is no vjp to
# pass: gradcheck.
w = rng.standard_normal((x.shape[1], 3))
ones = Tensor(np.ones(3))
loss = lambda x, w: ((x @ w).tanh() * ones).sum()
table.append(("sum(tanh(x @ w)), Tensors", "", verdict(gradcheck, loss, x, w)))

for row in table:
    print("{:<32}{:<11}{}".format(*row))
