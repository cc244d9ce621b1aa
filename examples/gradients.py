"""Is the gradient you wrote by hand the derivative? Check your own NumPy code, and find a planted bug.

You learn to use `check_vjp` (plain NumPy, no Tensor needed) and `gradcheck` (functions of Tensors), and why the
check most people write first, with a cotangent of ones, cannot see two famous bugs. Takes about a second.

    python examples/gradients.py [--quick] [--seed 0]
"""

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

# 1. The code to be checked: yours. A forward, and a backward that turns dy, the gradient of the output, into dx.


def layer_norm(x, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)


def layer_norm_vjp(dy, x, eps=1e-5):
    rstd = 1 / np.sqrt(x.var(-1, keepdims=True) + eps)
    y = layer_norm(x, eps)
    return rstd * (dy - dy.mean(-1, keepdims=True) - y * (dy * y).mean(-1, keepdims=True))


# 2. The planted bugs. One forgets that the standard deviation depends on x too: the third term is missing.
# The other is as wrong as can be: it says that a softmax never changes.


def layer_norm_two_terms(dy, x, eps=1e-5):
    rstd = 1 / np.sqrt(x.var(-1, keepdims=True) + eps)
    return rstd * (dy - dy.mean(-1, keepdims=True))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_zero(dy, x):
    return np.zeros_like(x)


# 3. The check most of us write first: differentiate f(x).sum() by differences. That is a cotangent of ones, and the
# rows of a layer norm sum to 0 and those of a softmax to 1 whatever x is, so the true answer is zero everywhere.


def passes_with_ones(f, vjp, h=1e-5):
    numerical = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        numerical[index] = (f(x + step).sum() - f(x - step).sum()) / (2 * h)
    return np.abs(vjp(np.ones_like(x), x) - numerical).max() < 1e-6


# 4. check_vjp draws the cotangent at random and raises at the first number that is wrong: which input, which index,
# what your gradient says there and what the differences say.


def verdict(check):
    try:
        report = check()
        return f"right: {report.compared} numbers compared, largest relative error {report.worst:.1e}"
    except GradientError as error:
        where, _, values = str(error).partition(": the gradient says ")
        mine, _, theirs = values.partition(", central differences say ")
        return f"WRONG at {where}: says {float(mine):+.6f}, is {float(theirs.split()[0]):+.6f}"


rows = [("gradient under test", "with ones", "check_vjp, with a random cotangent")]
for name, f, vjp in [
    ("layer norm, three terms", layer_norm, layer_norm_vjp),
    ("layer norm, third term missing", layer_norm, layer_norm_two_terms),
    ("softmax, dx = 0", softmax, softmax_zero),
]:
    ones = "passes" if passes_with_ones(f, vjp) else "fails"
    rows.append((name, ones, verdict(lambda f=f, vjp=vjp: check_vjp(f, vjp, x))))

# 5. A function of Tensors brings its own backward, chained by the engine, so there is no vjp to pass: gradcheck.
w = rng.standard_normal((x.shape[1], 3))
loss = lambda x, w: ((x @ w).tanh() * Tensor(np.ones(3))).sum()
rows.append(("sum(tanh(x @ w)), Tensors", "", verdict(lambda: gradcheck(loss, x, w))))

for row in rows:
    print("{:<32}{:<11}{}".format(*row))
