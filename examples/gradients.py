"""Is the gradient you wrote the derivative? Check your own NumPy code, and find a planted bug.

You learn to use `check_vjp` (plain NumPy, no Tensor needed) and `gradcheck` (functions of Tensors),
and why the check most people write first, with a cotangent of ones, cannot see two famous bugs.

    python examples/gradients.py [--quick] [--seed 0] [--seeds 3]

Takes about a second.
"""

# Before the imports that take time: Ctrl-C ends this in one line.
from minilora.cli.ctrl_c import one_line_on_ctrl_c

one_line_on_ctrl_c()

import numpy as np
from course import lab
from course.picture import COLOURS, INK

from minilora import check_vjp, gradcheck
from minilora.gradcheck import GradientError

run = lab.begin(__file__, __doc__, with_base=False, backends=["numpy"])
shape = (2, 5) if run.quick else (8, 24)


# %% The code to be checked: yours. A forward, and a backward that turns dy, the gradient of the
# output, into dx, the gradient of the input.


def layer_norm(x, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + eps)


def layer_norm_vjp(dy, x, eps=1e-5):
    rstd = 1 / np.sqrt(x.var(-1, keepdims=True) + eps)
    y = layer_norm(x, eps)
    return rstd * (dy - dy.mean(-1, keepdims=True) - y * (dy * y).mean(-1, keepdims=True))


# %% The planted bugs. One forgets that the standard deviation depends on x too: the third term is
# missing. The other is as wrong as can be: it says that a softmax never changes.


def layer_norm_two_terms(dy, x, eps=1e-5):
    rstd = 1 / np.sqrt(x.var(-1, keepdims=True) + eps)
    return rstd * (dy - dy.mean(-1, keepdims=True))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_zero(dy, x):
    return np.zeros_like(x)


# %% The check most of us write first: differentiate f(x).sum() by differences. That is a cotangent
# of ones. The rows of a layer norm sum to 0 and those of a softmax to 1, whatever x is, so the true
# answer is zero everywhere.


def compared(f, vjp, dy, x, h=1e-5):
    """(what the vjp says, what differences say) of each number of dx under the cotangent dy."""
    numerical = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        numerical[index] = (dy * (f(x + step) - f(x - step))).sum() / (2 * h)
    return vjp(dy, x), numerical


# %% check_vjp draws the cotangent at random and raises at the first number that is wrong: which
# input, which index, what your gradient says there and what the differences say.
def verdict(check, *arguments):
    """(in words, the largest relative error)"""
    try:
        report = check(*arguments)
    except GradientError as error:
        words = f"WRONG at {error.index}: says {error.analytic:+.6f}, is {error.numerical:+.6f}"
        return words, abs(error.analytic - error.numerical) / abs(error.numerical)
    return f"right: {report.compared} numbers compared", report.worst


CASES = {
    "layer norm, three terms": (layer_norm, layer_norm_vjp),
    "layer norm, third term missing": (layer_norm, layer_norm_two_terms),
    "softmax, dx = 0": (softmax, softmax_zero),
}
rows = []
points = {}
for seed in run.seeds:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    ones = np.ones_like(x)
    checked = {}
    for name, (f, vjp) in CASES.items():
        analytic, numerical = compared(f, vjp, ones, x)
        with_ones = "passes" if np.abs(analytic - numerical).max() < 1e-6 else "fails"
        checked[name] = with_ones, *verdict(check_vjp, f, vjp, x)
        if seed == run.seeds[0]:
            random = compared(f, vjp, rng.standard_normal(shape), x)
            points[name] = {"ones": (analytic, numerical), "random": random}

    # %% A function of Tensors brings its own backward, chained by the engine, so there is no vjp to
    # pass: gradcheck.
    w = rng.standard_normal((shape[1], 3))
    loss = lambda x, w: (x @ w).tanh().sum()
    checked["sum(tanh(x @ w)), Tensors"] = None, *verdict(gradcheck, loss, x, w)

    for i, (name, (with_ones, words, error)) in enumerate(checked.items()):
        if seed == run.seeds[0]:
            row = {"name": name, "with_ones": with_ones, "verdict": words, "error": []}
            rows.append(row)
        rows[i]["error"].append(float(error))


# %%
def draw(figure):
    """What each vjp says against what differences say: right is the diagonal."""
    panels = figure.subplots(2, 3, sharex="row", sharey="row")
    titles = {"ones": "cotangent of ones", "random": "random cotangent"}
    for line, (kind, title) in zip(panels, titles.items(), strict=True):
        for axes, name, colour in zip(line, CASES, COLOURS, strict=False):
            analytic, numerical = points[name][kind]
            axes.axline((0, 0), slope=1, color=INK, linewidth=1, marker="")
            axes.plot(np.ravel(numerical), np.ravel(analytic), ".", color=colour, markersize=4)
            axes.set(xlabel="differences")
            if kind == "ones":
                axes.set(title=name.replace(", ", ",\n"), xlim=(-2, 2), ylim=(-2, 2))
        line[0].set(ylabel=f"{title}:\nthe vjp")


columns = {
    "name": ("gradient under test", ""),
    "with_ones": ("with ones", ""),
    "verdict": ("check_vjp, with a random cotangent", ""),
    "error": ("relative error", ".0e"),
}
setting = f"x of {shape[0]} x {shape[1]} normal numbers, in float64."
run.finish(setting, columns, rows, draw)

# %% Exercises, each with its answer in README.md of this folder.
# 1. Let `softmax_zero` return the right gradient times 1.001. Does the check with ones see it?
# 2. In minilora/gradcheck.py, the cotangent is `components(rng, subject.y.size)`. Make it of ones:
#    which tests fail?
