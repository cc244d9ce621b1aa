"""Functions with a gradient each, right or wrong, and the verdict that a checker owes them.

Each is plain NumPy, so that any checker can be asked. A row is right to 1e-8 of itself; or wrong by
1e-5 of itself or more, or in one element by its own size; or it cannot be compared, for the reason
that stands in its name.
"""

import itertools
from collections import namedtuple

import numpy as np

ACCEPT = "accept"
REJECT = "reject"
CANNOT = "cannot compare"

# `make(scale)` returns (f, vjp), both with the output multiplied by `scale`. `skipped` numbers are
# such that no checker can compare them. `large`: more numbers than can be moved one by one.
Row = namedtuple("Row", "name make inputs verdict skipped large")


def row(name, f, vjp, *inputs, verdict=ACCEPT, skipped=0, large=False):
    """A row whose f and vjp are functions; the scale is put around them."""

    def make(scale):
        def scaled(*xs):
            return scale * f(*xs)

        def scaled_vjp(dy, *xs):
            return vjp(scale * dy, *xs)

        return scaled, scaled_vjp

    return Row(name, make, inputs, verdict, skipped, large)


def by_slope(name, f, slope, x, **options):
    """A row of a function of each element alone, from its derivative."""
    return row(name, f, lambda dy, x: (dy * slope(x),), np.array(x, np.float64), **options)


def rng(seed=0):
    return np.random.default_rng(seed)


X = rng().normal(size=(3, 4))
POSITIVE = np.abs(X) + 0.5
INSIDE = 0.9 * np.tanh(X)
W = rng(1).normal(size=(4, 2))
SQUARE = rng(2).normal(size=(4, 4)) + 4 * np.eye(4)


# Helpers that several rows use.


def is_positive(x):
    """The slope of a relu."""
    return np.where(x > 0, 1.0, 0.0)


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_vjp(dy, x):
    y = softmax(x)
    return (y * (dy - (dy * y).sum(-1, keepdims=True)),)


def logsumexp(x):
    top = x.max(-1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[..., 0]


def layer_norm(x, w, b):
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return normed * w + b


def layer_norm_vjp(dy, x, w, b):
    rstd = 1 / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    normed = (x - x.mean(-1, keepdims=True)) * rstd
    d = dy * w
    dx = rstd * (d - d.mean(-1, keepdims=True) - normed * (d * normed).mean(-1, keepdims=True))
    return dx, (dy * normed).sum(0), dy.sum(0)


def rms_norm(x, w):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w


def rms_norm_vjp(dy, x, w):
    rstd = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    d = dy * w
    normed = x * rstd
    return rstd * (d - normed * (d * normed).mean(-1, keepdims=True)), (dy * normed).sum(0)


TARGETS = np.array([2, 0, 3])


def cross_entropy(x):
    return (logsumexp(x) - x[np.arange(3), TARGETS]).mean()


def cross_entropy_vjp(dy, x):
    p = softmax(x)
    p[np.arange(3), TARGETS] -= 1
    return (dy * p / 3,)


def attention(q, k, v):
    return softmax(q @ k.T / 2) @ v


def attention_vjp(dy, q, k, v):
    p = softmax(q @ k.T / 2)
    dp = dy @ v.T
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / 2
    return ds @ k, ds.T @ q, p.T @ dy


C_GELU = np.sqrt(2 / np.pi)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(C_GELU * (x + 0.044715 * x * x * x)))


def gelu_slope(x):
    t = np.tanh(C_GELU * (x + 0.044715 * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * C_GELU * (1 + 3 * 0.044715 * x * x)


def convolve(x, w):
    return np.convolve(x, w, "valid")


def convolve_vjp(dy, x, w):
    return np.convolve(dy, w[::-1]), np.correlate(x, dy, "valid")[::-1]


def cumprod_vjp(dy, x):
    y = np.cumprod(x)
    return (np.cumsum((dy * y)[::-1])[::-1] / x,)


def solve_vjp(dy, a, b):
    db = np.linalg.solve(a.T, dy)
    return -np.outer(db, np.linalg.solve(a, b)), db


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def cosine_vjp(dy, a, b):
    na = np.sqrt(a @ a)
    nb = np.sqrt(b @ b)
    c = a @ b / (na * nb)
    return dy * (b / (na * nb) - c * a / na**2), dy * (a / (na * nb) - c * b / nb**2)


IDS = np.array([1, 1, 0, 2])


def gather_vjp(dy, x):
    dx = np.zeros_like(x)
    np.add.at(dx, IDS, dy)
    return (dx,)


def largest(x):
    return x.max(-1)


def largest_vjp(dy, x):
    return ((x == x.max(-1, keepdims=True)) * dy[:, None],)


def sorted_vjp(dy, x):
    dx = np.empty_like(x)
    dx[np.argsort(x)] = dy
    return (dx,)


MASK = rng(3).random((3, 4)) < 0.5
LAYERS = [rng(4 + i).normal(size=(4, 4)) * 0.4 for i in range(14)]
LAYERS[0] = LAYERS[0][:2]


def deep(w):
    h = sigmoid(np.ones((3, 4)) @ w)
    for layer in LAYERS:
        h = sigmoid(h @ layer)
    return h


def deep_vjp(dy, w):
    h = [sigmoid(np.ones((3, 4)) @ w)]
    for layer in LAYERS:
        h.append(sigmoid(h[-1] @ layer))
    d = dy * h[-1] * (1 - h[-1])
    for layer, y in zip(reversed(LAYERS), reversed(h[:-1]), strict=True):
        d = (d @ layer.T) * y * (1 - y)
    return (np.ones((4, 3)) @ d,)


def lora(x, a, b):
    return 2.0 * (x @ a.T) @ b.T


def lora_vjp(dy, x, a, b):
    d = 2.0 * dy @ b
    return d @ a, d.T @ x, 2.0 * dy.T @ (x @ a.T)


A = rng(20).normal(size=(2, 4))
B = rng(21).normal(size=(3, 2))
SMALL = [
    by_slope("x squared", lambda x: x * x, lambda x: 2 * x, X),
    by_slope("x cubed", lambda x: x * x * x, lambda x: 3 * x * x, X),
    by_slope("sin", np.sin, np.cos, X),
    by_slope("exp", np.exp, np.exp, X),
    by_slope("log", np.log, lambda x: 1 / x, POSITIVE),
    by_slope("sqrt", np.sqrt, lambda x: 0.5 / np.sqrt(x), POSITIVE),
    by_slope("reciprocal", lambda x: 1 / x, lambda x: -1 / (x * x), POSITIVE),
    by_slope("tanh", np.tanh, lambda x: 1 / np.cosh(x) ** 2, X),
    by_slope("sigmoid", sigmoid, lambda x: sigmoid(x) * sigmoid(-x), X),
    by_slope("softplus", lambda x: np.logaddexp(0, x), sigmoid, X),
    by_slope("silu", lambda x: x * sigmoid(x), lambda x: sigmoid(x) * (1 + x * sigmoid(-x)), X),
    by_slope("gelu", gelu, gelu_slope, X),
    by_slope("relu", lambda x: np.maximum(x, 0), is_positive, X),
    by_slope(
        "leaky relu", lambda x: np.where(x > 0, x, 0.1 * x), lambda x: np.where(x > 0, 1, 0.1), X
    ),
    by_slope(
        "clip", lambda x: np.clip(x, -0.5, 0.5), lambda x: np.where(np.abs(x) < 0.5, 1.0, 0.0), X
    ),
    by_slope("abs", np.abs, np.sign, X),
    by_slope("arcsin", np.arcsin, lambda x: 1 / np.sqrt(1 - x * x), INSIDE),
    by_slope("arctan", np.arctan, lambda x: 1 / (1 + x * x), X),
    by_slope("x to the 1.5", lambda x: x**1.5, lambda x: 1.5 * np.sqrt(x), POSITIVE),
    by_slope("bell", lambda x: np.exp(-x * x), lambda x: -2 * x * np.exp(-x * x), X),
    by_slope("sinc", np.sinc, lambda x: (np.cos(np.pi * x) - np.sinc(x)) / x, X),
    by_slope("masked", lambda x: np.where(MASK, x * x, 0.0), lambda x: np.where(MASK, 2 * x, 0), X),
    row("product of two", lambda a, b: a * b, lambda dy, a, b: (dy * b, dy * a), X, POSITIVE),
    row("quotient", lambda a, b: a / b, lambda dy, a, b: (dy / b, -dy * a / b**2), X, POSITIVE),
    row(
        "power of two",
        lambda a, b: a**b,
        lambda dy, a, b: (dy * b * a ** (b - 1), dy * a**b * np.log(a)),
        POSITIVE,
        X,
    ),
    row(
        "hypot",
        np.hypot,
        lambda dy, a, b: (dy * a / np.hypot(a, b), dy * b / np.hypot(a, b)),
        X,
        POSITIVE,
    ),
    row(
        "arctan2",
        np.arctan2,
        lambda dy, a, b: (dy * b / (a * a + b * b), -dy * a / (a * a + b * b)),
        X,
        POSITIVE,
    ),
    row("bias, broadcast", lambda x, b: x + b, lambda dy, x, b: (dy, dy.sum(0)), X, X[0]),
    row("matmul", lambda x, w: x @ w, lambda dy, x, w: (dy @ w.T, x.T @ dy), X, W),
    row("outer", np.multiply.outer, lambda dy, a, b: (dy @ b, a @ dy), X[0], X[1]),
    row("LoRA's update", lora, lora_vjp, X, A, B),
    row("sum", np.sum, lambda dy, x: (np.full(x.shape, dy),), X),
    row("mean over an axis", lambda x: x.mean(0), lambda dy, x: (np.tile(dy / 3, (3, 1)),), X),
    row(
        "variance",
        lambda x: x.var(-1),
        lambda dy, x: (2 / 4 * (x - x.mean(-1, keepdims=True)) * dy[:, None],),
        X,
    ),
    row(
        "norm",
        lambda x: np.sqrt((x * x).sum()),
        lambda dy, x: (dy * x / np.sqrt((x * x).sum()),),
        X,
    ),
    row("softmax", softmax, softmax_vjp, X),
    row(
        "softmax, summed: its gradient is zero",
        lambda x: softmax(x).sum(-1),
        lambda dy, x: softmax_vjp(np.tile(dy[:, None], (1, 4)), x),
        X,
    ),
    row("log-sum-exp", logsumexp, lambda dy, x: (dy[:, None] * softmax(x),), X),
    row("cross entropy", cross_entropy, cross_entropy_vjp, X),
    row("layer norm", layer_norm, layer_norm_vjp, X, POSITIVE[0], X[1]),
    row("RMS norm", rms_norm, rms_norm_vjp, X, POSITIVE[0]),
    row("attention", attention, attention_vjp, X, X[::-1] * 0.7, POSITIVE),
    row("convolution", convolve, convolve_vjp, rng(5).normal(size=7), rng(6).normal(size=3)),
    row("cumulative sum", np.cumsum, lambda dy, x: (np.cumsum(dy[::-1])[::-1],), X[0]),
    row("cumulative product", np.cumprod, cumprod_vjp, POSITIVE[0]),
    row(
        "determinant",
        np.linalg.det,
        lambda dy, a: (dy * np.linalg.det(a) * np.linalg.inv(a).T,),
        SQUARE,
    ),
    row(
        "inverse",
        np.linalg.inv,
        lambda dy, a: (-np.linalg.inv(a).T @ dy @ np.linalg.inv(a).T,),
        SQUARE,
    ),
    row("solve", np.linalg.solve, solve_vjp, SQUARE, X[0]),
    row("trace", np.trace, lambda dy, a: (dy * np.eye(4),), SQUARE),
    row(
        "quadratic form",
        lambda x, a: x @ a @ x,
        lambda dy, x, a: (dy * (a + a.T) @ x, dy * np.outer(x, x)),
        X[0],
        SQUARE,
    ),
    row("cosine similarity", cosine, cosine_vjp, X[0], X[1]),
    row("rows gathered, one twice", lambda x: x[IDS], gather_vjp, X),
    row("maximum", largest, largest_vjp, X),
    row("sort", np.sort, sorted_vjp, X[0]),
    row("transpose", np.transpose, lambda dy, x: (dy.T,), X),
    row("rolled", lambda x: np.roll(x, 1, -1), lambda dy, x: (np.roll(dy, -1, -1),), X),
    row("a constant", lambda x: np.ones(3) + 0 * x.sum(), lambda dy, x: (np.zeros_like(x),), X),
]

SCALED = [
    by_slope("sin far out", np.sin, np.cos, [1e5, -2e5]),
    by_slope(
        "the time of day, in Unix time",
        lambda t: np.sin(2 * np.pi * t / 86400),
        lambda t: 2 * np.pi / 86400 * np.cos(2 * np.pi * t / 86400),
        [1.7e9, 1.71e9 + 7000],
    ),
    by_slope(
        "a constant of physics times x squared",
        lambda x: 8.854e-12 * x * x,
        lambda x: 2 * 8.854e-12 * x,
        X,
    ),
    by_slope("log near zero", np.log, lambda x: 1 / x, [1e-8, 1e-3, 1.0]),
    by_slope("reciprocal near zero", lambda x: 1 / x, lambda x: -1 / (x * x), [1e-6, -1e-9]),
    by_slope(
        "x squared at many scales", lambda x: x * x, lambda x: 2 * x, [1e-12, 1e-4, 1.0, 1e5, 1e9]
    ),
    by_slope(
        "fast oscillation", lambda x: np.sin(1e6 * x), lambda x: 1e6 * np.cos(1e6 * x), [1.0, 0.3]
    ),
    by_slope("a line at 1e13", lambda x: x + 1e13, lambda x: 1 + 0 * x, [1.0, 2.0]),
    by_slope("on a plateau of a million", lambda x: x + 1e6, lambda x: 1 + 0 * x, [1.0, 2.0]),
    by_slope(
        "relu a little above its kink",
        lambda x: np.maximum(x, 0),
        is_positive,
        [3e-6, -7e-9, 1e-200],
    ),
    by_slope(
        "a weak kink nearby", lambda x: 1e-6 * np.abs(x), lambda x: 1e-6 * np.sign(x), [1e-7, -2e-3]
    ),
    by_slope("exp, large", np.exp, np.exp, [100.0, 200.0]),
    by_slope("tiny inputs", lambda x: x * x, lambda x: 2 * x, [1e-100, 3e-120]),
    by_slope("floor between integers", np.floor, lambda x: 0 * x, [0.5, 1000.5]),
    by_slope(
        "x to the 1.5 of |x| at zero",
        lambda x: np.abs(x) ** 1.5,
        lambda x: 1.5 * np.sqrt(np.abs(x)) * np.sign(x),
        [0.0, 1.0],
    ),
    by_slope("x squared at zero", lambda x: x * x, lambda x: 2 * x, [0.0]),
    by_slope("cos at zero", np.cos, lambda x: -np.sin(x), [0.0, 1.0]),
    by_slope(
        "most numbers saturated",
        np.tanh,
        lambda x: 1 / np.cosh(x) ** 2,
        [30.0, 1.0, -40.0],
        skipped=2,
    ),
    by_slope(
        "one kink among others",
        lambda x: np.maximum(x, 0),
        is_positive,
        [1.3, 0.0],
        skipped=1,
    ),
]


def never_the_same():
    draws = rng()
    return lambda x: x * draws.uniform(0.9, 1.1, x.shape)


def writes_to_its_input(x):
    x += 1
    return x * x


RELU = (lambda x: np.maximum(x, 0), is_positive)
FOURTEEN = row("flat: fourteen layers of sigmoids", deep, deep_vjp, rng(3).normal(size=(4, 2)))
UNDECIDED = [
    by_slope("kink: |x| at zero", np.abs, np.sign, [0.0]),
    by_slope(
        "kink: |x| at zero, zero among others in one norm",
        lambda x: np.abs(x).sum(),
        np.sign,
        [0.0],
    ),
    by_slope("kink: relu at zero", *RELU, [0.0, 0.0]),
    by_slope(
        "kink: relu far out",
        lambda x: np.maximum(x - 1e5, 0),
        lambda x: np.where(x > 1e5, 1.0, 0.0),
        [1e5],
    ),
    by_slope(
        "kink: a millionth of relu", lambda x: 1e-6 * RELU[0](x), lambda x: 1e-6 * RELU[1](x), [0.0]
    ),
    by_slope(
        "kink: 1e-12 of relu", lambda x: 1e-12 * RELU[0](x), lambda x: 1e-12 * RELU[1](x), [0.0]
    ),
    by_slope("kink: root of |x|", lambda x: np.sqrt(np.abs(x)), lambda x: 0 * x, [0.0]),
    by_slope("kink: clip at its border", lambda x: np.clip(x, 0, 1), is_positive, [1.0]),
    row("kink: maximum of equals", largest, largest_vjp, np.ones((1, 3)), verdict=CANNOT),
    by_slope("jump: floor at integers", np.floor, lambda x: 0 * x, [2.0, -1.0]),
    by_slope("jump: sign at zero", np.sign, lambda x: 0 * x, [0.0]),
    by_slope("domain: root of zero", np.sqrt, lambda x: 0 * x, [0.0]),
    by_slope("domain: log of zero", np.log, lambda x: 0 * x, [0.0]),
    by_slope("domain: arcsin of one", np.arcsin, lambda x: 0 * x, [1.0]),
    by_slope("flat: tanh of 30", np.tanh, lambda x: 1 / np.cosh(x) ** 2, [30.0, 35.0]),
    by_slope("flat: tanh of 30, doubled", np.tanh, lambda x: 2 / np.cosh(x) ** 2, [30.0, 35.0]),
    by_slope("a staircase, with the slope of a line", np.floor, lambda x: 1 + 0 * x, [0.5, 7.5]),
    by_slope("flat: 1e13 + sin", lambda x: np.sin(x) + 1e13, np.cos, [1.0]),
    FOURTEEN,
    by_slope(
        "float32 inside", lambda x: np.sin(x.astype(np.float32)).astype(np.float64), np.cos, X
    ),
    by_slope(
        "float32 in one of two terms",
        lambda x: x + np.sin(x.astype(np.float32)),
        lambda x: 1 + np.cos(x),
        X,
    ),
    by_slope(
        "too fast to see", lambda x: np.sin(1e14 * x), lambda x: 1e14 * np.cos(1e14 * x), [1.0]
    ),
    by_slope("random", never_the_same(), lambda x: 1 + 0 * x, X),
    by_slope("writes to its input", writes_to_its_input, lambda x: 2 * (x + 1), X),
]
UNDECIDED = [r._replace(verdict=CANNOT) for r in UNDECIDED]


def changed(base, name, change):
    """The row `base` with `change(gradients, usual)` for its gradients: a wrong one.

    `usual` are gradients under some cotangent: from them it can choose once what to change.
    """
    f, vjp = base.make(1.0)
    inputs = [np.array(x) for x in base.inputs]
    usual = vjp(rng(1).normal(size=np.shape(f(*inputs))), *inputs)

    def make(scale):
        f, vjp = base.make(scale)
        return f, lambda dy, *xs: change([np.array(d) for d in vjp(dy, *xs)], usual)

    return base._replace(name=f"{base.name}: {name}", make=make, verdict=REJECT, skipped=0)


def off_by(part):
    """Every number of every gradient wrong by `part` of itself."""
    return lambda gradients, usual: [(1 + part) * d for d in gradients]


def one_element(factor, which=0):
    """An element of gradient number `which`, one that is usually large, times `factor`."""

    def change(gradients, usual):
        k = which % len(gradients)
        gradients[k].flat[np.argmax(np.abs(usual[k]))] *= factor
        return gradients

    return change


# Rows whose gradient is zero: nothing that is multiplied changes it.
ZERO = ("a constant", "summed", "floor", "squared at zero")
NOT_ZERO = [r for r in SMALL + SCALED if not any(word in r.name for word in ZERO)]
CHANGES = [
    ("1e-5 off", off_by(1e-5)),
    ("one number zero", one_element(0.0)),
    ("one number negated", one_element(-1.0, 1)),
    ("1e-3 off", off_by(-1e-3)),
    ("one number doubled", one_element(2.0, -1)),
    ("zero", off_by(-1.0)),
]
WRONG = [
    changed(base, name, change)
    for base, (name, change) in zip(NOT_ZERO, itertools.cycle(CHANGES[:3]), strict=False)
    if "x to the 1.5 of" not in base.name
]
WRONG += [
    changed(base, name, change)
    for base, (name, change) in zip(NOT_ZERO, itertools.cycle(CHANGES[3:]), strict=False)
]
# Slopes of 1e-11 are seen to a hundredth: whether they are right to a millionth, nobody can tell.
WRONG += [
    changed(FOURTEEN, name, change)
    for name, change in (
        ("zero", off_by(-1.0)),
        ("negated", off_by(-2.0)),
        ("doubled", off_by(1.0)),
    )
]
WRONG += [
    row("softmax that never changes", softmax, lambda dy, x: (0 * x,), X, verdict=REJECT),
    row(
        "layer norm without its third term",
        lambda x: layer_norm(x, 1.0, 0.0),
        lambda dy, x: (
            (dy - dy.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5),
        ),
        X,
        verdict=REJECT,
    ),
    row(
        "matmul, not transposed",
        lambda x: x @ SQUARE,
        lambda dy, x: (dy @ SQUARE,),
        SQUARE,
        verdict=REJECT,
    ),
    row(
        "gather that counts a row once",
        lambda x: x[IDS],
        lambda dy, x: (np.vstack([dy[2], dy[1], dy[3]]),),
        X,
        verdict=REJECT,
    ),
    row(
        "roll, the wrong way",
        lambda x: np.roll(x, 1, -1),
        lambda dy, x: (np.roll(dy, 1, -1),),
        X,
        verdict=REJECT,
    ),
    row(
        "mean that sums",
        lambda x: x.mean(0),
        lambda dy, x: (np.tile(dy, (3, 1)),),
        X,
        verdict=REJECT,
    ),
    by_slope(
        "a plateau of 1e10, forgotten",
        lambda x: x + 1e10,
        lambda x: 0 * x,
        [1.0, 2.0],
        verdict=REJECT,
    ),
    by_slope("relu, twice the slope", RELU[0], lambda x: 2 * RELU[1](x), X, verdict=REJECT),
    by_slope(
        "x at many scales, 1e-5 off",
        lambda x: x * x,
        lambda x: 2 * x * (1 + 1e-5),
        [1e-9, 1.0, 1e6],
        verdict=REJECT,
    ),
]


def large(size=5_000_000):
    """Rows of many numbers, the largest of `size`. They are made when they are asked for."""
    x = rng(7).normal(size=max(size, 1_000_000))
    millions = f"{size / 1e6:g}M"
    zeros = np.where(rng(8).random(200_000) < 0.1, 0.0, x[:200_000])
    m = x[:90_000].reshape(300, 300)
    w = rng(9).normal(size=(300, 20))
    square = lambda name, n=size, **options: by_slope(
        name, lambda x: x * x, lambda x: 2 * x, x[:n], large=True, **options
    )

    def one(i, factor):
        def change(gradients, usual):
            gradients[0].flat[i] *= factor
            return gradients

        return change

    base = square(f"{millions} numbers squared")
    small = square("100,000 numbers squared", 100_000)
    relu = by_slope(f"relu of {millions} numbers", *RELU, x[:size], large=True)
    matrices = row(
        "matmul of 90,000",
        lambda x, w: x @ w,
        lambda dy, x, w: (dy @ w.T, x.T @ dy),
        m,
        w,
        large=True,
    )
    total = row(
        "sum of 100,000 squares",
        lambda x: (x * x).sum(),
        lambda dy, x: (2 * x * dy,),
        x[:100_000],
        large=True,
    )
    wave = by_slope("sin of 100,000 numbers", np.sin, np.cos, x[:100_000], large=True)
    rows = row("softmax of 300 rows", softmax, softmax_vjp, m, large=True)
    return [
        base,
        relu,
        small,
        matrices,
        total,
        wave,
        rows,
        by_slope(
            "relu, a tenth of 200,000 at its kink",
            *RELU,
            zeros,
            large=True,
            skipped=int(np.count_nonzero(zeros == 0)),
        ),
        by_slope(
            "log of 100,000 numbers of many sizes",
            np.log,
            lambda x: 1 / x,
            np.abs(x[:100_000]) * 10.0 ** -(np.arange(100_000) % 9),
            large=True,
        ),
        by_slope(
            "abs of 100,000 numbers of many sizes",
            np.abs,
            np.sign,
            x[:100_000] * 10.0 ** (np.arange(100_000) % 9 - 4),
            large=True,
        ),
        changed(base, "one sign", one(size * 2 // 3, -1.0)),
        changed(base, "1e-4 off", off_by(1e-4)),
        changed(square("a million numbers squared", 1_000_000), "1e-5 off", off_by(1e-5)),
        changed(
            by_slope("relu of a million numbers", *RELU, x[:1_000_000], large=True),
            "one forgotten",
            one(int(np.argmax(x[:1_000_000])), 0.0),
        ),
        changed(small, "the first one forgotten", one(0, 0.0)),
        changed(small, "the last one doubled", one(-1, 2.0)),
        changed(small, "the smallest doubled", one(int(np.argmin(np.abs(x[:100_000]))), 2.0)),
        changed(small, "1e-5 off", off_by(1e-5)),
        changed(matrices, "one number negated", one(4_567, -1.0)),
        changed(total, "one sign", one(77_777, -1.0)),
        changed(total, "1e-5 off", off_by(1e-5)),
        changed(wave, "one number zero", one(55_555, 0.0)),
        changed(rows, "one sign", one(int(np.argmax(m[7]) + 7 * 300), -1.0)),
        row(
            "softmax of 300 rows that never changes",
            softmax,
            lambda dy, x: (0 * x,),
            m,
            verdict=REJECT,
            large=True,
        ),
    ]
