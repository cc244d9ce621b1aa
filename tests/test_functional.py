"""Every op of the engine against its formula, its derivative, its dtype and another backend; then bad input."""

import contextlib
import math
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import OPS, draw, like, refuses
from strategies import rngs, sides
from test_lean import plant

from minilora import Tensor, gradcheck, lean, no_grad
from minilora import functional as F
from minilora.backend import get_array_module, to_device, to_numpy
from minilora.stack import pad_and_stack

both_forms = pytest.mark.parametrize("ops", [F, lean], ids=["functional", "lean"])
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
# These compute no new Tensor.
NOT_OPS = {"__init__", "__repr__", "item", "backward", "_operand", "__array_ufunc__", "__array_function__", "__array__",
           "_compare", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__",
           "no_number_is_tiny"}  # fmt: skip


def test_no_op_is_forgotten():
    """Whatever computes a Tensor, in `Tensor`, `functional` or `lean`, is run by some entry of OPS."""
    run = set()
    sys.setprofile(lambda frame, event, argument: run.add(frame.f_code))
    try:
        for op in OPS:
            op.function(*map(Tensor, draw(op, np.random.default_rng(0))))
    finally:
        sys.setprofile(None)
    ops = {name: f for name, f in vars(Tensor).items() if hasattr(f, "__code__") and name not in NOT_OPS}
    for module in (F, lean):
        for name, f in vars(module).items():
            if getattr(f, "__module__", "") == module.__name__ and not name.startswith("_") and name not in NOT_OPS:
                ops[f"{module.__name__}.{name}"] = f
    ops |= {"pad_and_stack": pad_and_stack}
    assert {"__add__", "__rsub__", "__matmul__", "__getitem__", "pad_and_stack"} <= ops.keys()
    assert {"minilora.functional.linear", "minilora.functional.dropout", "minilora.lean.attention"} <= ops.keys()
    assert [name for name, f in ops.items() if f.__code__ not in run] == []


@every_op
@settings(max_examples=4)
@given(rngs, st.tuples(sides, sides, sides))
def test_it_computes_its_formula_and_its_gradient_is_the_derivative(op, rng, dims):
    arrays = draw(op, rng, dims)
    y = op.function(*map(Tensor, arrays)).data
    assert y.shape == np.shape(op.formula(*arrays))
    assert np.allclose(y, op.formula(*arrays), rtol=1e-12, atol=1e-13)
    assert gradcheck(op.function, *arrays).compared == sum(x.size for x in arrays)


def results(op, arrays, xp):
    """The value of `op` and the gradients of its inputs under a random cotangent, as arrays of `xp`."""
    tensors = [Tensor(to_device(x, xp), requires_grad=True) for x in arrays]
    y = op.function(*tensors)
    dy = np.random.default_rng(1).uniform(0.5, 1.5, y.shape).astype(y.dtype)
    y.backward(to_device(dy, xp))
    return [y.data, *(t.grad for t in tensors)]


@every_op
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_and_gradients_keep_the_dtype(op, dtype):
    arrays = [x.astype(dtype) for x in draw(op, np.random.default_rng(2))]
    assert {r.dtype.name for r in results(op, arrays, np)} == {dtype}


@every_op
def test_another_backend_gives_the_same_numbers_and_keeps_them(op, device_xp):
    """A textbook op to the bit on the stand-in, which computes on the host. A GPU sums in another order, and so does a
    lean op on any device."""
    arrays = [x.astype(np.float32) for x in draw(op, np.random.default_rng(3))]
    device, host = results(op, arrays, device_xp), results(op, arrays, np)
    to_the_bit = device_xp.__name__ == "strict_array" and not op.name.startswith("lean ")
    same = np.array_equal if to_the_bit else lambda a, b: np.allclose(a, b, 1e-4, 1e-5)
    for ours, theirs in zip(device, host, strict=True):
        assert type(ours) is device_xp.ndarray and ours.dtype == np.float32
        assert same(to_numpy(ours), theirs)


@every_op
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(op):
    arrays = draw(op, np.random.default_rng(4))
    every = results(op, arrays, np)[1:]
    for frozen in range(len(arrays)):
        tensors = [Tensor(x, requires_grad=i != frozen) for i, x in enumerate(arrays)]
        y = op.function(*tensors)
        assert y.requires_grad == (len(arrays) > 1)
        if y.requires_grad:
            y.backward(np.random.default_rng(1).uniform(0.5, 1.5, y.shape))
        assert tensors[frozen].grad is None
        assert all(np.array_equal(t.grad, g) for t, g in zip(tensors, every, strict=True) if t.requires_grad)


@pytest.mark.parametrize("op", [F.gelu, Tensor.exp, Tensor.tanh, lambda x: x * x / 2, lambda x: -x.sum()],
                         ids=["gelu", "exp", "tanh", "arithmetic", "sum"])  # fmt: skip
@pytest.mark.parametrize("shape", [(), (1,), (0, 3)], ids=str)
def test_ops_without_axes_take_a_single_number_and_an_empty_array(op, shape):
    x = Tensor(np.full(shape, 0.7, np.float32), requires_grad=True)
    y = op(x)
    y.backward(np.ones(y.shape, np.float32))
    assert (x.grad.shape, x.grad.dtype) == (shape, np.float32)


@both_forms
def test_a_loss_and_attention_survive_huge_logits(ops):
    huge = Tensor(np.array([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]], np.float32), requires_grad=True)
    loss = ops.linear_cross_entropy(huge, Tensor(np.eye(3, dtype=np.float32)), [0, 1])
    assert loss.item() == pytest.approx(math.log(3) / 2)
    loss.backward()
    assert np.allclose(huge.grad, [[0, 0, 0], [1 / 6, -1 / 3, 1 / 6]], atol=1e-7)
    ties = Tensor(np.full((1, 4, 1), 1e4, np.float32))  # each query sees several keys that are equally near
    v = Tensor(np.zeros((1, 4, 1), np.float32), requires_grad=True)
    ops.attention(ties, ties, v, 1).backward(np.ones((1, 4, 1), np.float32))
    harmonic = 1 / np.arange(1, 5)
    assert np.allclose(v.grad.ravel(), harmonic[::-1].cumsum()[::-1], rtol=1e-6)
    q = Tensor(np.array([[[1e4], [-1e4]]], np.float32), requires_grad=True)
    y = ops.attention(q, q, Tensor(np.array([[[1.0], [2.0]]], np.float32)), 1)
    assert np.array_equal(y.data, [[[1], [2]]])
    y.backward(np.ones_like(y.data))
    assert not q.grad.any()


@both_forms
@given(rngs, sides, st.integers(2, 5))
def test_attention_does_not_see_the_future(ops, rng, T, C):
    q, k, v = (rng.normal(size=(1, T + 1, C)) for _ in range(3))
    changed_k, changed_v = k.copy(), v.copy()
    changed_k[:, -1] += 5
    changed_v[:, -1] -= 5
    y, changed = (ops.attention(Tensor(q), Tensor(a), Tensor(b), 1).data for a, b in ((k, v), (changed_k, changed_v)))
    assert np.allclose(y[:, :-1], changed[:, :-1], rtol=1e-12) and not np.allclose(y[:, -1], changed[:, -1])


@both_forms
def test_targets_of_minus_100_carry_neither_loss_nor_gradient(ops):
    rng = np.random.default_rng(0)
    x, weight = Tensor(rng.normal(size=(4, 5)), requires_grad=True), Tensor(rng.normal(size=(6, 5)))
    loss = ops.linear_cross_entropy(x, weight, [2, -100, -100, 1])
    assert loss.item() == ops.linear_cross_entropy(x[np.array([0, 3])], weight, [2, 1]).item()
    loss.backward()
    assert not x.grad[1:3].any() and x.grad[[0, 3]].all()


@both_forms
@pytest.mark.parametrize("C", [3, 768])
def test_the_layer_norm_of_a_large_constant_is_its_bias(ops, C):
    w, b = (Tensor(np.full(C, value, np.float32)) for value in (2, 5))
    assert np.array_equal(ops.layer_norm(Tensor(np.full((1, C), 1e4, np.float32)), w, b).data, np.full((1, C), 5))


@both_forms
def test_a_row_without_a_label_is_not_computed(ops):
    x = np.random.default_rng(0).normal(size=(4, 5))
    x[1:3] = np.nan
    x = Tensor(x, requires_grad=True)
    loss = ops.linear_cross_entropy(x, Tensor(np.eye(6, 5)), [2, -100, -100, 1])
    loss.backward()
    assert math.isfinite(loss.item()) and np.isfinite(x.grad).all()


def peak(work):
    """The most bytes of NumPy's arrays that existed at once while `work` ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_neither_all_scores_nor_all_logits_exist_at_once():
    rng = np.random.default_rng(0)
    q, k, v = (Tensor(rng.normal(size=(1, 768, 8)), requires_grad=True) for _ in range(3))
    x, weight = (Tensor(rng.normal(size=(n, 4)), requires_grad=True) for n in (2048, 512))
    targets = rng.integers(0, 512, 2048)
    scores, logits = 8 * 2 * 768 * 768, 8 * 2048 * 512
    assert peak(lambda: lean.attention(q, k, v, 2).sum().backward()) < scores / 2
    assert peak(lambda: lean.linear_cross_entropy(x, weight, targets).backward()) < logits / 2


@pytest.mark.parametrize("wanted", ["neither", "x", "weight", "no graph"])
def test_the_loss_makes_only_the_gradients_that_are_wanted(wanted):
    """Both would be large here, beside which the rest is small."""
    rng = np.random.default_rng(0)
    for rows, V, large in ((4096, 2, "x"), (2, 4096, "weight")):
        x = Tensor(rng.normal(size=(rows, 64)), requires_grad=wanted in ("x", "no graph"))
        weight = Tensor(rng.normal(size=(V, 64)), requires_grad=wanted in ("weight", "no graph"))
        recording = no_grad() if wanted == "no graph" else contextlib.nullcontext()
        with recording:
            bytes_ = peak(lambda: lean.linear_cross_entropy(x, weight, rng.integers(0, V, rows)))
        assert (bytes_ > 8 * 4096 * 64) == (wanted == large)


def test_dropout_keeps_the_mean_and_the_rate_and_is_off_if_and_only_if_there_is_no_generator():
    x = Tensor(np.ones(10_000, np.float32), requires_grad=True)
    y = F.dropout(x, 0.25, np.random.default_rng(0))
    kept = y.data != 0
    assert abs(kept.mean() - 0.75) < 0.02 and set(y.data[kept]) == {np.float32(1 / 0.75)}
    y.backward(np.ones(10_000, np.float32))
    assert np.array_equal(x.grad, y.data)
    with no_grad():
        assert np.array_equal(F.dropout(x, 0.25, np.random.default_rng(0)).data, y.data)
    assert F.dropout(x, 0.25, None) is x and F.dropout(x, 0.0, np.random.default_rng(0)) is x


RATES = [0.3, np.array([0.0, 0.1, 0.9]).reshape(3, 1)]


def dropped(x, p):
    """(the value, the gradient) of a dropout of x, on the host."""
    x = Tensor(x, requires_grad=True)
    y = F.dropout(x, p, np.random.default_rng(5))
    y.backward(get_array_module(x.data).ones(x.shape, x.dtype))
    assert y.dtype == x.grad.dtype == x.dtype
    return to_numpy(y.data), to_numpy(x.grad)


def check_one_mask(xp, p):
    """One seed drops the same to the bit, in both dtypes and on both backends."""
    x = np.random.default_rng(0).standard_normal((3, 1001))
    kept = {}
    for dtype in ("float32", "float64"):
        numpys = dropped(x.astype(dtype), p)
        ours = dropped(to_device(x.astype(dtype), xp), p)
        assert all(np.array_equal(a, b) for a, b in zip(ours, numpys, strict=True))
        kept[dtype] = ours[0] != 0
        assert np.array_equal(kept[dtype], ours[1] != 0)
    assert np.array_equal(kept["float32"], kept["float64"])
    assert np.all(abs(kept["float32"].mean(-1) - (1 - np.ravel(p))) < 0.06)


@pytest.mark.parametrize("p", RATES, ids=["one rate", "a rate each"])
def test_one_seed_drops_the_same_on_every_backend_and_in_both_dtypes(p, xp):
    check_one_mask(xp, p)


DROPOUT_BUGS = {  # what is wrong: (a line of dropout, the line with the bug)
    "drawn in the dtype of x": ("random(x.shape, np.float32)", "random(x.shape, x.dtype)"),
    "too many are dropped": ("drawn >= ", "drawn / 2 >= "),
    "the gradient of another mask": ("(x, drop)", "(x, lambda dy: drop(dy[..., ::-1])[..., ::-1])"),
}


@pytest.mark.parametrize("bug", DROPOUT_BUGS)
def test_each_bug_planted_in_the_masks_is_found(bug, monkeypatch):
    plant(monkeypatch, F.dropout, *DROPOUT_BUGS[bug])
    with pytest.raises(AssertionError):
        check_one_mask(np, RATES[0])


def test_equal_rates_drop_what_one_rate_drops():
    x = np.random.default_rng(0).standard_normal((3, 1001)).astype("float32")
    for one, each in zip(dropped(x, 0.1), dropped(x, np.full((3, 1), 0.1)), strict=True):
        assert np.array_equal(one, each)


def test_a_mask_moves_once_as_a_byte_for_each_number(xp, monkeypatch):
    moved = []
    monkeypatch.setattr(F, "to_device", lambda a, xp: moved.append(a.nbytes) or to_device(a, xp))
    dropped(xp.ones((2, 1001), "float32"), 0.3)
    assert moved == [2 * 1001]


def T(*shape, dtype=np.float64):
    return Tensor(np.full(shape, 0.5, dtype))


f32 = np.float32


def refused(ops):
    attention, loss, layer_norm = ops.attention, ops.linear_cross_entropy, ops.layer_norm
    return {  # what is wrong: (call, exception, what the message must show)
        "linear, in differs": (lambda: F.linear(T(2, 3), T(4, 5)), ValueError, ["(2, 3)", "(4, 5)"]),
        "linear, 0-d x": (lambda: F.linear(T(), T(4, 5)), ValueError, ["()", "(4, 5)"]),
        "linear, batch differs": (lambda: F.linear(T(2, 3, 4), T(5, 6, 4)), ValueError, ["(2, 3, 4)", "(5, 6, 4)"]),
        "linear, weight of one axis": (lambda: F.linear(T(2, 3), T(3)), ValueError, ["(2, 3)", "(3,)"]),
        "linear, bias too long": (lambda: F.linear(T(2, 3), T(4, 3), T(5)), ValueError, ["(4, 3)", "(5,)"]),
        "linear, bias of one number": (lambda: F.linear(T(2, 3), T(4, 3), T(1)), ValueError, ["(4, 3)", "(1,)"]),
        "linear, bias per row": (lambda: F.linear(T(2, 3), T(4, 3), T(2, 1)), ValueError, ["(4, 3)", "(2, 1)"]),
        "linear, dtypes": (lambda: F.linear(T(2, 3), T(4, 3, dtype=f32)), TypeError, ["float32", "float64"]),
        "embedding, id too large": (lambda: F.embedding(T(4, 3), [0, 4]), ValueError, ["0 .. 4", "0 .. 3"]),
        "embedding, id negative": (lambda: F.embedding(T(4, 3), [-1]), ValueError, ["-1", "0 .. 3"]),
        "embedding, float ids": (lambda: F.embedding(T(4, 3), [0.0]), TypeError, ["integers", "float64"]),
        "layer_norm, weight": (lambda: layer_norm(T(2, 3), T(4), T(3)), ValueError, ["(2, 3)", "(4,)"]),
        "layer_norm, bias": (lambda: layer_norm(T(2, 3), T(3), T(2, 3)), ValueError, ["(2, 3)", "(3,)"]),
        "layer_norm, dtypes": (lambda: layer_norm(T(3), T(3), T(3, dtype=f32)), TypeError, ["float32", "float64"]),
        "rotary, dtypes": (lambda: F.rotary(T(1, 2, 4, dtype=f32), np.ones((2, 1)), np.ones((2, 1)), 2), TypeError,
                           ["float32", "float64"]),
        "rotary, too few positions": (lambda: F.rotary(T(1, 3, 4), np.ones((2, 1)), np.ones((2, 1)), 2), ValueError,
                                      ["(1, 3, 4)", "(2, 1)"]),
        "rotary, one position for all": (lambda: F.rotary(T(1, 3, 4), np.ones((1, 1)), np.ones((1, 1)), 2), ValueError,
                                         ["(1, 3, 4)", "(1, 1)"]),
        "rotary, odd heads": (lambda: F.rotary(T(1, 2, 6), np.ones((2, 1)), np.ones((2, 1)), 2),
                              ValueError, ["(1, 2, 6)"]),
        "attention, channels differ": (lambda: attention(T(1, 2, 4), T(1, 2, 6), T(1, 2, 6), 2), ValueError,
                                       ["(1, 2, 4)", "(1, 2, 6)"]),
        "attention, keys and values": (lambda: attention(T(1, 2, 4), T(1, 2, 4), T(1, 3, 4), 2), ValueError,
                                       ["(1, 2, 4)", "(1, 3, 4)"]),
        "attention, fewer keys": (lambda: attention(T(1, 3, 4), T(1, 2, 4), T(1, 2, 4), 2), ValueError,
                                  ["(1, 3, 4)", "(1, 2, 4)"]),
        "attention, heads": (lambda: attention(T(1, 2, 4), T(1, 2, 4), T(1, 2, 4), 3), ValueError, ["(1, 2, 4)", "3"]),
        "attention, no batch axis": (lambda: attention(T(2, 4), T(2, 4), T(2, 4), 2), ValueError, ["(2, 4)"]),
        "attention, no heads": (lambda: attention(T(1, 2, 4), T(1, 2, 4), T(1, 2, 4), 0),
                                ValueError, ["(1, 2, 4)", "0"]),
        "attention, dtypes": (lambda: attention(T(1, 2, 4), T(1, 2, 4, dtype=f32), T(1, 2, 4), 2), TypeError,
                              ["float32", "float64"]),
        "loss, target too large": (lambda: loss(T(2, 4), T(3, 4), [0, 3]), ValueError, ["0 .. 3", "0 .. 2"]),
        "loss, target negative": (lambda: loss(T(2, 4), T(3, 4), [0, -1]), ValueError, ["-1", "0 .. 2"]),
        "loss, too few targets": (lambda: loss(T(2, 4), T(3, 4), [0]), ValueError, ["(1,)", "(2,)"]),
        "loss, channels": (lambda: loss(T(2, 4), T(3, 5), [0, 1]), ValueError, ["(2, 4)", "(3, 5)"]),
        "loss, a weight each": (lambda: loss(T(2, 4), T(2, 3, 4), [0, 1]), ValueError, ["(2, 4)", "(2, 3, 4)"]),
        "loss, of one number": (lambda: loss(T(), T(3, 4), 1), ValueError, ["()", "(3, 4)"]),
        "loss, dtypes": (lambda: loss(T(2, 4), T(3, 4, dtype=f32), [0, 1]), TypeError, ["float32", "float64"]),
        "loss, nothing to learn": (lambda: loss(T(2, 4), T(3, 4), [-100, -100]), ValueError, ["none of 2"]),
        "loss, empty": (lambda: loss(T(0, 4), T(3, 4), np.zeros(0, int)), ValueError, ["none of 0"]),
        "loss, float targets": (lambda: loss(T(2, 4), T(3, 4), [0.0, 1.0]), TypeError, ["integers", "float64"]),
        "dropout, p of one": (lambda: F.dropout(T(2), 1.0, np.random.default_rng(0)), ValueError, ["[0, 1)", "1.0"]),
        "dropout, p negative": (lambda: F.dropout(T(2), -0.1, np.random.default_rng(0)),
                                ValueError, ["[0, 1)", "-0.1"]),
        "dropout, p not a number": (lambda: F.dropout(T(2), math.nan, np.random.default_rng(0)), ValueError, ["nan"]),
    }  # fmt: skip


OF_LEAN = ("attention", "loss", "layer_norm")
LEAN = {f"lean {name}": case for name, case in refused(lean).items() if name.startswith(OF_LEAN)}
REFUSED = {**refused(F), **LEAN}


@pytest.mark.parametrize("wrong", REFUSED)
def test_bad_input_is_refused_with_both_sides_shown(wrong):
    refuses(*REFUSED[wrong])


# `attach` has compared what pad_and_stack is given.
MIXABLE = [op for op in OPS if len(op.shapes(2, 2, 2)) > 1 and op.name != "pad_and_stack"]


@pytest.mark.parametrize("op", MIXABLE, ids=lambda op: op.name)
def test_inputs_on_two_backends_are_refused_by_name(op, device_xp):
    first, *rest = (Tensor(x) for x in draw(op, np.random.default_rng(5)))
    with pytest.raises(TypeError, match=f"{device_xp.__name__} and numpy|numpy and {device_xp.__name__}"):
        op.function(Tensor(to_device(first.data, device_xp)), *rest)


@pytest.mark.parametrize("call", [lambda w, ids: F.embedding(w, ids), lambda w, ids: F.linear_cross_entropy(w, w, ids),
                                  lambda w, ids: lean.linear_cross_entropy(w, w, ids)],
                         ids=["embedding", "linear_cross_entropy", "lean linear_cross_entropy"])  # fmt: skip
def test_ids_may_be_on_the_host_or_on_the_device(call, xp):
    w = Tensor(to_device(np.eye(3, dtype=np.float32), xp), requires_grad=True)
    y = call(w, np.array([2, 0, 2]))
    assert get_array_module(y.data) is xp
    assert np.array_equal(to_numpy(call(w, like(w, np.array([2, 0, 2]))).data), to_numpy(y.data))
