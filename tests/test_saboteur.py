"""The checker can fail: every gradient of every op is corrupted in six ways, and `gradcheck` must object to each.

Every op goes through `record`, so one corrupted `record` reaches them all: nothing here knows how an op works.
"""

import functools
import importlib
import pkgutil
from collections import Counter

import numpy as np
import pytest
from ops import OPS, RECORDERS, draw, record_replaced

import minilora
from minilora import Tensor, check_vjp, functional, gradcheck
from minilora.gradcheck import GradientError
from minilora.graph import unbroadcast
from minilora.tensor import record


def rolled(d):
    axis = next((i for i, n in enumerate(d.shape) if n > 1), None)
    return d if axis is None else np.roll(d, 1, axis)


CORRUPTIONS = {
    "scaled": lambda d: d * 1.001,
    "scaled by a hair": lambda d: d * (1 + 1e-5),
    "dropped": np.zeros_like,
    "negated": np.negative,
    "transposed": lambda d: d.swapaxes(-1, -2) if d.ndim > 1 and d.shape[-1] == d.shape[-2] else d,
    "rolled": rolled,
}


class Saboteur:
    """Stands for `record` and numbers the gradients of one call of an op, in order; number `target` gets corrupted.

    A gradient is counted in the shape of its input: corrupted before broadcasting is undone, it might not change.
    """

    def __init__(self, corrupt=None, target=None):
        self.corrupt, self.target, self.count, self.changed = corrupt, target, 0, False

    def __call__(self, y, *edges):
        return record(y, *[(inputs, self.corrupted(inputs, vjp)) for inputs, vjp in edges])

    def corrupted(self, inputs, vjp):
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        numbers = []
        for t in tensors:
            numbers.append(self.count if t is not None and t.node is not None else None)
            self.count += numbers[-1] is not None
        shapes = [None if t is None else np.shape(t.data) for t in tensors]

        def wrong(dy):
            ds = vjp(dy)
            ds = ds if isinstance(ds, tuple) else (ds,)
            return tuple(map(self.touched, ds, numbers, shapes))

        return wrong

    def touched(self, d, number, shape):
        if number is None or number != self.target:
            return d
        d = np.asarray(unbroadcast(d, shape))
        wrong = self.corrupt(d)
        self.changed = not np.array_equal(d, wrong)
        return wrong

    def watch(self, function):
        """`function`, with the gradients of each call numbered from zero."""

        def watched(*tensors):
            self.count = 0
            return function(*tensors)

        return watched


def check(op, saboteur):
    """gradcheck of `op` with `saboteur` in the place of `record`."""
    n, m, k = op.dims
    if "attention" in op.name and "padding" not in op.name:
        # One row shows as much as a batch, whose rows know nothing of one another.
        n = 1
    with record_replaced(saboteur):
        return gradcheck(saboteur.watch(op.function), *draw(op, np.random.default_rng(6), (n, m, k)))


@functools.cache
def sabotage(op):
    """Every corruption of every gradient of `op`: [(gradient, corruption, outcome)]."""
    honest = Saboteur()
    check(op, honest)  # with nothing corrupted it passes, and the gradients are counted

    def outcome(saboteur):
        try:
            check(op, saboteur)
        except GradientError:
            return "caught"
        return "missed" if saboteur.changed else "unchanged"

    return [
        (target, name, outcome(Saboteur(corrupt, target)))
        for target in range(honest.count)
        for name, corrupt in CORRUPTIONS.items()
    ]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_corrupted_gradient_is_caught(op):
    outcomes = sabotage(op)
    assert len(outcomes) == op.edges * len(CORRUPTIONS)
    assert [case for case in outcomes if case[2] == "missed"] == []
    always = [o for o in outcomes if o[1] in ("scaled", "scaled by a hair", "dropped", "negated")]
    assert {outcome for *_, outcome in always} == {"caught"}


def test_the_saboteur_has_done_its_work():
    """How many corruptions were caught; "unchanged" is an array that the corruption leaves as it was."""
    done = Counter((name, outcome) for op in OPS for _, name, outcome in sabotage(op))
    edges = sum(op.edges for op in OPS)
    assert done["scaled", "caught"] == done["dropped", "caught"] == done["negated", "caught"] == edges
    assert done["scaled by a hair", "caught"] == edges
    assert done["rolled", "caught"] + done["rolled", "unchanged"] == edges
    assert done["transposed", "caught"] + done["transposed", "unchanged"] == edges
    # The constant gradients of sums and means, and those of a single number.
    assert done["rolled", "unchanged"] <= edges / 10
    # Vectors, matrices that are not square, and the same constants.
    assert done["transposed", "unchanged"] <= edges / 3


def test_no_op_escapes_the_saboteur():
    """Every module of the package that imports `record` is one of those in which it is replaced."""
    names = [m.name for m in pkgutil.walk_packages(minilora.__path__, "minilora.") if not m.name.endswith("__main__")]
    modules = [importlib.import_module(name) for name in names]
    assert [m for m in modules if vars(m).get("record") is record] == RECORDERS


# The classic blind spots. Rows of a softmax and of a layer norm have constant sums: under a cotangent of ones the true
# gradient is zero, and a backward that loses exactly what makes the rows interact is not noticed.


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)


def no_gradient(dy, x):
    return (np.zeros_like(x),)


def layer_norm_without_the_mean_term(dy, x):
    return ((dy - layer_norm(x) * (dy * layer_norm(x)).mean(-1, keepdims=True)) / x.std(-1, keepdims=True),)


def layer_norm_vjp(dy, x):
    (without,) = layer_norm_without_the_mean_term(dy, x)
    return (without - dy.mean(-1, keepdims=True) / x.std(-1, keepdims=True),)


def softmax_vjp(dy, x):
    y = softmax(x)
    return (y * (dy - (dy * y).sum(-1, keepdims=True)),)


X = np.random.default_rng(0).normal(size=(3, 5))


@pytest.mark.parametrize("f, right, planted", [
    (softmax, softmax_vjp, no_gradient),
    (layer_norm, layer_norm_vjp, no_gradient),
    (layer_norm, layer_norm_vjp, layer_norm_without_the_mean_term),
], ids=["softmax, backward zero", "layer norm, backward zero", "layer norm, mean term missing"])  # fmt: skip
def test_the_classic_blind_spots_are_seen(f, right, planted):
    assert check_vjp(f, right, X)
    with pytest.raises(GradientError):
        check_vjp(f, planted, X)


@pytest.mark.parametrize("f, planted", [(softmax, no_gradient), (layer_norm, no_gradient)])
def test_a_cotangent_of_ones_would_have_missed_them(f, planted):
    """What `f(x).sum()` in the place of a random cotangent sees: a true gradient of zero, like the planted one."""
    ones_see = lambda x: 1.0 + f(x).sum()  # the 1.0: of a sum that is rounding alone, nothing could be said
    assert check_vjp(ones_see, lambda dy, x: planted(np.ones_like(x), x), X)


def test_one_wrong_output_among_many_is_seen():
    """A corruption of a single element of one VJP, which no norm over the whole gradient would show."""

    def almost(dy, x):
        dx = dy * np.cos(x)
        dx[2, 4] *= 1.0001
        return (dx,)

    with pytest.raises(GradientError, match=r"at input 0\[2, 4\]"):
        check_vjp(np.sin, almost, X)


def test_the_saboteur_itself_is_harmless_when_told_to_do_nothing():
    x = Tensor(X, requires_grad=True)
    harmless = Saboteur(lambda d: d, 0)
    y = harmless(x.data * 2, (x, lambda dy: dy * 2))
    y.backward(X)
    assert not harmless.changed and np.array_equal(x.grad, 2 * X)
    assert functional.record is record  # and nothing stays patched
